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

// Asks for one head's memory ahead of its use, into the second cache: the first is full of scratch.
template <typename T>
void prefetch_head(const T* head, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(head + c, 0, 2);
}

template <typename T>
void narrow_row(T* to, const float* from, int64_t channels) {
  each_chunk(channels, [&](int64_t c, auto count) { store_row(to + c, Wide::loadu(from + c), count); });
}

// What a rotation does to the channels a, b of each pair: first = a cos_a - b sin_b, second = b cos_b + a sin_a. The
// offsets, where there are any, are added behind the gain of the head.
struct Turn {
  const float *cos_a, *sin_b, *cos_b, *sin_a;
  const float *offset_a = nullptr, *offset_b = nullptr;
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

// All heads of one token, from one scratch row to another.
struct Heads {
  float* to;
  const float* from;
  int64_t count, dim;
  const float* gains;  // of each head, or null

  float gain(int64_t head) const { return gains ? gains[head] : 1.0f; }
};

// Eight floats: what at::vec has no type for where vectors are wider.
struct Eight {
  float lanes[kEight];

  explicit Eight(const float* from) { std::copy_n(from, kEight, lanes); }
  void store(float* to) const { std::copy_n(lanes, kEight, to); }
};

// x * y + z, rounded once where the instruction set can. Compilers are told not to fuse by themselves.
C10_ALWAYS_INLINE float fmadd(float x, float y, float z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(x, y, z);
#else
  return x * y + z;
#endif
}

// gain (x c + y s), and the offset where there is one. Compilers make a few vector instructions of the loop.
template <bool shifted>
inline Eight combine(const Eight& x, const Eight& c, const Eight& y, const Eight& s, float gain, const Eight& offset) {
  Eight sum = x;
  for (int64_t i = 0; i < kEight; ++i) {
    const float turned = fmadd(x.lanes[i], c.lanes[i], y.lanes[i] * s.lanes[i]);
    sum.lanes[i] = shifted ? fmadd(gain, turned, offset.lanes[i]) : gain * turned;
  }
  return sum;
}

// Eight pairs in every head: the angles stay in registers, and so does what is passed by value.
template <bool shifted>
void rotate_eight(Heads heads, const Turn& turn, const Run& run) {
  const Eight cos_a(turn.cos_a + run.pair), cos_b(turn.cos_b + run.pair), sin_a(turn.sin_a + run.pair);
  Eight minus_sin_b(turn.sin_b + run.pair);
  for (auto& lane : minus_sin_b.lanes) lane = -lane;
  const Eight offset_a(shifted ? turn.offset_a + run.pair : turn.cos_a);
  const Eight offset_b(shifted ? turn.offset_b + run.pair : turn.cos_a);
  const float *from_a = heads.from + run.a, *from_b = heads.from + run.b;
  float *to_a = heads.to + run.a, *to_b = heads.to + run.b;
  for (int64_t h = 0; h < heads.count; ++h) {
    const Eight a(from_a + h * heads.dim), b(from_b + h * heads.dim);
    const float gain = heads.gain(h);
    combine<shifted>(a, cos_a, b, minus_sin_b, gain, offset_a).store(to_a + h * heads.dim);
    combine<shifted>(b, cos_b, a, sin_a, gain, offset_b).store(to_b + h * heads.dim);
  }
}

// Fewer than eight.
inline void rotate_few(const Heads& heads, const Turn& turn, const Run& run) {
  for (int64_t h = 0; h < heads.count; ++h) {
    for (int64_t i = 0; i < run.count; ++i) {
      const float a = heads.from[h * heads.dim + run.a + i], b = heads.from[h * heads.dim + run.b + i];
      const int64_t j = run.pair + i;
      const float offset_a = turn.offset_a ? turn.offset_a[j] : 0.0f,
                  offset_b = turn.offset_b ? turn.offset_b[j] : 0.0f;
      heads.to[h * heads.dim + run.a + i] = heads.gain(h) * (a * turn.cos_a[j] - b * turn.sin_b[j]) + offset_a;
      heads.to[h * heads.dim + run.b + i] = heads.gain(h) * (b * turn.cos_b[j] + a * turn.sin_a[j]) + offset_b;
    }
  }
}

// Channels `at` to at + two vectors in every head; where a head is shorter, one head at a time from front to back.
template <bool shifted>
void rotate_interleaved(Heads heads, const Turn& turn, int64_t at) {
  const Vec cos_a = Vec::loadu(turn.cos_a + at / 2), sin_b = Vec::loadu(turn.sin_b + at / 2);
  const Vec cos_b = Vec::loadu(turn.cos_b + at / 2), sin_a = Vec::loadu(turn.sin_a + at / 2);
  const Vec offset_a = Vec::loadu((shifted ? turn.offset_a : turn.cos_a) + at / 2);
  const Vec offset_b = Vec::loadu((shifted ? turn.offset_b : turn.cos_a) + at / 2);
  for (int64_t h = 0; h < heads.count; ++h) {
    const float* x = heads.from + h * heads.dim + at;
    float* y = heads.to + h * heads.dim + at;
    const auto [a, b] = at::vec::deinterleave2(Vec::loadu(x), Vec::loadu(x + Vec::size()));
    const Vec gain(heads.gain(h));
    const Vec first = at::vec::fmsub(a, cos_a, b * sin_b), second = at::vec::fmadd(b, cos_b, a * sin_a);
    const auto scaled = [&](const Vec& turned, const Vec& offset) C10_ALWAYS_INLINE_ATTRIBUTE {
      return shifted ? at::vec::fmadd(gain, turned, offset) : gain * turned;
    };
    const auto [low, high] = at::vec::interleave2(scaled(first, offset_a), scaled(second, offset_b));
    low.store(y);
    high.store(y + Vec::size());
  }
}

template <bool shifted, typename F>
void rotate_heads(const Heads& heads, const Turn& turn, const Pairs& pairs, F beside) {
  constexpr int64_t kStep = 2 * Vec::size();
  const int64_t steps = pairs.interleaved ? (heads.dim + kStep - 1) / kStep : pairs.runs.size();
  for (int64_t i = 0; i < steps; ++i) {
    for (int64_t h = heads.count * i / steps; h < heads.count * (i + 1) / steps; ++h) beside(h);
    if (pairs.interleaved) {
      rotate_interleaved<shifted>(heads, turn, std::max<int64_t>(0, std::min(i * kStep, heads.dim - kStep)));
    } else if (const Run& run = pairs.runs[i]; run.count == kEight) {
      rotate_eight<shifted>(heads, turn, run);
    } else {
      rotate_few(heads, turn, run);
    }
  }
}

// `beside(head)` is called once per head along the way: to fetch what comes next while there is work to do.
template <typename F>
void rotate_heads(const Heads& heads, const Turn& turn, const Pairs& pairs, F beside) {
  turn.offset_a ? rotate_heads<true>(heads, turn, pairs, beside) : rotate_heads<false>(heads, turn, pairs, beside);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace vidgen
