// SPDX-License-Identifier: Apache-2.0
// out[b, l, :] = normalise(x[b, l, :]) * (1 + scale) + shift, float32 inside. Compiled once per instruction set.
#include "cpu/kernels/adaln_modulate.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "common/rows.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// weight and bias are null where LayerNorm has none.
template <typename T>
void modulate_row(T* out, const T* x, const T* shift, const T* scale, const T* weight, const T* bias, int64_t channels,
                  float eps) {
  const Wide mean(sum_row(x, channels, [](const Wide& v) { return v; }) / channels);
  const float variance = sum_row(x, channels, [&](const Wide& v) { return (v - mean) * (v - mean); }) / channels;
  const Wide rstd(1.0f / std::sqrt(variance + eps)), one(1.0f);
  each_chunk(channels, [&](int64_t c, auto count) {
    Wide y = (load_row(x + c, count) - mean) * rstd;
    if (weight) y = y * load_row(weight + c, count);
    if (bias) y = y + load_row(bias + c, count);
    store_row(out + c, fmadd(y, one + load_row(scale + c, count), load_row(shift + c, count)), count);
  });
}

int64_t token_stride(const at::Tensor& t) { return t.dim() == 3 ? t.stride(1) : 0; }

}  // namespace

void adaln_modulate(const at::Tensor& out, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  const int64_t sequence = x.size(1), channels = x.size(2);
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "adaln_modulate", [&] {
    const scalar_t* w = weight ? weight->const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* bi = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, 32768 / (channels * sizeof(scalar_t)));
    at::parallel_for(0, x.size(0) * sequence, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / sequence, l = row % sequence;
        modulate_row(out.mutable_data_ptr<scalar_t>() + row * channels,
                     x.const_data_ptr<scalar_t>() + b * x.stride(0) + l * x.stride(1),
                     shift.const_data_ptr<scalar_t>() + b * shift.stride(0) + l * token_stride(shift),
                     scale.const_data_ptr<scalar_t>() + b * scale.stride(0) + l * token_stride(scale), w, bi, channels,
                     static_cast<float>(eps));
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
