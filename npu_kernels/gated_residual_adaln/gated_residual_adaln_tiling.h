// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/norm_tiling.h"

namespace vidgen {

struct GatedResidualAdalnTiling {
  RowSplit split;
  uint32_t channels, buffers;
  uint32_t gate_stride, shift_stride, scale_stride;  // elements from one sample's modulation to the next
  float eps;
};

// Unified buffer: two rows in and two out, `buffers` times, and one of parameters; in float h, y, gate, gain, offset.
VIDGEN_BOTH constexpr uint32_t gated_residual_adaln_bytes(uint32_t channels, Float type, uint32_t buffers) {
  return lanes(channels) * ((4 * buffers + 1) * size_of(type) + 5 * 4) + norm_bytes(channels);
}

inline bool tile(GatedResidualAdalnTiling& t, Float type, uint32_t samples, uint32_t rows, uint32_t channels,
                 uint32_t cores, uint32_t ub_bytes = UB_BYTES) {
  t.split = split_rows(samples, rows, cores);
  t.channels = channels;
  for (t.buffers = 2; t.buffers > 0; --t.buffers) {
    if (gated_residual_adaln_bytes(channels, type, t.buffers) <= ub_bytes) return true;
  }
  return false;
}

}  // namespace vidgen
