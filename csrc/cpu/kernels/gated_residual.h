// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
using gated_residual_fn = void(const at::Tensor& out, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y);
VIDGEN_KERNEL(gated_residual, gated_residual_fn)
}  // namespace vidgen
