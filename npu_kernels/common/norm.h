// SPDX-License-Identifier: Apache-2.0
// LayerNorm of one row that lies whole in the unified buffer.
#pragma once
#include "common/norm_tiling.h"
#include "common/vector.h"

namespace vidgen {

class RowNorm {
 public:
  __aicore__ inline void init(TPipe& pipe, uint32_t channels, float eps) {
    channels_ = channels, eps_ = eps;
    pipe.InitBuffer(buffer_, norm_bytes(channels));
    auto all = buffer_.Get<float>();
    sum_ = all, one_ = all[PER_BLOCK], rstd_ = all[2 * PER_BLOCK], block_ = all[2 * PER_BLOCK + REPEAT];
    work_ = all[2 * PER_BLOCK + 2 * REPEAT];
    Duplicate(one_, 1.0f, PER_BLOCK);
    fence();
  }

  // x becomes (x - mean) / sqrt(variance + eps); `scratch` is another row.
  __aicore__ inline void normalise(const LocalTensor<float>& x, const LocalTensor<float>& scratch) {
    subtract_block(x, x, mean(x), channels_);
    fence();
    Mul(scratch, x, x, channels_);
    fence();
    total(scratch);
    Adds(sum_, sum_, eps_, 1);
    fence();
    Sqrt(sum_, sum_, 1);
    fence();
    Div(sum_, one_, sum_, 1);  // Rsqrt and Reciprocal are approximations
    fence();
    Brcb(rstd_, sum_, 1, BrcbRepeatParams(1, PER_BLOCK));
    fence();
    multiply_by_block(x, x, rstd_, channels_);
    fence();
  }

  // The mean of a row, as a block; valid until the next one is taken.
  __aicore__ inline LocalTensor<float> mean(const LocalTensor<float>& row) {
    total(row);
    Brcb(block_, sum_, 1, BrcbRepeatParams(1, PER_BLOCK));
    fence();
    return block_;
  }
  // 1 / sqrt(variance + eps) of the row last normalised, as a block.
  __aicore__ inline LocalTensor<float> rstd() { return rstd_; }

 private:
  // The row's sum over its length, in sum_.
  __aicore__ inline void total(const LocalTensor<float>& row) {
    ReduceSum(sum_, row, work_, channels_);
    fence();
    Muls(sum_, sum_, 1.0f / channels_, 1);
    fence();
  }

  uint32_t channels_;
  float eps_;
  TBuf<TPosition::VECCALC> buffer_;
  LocalTensor<float> sum_, one_, rstd_, block_, work_;
};

}  // namespace vidgen
