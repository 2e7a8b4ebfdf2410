// SPDX-License-Identifier: Apache-2.0
// silu(group_norm(x)), float32 inside. Compiled once per instruction set. Blocks do not depend on the number of
// threads, and so neither do results.
#include "cpu/kernels/group_norm_silu.h"

#include <ATen/Parallel.h>

#include <vector>

#include "common/moments.h"
#include "common/silu.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 8192;  // elements

template <typename T>
Moments group_moments(const T* x, int64_t count, double eps) {
  Spread spread;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = std::min(kBlock, count - i);
    const float mean = row_sum(x + i, n) / n;
    spread.add(mean, row_squares(x + i, n, mean), n);
  }
  return spread.moments(eps);
}

template <typename T>
void channels_first(const at::Tensor& out, const at::Tensor& x, int64_t num_groups, const T* weight, const T* bias,
                    double eps) {
  const int64_t channels = x.size(1), positions = x.size(2), per_group = channels / num_groups;
  at::parallel_for(0, x.size(0) * num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const T* group = x.const_data_ptr<T>() + g * per_group * positions;
      const Moments moments = group_moments(group, per_group * positions, eps);
      for (int64_t i = 0; i < per_group; ++i) {
        const int64_t c = g % num_groups * per_group + i;
        const T* from = group + i * positions;
        T* to = out.mutable_data_ptr<T>() + (g * per_group + i) * positions;
        const Vec mean(moments.mean), gain(weight ? moments.rstd * static_cast<float>(weight[c]) : moments.rstd);
        const Vec offset(bias ? static_cast<float>(bias[c]) : 0.0f);
        each_pack(positions, [&](int64_t p, auto count) VIDGEN_INLINE {
          store_pack(to + p, silu<T>((load_pack(from + p, count) - mean) * gain + offset), count);
        });
      }
    }
  });
}

// Positions are rows of channels here, and sums run down the columns.
template <typename T>
class ChannelsLast {
 public:
  ChannelsLast(const at::Tensor& x, int64_t num_groups)
      : x_(x),
        positions_(x.size(1)),
        channels_(x.size(2)),
        padded_((channels_ + kWidth - 1) / kWidth * kWidth),
        groups_(num_groups),
        rows_(std::max<int64_t>(1, kBlock / channels_)),
        blocks_((positions_ + rows_ - 1) / rows_) {}

  void run(const at::Tensor& out, const T* weight, const T* bias, double eps) {
    std::vector<float> parts(x_.size(0) * blocks_ * 2 * groups_);
    each_block([&](int64_t block, int64_t first, int64_t count) {
      block_moments(parts.data() + block * 2 * groups_, x_.const_data_ptr<T>() + first * channels_, count);
    });
    std::vector<float> affine(x_.size(0) * 3 * padded_);
    for (int64_t b = 0; b < x_.size(0); ++b) {
      merge(affine.data() + b * 3 * padded_, parts.data() + b * blocks_ * 2 * groups_, weight, bias, eps);
    }
    each_block([&](int64_t block, int64_t first, int64_t count) {
      apply(out.mutable_data_ptr<T>() + first * channels_, x_.const_data_ptr<T>() + first * channels_, count,
            affine.data() + block / blocks_ * 3 * padded_);
    });
  }

