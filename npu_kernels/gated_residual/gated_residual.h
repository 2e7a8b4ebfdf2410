// SPDX-License-Identifier: Apache-2.0
// out = x + gate * y, rounded once.
#pragma once
#include "common/rows.h"
#include "gated_residual/gated_residual_tiling.h"

namespace vidgen {

template <typename T>
class GatedResidual {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR x, GM_ADDR gate, GM_ADDR y, GM_ADDR out,
                              const GatedResidualTiling& t) {
    t_ = t, gate_at_ = gate;
    const uint32_t row = lanes(t.columns);
    const uint64_t elements = elements_of(t.split, t.channels);
    x_.init(pipe, x, elements, 2, row);
    y_.init(pipe, y, elements, 2, row);
    out_.init(pipe, out, elements, 2, row);
    parameters_.init(pipe, row);
    pipe.InitBuffer(rows_, 3 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    x_row_ = all, y_row_ = all[row], gate_ = all[2 * row];
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      for (uint32_t column = 0; column < t_.channels; column += t_.columns) {
        const uint32_t n = t_.channels - column < t_.columns ? t_.channels - column : t_.columns;
        parameters_.read(gate_, gate_at_, uint64_t(run.sample) * t_.gate_stride + column, n);
        for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels + column, n);
      }
    }
  }

 private:
  __aicore__ inline void one(uint64_t at, uint32_t n) {
    x_.fetch(at, n);
    y_.fetch(at, n);
    x_.take(x_row_, n);
    y_.take(y_row_, n);
    Mul(y_row_, y_row_, gate_, n);
    fence();
    Add(x_row_, x_row_, y_row_, n);
    fence();
    out_.put(x_row_, n);
    out_.send(at, n);
  }

  GatedResidualTiling t_;
  RowIn<T> x_, y_;
  RowOut<T> out_;
  Parameters<T> parameters_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> x_row_, y_row_, gate_;
  GM_ADDR gate_at_;
};

}  // namespace vidgen
