// SPDX-License-Identifier: Apache-2.0
// The kernels as the host calls them, each defined beside its kernel (*.asc). No PyTorch here.
#pragma once
#include "adaln_modulate/adaln_modulate_tiling.h"

namespace vidgen {

using Memory = uint8_t*;  // global memory of the device, null for a parameter that is absent

struct Launch {
  Float type;  // of all tensors but those that a kernel keeps in float
  uint32_t cores;
  void* stream;
};

uint32_t vector_cores();  // of the current device

void adaln_modulate(Launch to, Memory x, Memory shift, Memory scale, Memory weight, Memory bias, Memory y,
                    const AdalnModulateTiling& tiling);

}  // namespace vidgen
