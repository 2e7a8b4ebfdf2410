// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
using adaln_modulate_fn = void(const at::Tensor& out, const at::Tensor& x, const at::Tensor& shift,
                               const at::Tensor& scale, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, double eps);
VIDGEN_KERNEL(adaln_modulate, adaln_modulate_fn)
}  // namespace vidgen
