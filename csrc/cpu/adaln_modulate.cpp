// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/adaln_modulate.h"

#include <torch/library.h>

#include "common/checks.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "adaln_modulate";

at::Tensor adaln_modulate_cpu(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                              const OptionalTensor& weight, const OptionalTensor& bias, double eps);

void adaln_modulate_out(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&adaln_modulate_cpu, kOp, x, shift, scale, weight, bias, eps));
    return;
  }
  TORCH_CHECK(x.dim() == 3, kOp, ": x must be (batch, sequence, channels)");
  check_out(kOp, out, x);
  check_modulation(kOp, "shift", shift, x);
  check_modulation(kOp, "scale", scale, x);
  check_parameter(kOp, "weight", weight, x, x.size(2));
  check_parameter(kOp, "bias", bias, x, x.size(2));
  if (out.numel() == 0) return;
  adaln_modulate_stub()(out, unit_rows(x), unit_rows(shift), unit_rows(scale), dense(weight), dense(bias), eps);
}

at::Tensor adaln_modulate_cpu(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                              const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  auto out = new_output(x.sizes(), x.options());
  adaln_modulate_out(x, shift, scale, weight, bias, eps, out);
  return out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("adaln_modulate", vidgen::adaln_modulate_cpu);
  m.impl("adaln_modulate.out", vidgen::adaln_modulate_out);
}
