// SPDX-License-Identifier: Apache-2.0
// Host side of sums over tokens: room for their blocks, and what follows from them.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <tuple>

#include "common/blocks.h"
#include "common/host.h"

namespace vidgen {

// (sums, batch, blocks, channels), to be filled by a kernel.
inline at::Tensor new_sums(int64_t sums, int64_t batch, int64_t blocks, int64_t channels, const at::Tensor& x) {
  return new_output({sums, batch, blocks, channels}, x.options().dtype(at::kFloat));
}

// One of them, (batch, channels).
inline at::Tensor total(const at::Tensor& sums, int64_t i) { return sums.select(0, i).sum(1); }

// Gradients of shift, scale, weight and bias of a modulated norm, from the sums over tokens of its gradient and of its
// gradient times the normalised values. weight and bias get none where they are none.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> modulation_gradients(const at::Tensor& grad_sum,
                                                                                       const at::Tensor& product_sum,
                                                                                       const at::Tensor& scale,
                                                                                       const OptionalTensor& weight,
                                                                                       const OptionalTensor& bias) {
  const auto dtype = scale.scalar_type();
  auto of_scale = product_sum;
  if (weight) of_scale = of_scale * *weight;
  if (bias) of_scale = of_scale + grad_sum * *bias;
  const auto gain = scale.to(at::kFloat) + 1;
  const auto none = [&] { return at::empty({0}, scale.options()); };
  const auto of_weight = weight ? (gain * product_sum).sum(0).to(dtype) : none();
  const auto of_bias = bias ? (gain * grad_sum).sum(0).to(dtype) : none();
  return {grad_sum.to(dtype), of_scale.to(dtype), of_weight, of_bias};
}

}  // namespace vidgen
