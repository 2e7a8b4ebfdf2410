// SPDX-License-Identifier: Apache-2.0
// One token's heads as float32 rows in scratch memory, and their rotation. For kernel sources only.
#pragma once

#include <memory>
#include <new>

#include "common/pairs.h"
#include "common/rows.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

// Scratch rows are read and written in whole vectors, past their end: each has this much room behind it.
// What is written there is garbage, and rows are filled from front to back so that it is written over.
constexpr int64_t kSlack = kWidth;

// Aligned float32 scratch, cut into rows with room behind each.
class Scratch {
 public:
  explicit Scratch(int64_t floats, int64_t rows)
      : memory_(static_cast<float*>(::operator new[]((floats + rows * (kSlack + 16)) * sizeof(float), kAlign))),
        next_(memory_.get()) {
    std::fill_n(next_, floats + rows * (kSlack + 16), 0.0f);
  }
  float* row(int64_t count) {
    float* row = next_;
    next_ += (count + kSlack + 15) / 16 * 16;
    return row;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, kAlign); }
  };
  std::unique_ptr<float[], Free> memory_;
  float* next_;
};

// The heads of one token to scratch, one after the other.
template <typename T>
void widen_heads(float* to, const T* from, int64_t heads, int64_t dim, int64_t head_stride) {
  const bool together = head_stride == dim;
  const int64_t runs = together ? 1 : heads, length = together ? heads * dim : dim;
  for (int64_t h = 0; h < runs; ++h, to += dim, from += head_stride) {
    each_chunk(length, [=](int64_t c, auto count) { load_row(from + c, count).store(to + c); });
  }
}

// Asks for one head's memory ahead of its use.
template <typename T>
void prefetch_head(const T* head, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(head + c);
}

template <typename T>
void narrow_row(T* to, const float* from, int64_t channels) {
  each_chunk(channels, [&](int64_t c, auto count) { store_row(to + c, Wide::loadu(from + c), count); });
}

// What a rotation does to the channels a, b of each pair: first = a cos_a - b sin_b, second = b cos_b + a sin_a.
struct Turn {
  const float *cos_a, *sin_b, *cos_b, *sin_a;
};

// Cosines and sines of one token in scratch. `inverse` turns the other way.
struct Angles {
  float *cos, *sin;
  int64_t pairs;

  Angles(Scratch& scratch, int64_t pairs) : cos(scratch.row(pairs)), sin(scratch.row(pairs)), pairs(pairs) {}

  Turn read(const at::Tensor& cos_table, const at::Tensor& sin_table, int64_t batch, int64_t token, bool inverse) {
    std::copy_n(at_token(cos_table, batch, token), pairs, cos);
    const float* from = at_token(sin_table, batch, token);
    for (int64_t j = 0; j < pairs; ++j) sin[j] = inverse ? -from[j] : from[j];
    return {cos, sin, cos, sin};
  }

 private:
  static const float* at_token(const at::Tensor& table, int64_t batch, int64_t token) {
    const int64_t sample = table.dim() == 3 ? batch * table.stride(0) : 0;
    return table.const_data_ptr<float>() + sample + token * table.stride(-2);
  }
};

inline void rotate_interleaved(float* y, const float* x, const Turn& turn, int64_t dim, const Vec& gain) {
  for (int64_t j = 0; j < dim; j += 2 * Vec::size()) {
    const auto [a, b] = at::vec::deinterleave2(Vec::loadu(x + j), Vec::loadu(x + j + Vec::size()));
    const Vec first = a * Vec::loadu(turn.cos_a + j / 2) - b * Vec::loadu(turn.sin_b + j / 2);
    const Vec second = b * Vec::loadu(turn.cos_b + j / 2) + a * Vec::loadu(turn.sin_a + j / 2);
    const auto [low, high] = at::vec::interleave2(first * gain, second * gain);
    low.store(y + j);
    high.store(y + j + Vec::size());
  }
}

// Chunks of a half go from back to front: what the last one writes past the half, the first one writes over.
inline void rotate_halves(float* y, const float* x, Turn turn, const std::vector<int64_t>& halves, const Vec& gain) {
  for (const int64_t h : halves) {
    for (int64_t j = (h - 1) / Vec::size() * Vec::size(); j >= 0; j -= Vec::size()) {
      const Vec a = Vec::loadu(x + j), b = Vec::loadu(x + h + j);
      const Vec first = a * Vec::loadu(turn.cos_a + j) - b * Vec::loadu(turn.sin_b + j);
      const Vec second = b * Vec::loadu(turn.cos_b + j) + a * Vec::loadu(turn.sin_a + j);
      (first * gain).store(y + j);
      (second * gain).store(y + h + j);
    }
    x += 2 * h, y += 2 * h;
    turn = {turn.cos_a + h, turn.sin_b + h, turn.cos_b + h, turn.sin_a + h};
  }
}

// All heads of one token, from one scratch row to another; each head times its gain, where there are gains.
// `beside(head)` is called along the way: to fetch what comes next while there is work to do.
template <typename F>
void rotate_heads(float* y, const float* x, const Turn& turn, const Pairs& pairs, int64_t heads, int64_t dim,
                  const float* gains, F beside) {
  for (int64_t h = 0; h < heads; ++h, x += dim, y += dim) {
    beside(h);
    const Vec gain(gains ? gains[h] : 1.0f);
    if (pairs.interleaved) {
      rotate_interleaved(y, x, turn, dim, gain);
    } else {
      rotate_halves(y, x, turn, pairs.halves, gain);
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
