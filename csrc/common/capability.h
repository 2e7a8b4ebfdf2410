// SPDX-License-Identifier: Apache-2.0
// One kernel source, compiled once per instruction set; the stub picks at run time.
#pragma once

#include <string_view>

namespace vidgen {

// What PyTorch uses, which ATEN_CPU_CAPABILITY limits: DEFAULT, AVX2 or AVX512. AVX512_BF16, for which PyTorch has no
// name, is AVX512 where the processor also rounds to bfloat16 by itself; a limit of any kind excludes it.
std::string_view capability();

}  // namespace vidgen

// Declares the variants that CMake builds of a kernel and a function `name##_stub()` that returns the right one.
#ifdef VIDGEN_X86
#define VIDGEN_VARIANT(set, name, signature) \
  namespace set {                            \
  extern signature name;                     \
  }
#ifdef VIDGEN_AVX512_BF16
#define VIDGEN_IF_BF16(...) __VA_ARGS__
#else
#define VIDGEN_IF_BF16(...)
#endif
#define VIDGEN_KERNEL(name, signature)                                      \
  VIDGEN_VARIANT(DEFAULT, name, signature)                                  \
  VIDGEN_VARIANT(AVX2, name, signature)                                     \
  VIDGEN_VARIANT(AVX512, name, signature)                                   \
  VIDGEN_IF_BF16(VIDGEN_VARIANT(AVX512_BF16, name, signature))              \
  inline decltype(&DEFAULT::name) name##_stub() {                           \
    static const auto chosen = [have = capability()] {                      \
      VIDGEN_IF_BF16(if (have == "AVX512_BF16") return &AVX512_BF16::name;) \
      if (have == "AVX512") return &AVX512::name;                           \
      if (have == "AVX2") return &AVX2::name;                               \
      return &DEFAULT::name;                                                \
    }();                                                                    \
    return chosen;                                                          \
  }
#else
#define VIDGEN_KERNEL(name, signature) \
  namespace DEFAULT {                  \
  extern signature name;               \
  }                                    \
  inline decltype(&DEFAULT::name) name##_stub() { return &DEFAULT::name; }
#endif
