// SPDX-License-Identifier: Apache-2.0
// Rows of any kernel dtype as packs of float32 vectors, as rows.h has them, but faster for bfloat16: in which lane an
// element travels is the dtype's own affair. For kernel sources that treat all elements of a row alike.
#pragma once

#include <c10/macros/Macros.h>

#include "common/rows.h"

// A lambda that the loop around it must swallow: called out of line, it would pass vectors through memory.
#define VIDGEN_INLINE C10_ALWAYS_INLINE_ATTRIBUTE

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
using Words = at::vec::Vectorized<int32_t>;

// As many elements as Wide has. A plain struct: compilers keep the arrays inside of VectorizedN in memory.
struct Pack {
  Vec a, b, c, d;
};
static_assert(kWidth == 4 * Vec::size());

C10_ALWAYS_INLINE Pack splat(float value) { return {Vec(value), Vec(value), Vec(value), Vec(value)}; }
C10_ALWAYS_INLINE Pack operator+(const Pack& x, const Pack& y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
C10_ALWAYS_INLINE Pack operator-(const Pack& x, const Pack& y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
C10_ALWAYS_INLINE Pack operator*(const Pack& x, const Pack& y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
C10_ALWAYS_INLINE Pack operator+(const Pack& x, const Vec& y) { return {x.a + y, x.b + y, x.c + y, x.d + y}; }
C10_ALWAYS_INLINE Pack operator-(const Pack& x, const Vec& y) { return {x.a - y, x.b - y, x.c - y, x.d - y}; }
C10_ALWAYS_INLINE Pack operator*(const Pack& x, const Vec& y) { return {x.a * y, x.b * y, x.c * y, x.d * y}; }
// x * y + z
C10_ALWAYS_INLINE Pack fmadd(const Pack& x, const Pack& y, const Pack& z) {
  using at::vec::fmadd;
  return {fmadd(x.a, y.a, z.a), fmadd(x.b, y.b, z.b), fmadd(x.c, y.c, z.c), fmadd(x.d, y.d, z.d)};
}
C10_ALWAYS_INLINE Pack fmadd(const Pack& x, const Vec& y, const Vec& z) {
  using at::vec::fmadd;
  return {fmadd(x.a, y, z), fmadd(x.b, y, z), fmadd(x.c, y, z), fmadd(x.d, y, z)};
}
template <typename F>
C10_ALWAYS_INLINE Pack map(const Pack& x, F f) {
  return {f(x.a), f(x.b), f(x.c), f(x.d)};
}

C10_ALWAYS_INLINE float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](auto a, auto b) { return a + b; }, x);
}
C10_ALWAYS_INLINE Vec fold(const Pack& x) { return (x.a + x.b) + (x.c + x.d); }
C10_ALWAYS_INLINE float sum(const Pack& x) { return sum(fold(x)); }

// Two neighbouring bfloat16 are one 32-bit word, the first in its low half: a shift and a mask part them, which is less
// work than widening and shuffling.
struct Neighbours {
  Vec low, high;
};
C10_ALWAYS_INLINE Neighbours part(const Words& words) {
  return {at::vec::cast<float>(words << Words(16)), at::vec::cast<float>(words & Words(-65536))};
}
#ifdef __AVX512BF16__
C10_ALWAYS_INLINE Words join(const Vec& low, const Vec& high) {
  const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(alternate, narrowed(low, high));
}
#else
// Rounds to nearest even; the upper half is the result. NaNs need no care: those that arithmetic makes or passes on
// from bfloat16 have no bit set in the lower half, and so cannot carry over into the sign.
C10_ALWAYS_INLINE Words rounded(const Vec& value) {
  const Words bits = at::vec::cast<int32_t>(value);
  return bits + Words(0x7fff) + ((bits >> Words(16)) & Words(1));
}
C10_ALWAYS_INLINE Words join(const Vec& low, const Vec& high) {
  const Words l = rounded(low) >> Words(16), h = rounded(high);
  return l ^ ((l ^ h) & Words(-65536));
}
#endif

template <typename T>
C10_ALWAYS_INLINE Pack load_pack(const T* from, Whole = {}) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto [a, b] = part(Words::loadu(from));
    const auto [c, d] = part(Words::loadu(from + 2 * Vec::size()));
    return {a, b, c, d};
  } else if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + Vec::size()), Vec::loadu(from + 2 * Vec::size()),
            Vec::loadu(from + 3 * Vec::size())};
  } else {
    const Wide wide = load_row(from);
    return {wide[0], wide[1], wide[2], wide[3]};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store_pack(T* to, const Pack& x, Whole = {}) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    join(x.a, x.b).store(to);
    join(x.c, x.d).store(to + 2 * Vec::size());
  } else if constexpr (std::is_same_v<T, float>) {
    x.a.store(to);
    x.b.store(to + Vec::size());
    x.c.store(to + 2 * Vec::size());
    x.d.store(to + 3 * Vec::size());
  } else {
    Wide wide;
    wide[0] = x.a, wide[1] = x.b, wide[2] = x.c, wide[3] = x.d;
    store_row(to, wide);
  }
}

