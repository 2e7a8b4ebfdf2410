// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/gated_residual_backward.h"

#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/sums.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "gated_residual_backward";

// A gate per token is left to the reference: its gradient is as large as y, and rare.
std::tuple<at::Tensor, at::Tensor> gated_residual_backward_cpu(const at::Tensor& grad, const at::Tensor& gate,
                                                               const at::Tensor& y) {
  if (!native_dtype(y) || gate.dim() != 2) return call_reference(&gated_residual_backward_cpu, kOp, grad, gate, y);
  TORCH_CHECK(y.dim() == 3, kOp, ": y must be (batch, sequence, channels)");
  check_like(kOp, "grad", grad, y);
  check_modulation(kOp, "gate", gate, y);
  const auto grad_y = new_output(y.sizes(), y.options());
  const auto sums = new_sums(1, y.size(0), blocks_of(y.size(1)), y.size(2), y);
  if (y.numel() != 0) {
    gated_residual_backward_stub()(sums, grad_y, unit_rows(grad), unit_rows(gate), unit_rows(y));
  }
  return {total(sums, 0).to(gate.scalar_type()), grad_y};
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("gated_residual_backward", vidgen::gated_residual_backward_cpu); }
