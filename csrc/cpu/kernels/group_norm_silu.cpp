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
          store_pack(to + p, silu((load_pack(from + p, count) - mean) * gain + offset), count);
        });
      }
    }
  });
}

// Positions are rows of channels here: sums run down the columns, in the lanes of T's packs.
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
        f(block, block / blocks_ * positions_ + row, std::min(rows_, positions_ - row));
      }
    });
  }

  // Sum down each column of term(pack, offset), in the order of channels.
  template <typename F>
  void sum_columns(float* sums, const T* x, int64_t rows, F add) const {
    each_pack(channels_, [&](int64_t c, auto count) VIDGEN_INLINE {
      Pack total = splat(0);
      for (int64_t r = 0; r < rows; ++r) add(total, load_pack(x + r * channels_ + c, count), c);
      store_ordered<T>(sums + c, total);
    });
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
    for (int64_t c = 0; c < channels_; ++c) means[c] = part[c / per_group];
    sum_columns(sums.data(), x, rows, [&](Pack& total, const Pack& v, int64_t c) VIDGEN_INLINE {
      const Pack centred = v - load_ordered<T>(means.data() + c);
      total = fmadd(centred, centred, total);
    });
    gather(part + groups_, 1);
  }

  // Mean, gain and offset of each channel of one sample.
  void merge(float* affine, const float* parts, const T* weight, const T* bias, double eps) const {
    const int64_t per_group = channels_ / groups_;
    for (int64_t g = 0; g < groups_; ++g) {
      Spread spread;
      for (int64_t block = 0; block < blocks_; ++block) {
        const float* part = parts + block * 2 * groups_;
        const int64_t rows = std::min(rows_, positions_ - block * rows_);
        spread.add(part[g], part[groups_ + g], rows * per_group);
      }
      const Moments moments = spread.moments(eps);
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        affine[c] = moments.mean;
        affine[padded_ + c] = weight ? moments.rstd * static_cast<float>(weight[c]) : moments.rstd;
        affine[2 * padded_ + c] = bias ? static_cast<float>(bias[c]) : 0.0f;
      }
    }
  }

  void apply(T* out, const T* x, int64_t rows, const float* affine) const {
    each_pack(channels_, [&](int64_t c, auto count) VIDGEN_INLINE {
      const Pack mean = load_ordered<T>(affine + c), gain = load_ordered<T>(affine + padded_ + c);
      const Pack offset = load_ordered<T>(affine + 2 * padded_ + c);
      for (int64_t i = c; i < rows * channels_; i += channels_) {
        store_pack(out + i, silu(fmadd(load_pack(x + i, count) - mean, gain, offset)), count);
      }
    });
  }

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
