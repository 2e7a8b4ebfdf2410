// SPDX-License-Identifier: Apache-2.0
// One kernel source, compiled once per instruction set; the stub picks at run time.
#pragma once

#include <ATen/Version.h>

#include <string>

// Declares the variants that CMake builds of a kernel and a function `name##_stub()` that returns
// the right one. Honours ATEN_CPU_CAPABILITY, as PyTorch does.
#ifdef VIDGEN_X86
#define VIDGEN_KERNEL(name, signature)                   \
  namespace DEFAULT {                                    \
  extern signature name;                                 \
  }                                                      \
  namespace AVX2 {                                       \
  extern signature name;                                 \
  }                                                      \
  namespace AVX512 {                                     \
  extern signature name;                                 \
  }                                                      \
  inline decltype(&DEFAULT::name) name##_stub() {        \
    static const auto chosen = [] {                      \
      const std::string have = at::get_cpu_capability(); \
      if (have == "AVX512") return &AVX512::name;        \
      if (have == "AVX2") return &AVX2::name;            \
      return &DEFAULT::name;                             \
    }();                                                 \
    return chosen;                                       \
  }
#else
#define VIDGEN_KERNEL(name, signature) \
  namespace DEFAULT {                  \
  extern signature name;               \
  }                                    \
  inline decltype(&DEFAULT::name) name##_stub() { return &DEFAULT::name; }
#endif
