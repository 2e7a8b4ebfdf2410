// SPDX-License-Identifier: Apache-2.0
// Sums down the columns of a block of rows, in the lanes of T's packs. For kernel sources only.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "common/blocks.h"
#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// Rows of float32 scratch with room for whole packs: the first `sums` are sums, the others are the caller's. Long
// chains of additions lose digits, so callers say after each row that it is done, and sums move on to others once in a
// while.
template <typename T>
class Columns {
 public:
  Columns(int64_t sums, int64_t others, int64_t channels)
      : channels_(channels),
        padded_((channels + kWidth - 1) / kWidth * kWidth),
        totals_(sums * padded_),
        data_((sums + others) * padded_) {}

  float* row(int64_t i) { return data_.data() + i * padded_; }

  void end_row() {
    if (++rows_ % kChain == 0) settle();
  }

  // As one block of each sum in (sums, batch, blocks, channels), in the order of channels.
  void write(const at::Tensor& sums, int64_t b, int64_t block) {
    settle();
    for (int64_t i = 0; i < sums.size(0); ++i) {
      float* total = totals_.data() + i * padded_;
      for (int64_t c = 0; c < padded_; c += kWidth) store_ordered<T>(total + c, load_pack(total + c));
      const int64_t at = (i * sums.size(1) + b) * sums.size(2) + block;
      std::copy_n(total, channels_, sums.mutable_data_ptr<float>() + at * channels_);
    }
  }

 private:
  static constexpr int64_t kChain = 16;

  void settle() {
    for (size_t c = 0; c < totals_.size(); c += kWidth)
      store_pack(&totals_[c], load_pack(&totals_[c]) + load_pack(&data_[c]));
    std::fill_n(data_.data(), totals_.size(), 0.0f);
  }

  int64_t channels_, padded_, rows_ = 0;
  std::vector<float> totals_, data_;
};

// Adds a pack to one of a row of float32 scratch.
C10_ALWAYS_INLINE void add_to(float* row, const Pack& x) { store_pack(row, load_pack(row) + x); }

// Calls f(sample, block, first token, past the last one) for every block of tokens.
template <typename F>
void each_block(int64_t batch, int64_t tokens, int64_t size, F f) {
  const int64_t blocks = blocks_of(tokens, size);
  at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * size;
      f(i / blocks, i % blocks, first, std::min(first + size, tokens));
    }
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
