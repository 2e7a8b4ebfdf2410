// SPDX-License-Identifier: Apache-2.0
// Rows of parameters, and those of adaptive conditioning made into one gain and one offset per channel.
#pragma once
#include "common/vector.h"

namespace vidgen {

struct Modulation {
  GM_ADDR shift;  // rows of (1, channels) for every sample
  GM_ADDR scale;
  GM_ADDR weight;  // of the norm; null: 1
  GM_ADDR bias;    // of the norm; null: 0
  uint32_t shift_stride, scale_stride;
};

// Reads through a queue of one tensor: parameters change once per sample, not per row.
template <typename T>
class ParameterRows {
 public:
  __aicore__ inline void init(TPipe& pipe, uint32_t channels) {
    channels_ = channels;
    pipe.InitBuffer(queue_, 1, lanes(channels) * sizeof(T));
  }

  // Row `index` of `from`, where rows are `stride` elements apart, as float.
  __aicore__ inline void read(const LocalTensor<float>& to, GM_ADDR from, uint32_t index, uint32_t stride) {
    const uint64_t at = uint64_t(index) * stride;
    auto row = queue_.template AllocTensor<T>();
    load(row, global<T>(from, at + channels_)[at], channels_);
    queue_.EnQue(row);
    row = queue_.template DeQue<T>();
    widen(to, row, channels_);
    fence();
    queue_.FreeTensor(row);
  }

  // gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift, for one sample.
  __aicore__ inline void read(const LocalTensor<float>& gain, const LocalTensor<float>& offset,
                              const LocalTensor<float>& scratch, const Modulation& from, uint32_t sample) {
    read(gain, from.scale, sample, from.scale_stride);
    Adds(gain, gain, 1.0f, channels_);
    read(offset, from.shift, sample, from.shift_stride);
    if (from.bias != nullptr) {
      read(scratch, from.bias, 0, 0);
      Mul(scratch, scratch, gain, channels_);
      fence();
      Add(offset, offset, scratch, channels_);
      fence();
    }
    if (from.weight != nullptr) {
      read(scratch, from.weight, 0, 0);
      Mul(gain, gain, scratch, channels_);
      fence();
    }
  }

 private:
  uint32_t channels_;
  TQue<TPosition::VECIN, 1> queue_;
};

}  // namespace vidgen
