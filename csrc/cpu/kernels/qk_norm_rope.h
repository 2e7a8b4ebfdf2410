// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/capability.h"
#include "common/pairs.h"

namespace vidgen {

// What q and k share. Rows of the results stand in group-skip order where sparse_n > 1.
struct NormRope {
  bool layer;  // LayerNorm, else RMSNorm
  double eps;
  std::optional<at::Tensor> cos, sin;
  Pairs pairs;
  int64_t sparse_n;
};

// Queries, keys and, where given, values, which only move: out (batch, padded, heads, head_dim).
struct NormRopeTensors {
  at::Tensor new_q, new_k, new_v, q, k;
  std::optional<at::Tensor> v, q_weight, k_weight, q_bias, k_bias;
};
using qk_norm_rope_fn = void(const NormRopeTensors& t, const NormRope& how);
VIDGEN_KERNEL(qk_norm_rope, qk_norm_rope_fn)

// Gradients of x, weight and bias from grad (batch, padded, heads, head_dim).
using qk_norm_rope_backward_fn = void(const at::Tensor& grad_x, const at::Tensor& grad_weight,
                                      const at::Tensor& grad_bias, const at::Tensor& grad, const at::Tensor& x,
                                      const std::optional<at::Tensor>& weight, const NormRope& how);
VIDGEN_KERNEL(qk_norm_rope_backward, qk_norm_rope_backward_fn)

}  // namespace vidgen
