// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
// (batch, channels, frames, height, width); rows of the input have unit stride.
using haar_2d_fn = void(const at::Tensor& out, const at::Tensor& in, double filter_constant);
VIDGEN_KERNEL(haar_2d, haar_2d_fn)
VIDGEN_KERNEL(inverse_haar_2d, haar_2d_fn)
}  // namespace vidgen
