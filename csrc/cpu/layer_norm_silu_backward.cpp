// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/layer_norm_silu_backward.h"

#include <torch/library.h>

#include <tuple>

#include "common/sums.h"
#include "common/volume.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "layer_norm_silu_backward";

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_silu_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                                            const at::Tensor& weight,
                                                                            const at::Tensor& bias, double eps) {
  if (!native_dtype(x)) return call_reference(&layer_norm_silu_backward_cpu, kOp, grad, x, weight, bias, eps);
  TORCH_CHECK(x.dim() >= 3, kOp, ": x must be (batch, channels, *spatial)");
  check_like(kOp, "grad", grad, x);
  check_parameter(kOp, "weight", weight, x, x.size(1));
  check_parameter(kOp, "bias", bias, x, x.size(1));
  const auto grad_x = new_volume(x);
  const int64_t positions = x.numel() ? x.numel() / (x.size(0) * x.size(1)) : 0;
  const auto sums = new_sums(2, x.size(0), blocks_of(positions, kBlockPositions), x.size(1), x);
  if (x.numel() != 0) {
    const bool last = is_channels_last(x);
    layer_norm_silu_backward_stub()(flat_volume(grad_x, last), sums, flat_volume(grad, last), flat_volume(x, last),
                                    last, weight.contiguous(), bias.contiguous(), eps);
  }
  const auto dtype = x.scalar_type();
  return {grad_x, sums.select(0, 1).sum({0, 1}).to(dtype), sums.select(0, 0).sum({0, 1}).to(dtype)};
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("layer_norm_silu_backward", vidgen::layer_norm_silu_backward_cpu); }
