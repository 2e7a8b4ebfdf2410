// SPDX-License-Identifier: Apache-2.0
// RMSNorm or LayerNorm of each of the heads of a token.
#pragma once
#include "common/short_rows.h"
#include "qk_norm_rope/qk_norm_rope_tiling.h"

namespace vidgen {

class HeadNorm {
 public:
  __aicore__ inline void init(TPipe& pipe, const QkNormRopeTiling& t) {
    norm_ = t.norm, eps_ = t.eps;
    const uint32_t n = t.tile_heads;
    pipe.InitBuffer(buffer_, n * (3 + 2 * PER_BLOCK) * sizeof(float));
    auto all = buffer_.Get<float>();
    sums_ = all, work_ = all[n], ones_ = all[2 * n], blocks_ = all[3 * n], rstd_ = all[3 * n + n * PER_BLOCK];
    Duplicate(ones_, 1.0f, static_cast<int32_t>(n));
    fence();
  }

  // x becomes x / sqrt(mean(x^2) + eps), for layer after its mean was taken off; `scratch` is as large as x.
  __aicore__ inline void normalise(const ShortRows& rows, const LocalTensor<float>& x,
                                   const LocalTensor<float>& scratch) {
    const int32_t n = static_cast<int32_t>(rows.rows);
    if (norm_ == Norm::layer) rows.subtract_blocks(x, mean(rows, x));
    Mul(scratch, x, x, static_cast<int32_t>(rows.rows * rows.pitch));
    fence();
    take_mean(rows, scratch);
    Adds(sums_, sums_, eps_, n);
    fence();
    Sqrt(sums_, sums_, n);
    fence();
    Div(sums_, ones_, sums_, n);  // Rsqrt and Reciprocal are approximations
    fence();
    rows.broadcast(rstd_, sums_);
    rows.multiply_by_blocks(x, rstd_);
  }

  // Means of the rows, as blocks; valid until the next are taken.
  __aicore__ inline LocalTensor<float> mean(const ShortRows& rows, const LocalTensor<float>& x) {
    take_mean(rows, x);
    rows.broadcast(blocks_, sums_);
    return blocks_;
  }
  // One over the deviation of the rows last normalised, as blocks.
  __aicore__ inline LocalTensor<float> rstd() { return rstd_; }

 private:
  __aicore__ inline void take_mean(const ShortRows& rows, const LocalTensor<float>& x) {
    rows.sum(sums_, x, work_);
    Muls(sums_, sums_, 1.0f / rows.width, static_cast<int32_t>(rows.rows));
    fence();
  }

  Norm norm_;
  float eps_;
  TBuf<TPosition::VECCALC> buffer_;
  LocalTensor<float> sums_, work_, ones_, blocks_, rstd_;
};

}  // namespace vidgen
