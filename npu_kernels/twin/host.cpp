// SPDX-License-Identifier: Apache-2.0
// The twin's device: as many cores as a test asks for, and what it saw.
#include "launch.h"
#include "machine.h"

namespace vidgen {

static uint32_t cores = 8;
uint32_t vector_cores() { return cores; }

}  // namespace vidgen

extern "C" void vidgen_twin_set_cores(uint32_t cores) { vidgen::cores = cores; }

// Most bytes of unified buffer that launches of a kernel took, as "kernel bytes" lines.
extern "C" const char* vidgen_twin_peaks() {
  static std::string text;
  text.clear();
  for (auto& [kernel, bytes] : twin::peaks()) text += kernel + " " + std::to_string(bytes) + "\n";
  return text.c_str();
}
extern "C" void vidgen_twin_forget_peaks() { twin::peaks().clear(); }
extern "C" void vidgen_twin_ignore_barriers(bool ignored) { twin::barriers_are_ignored() = ignored; }
