// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/gated_residual_adaln_backward.h"

#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/sums.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "gated_residual_adaln_backward";
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Modulation per token is left to the reference: its gradients are as large as x, and rare.
Gradients gated_residual_adaln_backward_cpu(const at::Tensor& grad_h, const at::Tensor& grad_modulated,
                                            const at::Tensor& h, const at::Tensor& gate, const at::Tensor& y,
                                            const at::Tensor& scale, const OptionalTensor& weight,
                                            const OptionalTensor& bias, double eps) {
  if (!native_dtype(h) || gate.dim() != 2 || scale.dim() != 2) {
    return call_reference(&gated_residual_adaln_backward_cpu, kOp, grad_h, grad_modulated, h, gate, y, scale, weight,
                          bias, eps);
  }
  TORCH_CHECK(h.dim() == 3, kOp, ": h must be (batch, sequence, channels)");
  check_like(kOp, "grad_h", grad_h, h);
  check_like(kOp, "grad_modulated", grad_modulated, h);
  check_like(kOp, "y", y, h);
  check_modulation(kOp, "gate", gate, h);
  check_modulation(kOp, "scale", scale, h);
  check_parameter(kOp, "weight", weight, h, h.size(2));
  check_parameter(kOp, "bias", bias, h, h.size(2));
  const auto grad_x = new_output(h.sizes(), h.options()), grad_y = new_output(h.sizes(), h.options());
  const auto sums = new_sums(3, h.size(0), blocks_of(h.size(1)), h.size(2), h);
  if (h.numel() != 0) {
    gated_residual_adaln_backward_stub()(grad_x, grad_y, sums, unit_rows(grad_h), unit_rows(grad_modulated),
                                         unit_rows(h), unit_rows(gate), unit_rows(y), unit_rows(scale), dense(weight),
                                         eps);
  }
  return std::tuple_cat(std::make_tuple(grad_x, total(sums, 2).to(gate.scalar_type()), grad_y),
                        modulation_gradients(total(sums, 0), total(sums, 1), scale, weight, bias));
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("gated_residual_adaln_backward", vidgen::gated_residual_adaln_backward_cpu);
}
