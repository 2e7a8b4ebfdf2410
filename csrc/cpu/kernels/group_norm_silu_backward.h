// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
// grad_x, grad and x are (batch, channels, positions), or (batch, positions, channels) where the channels are last;
// contiguous. sums, see common/blocks.h: of the gradient before SiLU, and of it times the normalised x; one block, or
// blocks of rows_per_block where the channels are last.
using group_norm_silu_backward_fn = void(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                                         const at::Tensor& x, int64_t num_groups, bool channels_last,
                                         const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                                         double eps);
VIDGEN_KERNEL(group_norm_silu_backward, group_norm_silu_backward_fn)
}  // namespace vidgen
