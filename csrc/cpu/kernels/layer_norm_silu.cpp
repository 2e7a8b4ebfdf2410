// SPDX-License-Identifier: Apache-2.0
// silu(layer_norm over the channels of each position), float32 inside. Compiled once per instruction set.
#include "cpu/kernels/layer_norm_silu.h"

#include <ATen/Parallel.h>

#include "common/moments.h"
#include "common/silu.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// Rows are normalised this many together: their horizontal sums do not wait for each other.
constexpr int64_t kRows = 16;

template <typename T>
void channels_last_rows(T* out, const T* x, const T* weight, const T* bias, int64_t rows, int64_t channels, float eps) {
  float mean[kRows], rstd[kRows];
  for (int64_t r = 0; r < rows; ++r) mean[r] = row_sum(x + r * channels, channels) / channels;
  for (int64_t r = 0; r < rows; ++r) rstd[r] = row_squares(x + r * channels, channels, mean[r]);
  for (int64_t r = 0; r < rows; ++r) rstd[r] = 1 / std::sqrt(rstd[r] / channels + eps);
  cover_packs(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
    const Pack gain = load_pack(weight + c, count), offset = load_pack(bias + c, count);
    for (int64_t r = 0; r < rows; ++r) {
      const Pack normalised = (load_pack(x + r * channels + c, count) - Vec(mean[r])) * Vec(rstd[r]);
      store_pack(out + r * channels + c, silu<T>(fmadd(normalised, gain, offset)), count);
    }
  });
}

// One pack of positions, side by side; the next channel of each is `positions` further on.
template <typename T, typename Count>
C10_ALWAYS_INLINE void channels_first_tile(T* out, const T* x, const T* weight, const T* bias, int64_t channels,
                                           int64_t positions, float eps, Count count) {
  const auto [mean, rstd] = column_moments(x, channels, positions, eps, count);
  for (int64_t c = 0; c < channels; ++c) {
    const Pack normalised = (load_pack(x + c * positions, count) - mean) * rstd;
    const Vec gain(static_cast<float>(weight[c])), offset(static_cast<float>(bias[c]));
    store_pack(out + c * positions, silu<T>(fmadd(normalised, gain, offset)), count);
  }
}

template <typename T>
void channels_first(const at::Tensor& out, const at::Tensor& x, const T* weight, const T* bias, float eps) {
  const int64_t channels = x.size(1), positions = x.size(2), tiles = (positions + kWidth - 1) / kWidth;
  at::parallel_for(0, x.size(0) * tiles, std::max<int64_t>(1, 256 / channels), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t p = tile % tiles * kWidth, first = tile / tiles * channels * positions + p;
      const T* from = x.const_data_ptr<T>() + first;
      T* to = out.mutable_data_ptr<T>() + first;
      if (p + kWidth <= positions) {
        channels_first_tile(to, from, weight, bias, channels, positions, eps, Whole{});
      } else {
        channels_first_tile(to, from, weight, bias, channels, positions, eps, positions - p);
      }
    }
  });
}

template <typename T>
void channels_last(const at::Tensor& out, const at::Tensor& x, const T* weight, const T* bias, float eps) {
  const int64_t rows = x.size(0) * x.size(1), channels = x.size(2);
  at::parallel_for(0, rows, std::max(kRows, 16384 / channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) {
      channels_last_rows(out.mutable_data_ptr<T>() + row * channels, x.const_data_ptr<T>() + row * channels, weight,
                         bias, std::min(kRows, end - row), channels, eps);
    }
  });
}

}  // namespace

void layer_norm_silu(const at::Tensor& out, const at::Tensor& x, bool last, const at::Tensor& weight,
                     const at::Tensor& bias, double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "layer_norm_silu", [&] {
    const auto *w = weight.const_data_ptr<scalar_t>(), *b = bias.const_data_ptr<scalar_t>();
    (last ? channels_last<scalar_t> : channels_first<scalar_t>)(out, x, w, b, static_cast<float>(eps));
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
