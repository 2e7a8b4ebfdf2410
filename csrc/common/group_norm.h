// SPDX-License-Identifier: Apache-2.0
// Moments of groups of channels where positions are rows of channels: sums run down the columns. For kernel sources
// only. Blocks of rows do not depend on the number of threads, and so neither do results.
#pragma once

#include <vector>

#include "common/columns.h"
#include "common/moments.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// x is (batch, positions, channels), contiguous. "Lanes" are rows of float32 scratch in the lanes of T's packs.
template <typename T>
struct ChannelsLast {
  ChannelsLast(const at::Tensor& x, int64_t num_groups)
      : data(x.const_data_ptr<T>()),
        batch(x.size(0)),
        positions(x.size(1)),
        channels(x.size(2)),
        padded((channels + kWidth - 1) / kWidth * kWidth),
        groups(num_groups),
        per_group(channels / num_groups),
        rows(rows_per_block(channels)) {}

  // f(sample, block, first row, past the last one), rows counted through the whole batch.
  template <typename F>
  void each_block(F f) const {
    CPU_CAPABILITY::each_block(batch, positions, rows, [&](int64_t b, int64_t block, int64_t first, int64_t last) {
      f(b, block, b * positions + first, b * positions + last);
    });
  }

  // (batch, 4, padded) lanes: mean, rstd, weight and bias of each channel.
  std::vector<float> affine(const T* weight, const T* bias, double eps) const {
    const int64_t blocks = blocks_of(positions, rows);
    std::vector<float> parts(batch * blocks * 2 * groups), lanes(batch * 4 * padded);
    each_block([&](int64_t b, int64_t block, int64_t first, int64_t last) {
      block_moments(parts.data() + (b * blocks + block) * 2 * groups, first, last);
    });
    for (int64_t b = 0; b < batch; ++b) {
      float* of = lanes.data() + b * 4 * padded;
      merge(of, parts.data() + b * blocks * 2 * groups, eps);
      for (int64_t c = 0; c < channels; ++c) {
        of[2 * padded + c] = weight ? static_cast<float>(weight[c]) : 1.0f;
        of[3 * padded + c] = bias ? static_cast<float>(bias[c]) : 0.0f;
      }
      to_lanes(of, 4 * padded);
    }
    return lanes;
  }

  static void to_lanes(float* row, int64_t count) {
    for (int64_t c = 0; c < count; c += kWidth) store_pack(row + c, load_ordered<T>(row + c));
  }

  const T* data;
  int64_t batch, positions, channels, padded, groups, per_group, rows;

 private:
  // Sums down the columns of what add(total, pack, offset) adds, in the order of channels. A few rows at a time, all
  // their columns: memory is then read nearly in order.
  template <typename F>
  void sum_columns(float* sums, int64_t first, int64_t last, F add) const {
    std::fill_n(sums, padded, 0.0f);
    for (int64_t row = first; row < last; row += 4) {
      const int64_t end = std::min(row + 4, last);
      each_pack(channels, [&](int64_t c, auto count) VIDGEN_INLINE {
        Pack total = load_pack(sums + c);
        for (int64_t r = row; r < end; ++r) add(total, load_pack(data + r * channels + c, count), c);
        store_pack(sums + c, total);
      });
    }
    for (int64_t c = 0; c < padded; c += kWidth) store_ordered<T>(sums + c, load_pack(sums + c));
  }

  // Mean and sum of squared distances from it of each group.
  void block_moments(float* part, int64_t first, int64_t last) const {
    std::vector<float> sums(padded), means(padded);
    const auto gather = [&](float* to, float divisor) {
      for (int64_t g = 0; g < groups; ++g) {
        float total = 0;
        for (int64_t i = 0; i < per_group; ++i) total += sums[g * per_group + i];
        to[g] = total / divisor;
      }
    };
    sum_columns(sums.data(), first, last, [](Pack& total, const Pack& v, int64_t) VIDGEN_INLINE { total = total + v; });
    gather(part, (last - first) * per_group);
    for (int64_t g = 0; g < groups; ++g) std::fill_n(means.data() + g * per_group, per_group, part[g]);
    to_lanes(means.data(), padded);
    sum_columns(sums.data(), first, last, [&](Pack& total, const Pack& v, int64_t c) VIDGEN_INLINE {
      const Pack centred = v - load_pack(&means[c]);
      total = fmadd(centred, centred, total);
    });
    gather(part + groups, 1);
  }

  // Mean and rstd of each channel of one sample.
  void merge(float* to, const float* parts, double eps) const {
    const int64_t blocks = blocks_of(positions, rows);
    std::vector<double> mean(groups), squares(groups);
    const double count = static_cast<double>(positions) * per_group;
    const auto count_of = [&](int64_t block) -> double { return std::min(rows, positions - block * rows) * per_group; };
    for (int64_t block = 0; block < blocks; ++block) {
      const double share = count_of(block) / count;
      for (int64_t g = 0; g < groups; ++g) mean[g] += share * parts[block * 2 * groups + g];
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const float *means = parts + block * 2 * groups, *within = means + groups;
      for (int64_t g = 0; g < groups; ++g) {
        const double distance = means[g] - mean[g];
        squares[g] += within[g] + count_of(block) * distance * distance;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = mean[c / per_group];
      to[padded + c] = 1 / std::sqrt(squares[c / per_group] / count + eps);
    }
  }
};

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
