// SPDX-License-Identifier: Apache-2.0
// The parameters of adaptive conditioning and of the norm, made into one gain and one offset per channel.
#pragma once
#include "common/rows.h"

namespace vidgen {

struct Modulation {
  GM_ADDR shift;  // a row per sample
  GM_ADDR scale;
  GM_ADDR weight;  // of the norm; null: 1
  GM_ADDR bias;    // of the norm; null: 0
  uint32_t shift_stride, scale_stride;
};

// gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift, for one sample.
template <typename T>
__aicore__ inline void read_modulation(Parameters<T>& parameters, const LocalTensor<float>& gain,
                                       const LocalTensor<float>& offset, const LocalTensor<float>& scratch,
                                       const Modulation& from, uint32_t sample, uint32_t n) {
  parameters.read(gain, from.scale, uint64_t(sample) * from.scale_stride, n);
  Adds(gain, gain, 1.0f, n);
  parameters.read(offset, from.shift, uint64_t(sample) * from.shift_stride, n);
  if (from.bias != nullptr) {
    parameters.read(scratch, from.bias, 0, n);
    Mul(scratch, scratch, gain, n);
    fence();
    Add(offset, offset, scratch, n);
    fence();
  }
  if (from.weight != nullptr) {
    parameters.read(scratch, from.weight, 0, n);
    Mul(gain, gain, scratch, n);
    fence();
  }
}

}  // namespace vidgen
