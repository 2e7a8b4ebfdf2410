// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/tiling.h"

namespace vidgen {

enum class Norm : uint32_t { none, rms, layer };

constexpr uint32_t MAX_SECTIONS = 4;

// Also of qk_norm_rope_backward. All heads of a token have the same angles, so a token is a unit of work, and its heads
// are the rows of a tile: `tile_heads` of them at a time, where they are too many for one.
struct QkNormRopeTiling {
  RowSplit split;  // over tokens; of the forward, padded ones
  uint32_t tokens, heads, head_dim, tile_heads;
  uint64_t batch_stride;  // of the input, in elements
  uint32_t token_stride;
  uint32_t sparse_n, padded;  // group layout of the output, or of the incoming gradient
  Norm norm;
  uint32_t rotates, interleaved;
  uint32_t sections[MAX_SECTIONS];  // where not interleaved: widths in each of which the halves are pairs; the rest 0
  uint32_t table_stride;            // elements from one sample's angles to the next; 0: all have the same
  float eps;
};

VIDGEN_BOTH constexpr uint32_t pitch(const QkNormRopeTiling& t) { return lanes(t.head_dim); }

// Row of token `t` in the group layout: runs of sparse_n tokens are dealt to the groups in turn.
VIDGEN_BOTH uint32_t group_row(const QkNormRopeTiling& t, uint32_t token) {
  const uint32_t k = t.sparse_n;
  return token / k % k * (t.padded / k) + token / (k * k) * k + token % k;
}

// Unified buffer for rows of `row` lanes, `heads` of them (a multiple of 8). Of both: sums, broadcast blocks, the
// token's angles twice as they come, and a few single rows. Forward: in and out twice, and x, its partner, the offsets.
// Backward: two in and one out twice, and x, gradient, scratch, two sums, the offsets.
VIDGEN_BOTH constexpr uint32_t qk_norm_rope_bytes(uint32_t heads, uint32_t row, Float type, bool backward) {
  return heads * row * ((backward ? 6 : 4) * size_of(type) + (backward ? 6 : 3) * 4) + heads * (3 + 2 * 8) * 4 +
         row * (2 * 2 * 4 + 6 * 4 + size_of(type) + (backward ? 4 : 0));
}

constexpr uint32_t MOST_HEADS = 248,
                   MOST_LANES = 2032;  // repeats of an instruction, and blocks between them, are 8 bits

// Fills the split and tile_heads; the other fields are given. False where not even 8 heads fit.
inline bool tile(QkNormRopeTiling& t, Float type, bool backward, uint32_t batch, uint32_t cores,
                 uint32_t ub_bytes = UB_BYTES) {
  t.split = backward ? split_rows(batch, t.tokens, cores, MOST_SUMMED) : split_rows(batch, t.padded, cores);
  t.tile_heads = round_up(t.heads, 8) < MOST_HEADS ? round_up(t.heads, 8) : MOST_HEADS;
  while (t.tile_heads > 0 && qk_norm_rope_bytes(t.tile_heads, pitch(t), type, backward) > ub_bytes) t.tile_heads -= 8;
  return t.tile_heads > 0 && pitch(t) <= MOST_LANES;
}

}  // namespace vidgen
