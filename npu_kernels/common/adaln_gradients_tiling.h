// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/norm_tiling.h"

namespace vidgen {

// Of adaln_modulate_backward, and with a gate of gated_residual_adaln_backward.
struct AdalnBackwardTiling {
  RowSplit split;
  uint32_t channels, buffers;
  uint32_t gate_stride, scale_stride;  // elements from one sample's modulation to the next
  float eps;
};

// Unified buffer: rows in and out in their own type, `buffers` times (grad, x, grad_x; with a gate also grad_h and
// y in turn, and grad_y), and one of parameters; in float the six rows of AdalnGradients and one on its way out, with a
// gate two more.
VIDGEN_BOTH constexpr uint32_t adaln_backward_bytes(uint32_t channels, Float type, bool gated, uint32_t buffers) {
  return lanes(channels) * (((gated ? 5 : 3) * buffers + 1) * size_of(type) + (gated ? 9 : 7) * 4) +
         norm_bytes(channels);
}

inline bool tile(AdalnBackwardTiling& t, Float type, bool gated, uint32_t samples, uint32_t rows, uint32_t channels,
                 uint32_t cores, uint32_t ub_bytes = UB_BYTES) {
  t.split = split_rows(samples, rows, cores, MOST_SUMMED);
  t.channels = channels;
  for (t.buffers = 2; t.buffers > 0; --t.buffers) {
    if (adaln_backward_bytes(channels, type, gated, t.buffers) <= ub_bytes) return true;
  }
  return false;
}

}  // namespace vidgen
