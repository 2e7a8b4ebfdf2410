// SPDX-License-Identifier: Apache-2.0
// What Python asks of the library itself. Ops are joined to their schemas in csrc/cpu, one file each.
#include <pybind11/pybind11.h>

#include <string>

#include "common/capability.h"
#include "common/host.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of vidgen.ops.";
  m.def(
      "cpu_capability", [] { return std::string(vidgen::capability()); },
      "Instruction set that the kernels use in this process: DEFAULT, AVX2, AVX512 or AVX512_BF16.");
  m.def("guard_outputs", &vidgen::guard_outputs, pybind11::arg("on"),
        "For tests: surround the outputs of kernels by margins, and fill both with NaN beforehand.");
  m.def("count_damaged_guards", &vidgen::count_damaged_guards,
        "For tests: how many outputs made since the last call were written outside of.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = VIDGEN_TORCH_VERSION;
    info["compiler"] = __VERSION__;
#if defined(VIDGEN_AVX512_BF16)
    info["capabilities"] = "DEFAULT AVX2 AVX512 AVX512_BF16";
#elif defined(VIDGEN_X86)
    info["capabilities"] = "DEFAULT AVX2 AVX512";
#else
    info["capabilities"] = "DEFAULT";
#endif
    return info;
  });
}
