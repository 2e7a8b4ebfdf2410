// SPDX-License-Identifier: Apache-2.0
// Norm, scale and rotation of the heads of each token, written in the order of the tokens or in the group layout of
// Skiparse attention. One launch each for q and k; v is only moved (Norm::none).
#pragma once
#include "common/rows.h"
#include "qk_norm_rope/head_norm.h"
#include "qk_norm_rope/rotation.h"

namespace vidgen {

template <typename T>
class QkNormRope {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR x, GM_ADDR weight, GM_ADDR bias, GM_ADDR cos, GM_ADDR sin, GM_ADDR y,
                              const QkNormRopeTiling& t) {
    t_ = t, pitch_ = pitch(t), has_weight_ = weight != nullptr, has_bias_ = bias != nullptr;
    const uint32_t tile = t.tile_heads * pitch_;
    x_ = global<T>(x, (t.split.samples - 1) * t.batch_stride + uint64_t(t.tokens - 1) * t.token_stride +
                          uint64_t(t.heads) * t.head_dim);
    y_ = global<T>(y, uint64_t(t.split.samples) * t.padded * t.heads * t.head_dim);
    pipe.InitBuffer(in_, 2, tile * sizeof(T));
    pipe.InitBuffer(out_, 2, tile * sizeof(T));
    pipe.InitBuffer(tiles_, 2 * tile * sizeof(float));
    pipe.InitBuffer(rows_, 2 * pitch_ * sizeof(float));
    values_ = tiles_.template Get<float>(), scratch_ = values_[tile];
    weight_ = rows_.template Get<float>(), bias_ = weight_[pitch_];
    parameters_.init(pipe, pitch_);
    norm_.init(pipe, t);
    rotation_.init(pipe, cos, sin, t, 1.0f);
    if (has_weight_) parameters_.read(weight_, weight, 0, t.head_dim);
    if (has_bias_) parameters_.read(bias_, bias, 0, t.head_dim);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      for (uint32_t token = run.begin; token < run.end; ++token) {
        if (token < t_.tokens) rotation_.read_angles(run.sample, token);
        for (uint32_t head = 0; head < t_.heads; head += t_.tile_heads) {
          const uint32_t rows = t_.heads - head < t_.tile_heads ? t_.heads - head : t_.tile_heads;
          one(run.sample, token, head, {rows, t_.head_dim, pitch_});
        }
      }
    }
  }

 private:
  __aicore__ inline void one(uint32_t sample, uint32_t token, uint32_t head, const ShortRows& rows) {
    const Rows copied{t_.head_dim, rows.rows, t_.head_dim, pitch_};
    if (token < t_.tokens) {
      const uint64_t at = sample * t_.batch_stride + uint64_t(token) * t_.token_stride + uint64_t(head) * t_.head_dim;
      auto x = in_.template AllocTensor<T>();
      load(x, x_[at], copied);
      in_.EnQue(x);
      x = in_.template DeQue<T>();
      widen(values_, x, rows.rows * pitch_);
      fence();
      in_.FreeTensor(x);
      if (t_.norm != Norm::none) norm_and_rotate(rows);
    } else {
      Duplicate(values_, 0.0f, static_cast<int32_t>(rows.rows * pitch_));  // padding of the group layout
      fence();
    }
    const uint64_t row = uint64_t(sample) * t_.padded + group_row(t_, token);
    auto y = out_.template AllocTensor<T>();
    narrow(y, values_, rows.rows * pitch_);
    out_.EnQue(y);
    y = out_.template DeQue<T>();
    store(y_[(row * t_.heads + head) * t_.head_dim], y, copied);
    out_.FreeTensor(y);
  }

  __aicore__ inline void norm_and_rotate(const ShortRows& rows) {
    norm_.normalise(rows, values_, scratch_);
    if (has_weight_) rows.multiply_by_row(values_, weight_);
    if (has_bias_) rows.add_row(values_, bias_);
    rotation_.apply(rows, values_, scratch_);
  }

  QkNormRopeTiling t_;
  uint32_t pitch_;
  bool has_weight_, has_bias_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> tiles_, rows_;
  LocalTensor<float> values_, scratch_, weight_, bias_;
  Parameters<T> parameters_;
  HeadNorm norm_;
  Rotation rotation_;
  GlobalTensor<T> x_, y_;
};

}  // namespace vidgen
