// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
// sums, see common/blocks.h: of grad times y. gate is per sample.
using gated_residual_backward_fn = void(const at::Tensor& sums, const at::Tensor& grad_y, const at::Tensor& grad,
                                        const at::Tensor& gate, const at::Tensor& y);
VIDGEN_KERNEL(gated_residual_backward, gated_residual_backward_fn)
}  // namespace vidgen
