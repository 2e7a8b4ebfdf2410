// SPDX-License-Identifier: Apache-2.0
// Sigmoid and SiLU of vectors and packs. For kernel sources only.
#pragma once

#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// exp(-x) for |x| <= 87: -x / ln 2 = n + f, and n is added to the exponent of 2^f, a Taylor series (|f| <= 1/2), as
// long as the dtype T of the result deserves.
template <typename T>
C10_ALWAYS_INLINE Vec bounded_exp_neg(const Vec& x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
  const Vec magic(12582912.0f), per_ln2(-1.44269504f);
  const Vec shifted = fmadd(x, per_ln2, magic), f = fmadd(x, per_ln2, magic - shifted);
  Vec p(9.61812911e-3f);
  if constexpr (std::is_same_v<T, float>) {
    p = fmadd(Vec(1.52527338e-5f), f, Vec(1.54035304e-4f));
    p = fmadd(p, f, Vec(1.33335581e-3f));
    p = fmadd(p, f, Vec(9.61812911e-3f));
  }
  p = fmadd(p, f, Vec(5.55041087e-2f));
  p = fmadd(p, f, Vec(0.240226507f));
  p = fmadd(p, f, Vec(0.693147181f));
  p = fmadd(p, f, Vec(1.0f));
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

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
