// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"

namespace vidgen {
// out and x are (batch, channels, positions), or (batch, positions, channels) where the channels are last; contiguous.
using layer_norm_silu_fn = void(const at::Tensor& out, const at::Tensor& x, bool channels_last,
                                const at::Tensor& weight, const at::Tensor& bias, double eps);
VIDGEN_KERNEL(layer_norm_silu, layer_norm_silu_fn)
}  // namespace vidgen
