// SPDX-License-Identifier: Apache-2.0
// Haar transforms of a few neighbouring rows at once, what haar_2d and haar_3d share. For kernel sources only.
#pragma once

#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>
#include <c10/util/Unroll.h>

#include "common/pack.h"
#include "common/stream.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

using Floats = Vec;

// Two vectors, as many floats as one 16-bit vector holds elements. A plain struct rather than VectorizedN: its loops
// would keep arrays of them in memory.
struct Lanes {
  Floats a, b;
};

inline Lanes operator+(const Lanes& x, const Lanes& y) { return {x.a + y.a, x.b + y.b}; }
inline Lanes operator-(const Lanes& x, const Lanes& y) { return {x.a - y.a, x.b - y.b}; }
inline Lanes operator*(const Lanes& x, const Floats& y) { return {x.a * y, x.b * y}; }

// Rows are split into, or joined from, this many pairs of neighbours at a time.
constexpr int64_t kPairs = 2 * Floats::size();
using WholePairs = std::integral_constant<int64_t, kPairs>;

struct Pairs {
  Lanes first, second;
};

// How elements of one dtype become float32 and back. A band is read by load and written by store; a row is read by
// split and written by join, which part neighbours. Which lane a pair travels in is the dtype's own affair.
template <typename T>
struct Access {
  static Lanes load(const T* from) {
    if constexpr (std::is_same_v<T, float>) {
      return {Floats::loadu(from), Floats::loadu(from + Floats::size())};
    } else {
      const auto wide = at::vec::convert<float, 2, T, 1>(at::vec::VectorizedN<T, 1>::loadu(from));
      return {wide[0], wide[1]};
    }
  }
  static void store(T* to, const Lanes& value) {
    if constexpr (std::is_same_v<T, float>) {
      value.a.store(to);
      value.b.store(to + Floats::size());
    } else {
      at::vec::convert<T, 1, float, 2>(at::vec::VectorizedN<float, 2>(value.a, value.b)).store(to);
    }
  }
  static Pairs split(const T* from) {
    const Lanes left = load(from), right = load(from + kPairs);
    const auto [a, c] = at::vec::deinterleave2(left.a, left.b);
    const auto [b, d] = at::vec::deinterleave2(right.a, right.b);
    return {{a, b}, {c, d}};
  }
  static void join(T* to, const Lanes& first, const Lanes& second) {
    const auto [a, b] = at::vec::interleave2(first.a, second.a);
    const auto [c, d] = at::vec::interleave2(first.b, second.b);
    store(to, {a, b});
    store(to + kPairs, {c, d});
  }
};

#ifdef __AVX512BF16__
// Neighbours are parted where they are loaded, pairs stay in order.
template <>
struct Access<at::BFloat16> {
  static Lanes load(const at::BFloat16* from) {
    const auto wide = at::vec::convert<float, 2, at::BFloat16, 1>(at::vec::VectorizedN<at::BFloat16, 1>::loadu(from));
    return {wide[0], wide[1]};
  }
  static void store(at::BFloat16* to, const Lanes& value) { narrowed(value.a, value.b).store(to); }
  static Pairs split(const at::BFloat16* from) {
    const auto left = part(Words::loadu(from)), right = part(Words::loadu(from + kPairs));
    return {{left.low, right.low}, {left.high, right.high}};
  }
  static void join(at::BFloat16* to, const Lanes& first, const Lanes& second) {
    CPU_CAPABILITY::join(first.a, second.a).store(to);
    CPU_CAPABILITY::join(first.b, second.b).store(to + kPairs);
  }
};
#else
// Of neighbours as pack.h parts them, the first of each two travels in lanes a, the second in lanes b.
template <>
struct Access<at::BFloat16> {
  static Lanes widen(const Words& words) {
    const auto [low, high] = part(words);
    return {low, high};
  }

  static Lanes load(const at::BFloat16* from) { return widen(Words::loadu(from)); }
  static void store(at::BFloat16* to, const Lanes& value) { CPU_CAPABILITY::join(value.a, value.b).store(to); }
  static Pairs split(const at::BFloat16* from) {
    const auto [a, b] = at::vec::deinterleave2(Floats::loadu(from), Floats::loadu(from + kPairs));
    const Lanes even = widen(at::vec::cast<int32_t>(a)), odd = widen(at::vec::cast<int32_t>(b));
    return {{even.a, odd.a}, {even.b, odd.b}};
  }
  static void join(at::BFloat16* to, const Lanes& first, const Lanes& second) {
    const Words even = CPU_CAPABILITY::join(first.a, second.a), odd = CPU_CAPABILITY::join(first.b, second.b);
    const auto [a, b] = at::vec::interleave2(at::vec::cast<float>(even), at::vec::cast<float>(odd));
    a.store(to);
    b.store(to + kPairs);
  }
};
#endif

template <typename T>
Lanes load_band(const T* from, WholePairs) {
  return Access<T>::load(from);
}

template <bool streamed, typename T>
void store_band(T* to, const Lanes& value, WholePairs) {
  if constexpr (streamed) {
    alignas(kLine) T band[kPairs];
    Access<T>::store(band, value);
    stream_copy<kPairs>(to, band);
  } else {
    Access<T>::store(to, value);
  }
}

