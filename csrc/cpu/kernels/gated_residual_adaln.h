// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
using gated_residual_adaln_fn = void(const at::Tensor& h, const at::Tensor& modulated, const at::Tensor& x,
                                     const at::Tensor& gate, const at::Tensor& y, const at::Tensor& shift,
                                     const at::Tensor& scale, const std::optional<at::Tensor>& weight,
                                     const std::optional<at::Tensor>& bias, double eps);
VIDGEN_KERNEL(gated_residual_adaln, gated_residual_adaln_fn)
}  // namespace vidgen
