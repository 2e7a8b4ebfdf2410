// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/layer_norm_silu.h"

#include <torch/library.h>

#include "common/volume.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "layer_norm_silu";

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  TORCH_CHECK(x.dim() >= 3, kOp, ": x must be (batch, channels, *spatial)");
  check_parameter(kOp, "weight", weight, x, x.size(1));
  check_parameter(kOp, "bias", bias, x, x.size(1));
}

at::Tensor layer_norm_silu_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  if (!native_dtype(x)) return call_reference(&layer_norm_silu_cpu, kOp, x, weight, bias, eps);
  check(x, weight, bias);
  const auto out = new_volume(x);
  if (x.numel() == 0) return out;
  const bool last = is_channels_last(x);
  layer_norm_silu_stub()(flat_volume(out, last), flat_volume(x, last), last, weight.contiguous(), bias.contiguous(),
                         eps);
  return out;
}

void layer_norm_silu_out(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                         at::Tensor out) {
  if (!native_dtype(x) || is_channels_last(x)) {
    out.copy_(layer_norm_silu_cpu(x, weight, bias, eps));
    return;
  }
  check(x, weight, bias);
  check_out(kOp, out, x);
  if (x.numel() == 0) return;
  layer_norm_silu_stub()(flat_volume(out, false), flat_volume(x, false), false, weight.contiguous(), bias.contiguous(),
                         eps);
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("layer_norm_silu", vidgen::layer_norm_silu_cpu);
  m.impl("layer_norm_silu.out", vidgen::layer_norm_silu_out);
}
