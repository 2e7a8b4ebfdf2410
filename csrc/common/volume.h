// SPDX-License-Identifier: Apache-2.0
// (batch, channels, *spatial) in either memory format, as (batch, channels, positions) or (batch, positions, channels).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/checks.h"

namespace vidgen {

// The rule of vidgen/ops/_norm_silu.py for the memory format of results.
inline bool is_channels_last(const at::Tensor& x) {
  if (x.is_contiguous()) return false;
  return (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// A result for x, in the format that the rule gives it.
inline at::Tensor new_volume(const at::Tensor& x) {
  if (!is_channels_last(x)) return new_output(x.sizes(), x.options());
  std::vector<int64_t> sizes{x.size(0)};
  sizes.insert(sizes.end(), x.sizes().begin() + 2, x.sizes().end());
  sizes.push_back(x.size(1));
  return new_output(sizes, x.options()).movedim(-1, 1);
}

// Contiguous and of rank 3: a view where t has the format asked for, else of a copy.
inline at::Tensor flat_volume(const at::Tensor& t, bool channels_last) {
  if (channels_last) return t.movedim(1, -1).contiguous().view({t.size(0), -1, t.size(1)});
  return t.contiguous().view({t.size(0), t.size(1), -1});
}

}  // namespace vidgen
