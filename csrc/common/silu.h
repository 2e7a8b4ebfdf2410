// SPDX-License-Identifier: Apache-2.0
// Sigmoid and SiLU of vectors and packs. For kernel sources only.
#pragma once

#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// exp(-x) for |x| <= 87: with the integer n next to -x / ln 2, n is added to the exponent of exp(-(x + n ln 2)), a
// Taylor series (its argument is below 0.35) as long as the dtype T of the result deserves.
template <typename T>
C10_ALWAYS_INLINE Vec bounded_exp_neg(const Vec& x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
  const Vec magic(12582912.0f), shifted = fmadd(x, Vec(-1.44269504f), magic), n = shifted - magic;
  Vec rest, p(1.0f / 24);
  if constexpr (std::is_same_v<T, float>) {
    // ln 2 in two parts, of which the first has so few digits that its product with n is exact.
    rest = fmadd(n, Vec(-2.12194440e-4f), fmadd(n, Vec(0.693359375f), x));
    p = fmadd(Vec(-1.0f / 5040), rest, Vec(1.0f / 720));
    p = fmadd(p, rest, Vec(-1.0f / 120));
    p = fmadd(p, rest, Vec(1.0f / 24));
  } else {
    rest = fmadd(n, Vec(0.693147181f), x);
  }
  p = fmadd(p, rest, Vec(-1.0f / 6));
  p = fmadd(p, rest, Vec(0.5f));
  p = fmadd(p, rest, Vec(-1.0f));
  p = fmadd(p, rest, Vec(1.0f));
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + (at::vec::cast<int32_t>(shifted) << Words(23)));
}

// 1 + exp(-x), so that its inverse is the sigmoid; beyond 87, where float32 ends, as at 87.
template <typename T>
C10_ALWAYS_INLINE Vec inverse_sigmoid(const Vec& x) {
  return Vec(1.0f) + bounded_exp_neg<T>(at::vec::clamp(x, Vec(-87.0f), Vec(87.0f)));
}

// x * sigmoid(x)
template <typename T>
C10_ALWAYS_INLINE Pack silu(const Pack& x) {
  return map(x, [](const Vec& v) VIDGEN_INLINE { return v / inverse_sigmoid<T>(v); });
}

// Gradient of x from that of x * sigmoid(x).
template <typename T>
C10_ALWAYS_INLINE Vec silu_backward(const Vec& grad, const Vec& x) {
  const Vec one(1.0f), sigmoid = one / inverse_sigmoid<T>(x);
  return grad * sigmoid * fmadd(x, one - sigmoid, one);
}
template <typename T>
C10_ALWAYS_INLINE Pack silu_backward(const Pack& grad, const Pack& x) {
  return {silu_backward<T>(grad.a, x.a), silu_backward<T>(grad.b, x.b), silu_backward<T>(grad.c, x.c),
          silu_backward<T>(grad.d, x.d)};
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
