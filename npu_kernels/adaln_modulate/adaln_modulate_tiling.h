// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/norm_tiling.h"

namespace vidgen {

struct AdalnModulateTiling {
  RowSplit split;
  uint32_t channels, buffers;
  uint32_t shift_stride, scale_stride;  // elements from one sample's modulation to the next
  float eps;
};

// Unified buffer: `buffers` rows each way and one of modulation in their own type; x, scratch, gain, offset in float.
VIDGEN_BOTH constexpr uint32_t adaln_modulate_bytes(uint32_t channels, Float type, uint32_t buffers) {
  return lanes(channels) * ((2 * buffers + 1) * size_of(type) + 4 * 4) + norm_bytes(channels);
}

// False where a row does not fit. Two buffers let copies run beside the arithmetic; one is for rows that are too long.
inline bool tile(AdalnModulateTiling& t, Float type, uint32_t samples, uint32_t rows, uint32_t channels, uint32_t cores,
                 uint32_t ub_bytes = UB_BYTES) {
  t.split = split_rows(samples, rows, cores);
  t.channels = channels;
  for (t.buffers = 2; t.buffers > 0; --t.buffers) {
    if (adaln_modulate_bytes(channels, type, t.buffers) <= ub_bytes) return true;
  }
  return false;
}

}  // namespace vidgen
