// SPDX-License-Identifier: Apache-2.0
// Gradients of adaln_modulate in one pass over the sequence. Compiled once per instruction set.
#include "cpu/kernels/adaln_modulate_backward.h"

#include "common/modulation_backward.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void adaln_modulate_backward(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                             const at::Tensor& x, const at::Tensor& scale, const std::optional<at::Tensor>& weight,
                             double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "adaln_modulate_backward", [&] {
    using T = scalar_t;
    const int64_t channels = x.size(2);
    const auto to = write_tokens<T>(grad_x);
    const auto of_grad = read_tokens<T>(grad), of_x = read_tokens<T>(x), of_scale = read_tokens<T>(scale);
    each_block(x.size(0), x.size(1), kBlockTokens, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
      Columns<T> rows(2, 1, channels);
      float *grad_sum = rows.row(0), *product_sum = rows.row(1), *gain = rows.row(2);
      read_gain(gain, of_scale.at(b, 0), read_parameter<T>(weight), channels);
      for (int64_t l = first; l < last; ++l) {
        T* row = to.at(b, l);
        modulate_row_backward(
            of_grad.at(b, l), of_x.at(b, l), gain, grad_sum, product_sum, channels, static_cast<float>(eps),
            [&](int64_t c, auto count, const Pack& value) VIDGEN_INLINE { store_pack(row + c, value, count); });
        rows.end_row();
      }
      rows.write(sums, b, block);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
