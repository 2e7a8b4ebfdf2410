// SPDX-License-Identifier: Apache-2.0
// h = x + gate * y, then its modulated LayerNorm while the row is in the nearest cache. Compiled once per instruction
// set. The norm reads h as it was rounded, so that both results are those of the two ops one after the other.
#include "cpu/kernels/gated_residual_adaln.h"

#include "common/modulation.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void gated_residual_adaln(const at::Tensor& h, const at::Tensor& modulated, const at::Tensor& x, const at::Tensor& gate,
                          const at::Tensor& y, const at::Tensor& shift, const at::Tensor& scale,
                          const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "gated_residual_adaln", [&] {
    using T = scalar_t;
    const auto to_h = write_tokens<T>(h), to = write_tokens<T>(modulated);
    const auto of_x = read_tokens<T>(x), of_gate = read_tokens<T>(gate), of_y = read_tokens<T>(y);
    const auto of_shift = read_tokens<T>(shift), of_scale = read_tokens<T>(scale);
    const T *w = read_parameter<T>(weight), *bi = read_parameter<T>(bias);
    each_token(x, [&](int64_t b, int64_t l) {
      T* row = to_h.at(b, l);
      const float sum = gate_row_sum(row, of_x.at(b, l), of_gate.at(b, l), of_y.at(b, l), x.size(2));
      modulate_row<T>(to.at(b, l), row, sum, of_shift.at(b, l), of_scale.at(b, l), w, bi, x.size(2),
                      static_cast<float>(eps));
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
