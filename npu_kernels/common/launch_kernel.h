// SPDX-License-Identifier: Apache-2.0
// `kernel<<<...>>>` as the Ascend C compiler has it, and the same call into the CPU twin.
#pragma once
#include "kernel_operator.h"
#include "launch.h"

#ifdef VIDGEN_ASCENDC_TWIN
#define VIDGEN_LAUNCH(to, kernel, ...) twin::launch(#kernel, (to).cores, [&] { kernel(__VA_ARGS__); })
#else
#define VIDGEN_LAUNCH(to, kernel, ...) kernel<<<(to).cores, nullptr, (to).stream>>>(__VA_ARGS__)
#endif

// Launches name_float32, name_bfloat16 or name_float16: entry points with plain names are what every compiler takes.
#define VIDGEN_LAUNCH_FLOAT(to, name, ...)             \
  switch ((to).type) {                                 \
    case vidgen::Float::float32:                       \
      VIDGEN_LAUNCH(to, name##_float32, __VA_ARGS__);  \
      break;                                           \
    case vidgen::Float::bfloat16:                      \
      VIDGEN_LAUNCH(to, name##_bfloat16, __VA_ARGS__); \
      break;                                           \
    case vidgen::Float::float16:                       \
      VIDGEN_LAUNCH(to, name##_float16, __VA_ARGS__);  \
      break;                                           \
  }
