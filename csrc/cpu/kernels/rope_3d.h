// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "common/capability.h"
#include "common/pairs.h"

namespace vidgen {
using rope_3d_fn = void(const at::Tensor& out, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                        const Pairs& pairs);
VIDGEN_KERNEL(rope_3d, rope_3d_fn)
}  // namespace vidgen
