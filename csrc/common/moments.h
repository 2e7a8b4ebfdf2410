// SPDX-License-Identifier: Apache-2.0
// Mean and spread of rows and of larger groups, and the parameters of norms. For kernel sources only.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "common/blocks.h"
#include "common/pack.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// A parameter of the norm, or null.
template <typename T>
const T* read_parameter(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename T>
C10_ALWAYS_INLINE float row_sum(const T* x, int64_t count) {
  return sum_packs(x, count, [](Pack& total, const Pack& v) VIDGEN_INLINE { total = total + v; });
}

// Sum of squared distances from `mean`.
template <typename T>
C10_ALWAYS_INLINE float row_squares(const T* x, int64_t count, float mean) {
  const Vec m(mean);
  return sum_packs(x, count, [&](Pack& total, const Pack& v) VIDGEN_INLINE {
    const Pack centred = v - m;
    total = fmadd(centred, centred, total);
  });
}

struct Moments {
  float mean, rstd;
};

template <typename T>
C10_ALWAYS_INLINE Moments row_moments(const T* x, float sum, int64_t channels, float eps) {
  const float mean = sum / channels;
  return {mean, 1.0f / std::sqrt(row_squares(x, channels, mean) / channels + eps)};
}
template <typename T>
C10_ALWAYS_INLINE Moments row_moments(const T* x, int64_t channels, float eps) {
  return row_moments(x, row_sum(x, channels), channels, eps);
}

struct PackMoments {
  Pack mean, rstd;
};

// Of a pack of columns, side by side: the next element of each is `stride` further on. Sums along a column are long
// chains, so the mean that they give is corrected by the mean distance from it.
template <typename T, typename Count>
C10_ALWAYS_INLINE PackMoments column_moments(const T* x, int64_t length, int64_t stride, float eps, Count count) {
  const Vec share(1.0f / length), one(1.0f);
  Pack total = splat(0), distance = splat(0), squares = splat(0);
  for (int64_t i = 0; i < length; ++i) total = total + load_pack(x + i * stride, count);
  const Pack near = total * share;
  for (int64_t i = 0; i < length; ++i) {
    const Pack centred = load_pack(x + i * stride, count) - near;
    distance = distance + centred;
    squares = fmadd(centred, centred, squares);
  }
  const Pack correction = distance * share, variance = squares * share - correction * correction;
  return {near + correction, map(variance + Vec(eps), [&](const Vec& v) VIDGEN_INLINE { return one / v.sqrt(); })};
}

// Moments of more than a cache holds: gathered from blocks, of which each is read twice while it is near.
class Spread {
 public:
  void add(double mean, double squares, double count) {
    const double distance = mean - mean_, total = count_ + count;
    mean_ += distance * count / total;
    squares_ += squares + distance * distance * count_ * count / total;
    count_ = total;
  }
  Moments moments(double eps) const {
    return {static_cast<float>(mean_), static_cast<float>(1 / std::sqrt(squares_ / count_ + eps))};
  }

 private:
  double mean_ = 0, squares_ = 0, count_ = 0;
};

template <typename T>
Moments group_moments(const T* x, int64_t count, double eps) {
  Spread spread;
  for (int64_t i = 0; i < count; i += kBlockElements) {
    const int64_t n = std::min(kBlockElements, count - i);
    const float mean = row_sum(x + i, n) / n;
    spread.add(mean, row_squares(x + i, n, mean), n);
  }
  return spread.moments(eps);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
