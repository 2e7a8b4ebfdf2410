// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/group_norm_silu_backward.h"

#include <torch/library.h>

#include <tuple>

#include "common/sums.h"
#include "common/volume.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "group_norm_silu_backward";

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                                            int64_t num_groups,
                                                                            const OptionalTensor& weight,
                                                                            const OptionalTensor& bias, double eps) {
  if (!native_dtype(x)) {
    return call_reference(&group_norm_silu_backward_cpu, kOp, grad, x, num_groups, weight, bias, eps);
  }
  TORCH_CHECK(x.dim() >= 3, kOp, ": x must be (batch, channels, *spatial)");
  TORCH_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, kOp, ": num_groups must divide the channels");
  check_like(kOp, "grad", grad, x);
  check_parameter(kOp, "weight", weight, x, x.size(1));
  check_parameter(kOp, "bias", bias, x, x.size(1));
  const bool last = is_channels_last(x);
  const auto grad_x = new_volume(x);
  const int64_t blocks = last ? blocks_of(x.numel() / (x.size(0) * x.size(1)), rows_per_block(x.size(1))) : 1;
  const auto sums = new_sums(2, x.size(0), blocks, x.size(1), x);
  if (x.numel() != 0) {
    group_norm_silu_backward_stub()(flat_volume(grad_x, last), sums, flat_volume(grad, last), flat_volume(x, last),
                                    num_groups, last, dense(weight), dense(bias), eps);
  } else {
    sums.zero_();
  }
  const auto parameter = [&](bool given, int64_t i) {
    return given ? sums.select(0, i).sum({0, 1}).to(x.scalar_type()) : at::empty({0}, x.options());
  };
  return {grad_x, parameter(weight.has_value(), 1), parameter(bias.has_value(), 0)};
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("group_norm_silu_backward", vidgen::group_norm_silu_backward_cpu); }
