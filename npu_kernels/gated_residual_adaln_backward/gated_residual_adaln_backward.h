// SPDX-License-Identifier: Apache-2.0
// grad_x and grad_y of gated_residual_adaln through both results, and partial sums of the gradients of its parameters.
#pragma once
#include "common/adaln_gradients.h"
#include "common/adaln_gradients_tiling.h"

namespace vidgen {

struct GatedInputs {
  GM_ADDR grad_h;
  GM_ADDR grad_modulated;
  GM_ADDR h;
  GM_ADDR gate;
  GM_ADDR y;
};

template <typename T>
class GatedResidualAdalnBackward {
 public:
  __aicore__ inline void init(TPipe& pipe, const GatedInputs& from, const NormParameters& norm, GM_ADDR grad_x,
                              GM_ADDR grad_y, GM_ADDR sum_gate, const PartialSums& sums, const AdalnBackwardTiling& t) {
    t_ = t, gate_at_ = from.gate, sum_gate_at_ = sum_gate;
    const uint32_t row = lanes(t.channels);
    const uint64_t elements = elements_of(t.split, t.channels);
    grad_h_.init(pipe, from.grad_h, elements, t.buffers, row);
    grad_modulated_.init(pipe, from.grad_modulated, elements, t.buffers, row);
    h_.init(pipe, from.h, elements, t.buffers, row);
    y_ = global<T>(from.y, elements);
    grad_x_.init(pipe, grad_x, elements, t.buffers, row);
    grad_y_.init(pipe, grad_y, elements, t.buffers, row);
    pipe.InitBuffer(rows_, 2 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    gate_ = all, sum_gate_ = all[row];
    gradients_.init(pipe, norm, sums, runs(t.split), t.channels, t.eps);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      gradients_.parameters().read(gate_, gate_at_, uint64_t(run.sample) * t_.gate_stride, t_.channels);
      Duplicate(sum_gate_, 0.0f, t_.channels);
      gradients_.begin(run.sample);
      for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels);
      gradients_.send(sum_gate_at_, sum_gate_, i);
      gradients_.finish(i, run.sample);
    }
  }

 private:
  __aicore__ inline void one(uint64_t at) {
    const uint32_t n = t_.channels;
    auto &grad = gradients_.grad, &other = gradients_.x, &scratch = gradients_.scratch;
    grad_modulated_.fetch(at, n);
    h_.fetch(at, n);
    grad_h_.fetch(at, n);
    grad_modulated_.take(grad, n);
    h_.take(other, n);
    gradients_.one();
    grad_h_.take(other, n);
    grad_h_.fetch(y_, at, n);  // through the same queue: a fourth would not leave room for 3072 channels of float32
    Add(grad, grad, other, n);
    fence();
    grad_x_.put(grad, n);
    grad_x_.send(at, n);
    grad_h_.take(scratch, n);
    Mul(scratch, scratch, grad, n);
    Mul(other, grad, gate_, n);
    fence();
    Add(sum_gate_, sum_gate_, scratch, n);
    grad_y_.put(other, n);
    fence();
    grad_y_.send(at, n);
  }

  AdalnBackwardTiling t_;
  RowIn<T> grad_h_, grad_modulated_, h_;
  RowOut<T> grad_x_, grad_y_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> gate_, sum_gate_;
  AdalnGradients<T> gradients_;
  GlobalTensor<T> y_;
  GM_ADDR gate_at_;
  GM_ADDR sum_gate_at_;
};

}  // namespace vidgen
