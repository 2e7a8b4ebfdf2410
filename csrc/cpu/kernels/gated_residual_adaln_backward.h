// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
// sums, see common/blocks.h: of grad_modulated, of grad_modulated times the normalised h, of grad_x times y. gate and
// scale are per sample.
using gated_residual_adaln_backward_fn = void(const at::Tensor& grad_x, const at::Tensor& grad_y,
                                              const at::Tensor& sums, const at::Tensor& grad_h,
                                              const at::Tensor& grad_modulated, const at::Tensor& h,
                                              const at::Tensor& gate, const at::Tensor& y, const at::Tensor& scale,
                                              const std::optional<at::Tensor>& weight, double eps);
VIDGEN_KERNEL(gated_residual_adaln_backward, gated_residual_adaln_backward_fn)
}  // namespace vidgen