template <typename T>
Pairs split_row(const T* from, WholePairs) {
  return Access<T>::split(from);
}

template <typename T>
void join_row(T* to, const Pairs& pairs, WholePairs) {
  Access<T>::join(to, pairs.first, pairs.second);
}

// The end of a row: lanes past `count` pairs read as zero and are not written.
template <typename T>
Lanes load_band(const T* from, int64_t count) {
  T padded[kPairs] = {};
  std::copy_n(from, count, padded);
  return Access<T>::load(padded);
}

template <bool streamed, typename T>
void store_band(T* to, const Lanes& value, int64_t count) {
  T padded[kPairs];
  Access<T>::store(padded, value);
  std::copy_n(padded, count, to);
}

template <typename T>
Pairs split_row(const T* from, int64_t count) {
  T padded[2 * kPairs] = {};
  std::copy_n(from, 2 * count, padded);
  return Access<T>::split(padded);
}

template <typename T>
void join_row(T* to, const Pairs& pairs, int64_t count) {
  T padded[2 * kPairs];
  Access<T>::join(padded, pairs.first, pairs.second);
  std::copy_n(padded, 2 * count, to);
}

// Calls f(offset, count) along `pairs` pairs, as each_chunk does along single elements.
template <typename F>
void each_pairs(int64_t pairs, F f) {
  int64_t p = 0;
  for (; p + kPairs <= pairs; p += kPairs) f(p, WholePairs{});
  if (p < pairs) f(p, pairs - p);
}

C10_ALWAYS_INLINE void sum_and_difference(Lanes& x, Lanes& y) {
  const Lanes sum = x + y;
  y = x - y;
  x = sum;
}

// Sums and differences over every bit of the index: where it is set, a difference. Its own transpose.
C10_ALWAYS_INLINE void butterfly(Lanes (&x)[2]) { sum_and_difference(x[0], x[1]); }

C10_ALWAYS_INLINE void butterfly(Lanes (&x)[4]) {
  sum_and_difference(x[0], x[1]);
  sum_and_difference(x[2], x[3]);
  sum_and_difference(x[0], x[2]);
  sum_and_difference(x[1], x[3]);
}

// `rows` rows of 2 * pairs elements to the bands bands[c][r]: c, difference along the row; r, differences over the bits
// of the row's number. Unrolled by templates: loops unrolled later would leave the values in memory.
template <int rows, bool streamed = false, typename T>
void analyse_rows(T* const (&bands)[2][rows], const T* const (&from)[rows], int64_t pairs, float filter_constant) {
  const Floats constant(filter_constant);
  each_pairs(pairs, [&](int64_t p, auto count) C10_ALWAYS_INLINE_ATTRIBUTE {
    Lanes sums[rows], differences[rows];
    c10::ForcedUnroll<rows>{}([&](auto r) {
      const Pairs row = split_row(from[r] + 2 * p, count);
      sums[r] = row.first + row.second;
      differences[r] = row.first - row.second;
    });
    butterfly(sums);
    butterfly(differences);
    c10::ForcedUnroll<rows>{}([&](auto r) {
      store_band<streamed>(bands[0][r] + p, sums[r] * constant, count);
      store_band<streamed>(bands[1][r] + p, differences[r] * constant, count);
    });
  });
}

// The transpose. Rows that are null are not written.
template <int rows, typename T>
void synthesise_rows(T* const (&to)[rows], const T* const (&bands)[2][rows], int64_t pairs, float filter_constant) {
  const Floats constant(filter_constant);
  each_pairs(pairs, [&](int64_t p, auto count) C10_ALWAYS_INLINE_ATTRIBUTE {
    Lanes sums[rows], differences[rows];
    c10::ForcedUnroll<rows>{}([&](auto r) {
      sums[r] = load_band(bands[0][r] + p, count);
      differences[r] = load_band(bands[1][r] + p, count);
    });
    butterfly(sums);
    butterfly(differences);
    c10::ForcedUnroll<rows>{}([&](auto r) {
      if (!to[r]) return;
      const Pairs row = {(sums[r] + differences[r]) * constant, (sums[r] - differences[r]) * constant};
      join_row(to[r] + 2 * p, row, count);
    });
  });
}

// Calls f(b, c, t, h) for every row of one band, in parallel, and done() behind those of each thread; `bytes`: what
// one call reads and writes.
template <typename F, typename End>
void each_band_row(int64_t batch, int64_t channels, int64_t frames, int64_t height, int64_t bytes, F f, End done) {
  const int64_t grain = std::max<int64_t>(1, 32768 / bytes);
  at::parallel_for(0, batch * channels * frames * height, grain, [&](int64_t begin, int64_t end) {
    int64_t h = begin % height, t = begin / height % frames, c = begin / height / frames % channels;
    int64_t b = begin / height / frames / channels;
    for (int64_t i = begin; i < end; ++i) {  // counted on: four divisions a row are not free
      f(b, c, t, h);
      if (++h < height) continue;
      h = 0;
      if (++t < frames) continue;
      t = 0;
      if (++c < channels) continue;
      c = 0;
      ++b;
    }
    done();
  });
}

template <typename F>
void each_band_row(int64_t batch, int64_t channels, int64_t frames, int64_t height, int64_t bytes, F f) {
  each_band_row(batch, channels, frames, height, bytes, f, [] {});
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
