// SPDX-License-Identifier: Apache-2.0
// What the kernels of adaptive conditioning do to one token, and the loop over tokens. For kernel sources only.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "common/moments.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// Rows of (batch, sequence, channels), or of (batch, channels), which all tokens of a sample share.
template <typename T>
struct Tokens {
  T* base;
  int64_t sample, token;

  T* at(int64_t b, int64_t l) const { return base + b * sample + l * token; }
};

template <typename T>
Tokens<const T> read_tokens(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.dim() == 3 ? t.stride(1) : 0};
}

template <typename T>
Tokens<T> write_tokens(const at::Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.stride(0), t.dim() == 3 ? t.stride(1) : 0};
}

// Calls f(sample, token) for every token of x.
template <typename F>
void each_token(const at::Tensor& x, F f) {
  const int64_t sequence = x.size(1), row_bytes = x.size(2) * x.element_size();
  at::parallel_for(0, x.size(0) * sequence, std::max<int64_t>(1, 32768 / row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row / sequence, row % sequence);
  });
}

// out = normalise(x) * (1 + scale) + shift; weight and bias are null where the norm has none. out may be x.
template <typename T>
void modulate_row(T* out, const T* x, const T* shift, const T* scale, const T* weight, const T* bias, int64_t channels,
                  float eps) {
  const Moments moments = row_moments(x, channels, eps);
  const Vec mean(moments.mean), rstd(moments.rstd), one(1.0f);
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    Pack y = (load_pack(x + c, count) - mean) * rstd;
    if (weight) y = y * load_pack(weight + c, count);
    if (bias) y = y + load_pack(bias + c, count);
    store_pack(out + c, fmadd(y, load_pack(scale + c, count) + one, load_pack(shift + c, count)), count);
  });
}

// out = x + gate * y. out may be x or y.
template <typename T>
void gate_row(T* out, const T* x, const T* gate, const T* y, int64_t channels) {
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    store_pack(out + c, fmadd(load_pack(gate + c, count), load_pack(y + c, count), load_pack(x + c, count)), count);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
