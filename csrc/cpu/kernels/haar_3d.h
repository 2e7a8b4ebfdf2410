// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
// Rows of the input have unit stride; `edge`: the first frame is paired with itself, or is not written.
using haar_3d_fn = void(const at::Tensor& out, const at::Tensor& in, double filter_constant, bool edge);
VIDGEN_KERNEL(haar_3d, haar_3d_fn)
VIDGEN_KERNEL(inverse_haar_3d, haar_3d_fn)
}  // namespace vidgen
