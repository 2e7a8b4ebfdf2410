// SPDX-License-Identifier: Apache-2.0
// Gradients of group_norm_silu. Compiled once per instruction set.
#include "cpu/kernels/group_norm_silu_backward.h"

#include "common/group_norm.h"
#include "common/silu.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// One channel of a group: what it is multiplied by and shifted by after its normalisation.
struct Channel {
  Vec mean, rstd, gain, offset;

  C10_ALWAYS_INLINE Pack normalise(const Pack& x) const { return (x - mean) * rstd; }
  template <typename T>
  C10_ALWAYS_INLINE Pack before_silu(const Pack& grad, const Pack& normalised) const {
    return silu_backward<T>(grad, fmadd(normalised, gain, offset));
  }
};

struct Sums {
  double grad = 0, product = 0;
};

// The gradient before SiLU is needed twice. It is kept where there is room, since it costs an exponential and a
// division: in the result where that is float32, else in scratch of so many floats at most, in the lanes of T's packs.
constexpr int64_t kKept = int64_t(1) << 20;

template <typename T, typename Count>
C10_ALWAYS_INLINE void keep_pack(float* to, const Pack& x, Count count) {
  if constexpr (std::is_same_v<T, float>) {
    store_pack(to, x, count);
  } else {
    store_pack(to, x);
  }
}
template <typename T, typename Count>
C10_ALWAYS_INLINE Pack kept_pack(const float* from, Count count) {
  if constexpr (std::is_same_v<T, float>) {
    return load_pack(from, count);
  } else {
    return load_pack(from);
  }
}

int64_t padded_positions(int64_t positions) { return (positions + kWidth - 1) / kWidth * kWidth; }

// Over the positions of one channel, in short blocks: long float32 sums would lose digits.
constexpr int64_t kSummed = 1024;

template <bool keeps, typename T>
Sums channel_sums(float* kept, const T* grad, const T* x, int64_t positions, const Channel& channel) {
  Sums sums;
  for (int64_t first = 0; first < positions; first += kSummed) {
    Pack total = splat(0), product = splat(0);
    each_pack(std::min(kSummed, positions - first), [&](int64_t i, auto count) VIDGEN_INLINE {
      const Pack normalised = channel.normalise(load_pack(x + first + i, count));
      const Pack g = channel.before_silu<T>(load_pack(grad + first + i, count), normalised);
      if constexpr (keeps) keep_pack<T>(kept + first + i, g, count);
      total = total + g;
      product = fmadd(g, normalised, product);
    });
    sums.grad += sum(total);
    sums.product += sum(product);
  }
  return sums;
}

template <bool keeps, typename T>
void channel_gradient(T* to, const float* kept, const T* grad, const T* x, int64_t positions, const Channel& channel,
                      const Vec& a, const Vec& b) {
  each_pack(positions, [&](int64_t i, auto count) VIDGEN_INLINE {
    const Pack normalised = channel.normalise(load_pack(x + i, count));
    const Pack g =
        keeps ? kept_pack<T>(kept + i, count) : channel.before_silu<T>(load_pack(grad + i, count), normalised);
    store_pack(to + i, (g * channel.gain - a - normalised * b) * channel.rstd, count);
  });
}

// One group of one sample at a time.
template <bool keeps, typename T>
void channels_first(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& x,
                    int64_t num_groups, const T* weight, const T* bias, double eps) {
  const int64_t channels = x.size(1), positions = x.size(2), per_group = channels / num_groups;
  const int64_t count = per_group * positions, padded = padded_positions(positions);
  float *grad_sums = sums.mutable_data_ptr<float>(), *product_sums = grad_sums + sums.stride(0);
  at::parallel_for(0, x.size(0) * num_groups, 1, [&](int64_t begin, int64_t end) {
    constexpr bool in_place = std::is_same_v<T, float>;
    std::vector<float> scratch(keeps && !in_place ? per_group * padded : 0);
    for (int64_t group = begin; group < end; ++group) {
      const T *from = x.const_data_ptr<T>() + group * count, *grads = grad.const_data_ptr<T>() + group * count;
      const int64_t first = group % num_groups * per_group;
      const auto gain = [&](int64_t i) { return weight ? static_cast<float>(weight[first + i]) : 1.0f; };
      const Moments moments = group_moments(from, count, eps);
      const auto channel = [&](int64_t i) -> Channel {
        const float offset = bias ? static_cast<float>(bias[first + i]) : 0.0f;
        return {Vec(moments.mean), Vec(moments.rstd), Vec(gain(i)), Vec(offset)};
      };
      T* to = grad_x.mutable_data_ptr<T>() + group * count;
      const auto kept = [&](int64_t i) {
        if constexpr (in_place) {
          return to + i * positions;
        } else {
          return scratch.data() + i * padded;
        }
      };
      double through_mean = 0, through_rstd = 0;
      for (int64_t i = 0; i < per_group; ++i) {
        const int64_t at = i * positions;
        const Sums of = channel_sums<keeps>(kept(i), grads + at, from + at, positions, channel(i));
        grad_sums[group * per_group + i] = of.grad;
        product_sums[group * per_group + i] = of.product;
        through_mean += gain(i) * of.grad;
        through_rstd += gain(i) * of.product;
      }
      const Vec a(through_mean / count), b(through_rstd / count);
      for (int64_t i = 0; i < per_group; ++i) {
        const int64_t at = i * positions;
        channel_gradient<keeps>(to + at, kept(i), grads + at, from + at, positions, channel(i), a, b);
      }
    }
  });
}

