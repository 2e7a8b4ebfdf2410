// SPDX-License-Identifier: Apache-2.0
// Rows of any kernel dtype, read and written as float32 vectors. For kernel sources only: depends on CPU_CAPABILITY.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

// The dtypes that kernels take. Others go to the reference, see host.h.
#define VIDGEN_DISPATCH_FLOATS(dtype, name, ...)                                                            \
  AT_DISPATCH_SWITCH(dtype, name,                                                                           \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

#ifdef __AVX512BF16__
// Two vectors to bfloat16, one behind the other, to the nearest (results below 2^-126 become zero): one instruction
// where shifts and masks take ten. at::vec does not have it, the kernels of this instruction set are built for it
// alone.
C10_ALWAYS_INLINE at::vec::Vectorized<int32_t> narrowed(const at::vec::Vectorized<float>& first,
                                                        const at::vec::Vectorized<float>& second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
#endif

// Four vectors at a time: four independent chains keep the adders busy, and two 16-bit vectors widen into exactly four.
using Wide = at::vec::VectorizedN<float, 4>;
constexpr int64_t kWidth = Wide::size();
using Whole = std::integral_constant<int64_t, kWidth>;

template <typename T>
C10_ALWAYS_INLINE Wide load_row(const T* from, Whole = {}) {
  if constexpr (std::is_same_v<T, float>) {
    return Wide::loadu(from);
  } else {
    return at::vec::convert<float, 4, T, 2>(at::vec::VectorizedN<T, 2>::loadu(from));
  }
}

template <typename T>
C10_ALWAYS_INLINE void store_row(T* to, const Wide& value, Whole = {}) {
  if constexpr (std::is_same_v<T, float>) {
    value.store(to);
#ifdef __AVX512BF16__
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    narrowed(value[0], value[1]).store(to);
    narrowed(value[2], value[3]).store(to + kWidth / 2);
#endif
  } else {
    at::vec::convert<T, 2, float, 4>(value).store(to);
  }
}

// The end of a row: lanes past `count` read as zero and are not written.
template <typename T>
Wide load_row(const T* from, int64_t count) {
  T padded[kWidth] = {};
  std::copy_n(from, count, padded);
  return load_row(padded);
}

template <typename T>
void store_row(T* to, const Wide& value, int64_t count) {
  T padded[kWidth];
  store_row(padded, value);
  std::copy_n(padded, count, to);
}

// Calls f(offset, count) along a row. Whole chunks carry their count as a type: only the end pays for being one.
template <typename F>
void each_chunk(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(c, Whole{});
  if (c < channels) f(c, channels - c);
}

// Sum over a row of term(chunk).
template <typename T, typename F>
float sum_row(const T* row, int64_t channels, F term) {
  Wide total(0);
  float rest = 0;
  each_chunk(channels, [&](int64_t c, auto count) {
    const Wide chunk = term(load_row(row + c, count));
    if constexpr (std::is_same_v<decltype(count), Whole>) {
      total = total + chunk;
    } else {
      float lanes[kWidth];
      chunk.store(lanes);
      for (int64_t i = 0; i < count; ++i) rest += lanes[i];
    }
  });
  return rest + at::vec::vec_reduce_all<float>([](auto a, auto b) { return a + b; }, total);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
