// SPDX-License-Identifier: Apache-2.0
// Gradients of gated_residual in one pass over the sequence. Compiled once per instruction set.
#include "cpu/kernels/gated_residual_backward.h"

#include "common/columns.h"
#include "common/modulation.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void gated_residual_backward(const at::Tensor& sums, const at::Tensor& grad_y, const at::Tensor& grad,
                             const at::Tensor& gate, const at::Tensor& y) {
  VIDGEN_DISPATCH_FLOATS(y.scalar_type(), "gated_residual_backward", [&] {
    using T = scalar_t;
    const int64_t channels = y.size(2);
    const auto to = write_tokens<T>(grad_y);
    const auto of_grad = read_tokens<T>(grad), of_gate = read_tokens<T>(gate), of_y = read_tokens<T>(y);
    each_block(y.size(0), y.size(1), kBlockTokens, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
      Columns<T> rows(1, 0, channels);
      float* total = rows.row(0);
      const T* gate_row = of_gate.at(b, 0);
      for (int64_t l = first; l < last; ++l) {
        const T *grad_row = of_grad.at(b, l), *y_row = of_y.at(b, l);
        T* row = to.at(b, l);
        each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
          const Pack g = load_pack(grad_row + c, count);
          store_pack(total + c, fmadd(g, load_pack(y_row + c, count), load_pack(total + c)));
          store_pack(row + c, g * load_pack(gate_row + c, count), count);
        });
        rows.end_row();
      }
      rows.write(sums, b, block);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
