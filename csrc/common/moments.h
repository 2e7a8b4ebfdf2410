// SPDX-License-Identifier: Apache-2.0
// Mean and spread of rows and of larger groups, and the parameters of norms. For kernel sources only.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

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
C10_ALWAYS_INLINE Moments row_moments(const T* x, int64_t channels, float eps) {
  const float mean = row_sum(x, channels) / channels;
  return {mean, 1.0f / std::sqrt(row_squares(x, channels, mean) / channels + eps)};
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

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
