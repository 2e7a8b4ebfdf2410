// SPDX-License-Identifier: Apache-2.0
// half and bfloat16 as storage: like a careful kernel, the twin computes in float and converts with Cast.
#pragma once
#include <cstdint>
#include <cstring>

struct half {
  uint16_t bits = 0;
};
struct bfloat16_t {
  uint16_t bits = 0;
};

namespace twin {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16_t x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float subnormal = float(fraction) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// To nearest, ties to even, as RoundMode::CAST_RINT.
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, bfloat16_t& to) {
  const uint32_t u = bits_of(x);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  to.bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float x, half& to) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest half
    to.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: adding 2^-1 leaves units of 2^-24 in the last bits
    to.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  } else {
    to.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

}  // namespace twin
