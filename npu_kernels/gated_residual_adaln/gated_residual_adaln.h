// SPDX-License-Identifier: Apache-2.0
// h = x + gate * y, rounded; modulated = layer_norm(h) * (1 + scale) + shift, of the rounded h.
#pragma once
#include "common/modulation.h"
#include "common/norm.h"
#include "gated_residual_adaln/gated_residual_adaln_tiling.h"

namespace vidgen {

template <typename T>
class GatedResidualAdaln {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR x, GM_ADDR gate, GM_ADDR y, const Modulation& modulation, GM_ADDR h,
                              GM_ADDR modulated, const GatedResidualAdalnTiling& t) {
    t_ = t, modulation_ = modulation, gate_at_ = gate;
    const uint32_t row = lanes(t.channels);
    const uint64_t elements = elements_of(t.split, t.channels);
    x_.init(pipe, x, elements, t.buffers, row);
    y_.init(pipe, y, elements, t.buffers, row);
    h_.init(pipe, h, elements, t.buffers, row);
    modulated_.init(pipe, modulated, elements, t.buffers, row);
    parameters_.init(pipe, row);
    pipe.InitBuffer(rows_, 5 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    row_ = all, scratch_ = all[row], gate_ = all[2 * row], gain_ = all[3 * row], offset_ = all[4 * row];
    norm_.init(pipe, t.channels, t.eps);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      parameters_.read(gate_, gate_at_, uint64_t(run.sample) * t_.gate_stride, t_.channels);
      read_modulation(parameters_, gain_, offset_, scratch_, modulation_, run.sample, t_.channels);
      for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels);
    }
  }

 private:
  __aicore__ inline void one(uint64_t at) {
    const uint32_t n = t_.channels;
    x_.fetch(at, n);
    y_.fetch(at, n);
    x_.take(row_, n);
    y_.take(scratch_, n);
    Mul(scratch_, scratch_, gate_, n);
    fence();
    Add(row_, row_, scratch_, n);
    fence();
    h_.put_rounded(row_, n);
    h_.send(at, n);
    norm_.normalise(row_, scratch_);
    Mul(row_, row_, gain_, n);
    fence();
    Add(row_, row_, offset_, n);
    fence();
    modulated_.put(row_, n);
    modulated_.send(at, n);
  }

  GatedResidualAdalnTiling t_;
  Modulation modulation_;
  RowIn<T> x_, y_;
  RowOut<T> h_, modulated_;
  Parameters<T> parameters_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> row_, scratch_, gate_, gain_, offset_;
  RowNorm norm_;
  GM_ADDR gate_at_;
};

}  // namespace vidgen