 private:
  // f(block, first row, rows), rows counted through the whole batch.
  template <typename F>
  void each_block(F f) const {
    at::parallel_for(0, x_.size(0) * blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block % blocks_ * rows_;
        f(block, block / blocks_ * positions_ + row, rows_of(block % blocks_));
      }
    });
  }

  // Sums down the columns of what add(total, pack, offset) adds, in the order of channels. A few rows at a time, all
  // their columns: memory is then read nearly in order.
  template <typename F>
  void sum_columns(float* sums, const T* x, int64_t rows, F add) const {
    std::fill_n(sums, padded_, 0.0f);
    for (int64_t first = 0; first < rows; first += 4) {
      const int64_t end = std::min(first + 4, rows);
      each_pack(channels_, [&](int64_t c, auto count) VIDGEN_INLINE {
        Pack total = load_pack(sums + c);
        for (int64_t r = first; r < end; ++r) add(total, load_pack(x + r * channels_ + c, count), c);
        store_pack(sums + c, total);
      });
    }
    for (int64_t c = 0; c < channels_; c += kWidth) store_ordered<T>(sums + c, load_pack(sums + c));
  }

  // Mean and sum of squared distances from it of each group.
  void block_moments(float* part, const T* x, int64_t rows) const {
    const int64_t per_group = channels_ / groups_;
    std::vector<float> sums(padded_), means(padded_);
    const auto gather = [&](float* to, float divisor) {
      for (int64_t g = 0; g < groups_; ++g) {
        float total = 0;
        for (int64_t i = 0; i < per_group; ++i) total += sums[g * per_group + i];
        to[g] = total / divisor;
      }
    };
    sum_columns(sums.data(), x, rows, [](Pack& total, const Pack& v, int64_t) VIDGEN_INLINE { total = total + v; });
    gather(part, rows * per_group);
    for (int64_t g = 0; g < groups_; ++g) std::fill_n(means.data() + g * per_group, per_group, part[g]);
    for (int64_t c = 0; c < channels_; c += kWidth) store_pack(&means[c], load_ordered<T>(&means[c]));
    sum_columns(sums.data(), x, rows, [&](Pack& total, const Pack& v, int64_t c) VIDGEN_INLINE {
      const Pack centred = v - load_pack(&means[c]);
      total = fmadd(centred, centred, total);
    });
    gather(part + groups_, 1);
  }

  // Mean, gain and offset of each channel of one sample, in the lanes of T's packs.
  void merge(float* affine, const float* parts, const T* weight, const T* bias, double eps) const {
    const int64_t per_group = channels_ / groups_;
    std::vector<double> mean(groups_), squares(groups_);
    const double total = static_cast<double>(positions_) * per_group;
    for (int64_t block = 0; block < blocks_; ++block) {
      const double share = rows_of(block) * per_group / total;
      for (int64_t g = 0; g < groups_; ++g) mean[g] += share * parts[block * 2 * groups_ + g];
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      const float *means = parts + block * 2 * groups_, *within = means + groups_;
      const double count = rows_of(block) * per_group;
      for (int64_t g = 0; g < groups_; ++g) {
        const double distance = means[g] - mean[g];
        squares[g] += within[g] + count * distance * distance;
      }
    }
    for (int64_t c = 0; c < channels_; ++c) {
      const int64_t g = c / per_group;
      const float rstd = 1 / std::sqrt(squares[g] / total + eps);
      affine[c] = mean[g];
      affine[padded_ + c] = weight ? rstd * static_cast<float>(weight[c]) : rstd;
      affine[2 * padded_ + c] = bias ? static_cast<float>(bias[c]) : 0.0f;
    }
    for (int64_t i = 0; i < 3 * padded_; i += kWidth) store_pack(affine + i, load_ordered<T>(affine + i));
  }

  void apply(T* out, const T* x, int64_t rows, const float* affine) const {
    const float *mean = affine, *gain = affine + padded_, *offset = affine + 2 * padded_;
    for (int64_t r = 0; r < rows; ++r, out += channels_, x += channels_) {
      each_pack(channels_, [&](int64_t c, auto count) VIDGEN_INLINE {
        const Pack centred = load_pack(x + c, count) - load_pack(mean + c);
        store_pack(out + c, silu<T>(fmadd(centred, load_pack(gain + c), load_pack(offset + c))), count);
      });
    }
  }

  int64_t rows_of(int64_t block) const { return std::min(rows_, positions_ - block * rows_); }

  const at::Tensor& x_;
  const int64_t positions_, channels_, padded_, groups_, rows_, blocks_;
};

}  // namespace

void group_norm_silu(const at::Tensor& out, const at::Tensor& x, int64_t num_groups, bool channels_last,
                     const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "group_norm_silu", [&] {
    const auto *w = read_parameter<scalar_t>(weight), *b = read_parameter<scalar_t>(bias);
    if (channels_last) {
      ChannelsLast<scalar_t>(x, num_groups).run(out, w, b, eps);
    } else {
      channels_first(out, x, num_groups, w, b, eps);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
