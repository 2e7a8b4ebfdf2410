// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
// grad_x, grad and x are (batch, channels, positions), or (batch, positions, channels) where the channels are last;
// contiguous. sums, see common/blocks.h: of the gradient before SiLU, and of it times the normalised x; blocks are of
// kBlockPositions.
using layer_norm_silu_backward_fn = void(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                                         const at::Tensor& x, bool channels_last, const at::Tensor& weight,
                                         const at::Tensor& bias, double eps);
VIDGEN_KERNEL(layer_norm_silu_backward, layer_norm_silu_backward_fn)
constexpr int64_t kBlockPositions = 1024;
}  // namespace vidgen
