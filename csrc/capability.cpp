// SPDX-License-Identifier: Apache-2.0
#include "common/capability.h"

#include <ATen/Version.h>

#include <cstdlib>
#include <string>

namespace vidgen {

std::string_view capability() {
  static const std::string chosen = [] {
    std::string have = at::get_cpu_capability();
#ifdef VIDGEN_AVX512_BF16
    const bool limited = std::getenv("ATEN_CPU_CAPABILITY") != nullptr;
    if (have == "AVX512" && !limited && __builtin_cpu_supports("avx512bf16")) have = "AVX512_BF16";
#endif
    return have;
  }();
  return chosen;
}

}  // namespace vidgen
