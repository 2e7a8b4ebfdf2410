// SPDX-License-Identifier: Apache-2.0
// Which two channels of a head a rotary embedding rotates together: the styles of vidgen/ops/rope_3d.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace vidgen {

struct Pairs {
  bool interleaved = false;     // channels 2j and 2j+1
  std::vector<int64_t> halves;  // otherwise: sections of 2h channels in which j and j+h are a pair, h each
};

// Refuses what would read or write outside of a head of `dim` channels.
inline Pairs make_pairs(std::string_view style, at::OptionalIntArrayRef sections, int64_t dim) {
  Pairs pairs;
  TORCH_CHECK(dim % 2 == 0, "rope: head_dim must be even, got ", dim);
  if (style == "interleaved") {
    pairs.interleaved = true;
  } else if (style == "half") {
    pairs.halves = {dim / 2};
  } else {
    TORCH_CHECK(style == "half_per_axis" && sections, "rope: style must be known, and sections given per axis");
    int64_t total = 0;
    for (const auto d : *sections) {
      TORCH_CHECK(d >= 0 && d % 2 == 0, "rope: sections must be even, got ", *sections);
      pairs.halves.push_back(d / 2);
      total += d;
    }
    TORCH_CHECK(total == dim, "rope: sections must add up to head_dim ", dim, ", got ", *sections);
  }
  return pairs;
}

// cos and sin must be float32 (sequence, dim / 2) or (batch, sequence, dim / 2).
inline void check_tables(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  for (const auto& t : {cos, sin}) {
    TORCH_CHECK(t.scalar_type() == at::kFloat && (t.dim() == 2 || (t.dim() == 3 && t.size(0) == x.size(0))) &&
                    t.size(-2) == x.size(1) && t.size(-1) == x.size(3) / 2,
                "rope: tables must be float32 and fit x ", x.sizes(), ", got ", t.sizes());
  }
}

}  // namespace vidgen
