// SPDX-License-Identifier: Apache-2.0
// Gradients of gated_residual_adaln, through both results, in one pass over the sequence. Compiled once per instruction
// set.
#include "cpu/kernels/gated_residual_adaln_backward.h"

#include "common/modulation_backward.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void gated_residual_adaln_backward(const at::Tensor& grad_x, const at::Tensor& grad_y, const at::Tensor& sums,
                                   const at::Tensor& grad_h, const at::Tensor& grad_modulated, const at::Tensor& h,
                                   const at::Tensor& gate, const at::Tensor& y, const at::Tensor& scale,
                                   const std::optional<at::Tensor>& weight, double eps) {
  VIDGEN_DISPATCH_FLOATS(h.scalar_type(), "gated_residual_adaln_backward", [&] {
    using T = scalar_t;
    const int64_t channels = h.size(2);
    const auto to_x = write_tokens<T>(grad_x), to_y = write_tokens<T>(grad_y);
    const auto of_grad_h = read_tokens<T>(grad_h), of_grad = read_tokens<T>(grad_modulated);
    const auto of_h = read_tokens<T>(h), of_gate = read_tokens<T>(gate), of_y = read_tokens<T>(y);
    const auto of_scale = read_tokens<T>(scale);
    each_block(h.size(0), h.size(1), kBlockTokens, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
      Columns<T> rows(3, 1, channels);
      float *grad_sum = rows.row(0), *product_sum = rows.row(1), *gate_sum = rows.row(2), *gain = rows.row(3);
      read_gain(gain, of_scale.at(b, 0), read_parameter<T>(weight), channels);
      const T* gate_row = of_gate.at(b, 0);
      for (int64_t l = first; l < last; ++l) {
        const T *grad_h_row = of_grad_h.at(b, l), *y_row = of_y.at(b, l);
        T *x_to = to_x.at(b, l), *y_to = to_y.at(b, l);
        modulate_row_backward(
            of_grad.at(b, l), of_h.at(b, l), gain, grad_sum, product_sum, channels, static_cast<float>(eps),
            [&](int64_t c, auto count, const Pack& through_norm) VIDGEN_INLINE {
              const Pack g = load_pack(grad_h_row + c, count) + through_norm;
              store_pack(gate_sum + c, fmadd(g, load_pack(y_row + c, count), load_pack(gate_sum + c)));
              store_pack(x_to + c, g, count);
              store_pack(y_to + c, g * load_pack(gate_row + c, count), count);
            });
        rows.end_row();
      }
      rows.write(sums, b, block);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
