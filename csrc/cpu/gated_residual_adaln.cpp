// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/gated_residual_adaln.h"

#include <torch/library.h>

#include <tuple>

#include "common/checks.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "gated_residual_adaln";

std::tuple<at::Tensor, at::Tensor> gated_residual_adaln_cpu(const at::Tensor& x, const at::Tensor& gate,
                                                            const at::Tensor& y, const at::Tensor& shift,
                                                            const at::Tensor& scale, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, double eps) {
  if (!native_dtype(x)) {
    return call_reference(&gated_residual_adaln_cpu, kOp, x, gate, y, shift, scale, weight, bias, eps);
  }
  TORCH_CHECK(x.dim() == 3, kOp, ": x must be (batch, sequence, channels)");
  check_modulation(kOp, "gate", gate, x);
  check_like(kOp, "y", y, x);
  check_modulation(kOp, "shift", shift, x);
  check_modulation(kOp, "scale", scale, x);
  check_parameter(kOp, "weight", weight, x, x.size(2));
  check_parameter(kOp, "bias", bias, x, x.size(2));
  auto h = new_output(x.sizes(), x.options()), modulated = new_output(x.sizes(), x.options());
  if (x.numel() != 0) {
    gated_residual_adaln_stub()(h, modulated, unit_rows(x), unit_rows(gate), unit_rows(y), unit_rows(shift),
                                unit_rows(scale), dense(weight), dense(bias), eps);
  }
  return {h, modulated};
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("gated_residual_adaln", vidgen::gated_residual_adaln_cpu); }
