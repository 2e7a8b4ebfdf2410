// SPDX-License-Identifier: Apache-2.0
// Gradients of layer_norm(x) * (1 + scale) + shift, row by row. All sums over tokens that the parameters need are made
// of two: of the incoming gradient g, and of g times the normalised x.
#pragma once
#include "common/norm.h"
#include "common/rows.h"

namespace vidgen {

struct NormParameters {
  GM_ADDR scale;   // a row per sample
  GM_ADDR weight;  // null: 1
  GM_ADDR bias;    // null: 0
  uint32_t scale_stride;
};

// One float row per run of tokens each; null where the norm has no such parameter.
struct PartialSums {
  GM_ADDR shift;
  GM_ADDR scale;
  GM_ADDR weight;
  GM_ADDR bias;
};

template <typename T>
class AdalnGradients {
 public:
  // Rows for the caller's use, too: x and grad come in through them, grad_x goes out through grad; scratch is free
  // between calls.
  LocalTensor<float> x, grad, scratch;

  static constexpr uint32_t ROWS = 6;

  __aicore__ inline void init(TPipe& pipe, const NormParameters& norm, const PartialSums& sums, uint32_t runs,
                              uint32_t channels, float eps) {
    norm_ = norm, sums_ = sums, channels_ = channels, runs_ = runs;
    const uint32_t row = lanes(channels);
    parameters_.init(pipe, row);
    out_.init(pipe, sums.shift, uint64_t(runs) * channels, 1, row);
    pipe.InitBuffer(rows_, ROWS * row * sizeof(float));
    auto all = rows_.template Get<float>();
    x = all, grad = all[row], scratch = all[2 * row];
    gain_ = all[3 * row], sum_ = all[4 * row], sum_normalised_ = all[5 * row];
    row_norm_.init(pipe, channels, eps);
  }

  __aicore__ inline Parameters<T>& parameters() { return parameters_; }

  __aicore__ inline void begin(uint32_t sample) {
    const uint32_t n = channels_;
    parameters_.read(gain_, norm_.scale, uint64_t(sample) * norm_.scale_stride, n);
    Adds(gain_, gain_, 1.0f, n);
    Duplicate(sum_, 0.0f, n);
    Duplicate(sum_normalised_, 0.0f, n);
    fence();
    if (norm_.weight != nullptr) {
      parameters_.read(scratch, norm_.weight, 0, n);
      Mul(gain_, gain_, scratch, n);
      fence();
    }
  }

  // With g' = grad * gain and y the normalised x: grad becomes rstd * (g' - mean(g') - y * mean(g' * y)).
  __aicore__ inline void one() {
    const uint32_t n = channels_;
    row_norm_.normalise(x, scratch);
    Mul(scratch, grad, x, n);
    Add(sum_, sum_, grad, n);
    fence();
    Add(sum_normalised_, sum_normalised_, scratch, n);
    Mul(grad, grad, gain_, n);
    fence();
    Mul(scratch, grad, x, n);
    fence();
    multiply_by_block(x, x, row_norm_.mean(scratch), n);
    fence();
    subtract_block(grad, grad, row_norm_.mean(grad), n);
    fence();
    Sub(grad, grad, x, n);
    fence();
    multiply_by_block(grad, grad, row_norm_.rstd(), n);
    fence();
  }

  __aicore__ inline void finish(uint32_t run, uint32_t sample) {
    const uint32_t n = channels_;
    send(sums_.shift, sum_, run);
    if (norm_.weight != nullptr) {  // scale multiplies weight * y + bias
      parameters_.read(scratch, norm_.weight, 0, n);
      Mul(scratch, scratch, sum_normalised_, n);
    } else {
      Muls(scratch, sum_normalised_, 1.0f, n);
    }
    fence();
    if (norm_.bias != nullptr) {
      parameters_.read(x, norm_.bias, 0, n);
      Mul(x, x, sum_, n);
      fence();
      Add(scratch, scratch, x, n);
      fence();
    }
    send(sums_.scale, scratch, run);
    if (norm_.weight == nullptr && norm_.bias == nullptr) return;
    parameters_.read(x, norm_.scale, uint64_t(sample) * norm_.scale_stride, n);
    Adds(x, x, 1.0f, n);
    fence();
    if (norm_.weight != nullptr) {
      Mul(scratch, x, sum_normalised_, n);
      fence();
      send(sums_.weight, scratch, run);
    }
    if (norm_.bias != nullptr) {
      Mul(scratch, x, sum_, n);
      fence();
      send(sums_.bias, scratch, run);
    }
  }

  // A row of partial sums to its place in a workspace.
  __aicore__ inline void send(GM_ADDR to, const LocalTensor<float>& row, uint32_t run) {
    out_.put(row, channels_);
    out_.send(global<float>(to, uint64_t(runs_) * channels_), uint64_t(run) * channels_, channels_);
  }

 private:
  NormParameters norm_;
  PartialSums sums_;
  uint32_t channels_, runs_;
  Parameters<T> parameters_;
  RowOut<float> out_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> gain_, sum_, sum_normalised_;
  RowNorm row_norm_;
};

}  // namespace vidgen
