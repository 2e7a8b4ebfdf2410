// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/tiling.h"

namespace vidgen {

// (outer, parts, width) to (outer, width), in pieces of `columns` of one outer row.
struct SumPartialsTiling {
  uint32_t outer, parts, width, columns;
};

// Unified buffer: two rows of partial sums on their way in, one output; the sum, that of a
// group, and the next addend.
VIDGEN_BOTH constexpr uint32_t sum_partials_bytes(uint32_t columns, Float type) {
  return lanes(columns) * (2 * 4 + size_of(type) + 3 * 4);
}

inline void tile(SumPartialsTiling& t, Float type, uint32_t outer, uint32_t parts, uint32_t width, uint32_t cores,
                 uint32_t ub_bytes = UB_BYTES) {
  t = {outer, parts, width, 0};
  // One piece per core if that leaves whole blocks, and no more than fit.
  const uint32_t wanted = lanes(ceil_div(width, ceil_div(cores, outer < cores ? outer : cores)));
  const uint32_t most = ub_bytes / sum_partials_bytes(16, type) * 16;
  t.columns = wanted < most ? wanted : most;
}

}  // namespace vidgen
