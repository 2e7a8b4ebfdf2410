// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/tiling.h"

namespace vidgen {

// Element by element, so rows of any length go in pieces of `columns`. Also of gated_residual_backward.
struct GatedResidualTiling {
  RowSplit split;
  uint32_t channels, columns;
  uint32_t gate_stride;  // elements from one sample's gate to the next
};

// Unified buffer: x, y and the result twice and the gate in their own type; all but the result in float.
VIDGEN_BOTH constexpr uint32_t gated_residual_bytes(uint32_t columns, Float type) {
  return lanes(columns) * (7 * size_of(type) + 3 * 4);
}
// The gradient keeps two float rows more: the sum over tokens, and its way out.
VIDGEN_BOTH constexpr uint32_t gated_residual_backward_bytes(uint32_t columns, Float type) {
  return lanes(columns) * (7 * size_of(type) + 5 * 4);
}

inline void tile(GatedResidualTiling& t, Float type, bool backward, uint32_t samples, uint32_t rows, uint32_t channels,
                 uint32_t cores, uint32_t ub_bytes = UB_BYTES) {
  const uint32_t piece = backward ? gated_residual_backward_bytes(16, type) : gated_residual_bytes(16, type);
  const uint32_t most = ub_bytes / piece * 16;
  t.split = split_rows(samples, rows, cores, backward ? MOST_SUMMED : rows);
  t.channels = channels, t.columns = lanes(channels) < most ? lanes(channels) : most;
}

}  // namespace vidgen
