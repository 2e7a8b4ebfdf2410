// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
// sums, see common/blocks.h: of grad, and of grad times the normalised x. scale is per sample.
using adaln_modulate_backward_fn = void(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                                        const at::Tensor& x, const at::Tensor& scale,
                                        const std::optional<at::Tensor>& weight, double eps);
VIDGEN_KERNEL(adaln_modulate_backward, adaln_modulate_backward_fn)
}  // namespace vidgen
