// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"

namespace vidgen {
// out and x are (batch, channels, positions), or (batch, positions, channels) where the channels are last; contiguous.
using group_norm_silu_fn = void(const at::Tensor& out, const at::Tensor& x, int64_t num_groups, bool channels_last,
                                const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                                double eps);
VIDGEN_KERNEL(group_norm_silu, group_norm_silu_fn)
}  // namespace vidgen
