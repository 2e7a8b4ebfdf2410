// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/adaln_modulate.h"

#include <torch/library.h>

#include "common/host.h"

namespace vidgen {
namespace {

at::Tensor adaln_modulate_cpu(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                              const OptionalTensor& weight, const OptionalTensor& bias, double eps);

void adaln_modulate_out(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&adaln_modulate_cpu, "adaln_modulate", x, shift, scale, weight, bias, eps));
    return;
  }
  TORCH_CHECK(out.is_contiguous() && out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(),
              "adaln_modulate: out must be contiguous and like x");
  for (const auto& t : {shift, scale}) {
    TORCH_CHECK(t.scalar_type() == x.scalar_type() && (t.dim() == 2 || t.dim() == 3) && t.size(0) == x.size(0) &&
                    t.size(-1) == x.size(-1) && (t.dim() == 2 || t.size(1) == x.size(1)),
                "adaln_modulate: shift and scale must match x ", x.sizes(), ", got ", t.sizes());
  }
  for (const auto& t : {weight, bias}) {
    TORCH_CHECK(!t || (t->scalar_type() == x.scalar_type() && t->dim() == 1 && t->size(0) == x.size(-1)),
                "adaln_modulate: weight and bias must be (channels) of x's dtype");
  }
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
