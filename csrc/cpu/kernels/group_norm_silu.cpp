// SPDX-License-Identifier: Apache-2.0
// silu(group_norm(x)), float32 inside. Compiled once per instruction set. Blocks do not depend on the number of
// threads, and so neither do results.
#include "cpu/kernels/group_norm_silu.h"

#include "common/group_norm.h"
#include "common/silu.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

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
          store_pack(to + p, silu<T>(fmadd(load_pack(from + p, count) - mean, gain, offset)), count);
        });
      }
    }
  });
}

template <typename T>
void channels_last(const at::Tensor& out, const at::Tensor& x, int64_t num_groups, const T* weight, const T* bias,
                   double eps) {
  const ChannelsLast<T> rows(x, num_groups);
  const int64_t channels = rows.channels, padded = rows.padded;
  std::vector<float> affine = rows.affine(weight, bias, eps);
  rows.each_block([&](int64_t b, int64_t, int64_t first, int64_t last) {
    const float *mean = affine.data() + b * 4 * padded, *rstd = mean + padded, *gain = rstd + padded;
    const float* offset = gain + padded;
    for (int64_t i = first * channels; i < last * channels; i += channels) {
      const T* from = x.const_data_ptr<T>() + i;
      T* to = out.mutable_data_ptr<T>() + i;
      each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
        const Pack normalised = (load_pack(from + c, count) - load_pack(mean + c)) * load_pack(rstd + c);
        store_pack(to + c, silu<T>(fmadd(normalised, load_pack(gain + c), load_pack(offset + c))), count);
      });
    }
  });
}

}  // namespace

void group_norm_silu(const at::Tensor& out, const at::Tensor& x, int64_t num_groups, bool last,
                     const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "group_norm_silu", [&] {
    const auto *w = read_parameter<scalar_t>(weight), *b = read_parameter<scalar_t>(bias);
    (last ? channels_last<scalar_t> : channels_first<scalar_t>)(out, x, num_groups, w, b, eps);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
