// SPDX-License-Identifier: Apache-2.0
// The kernels as the host calls them, each defined beside its kernel (*.asc). No PyTorch here.
#pragma once
#include "adaln_modulate/adaln_modulate_tiling.h"
#include "common/adaln_gradients_tiling.h"
#include "gated_residual/gated_residual_tiling.h"
#include "gated_residual_adaln/gated_residual_adaln_tiling.h"
#include "haar_3d/haar_3d_tiling.h"
#include "qk_norm_rope/qk_norm_rope_tiling.h"
#include "sum_partials/sum_partials_tiling.h"

namespace vidgen {

using Memory = uint8_t*;  // global memory of the device, null for a parameter that is absent

struct Launch {
  Float type;  // of all tensors but partial sums, which are float32
  uint32_t cores;
  void* stream;
};

struct Sums {  // workspaces (runs, channels) for partial sums
  Memory shift, scale, weight, bias;
};

uint32_t vector_cores();  // of the current device

void adaln_modulate(Launch to, Memory x, Memory shift, Memory scale, Memory weight, Memory bias, Memory y,
                    const AdalnModulateTiling& tiling);
void adaln_modulate_backward(Launch to, Memory grad, Memory x, Memory scale, Memory weight, Memory bias, Memory grad_x,
                             const Sums& sums, const AdalnBackwardTiling& tiling);
void gated_residual(Launch to, Memory x, Memory gate, Memory y, Memory result, const GatedResidualTiling& tiling);
void gated_residual_backward(Launch to, Memory grad, Memory gate, Memory y, Memory grad_y, Memory partials,
                             const GatedResidualTiling& tiling);
void gated_residual_adaln(Launch to, Memory x, Memory gate, Memory y, Memory shift, Memory scale, Memory weight,
                          Memory bias, Memory h, Memory modulated, const GatedResidualAdalnTiling& tiling);
void gated_residual_adaln_backward(Launch to, Memory grad_h, Memory grad_modulated, Memory h, Memory gate, Memory y,
                                   Memory scale, Memory weight, Memory bias, Memory grad_x, Memory grad_y,
                                   Memory sum_gate, const Sums& sums, const AdalnBackwardTiling& tiling);
void haar_3d(Launch to, Memory x, Memory y, const HaarTiling& tiling);
void inverse_haar_3d(Launch to, Memory y, Memory x, const HaarTiling& tiling);
void qk_norm_rope(Launch to, Memory x, Memory weight, Memory bias, Memory cos, Memory sin, Memory y,
                  const QkNormRopeTiling& tiling);
void qk_norm_rope_backward(Launch to, Memory grad, Memory x, Memory weight, Memory cos, Memory sin, Memory grad_x,
                           Memory sum_weight, Memory sum_bias, const QkNormRopeTiling& tiling);
void sum_partials(Launch to, Memory partials, Memory sums, const SumPartialsTiling& tiling);

}  // namespace vidgen
