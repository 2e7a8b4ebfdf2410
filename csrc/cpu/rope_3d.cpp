// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/rope_3d.h"

#include <torch/library.h>

#include "common/host.h"

namespace vidgen {
namespace {

at::Tensor rope_3d_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, std::string_view style,
                       at::OptionalIntArrayRef sections);

void rope_3d_out(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, std::string_view style,
                 at::OptionalIntArrayRef sections, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&rope_3d_cpu, "rope_3d", x, cos, sin, style, sections));
    return;
  }
  TORCH_CHECK(x.dim() == 4, "rope_3d: x must be (batch, sequence, heads, head_dim), got ", x.sizes());
  TORCH_CHECK(out.is_contiguous() && out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(),
              "rope_3d: out must be contiguous and like x");
  check_tables(x, cos, sin);
  const auto pairs = make_pairs(style, sections, x.size(3));
  if (out.numel() == 0) return;
  rope_3d_stub()(out, unit_rows(x), unit_rows(cos), unit_rows(sin), pairs);
}

at::Tensor rope_3d_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, std::string_view style,
                       at::OptionalIntArrayRef sections) {
  auto out = new_output(x.sizes(), x.options());
  rope_3d_out(x, cos, sin, style, sections, out);
  return out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("rope_3d", vidgen::rope_3d_cpu);
  m.impl("rope_3d.out", vidgen::rope_3d_out);
}