// Stores x and returns what was stored.
template <typename T>
C10_ALWAYS_INLINE Pack store_rounded(T* to, const Pack& x) {
  if constexpr (std::is_same_v<T, float>) {
    store_pack(to, x);
    return x;
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    const Words first = join(x.a, x.b), second = join(x.c, x.d);
    first.store(to);
    second.store(to + 2 * Vec::size());
    const auto [a, b] = part(first);
    const auto [c, d] = part(second);
    return {a, b, c, d};
  } else {
    store_pack(to, x);
    return load_pack(to);
  }
}

// The end of a row: elements past `count` read as zero and are not written.
template <typename T>
C10_NOINLINE Pack load_pack(const T* from, int64_t count) {
  T padded[kWidth] = {};
  std::copy_n(from, count, padded);
  return load_pack(padded);
}

template <typename T>
C10_NOINLINE void store_pack(T* to, const Pack& x, int64_t count) {
  T padded[kWidth];
  store_pack(padded, x);
  std::copy_n(padded, count, to);
}

// Float32 in the lanes of T's packs, to the order of elements.
template <typename T>
C10_ALWAYS_INLINE void store_ordered(float* to, const Pack& x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto [a, b] = at::vec::interleave2(x.a, x.b);
    const auto [c, d] = at::vec::interleave2(x.c, x.d);
    store_pack(to, Pack{a, b, c, d});
  } else {
    store_pack(to, x);
  }
}

// The inverse.
template <typename T>
C10_ALWAYS_INLINE Pack load_ordered(const float* from) {
  const Pack x = load_pack(from);
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto [a, b] = at::vec::deinterleave2(x.a, x.b);
    const auto [c, d] = at::vec::deinterleave2(x.c, x.d);
    return {a, b, c, d};
  } else {
    return x;
  }
}

// x with the lanes of all but the first `count` elements set to zero, or of all but the last.
template <typename T>
Pack keep(const Pack& x, const T* marks) {
  const Pack m = load_pack(marks);
  const Vec zero(0);
  const auto kept = [&](const Vec& v, const Vec& mark) { return Vec::blendv(zero, v, mark > zero); };
  return {kept(x.a, m.a), kept(x.b, m.b), kept(x.c, m.c), kept(x.d, m.d)};
}

template <typename T>
struct Marks {
  T zeros_ones_zeros[3 * kWidth] = {};
  Marks() { std::fill_n(zeros_ones_zeros + kWidth, kWidth, T(1)); }
  static const T* get() {
    static const Marks marks;
    return marks.zeros_ones_zeros;
  }
};

template <typename T>
Pack keep_first(const Pack& x, int64_t count) {
  return keep(x, Marks<T>::get() + 2 * kWidth - count);
}
template <typename T>
Pack keep_last(const Pack& x, int64_t count) {
  return keep(x, Marks<T>::get() + count);
}

// Calls f(offset, count) along a row, as each_chunk does. f must be marked VIDGEN_INLINE.
template <typename F>
C10_ALWAYS_INLINE void each_pack(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(c, Whole{});
  if (c < channels) f(c, channels - c);
}

// The same, but where a row is long enough its last pack is whole and overlaps the one before: for results that may be
// computed twice, from input that is not the output.
template <typename F>
C10_ALWAYS_INLINE void cover_packs(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(c, Whole{});
  if (c == channels) return;
  if (channels > kWidth) {
    f(channels - kWidth, Whole{});
  } else {
    f(c, channels - c);
  }
}

// Sum over a row of what add(total, pack) adds. add must be marked VIDGEN_INLINE.
template <typename T, typename F>
C10_ALWAYS_INLINE float sum_packs(const T* row, int64_t channels, F add) {
  Pack total = splat(0);
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) add(total, load_pack(row + c));
  if (c < channels) {
    Pack end = splat(0);
    if (channels > kWidth) {
      add(end, load_pack(row + channels - kWidth));
      end = keep_last<T>(end, channels - c);
    } else {
      add(end, load_pack(row + c, channels - c));
      end = keep_first<T>(end, channels - c);
    }
    total = total + end;
  }
  return sum(total);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
