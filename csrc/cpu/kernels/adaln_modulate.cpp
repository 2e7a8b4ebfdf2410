// SPDX-License-Identifier: Apache-2.0
// out[b, l, :] = normalise(x[b, l, :]) * (1 + scale) + shift, float32 inside. Compiled once per instruction set.
#include "cpu/kernels/adaln_modulate.h"

#include "common/modulation.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void adaln_modulate(const at::Tensor& out, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "adaln_modulate", [&] {
    using T = scalar_t;
    const auto to = write_tokens<T>(out);
    const auto from = read_tokens<T>(x), of_shift = read_tokens<T>(shift), of_scale = read_tokens<T>(scale);
    const T *w = read_parameter<T>(weight), *bi = read_parameter<T>(bias);
    each_token(x, [&](int64_t b, int64_t l) {
      const T* row = from.at(b, l);
      modulate_row(to.at(b, l), row, row_sum(row, x.size(2)), of_shift.at(b, l), of_scale.at(b, l), w, bi, x.size(2),
                   static_cast<float>(eps));
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
