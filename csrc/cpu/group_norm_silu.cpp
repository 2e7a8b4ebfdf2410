// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/group_norm_silu.h"

#include <torch/library.h>

#include "common/volume.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "group_norm_silu";

void check(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() >= 3, kOp, ": x must be (batch, channels, *spatial)");
  TORCH_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, kOp, ": num_groups must divide the channels");
  check_parameter(kOp, "weight", weight, x, x.size(1));
  check_parameter(kOp, "bias", bias, x, x.size(1));
}

at::Tensor group_norm_silu_cpu(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps) {
  if (!native_dtype(x)) return call_reference(&group_norm_silu_cpu, kOp, x, num_groups, weight, bias, eps);
  check(x, num_groups, weight, bias);
  const auto out = new_volume(x);
  if (x.numel() == 0) return out;
  const bool last = is_channels_last(x);
  group_norm_silu_stub()(flat_volume(out, last), flat_volume(x, last), num_groups, last, dense(weight), dense(bias),
                         eps);
  return out;
}

void group_norm_silu_out(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, at::Tensor out) {
  if (!native_dtype(x) || is_channels_last(x)) {
    out.copy_(group_norm_silu_cpu(x, num_groups, weight, bias, eps));
    return;
  }
  check(x, num_groups, weight, bias);
  check_out(kOp, out, x);
  if (x.numel() == 0) return;
  group_norm_silu_stub()(flat_volume(out, false), flat_volume(x, false), num_groups, false, dense(weight), dense(bias),
                         eps);
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("group_norm_silu", vidgen::group_norm_silu_cpu);
  m.impl("group_norm_silu.out", vidgen::group_norm_silu_out);
}
