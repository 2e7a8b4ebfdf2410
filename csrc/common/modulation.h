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

// out = normalise(x) * (1 + scale) + shift, from the sum of x; weight and bias are null where the norm has none. out
// may be x.
template <typename T>
void modulate_row(T* out, const T* x, float x_sum, const T* shift, const T* scale, const T* weight, const T* bias,
                  int64_t channels, float eps) {
  const Moments moments = row_moments(x, x_sum, channels, eps);
  const Vec mean(moments.mean), rstd(moments.rstd), one(1.0f);
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    Pack y = (load_pack(x + c, count) - mean) * rstd;
    if (weight) y = y * load_pack(weight + c, count);
    if (bias) y = y + load_pack(bias + c, count);
    store_pack(out + c, fmadd(y, load_pack(scale + c, count) + one, load_pack(shift + c, count)), count);
  });
}

// x + gate * y, rounded twice as eager PyTorch in float32 does: a norm that follows would magnify any difference.
template <typename T, typename Count>
C10_ALWAYS_INLINE Pack gated(const T* x, const T* gate, const T* y, Count count) {
  return load_pack(x, count) + load_pack(gate, count) * load_pack(y, count);
}

// Asks for the cache lines of a pack ahead of their use; past the end of memory it does nothing.
template <bool for_writing, typename T>
C10_ALWAYS_INLINE void prefetch_pack(const T* at) {
  for (int64_t c = 0; c < kWidth; c += 64 / sizeof(T)) __builtin_prefetch(at + c, for_writing);
}

// out = x + gate * y. out may be x or y.
template <typename T>
void gate_row(T* out, const T* x, const T* gate, const T* y, int64_t channels) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    prefetch_pack<false>(x + c + kAhead);
    prefetch_pack<false>(y + c + kAhead);
    prefetch_pack<true>(out + c + kAhead);
    store_pack(out + c, gated(x + c, gate + c, y + c, count), count);
  });
}

// The same, and the sum of what was written, as row_sum has it. out may be x or y.
template <typename T>
float gate_row_sum(T* out, const T* x, const T* gate, const T* y, int64_t channels) {
  if (channels % kWidth != 0) {
    each_pack(channels, [&](int64_t c, auto count)
                            VIDGEN_INLINE { store_pack(out + c, gated(x + c, gate + c, y + c, count), count); });
    return row_sum(out, channels);
  }
  Pack total = splat(0);
  for (int64_t c = 0; c < channels; c += kWidth) {
    total = total + store_rounded(out + c, gated(x + c, gate + c, y + c, Whole{}));
  }
  return sum(total);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
