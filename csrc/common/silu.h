// SPDX-License-Identifier: Apache-2.0
// Sigmoid and SiLU of vectors and packs. For kernel sources only.
#pragma once

#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// exp(x) for |x| <= 88 to about one unit in the last place: x = n ln 2 + r, exp(r) as its Taylor series (|r| < 0.35),
// and n added to the exponent. Other x and NaN give finite garbage.
C10_ALWAYS_INLINE Vec bounded_exp(const Vec& x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
  const Vec magic(12582912.0f), shifted = fmadd(x, Vec(1.44269504f), magic), n = shifted - magic;
  const Vec r = fmadd(n, Vec(-1.42860677e-6f), fmadd(n, Vec(-0.693145752f), x));
  Vec p = fmadd(r, Vec(1.98412698e-4f), Vec(1.38888889e-3f));
  p = fmadd(p, r, Vec(8.33333333e-3f));
  p = fmadd(p, r, Vec(4.16666667e-2f));
  p = fmadd(p, r, Vec(1.66666667e-1f));
  p = fmadd(p, r, Vec(0.5f));
  p = fmadd(p, r, Vec(1.0f));
  p = fmadd(p, r, Vec(1.0f));
  const Words exponent = at::vec::cast<int32_t>(shifted) << Words(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
}

// 1 / (1 + exp(-x)); below -88, where the true value is less than any normal number, it is 0, and so is that of NaN.
C10_ALWAYS_INLINE Vec sigmoid(const Vec& x) {
  const Vec limit(88.0f);
  const Vec one(1.0f), e = bounded_exp(at::vec::clamp(x.neg(), limit.neg(), limit));
  return (one / (one + e)) & (x >= limit.neg());
}

// x * sigmoid(x): NaN for NaN and for -inf, as PyTorch has it.
C10_ALWAYS_INLINE Pack silu(const Pack& x) {
  return map(x, [](const Vec& v) VIDGEN_INLINE { return v * sigmoid(v); });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
