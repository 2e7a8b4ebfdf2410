// SPDX-License-Identifier: Apache-2.0
// Which two channels of a head a rotary embedding rotates together: the styles of vidgen/ops/rope_3d.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

namespace vidgen {

// Pairs (a+i, b+i), i < count, whose angles begin at `pair` of the table.
struct Run {
  int64_t a, b, pair, count;
};

// Runs are cut to eight: halves of sections are short (8, 12, 16, 24 pairs) and start anywhere, so that full vectors
// would be half empty and cross cache lines. The last eight of a half overlap those before.
constexpr int64_t kEight = 8;

struct Pairs {
  bool interleaved = false;  // channels 2j and 2j+1
  std::vector<Run> runs;     // otherwise
};

inline void add_section(Pairs& pairs, int64_t begin, int64_t half) {
  for (int64_t j = 0; j < half; j += kEight) {
    const int64_t at = half < kEight ? 0 : std::min(j, half - kEight);
    pairs.runs.push_back({begin + at, begin + half + at, begin / 2 + at, std::min(half, kEight)});
  }
}

// Refuses what would read or write outside of a head of `dim` channels.
inline Pairs make_pairs(std::string_view style, at::OptionalIntArrayRef sections, int64_t dim) {
  Pairs pairs;
  TORCH_CHECK(dim % 2 == 0, "rope: head_dim must be even, got ", dim);
  if (style == "interleaved") {
    pairs.interleaved = true;
  } else if (style == "half") {
    add_section(pairs, 0, dim / 2);
  } else {
    TORCH_CHECK(style == "half_per_axis" && sections, "rope: style must be known, and sections given per axis");
    int64_t total = 0;
    for (const auto d : *sections) {
      TORCH_CHECK(d >= 0 && d % 2 == 0, "rope: sections must be even, got ", *sections);
      add_section(pairs, total, d / 2);
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