// Rows of channels: the gradient before SiLU of a pack of them.
struct Affine {
  const float *mean, *rstd, *gain, *offset;

  Affine(const float* lanes, int64_t padded)
      : mean(lanes), rstd(lanes + padded), gain(lanes + 2 * padded), offset(lanes + 3 * padded) {}
  C10_ALWAYS_INLINE Pack normalise(const Pack& x, int64_t c) const {
    return (x - load_pack(mean + c)) * load_pack(rstd + c);
  }
  template <typename T>
  C10_ALWAYS_INLINE Pack before_silu(const Pack& grad, const Pack& normalised, int64_t c) const {
    return silu_backward<T>(grad, fmadd(normalised, load_pack(gain + c), load_pack(offset + c)));
  }
};

template <typename T>
void block_sums(const ChannelsLast<T>& rows, const at::Tensor& sums, const T* grad, const std::vector<float>& affine) {
  rows.each_block([&](int64_t b, int64_t block, int64_t first, int64_t last) {
    const Affine of(affine.data() + b * 4 * rows.padded, rows.padded);
    Columns<T> columns(2, 0, rows.channels);
    float *grad_sum = columns.row(0), *product_sum = columns.row(1);
    for (int64_t i = first * rows.channels; i < last * rows.channels; i += rows.channels) {
      each_pack(rows.channels, [&](int64_t c, auto count) VIDGEN_INLINE {
        const Pack normalised = of.normalise(load_pack(rows.data + i + c, count), c);
        const Pack g = of.before_silu<T>(load_pack(grad + i + c, count), normalised, c);
        add_to(grad_sum + c, g);
        store_pack(product_sum + c, fmadd(g, normalised, load_pack(product_sum + c)));
      });
      columns.end_row();
    }
    columns.write(sums, b, block);
  });
}

// (batch, 2, padded) lanes: what the mean and the rstd of its group take from the gradient of each channel.
template <typename T>
std::vector<float> through_moments(const ChannelsLast<T>& rows, const at::Tensor& sums, const T* weight) {
  std::vector<float> lanes(rows.batch * 2 * rows.padded);
  const int64_t blocks = sums.size(2);
  for (int64_t i = 0; i < rows.batch * 2; ++i) {
    const int64_t b = i / 2, which = i % 2;
    const float* from = sums.const_data_ptr<float>() + (which * rows.batch + b) * blocks * rows.channels;
    std::vector<double> totals(rows.groups);
    for (int64_t at = 0; at < blocks * rows.channels; ++at) {
      const int64_t c = at % rows.channels;
      totals[c / rows.per_group] += from[at] * (weight ? static_cast<double>(static_cast<float>(weight[c])) : 1.0);
    }
    float* to = lanes.data() + i * rows.padded;
    for (int64_t c = 0; c < rows.channels; ++c) {
      to[c] = totals[c / rows.per_group] / (static_cast<double>(rows.positions) * rows.per_group);
    }
    rows.to_lanes(to, rows.padded);
  }
  return lanes;
}

template <typename T>
void channels_last(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& x,
                   int64_t num_groups, const T* weight, const T* bias, double eps) {
  const ChannelsLast<T> rows(x, num_groups);
  const T* grads = grad.const_data_ptr<T>();
  T* to = grad_x.mutable_data_ptr<T>();
  const auto affine = rows.affine(weight, bias, eps);
  block_sums(rows, sums, grads, affine);
  const auto through = through_moments(rows, sums, weight);
  rows.each_block([&](int64_t b, int64_t, int64_t first, int64_t last) {
    const Affine of(affine.data() + b * 4 * rows.padded, rows.padded);
    const float *mean = through.data() + b * 2 * rows.padded, *rstd = mean + rows.padded;
    for (int64_t i = first * rows.channels; i < last * rows.channels; i += rows.channels) {
      each_pack(rows.channels, [&](int64_t c, auto count) VIDGEN_INLINE {
        const Pack normalised = of.normalise(load_pack(rows.data + i + c, count), c);
        const Pack g = of.before_silu<T>(load_pack(grads + i + c, count), normalised, c);
        const Pack inner = g * load_pack(of.gain + c);
        const Pack centred = inner - load_pack(mean + c) - normalised * load_pack(rstd + c);
        store_pack(to + i + c, centred * load_pack(of.rstd + c), count);
      });
    }
  });
}

}  // namespace

void group_norm_silu_backward(const at::Tensor& grad_x, const at::Tensor& sums, const at::Tensor& grad,
                              const at::Tensor& x, int64_t num_groups, bool last,
                              const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                              double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "group_norm_silu_backward", [&] {
    const auto *w = read_parameter<scalar_t>(weight), *b = read_parameter<scalar_t>(bias);
    const bool keeps = std::is_same_v<scalar_t, float> || x.size(1) / num_groups * padded_positions(x.size(2)) <= kKept;
    const auto first = keeps ? channels_first<true, scalar_t> : channels_first<false, scalar_t>;
    (last ? channels_last<scalar_t> : first)(grad_x, sums, grad, x, num_groups, w, b, eps);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
