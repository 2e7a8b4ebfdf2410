// SPDX-License-Identifier: Apache-2.0
// Gradients of the modulated LayerNorm, of one token. For kernel sources only.
#pragma once

#include "common/columns.h"
#include "common/modulation.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// (1 + scale) * weight, what normalised values are multiplied by.
template <typename T>
void read_gain(float* gain, const T* scale, const T* weight, int64_t channels) {
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    Pack value = load_pack(scale + c, count) + Vec(1.0f);
    if (weight) value = value * load_pack(weight + c, count);
    store_pack(gain + c, value);
  });
}

// Calls use(offset, count, gradient of x before rounding) along a row of x. Adds grad, and grad times the normalised
// values, to the two rows of sums: the gradients of everything per channel come from these.
template <typename T, typename F>
C10_ALWAYS_INLINE void modulate_row_backward(const T* grad, const T* x, const float* gain, float* grad_sum,
                                             float* product_sum, int64_t channels, float eps, F use) {
  const Moments moments = row_moments(x, channels, eps);
  const Vec mean(moments.mean), rstd(moments.rstd);
  Pack through_mean = splat(0), through_rstd = splat(0);
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    const Pack g = load_pack(grad + c, count), normalised = (load_pack(x + c, count) - mean) * rstd;
    const Pack inner = g * load_pack(gain + c);
    through_mean = through_mean + inner;
    through_rstd = fmadd(inner, normalised, through_rstd);
    add_to(grad_sum + c, g);
    store_pack(product_sum + c, fmadd(g, normalised, load_pack(product_sum + c)));
  });
  const Vec a(sum(through_mean) / channels), b(sum(through_rstd) / channels);
  each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    const Pack normalised = (load_pack(x + c, count) - mean) * rstd;
    const Pack inner = load_pack(grad + c, count) * load_pack(gain + c);
    use(c, count, (inner - a - normalised * b) * rstd);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
