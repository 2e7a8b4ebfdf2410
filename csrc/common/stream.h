// SPDX-License-Identifier: Apache-2.0
// Results that no cache would hold until they are read may be written past the caches: that saves fetching the memory
// which is written over. For kernel sources only; where there is no such instruction results are written as ever.
#pragma once

#ifdef VIDGEN_X86
#include <immintrin.h>
#endif

#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// What one core may hope to find again in a last cache that it shares with others.
constexpr int64_t kCachedBytes = int64_t(32) << 20;
constexpr int64_t kLine = 64;

// Whether an op that moves `bytes` should write rows of `count` elements this way, `step` at a time.
template <typename T>
bool should_stream(const T* to, int64_t count, int64_t step, int64_t bytes) {
#ifdef VIDGEN_X86
  return bytes > kCachedBytes && count % step == 0 && count * sizeof(T) % kLine == 0 &&
         reinterpret_cast<uintptr_t>(to) % kLine == 0;
#else
  return false;
#endif
}

// Both must be aligned, to the length but for at most a cache line. Each thread that wrote anything this way must call
// end_stream at the end.
template <int64_t count, typename T>
C10_ALWAYS_INLINE void stream_copy(T* to, const T* from) {
#if defined(__AVX512F__)
  if constexpr (count * sizeof(T) % 64 == 0) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
    }
    return;
  }
#endif
#ifdef VIDGEN_X86
  for (int64_t i = 0; i < count; i += 16 / sizeof(T)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::copy_n(from, count, to);
#endif
}

inline void end_stream() {
#ifdef VIDGEN_X86
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
