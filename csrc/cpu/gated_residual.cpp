// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/gated_residual.h"

#include <torch/library.h>

#include "common/checks.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "gated_residual";

at::Tensor gated_residual_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y);

void gated_residual_out(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&gated_residual_cpu, kOp, x, gate, y));
    return;
  }
  TORCH_CHECK(x.dim() == 3, kOp, ": x must be (batch, sequence, channels)");
  check_out(kOp, out, x);
  check_modulation(kOp, "gate", gate, x);
  check_like(kOp, "y", y, x);
  if (out.numel() == 0) return;
  gated_residual_stub()(out, unit_rows(x), unit_rows(gate), unit_rows(y));
}

at::Tensor gated_residual_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y) {
  auto out = new_output(x.sizes(), x.options());
  gated_residual_out(x, gate, y, out);
  return out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("gated_residual", vidgen::gated_residual_cpu);
  m.impl("gated_residual.out", vidgen::gated_residual_out);
}
