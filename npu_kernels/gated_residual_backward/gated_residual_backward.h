// SPDX-License-Identifier: Apache-2.0
// grad_y = grad * gate, and for each run of tokens the sum of grad * y, of which sum_partials makes grad_gate.
#pragma once
#include "common/rows.h"
#include "gated_residual/gated_residual_tiling.h"

namespace vidgen {

template <typename T>
class GatedResidualBackward {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR grad, GM_ADDR gate, GM_ADDR y, GM_ADDR grad_y, GM_ADDR partials,
                              const GatedResidualTiling& t) {
    t_ = t, gate_at_ = gate;
    const uint32_t row = lanes(t.columns);
    const uint64_t elements = elements_of(t.split, t.channels);
    grad_.init(pipe, grad, elements, 2, row);
    y_.init(pipe, y, elements, 2, row);
    grad_y_.init(pipe, grad_y, elements, 2, row);
    partials_.init(pipe, partials, uint64_t(runs(t.split)) * t.channels, 1, row);
    parameters_.init(pipe, row);
    pipe.InitBuffer(rows_, 4 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    grad_row_ = all, y_row_ = all[row], gate_ = all[2 * row], sum_ = all[3 * row];
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      for (uint32_t column = 0; column < t_.channels; column += t_.columns) {
        const uint32_t n = t_.channels - column < t_.columns ? t_.channels - column : t_.columns;
        parameters_.read(gate_, gate_at_, uint64_t(run.sample) * t_.gate_stride + column, n);
        Duplicate(sum_, 0.0f, n);
        fence();
        for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels + column, n);
        partials_.put(sum_, n);
        partials_.send(uint64_t(i) * t_.channels + column, n);
      }
    }
  }

 private:
  __aicore__ inline void one(uint64_t at, uint32_t n) {
    grad_.fetch(at, n);
    y_.fetch(at, n);
    grad_.take(grad_row_, n);
    y_.take(y_row_, n);
    Mul(y_row_, y_row_, grad_row_, n);
    Mul(grad_row_, grad_row_, gate_, n);
    fence();
    Add(sum_, sum_, y_row_, n);
    grad_y_.put(grad_row_, n);
    fence();
    grad_y_.send(at, n);
  }

  GatedResidualTiling t_;
  RowIn<T> grad_, y_;
  RowOut<T> grad_y_;
  RowOut<float> partials_;
  Parameters<T> parameters_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> grad_row_, y_row_, gate_, sum_;
  GM_ADDR gate_at_;
};

}  // namespace vidgen
