// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/tiling.h"

namespace vidgen {

// What RowNorm takes of the unified buffer: its sums and broadcast blocks, and one partial sum per 64 channels.
VIDGEN_BOTH constexpr uint32_t norm_bytes(uint32_t channels) {
  return 4 * (2 * 8 + 2 * 64 + round_up(ceil_div(channels, 64), 8));
}

}  // namespace vidgen
