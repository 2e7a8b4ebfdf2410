// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/adaln_modulate_backward.h"

#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/sums.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "adaln_modulate_backward";
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Modulation per token is left to the reference: its gradients are as large as x, and rare.
Gradients adaln_modulate_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                      const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  if (!native_dtype(x) || scale.dim() != 2) {
    return call_reference(&adaln_modulate_backward_cpu, kOp, grad, x, scale, weight, bias, eps);
  }
  TORCH_CHECK(x.dim() == 3, kOp, ": x must be (batch, sequence, channels)");
  check_like(kOp, "grad", grad, x);
  check_modulation(kOp, "scale", scale, x);
  check_parameter(kOp, "weight", weight, x, x.size(2));
  check_parameter(kOp, "bias", bias, x, x.size(2));
  const auto grad_x = new_output(x.sizes(), x.options());
  const auto sums = new_sums(2, x.size(0), blocks_of(x.size(1)), x.size(2), x);
  if (x.numel() != 0) {
    adaln_modulate_backward_stub()(grad_x, sums, unit_rows(grad), unit_rows(x), unit_rows(scale), dense(weight), eps);
  }
  return std::tuple_cat(std::make_tuple(grad_x),
                        modulation_gradients(total(sums, 0), total(sums, 1), scale, weight, bias));
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("adaln_modulate_backward", vidgen::adaln_modulate_backward_cpu); }
