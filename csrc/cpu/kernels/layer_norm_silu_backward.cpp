// SPDX-License-Identifier: Apache-2.0
// Gradients of layer_norm_silu in one pass over the positions. Compiled once per instruction set.
#include "cpu/kernels/layer_norm_silu_backward.h"

#include "common/columns.h"
#include "common/moments.h"
#include "common/silu.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// One row of channels, and scratch that makes it whole packs: elements past its end are zero, and so are their
// gradients.
template <typename T>
class Row {
 public:
  Row(const T* weight, const T* bias, int64_t channels)
      : channels_(channels),
        padded_((channels + kWidth - 1) / kWidth * kWidth),
        scratch_(5 * padded_),
        weight_(pad(weight, 0)),
        bias_(pad(bias, 1)),
        inner_(padded_) {}

  void backward(T* to, const T* grad, const T* x, float* grad_sum, float* product_sum, float eps) {
    const Moments moments = row_moments(x, channels_, eps);
    const Vec mean(moments.mean), rstd(moments.rstd);
    grad = pad(grad, 2);
    x = pad(x, 3);
    Pack through_mean = splat(0), through_rstd = splat(0);
    for (int64_t c = 0; c < padded_; c += kWidth) {
      const Pack normalised = (load_pack(x + c) - mean) * rstd, gain = load_pack(weight_ + c);
      const Pack g = silu_backward<T>(load_pack(grad + c), fmadd(normalised, gain, load_pack(bias_ + c)));
      const Pack inner = g * gain;
      add_to(grad_sum + c, g);
      store_pack(product_sum + c, fmadd(g, normalised, load_pack(product_sum + c)));
      store_pack(&inner_[c], inner);
      through_mean = through_mean + inner;
      through_rstd = fmadd(inner, normalised, through_rstd);
    }
    const Vec a(sum(through_mean) / channels_), b(sum(through_rstd) / channels_);
    T* whole = channels_ == padded_ ? to : scratch_.data() + 4 * padded_;
    for (int64_t c = 0; c < padded_; c += kWidth) {
      const Pack normalised = (load_pack(x + c) - mean) * rstd;
      store_pack(whole + c, (load_pack(&inner_[c]) - a - normalised * b) * rstd);
    }
    if (whole != to) std::copy_n(whole, channels_, to);
  }

 private:
  const T* pad(const T* row, int64_t i) {
    return channels_ == padded_ ? row : std::copy_n(row, channels_, scratch_.data() + i * padded_) - channels_;
  }

  const int64_t channels_, padded_;
  std::vector<T> scratch_;
  const T *const weight_, *const bias_;
  std::vector<float> inner_;
};

template <typename T>
void channels_last(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& x,
                   const T* weight, const T* bias, float eps) {
  const int64_t positions = x.size(1), channels = x.size(2);
  each_block(x.size(0), positions, kBlockPositions, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
    Columns<T> columns(2, 0, channels);
    Row<T> row(weight, bias, channels);
    for (int64_t p = first; p < last; ++p) {
      const int64_t at = (b * positions + p) * channels;
      row.backward(grad_x.mutable_data_ptr<T>() + at, grad.const_data_ptr<T>() + at, x.const_data_ptr<T>() + at,
                   columns.row(0), columns.row(1), eps);
      columns.end_row();
    }
    columns.write(sums, b, block);
  });
}

// What one pack of positions, side by side, needs of scratch: a vector of each sum and a pack for each channel.
struct Scratch {
  explicit Scratch(int64_t channels)
      : grad_sum(channels * Vec::size()), product_sum(channels * Vec::size()), inner(channels * kWidth) {}
  std::vector<float> grad_sum, product_sum, inner;
};

C10_ALWAYS_INLINE void add_folded(float* to, const Pack& x) { (Vec::loadu(to) + fold(x)).store(to); }

template <typename T, typename Count>
C10_ALWAYS_INLINE void channels_first_tile(T* to, const T* grad, const T* x, const T* weight, const T* bias,
                                           Scratch& scratch, int64_t channels, int64_t positions, float eps,
                                           Count count) {
  const Vec share(1.0f / channels);
  const auto [mean, rstd] = column_moments(x, channels, positions, eps, count);
  Pack through_mean = splat(0), through_rstd = splat(0);
  for (int64_t c = 0; c < channels; ++c) {
    const Pack normalised = (load_pack(x + c * positions, count) - mean) * rstd;
    const Vec gain(static_cast<float>(weight[c])), offset(static_cast<float>(bias[c]));
    const Pack g = silu_backward<T>(load_pack(grad + c * positions, count), fmadd(normalised, gain, offset));
    add_folded(&scratch.grad_sum[c * Vec::size()], g);
    add_folded(&scratch.product_sum[c * Vec::size()], g * normalised);
    const Pack weighted = g * gain;
    store_pack(&scratch.inner[c * kWidth], weighted);
    through_mean = through_mean + weighted;
    through_rstd = fmadd(weighted, normalised, through_rstd);
  }
  const Pack a = through_mean * share, b = through_rstd * share;
  for (int64_t c = 0; c < channels; ++c) {
    const Pack normalised = (load_pack(x + c * positions, count) - mean) * rstd;
    store_pack(to + c * positions, (load_pack(&scratch.inner[c * kWidth]) - a - normalised * b) * rstd, count);
  }
}

template <typename T>
void channels_first(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& x,
                    const T* weight, const T* bias, float eps) {
  const int64_t channels = x.size(1), positions = x.size(2);
  each_block(x.size(0), positions, kBlockPositions, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
    Scratch scratch(channels);
    for (int64_t p = first; p < last; p += kWidth) {
      const int64_t at = b * channels * positions + p;
      T* to = grad_x.mutable_data_ptr<T>() + at;
      const T *grad_tile = grad.const_data_ptr<T>() + at, *tile = x.const_data_ptr<T>() + at;
      if (p + kWidth <= last) {
        channels_first_tile(to, grad_tile, tile, weight, bias, scratch, channels, positions, eps, Whole{});
      } else {
        channels_first_tile(to, grad_tile, tile, weight, bias, scratch, channels, positions, eps, last - p);
      }
    }
    float* to = sums.mutable_data_ptr<float>() + (b * sums.size(2) + block) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = sum(Vec::loadu(&scratch.grad_sum[c * Vec::size()]));
      to[sums.stride(0) + c] = sum(Vec::loadu(&scratch.product_sum[c * Vec::size()]));
    }
  });
}

}  // namespace

void layer_norm_silu_backward(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                              const at::Tensor& x, bool last, const at::Tensor& weight, const at::Tensor& bias,
                              double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "layer_norm_silu_backward", [&] {
    const auto *w = weight.const_data_ptr<scalar_t>(), *b = bias.const_data_ptr<scalar_t>();
    (last ? channels_last<scalar_t> : channels_first<scalar_t>)(grad_x, sums, grad, x, w, b, static_cast<float>(eps));
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
