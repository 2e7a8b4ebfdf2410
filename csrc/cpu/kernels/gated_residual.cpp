// SPDX-License-Identifier: Apache-2.0
// out = x + gate * y, float32 inside. Compiled once per instruction set.
#include "cpu/kernels/gated_residual.h"

#include "common/modulation.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void gated_residual(const at::Tensor& out, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "gated_residual", [&] {
    using T = scalar_t;
    const auto to = write_tokens<T>(out);
    const auto of_x = read_tokens<T>(x), of_gate = read_tokens<T>(gate), of_y = read_tokens<T>(y);
    each_token(x, [&](int64_t b, int64_t l) {
      gate_row(to.at(b, l), of_x.at(b, l), of_gate.at(b, l), of_y.at(b, l), x.size(2));
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
