// SPDX-License-Identifier: Apache-2.0
// The gradient of q or k: back from the group layout and the rotation, through the norm; and, for each run of tokens,
// the sums of which sum_partials makes the gradients of weight and bias.
#pragma once
#include "common/rows.h"
#include "qk_norm_rope/head_norm.h"
#include "qk_norm_rope/rotation.h"

namespace vidgen {

template <typename T>
class QkNormRopeBackward {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR grad, GM_ADDR x, GM_ADDR weight, GM_ADDR cos, GM_ADDR sin,
                              GM_ADDR grad_x, GM_ADDR sum_weight, GM_ADDR sum_bias, const QkNormRopeTiling& t) {
    t_ = t, pitch_ = pitch(t), has_weight_ = weight != nullptr;
    const uint32_t tile = t.tile_heads * pitch_;
    const uint64_t token = uint64_t(t.heads) * t.head_dim;
    grad_ = global<T>(grad, uint64_t(t.split.samples) * t.padded * token);
    x_ = global<T>(x, (t.split.samples - 1) * t.batch_stride + uint64_t(t.tokens - 1) * t.token_stride + token);
    grad_x_ = global<T>(grad_x, uint64_t(t.split.samples) * t.tokens * token);
    pipe.InitBuffer(grad_in_, 2, tile * sizeof(T));
    pipe.InitBuffer(x_in_, 2, tile * sizeof(T));
    pipe.InitBuffer(out_, 2, tile * sizeof(T));
    pipe.InitBuffer(tiles_, 5 * tile * sizeof(float));
    pipe.InitBuffer(row_, 2 * pitch_ * sizeof(float));
    auto all = tiles_.template Get<float>();
    values_ = all, inner_ = all[tile], scratch_ = all[2 * tile], sum_weight_ = all[3 * tile], sum_bias_ = all[4 * tile];
    weight_ = row_.template Get<float>();
    parameters_.init(pipe, pitch_);
    const uint64_t sums = uint64_t(runs(t.split)) * t.head_dim;
    sum_weight_at_ = global<float>(sum_weight, sums), sum_bias_at_ = global<float>(sum_bias, sums);
    sums_out_.init(pipe, sum_weight, sums, 1, pitch_);
    norm_.init(pipe, t);
    rotation_.init(pipe, cos, sin, t, -1.0f);
    if (has_weight_) parameters_.read(weight_, weight, 0, t.head_dim);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      Duplicate(sum_weight_, 0.0f, static_cast<int32_t>(2 * t_.tile_heads * pitch_));  // and the bias's, behind it
      fence();
      for (uint32_t token = run.begin; token < run.end; ++token) {
        rotation_.read_angles(run.sample, token);
        for (uint32_t head = 0; head < t_.heads; head += t_.tile_heads) {
          const uint32_t rows = t_.heads - head < t_.tile_heads ? t_.heads - head : t_.tile_heads;
          one(run.sample, token, head, {rows, t_.head_dim, pitch_});
        }
      }
      send(sum_weight_at_, sum_weight_, i);
      send(sum_bias_at_, sum_bias_, i);
    }
  }

 private:
  __aicore__ inline void one(uint32_t sample, uint32_t token, uint32_t head, const ShortRows& rows) {
    const Rows copied{t_.head_dim, rows.rows, t_.head_dim, pitch_};
    const uint32_t n = rows.rows * pitch_;
    const uint64_t row = uint64_t(sample) * t_.padded + group_row(t_, token);
    auto grad = grad_in_.template AllocTensor<T>();
    load(grad, grad_[(row * t_.heads + head) * t_.head_dim], copied);
    grad_in_.EnQue(grad);
    const uint64_t at = sample * t_.batch_stride + uint64_t(token) * t_.token_stride + uint64_t(head) * t_.head_dim;
    auto x = x_in_.template AllocTensor<T>();
    load(x, x_[at], copied);
    x_in_.EnQue(x);
    grad = grad_in_.template DeQue<T>();
    widen(inner_, grad, n);
    x = x_in_.template DeQue<T>();
    widen(values_, x, n);
    fence();
    grad_in_.FreeTensor(grad);
    x_in_.FreeTensor(x);
    compute(rows);
    auto out = out_.template AllocTensor<T>();
    narrow(out, inner_, n);
    out_.EnQue(out);
    out = out_.template DeQue<T>();
    const uint64_t to = ((uint64_t(sample) * t_.tokens + token) * t_.heads + head) * t_.head_dim;
    store(grad_x_[to], out, copied);
    out_.FreeTensor(out);
  }

  // With g the gradient before the rotation, g' = g * weight and y the normalised x: inner becomes
  // rstd * (g' - mean(g') - y * mean(g' * y)); the rms norm takes no mean off.
  __aicore__ inline void compute(const ShortRows& rows) {
    const int32_t n = static_cast<int32_t>(rows.rows * pitch_);
    rotation_.apply(rows, inner_, scratch_);
    norm_.normalise(rows, values_, scratch_);
    Mul(scratch_, inner_, values_, n);
    Add(sum_bias_, sum_bias_, inner_, n);
    fence();
    Add(sum_weight_, sum_weight_, scratch_, n);
    fence();
    if (has_weight_) rows.multiply_by_row(inner_, weight_);
    Mul(scratch_, inner_, values_, n);
    fence();
    rows.multiply_by_blocks(values_, norm_.mean(rows, scratch_));
    if (t_.norm == Norm::layer) rows.subtract_blocks(inner_, norm_.mean(rows, inner_));
    Sub(inner_, inner_, values_, n);
    fence();
    rows.multiply_by_blocks(inner_, norm_.rstd());
  }

  // The sum over the rows of a tile to its place in the workspace.
  __aicore__ inline void send(const GlobalTensor<float>& to, const LocalTensor<float>& tile, uint32_t run) {
    for (uint32_t row = 1; row < t_.tile_heads; ++row) {
      Add(tile, tile, tile[row * pitch_], static_cast<int32_t>(t_.head_dim));
      fence();
    }
    sums_out_.put(tile, t_.head_dim);
    sums_out_.send(to, uint64_t(run) * t_.head_dim, t_.head_dim);
  }

  QkNormRopeTiling t_;
  uint32_t pitch_;
  bool has_weight_;
  TQue<TPosition::VECIN, 1> grad_in_, x_in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> tiles_, row_;
  LocalTensor<float> values_, inner_, scratch_, sum_weight_, sum_bias_, weight_;
  Parameters<T> parameters_;
  RowOut<float> sums_out_;
  HeadNorm norm_;
  Rotation rotation_;
  GlobalTensor<T> grad_, x_, grad_x_;
  GlobalTensor<float> sum_weight_at_, sum_bias_at_;
};

}  // namespace vidgen
