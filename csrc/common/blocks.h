// SPDX-License-Identifier: Apache-2.0
// Sums over tokens or positions are taken in blocks of a fixed size and merged in order: they do not depend on the
// number of threads. Kernels fill (sums, batch, blocks, channels) in float32, hosts add up the blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vidgen {

constexpr int64_t kBlockTokens = 64;

// Where a block is read more than once it should stay in the nearest cache.
constexpr int64_t kBlockElements = 8192;

inline int64_t rows_per_block(int64_t channels) { return std::max<int64_t>(1, kBlockElements / channels); }

inline int64_t blocks_of(int64_t tokens, int64_t size = kBlockTokens) { return (tokens + size - 1) / size; }

}  // namespace vidgen
