// SPDX-License-Identifier: Apache-2.0
// y = layer_norm(x) * (1 + scale) + shift, one row at a time.
#pragma once
#include "adaln_modulate/adaln_modulate_tiling.h"
#include "common/modulation.h"
#include "common/norm.h"

namespace vidgen {

template <typename T>
class AdalnModulate {
 public:
  __aicore__ inline void init(GM_ADDR x, GM_ADDR shift, GM_ADDR scale, GM_ADDR weight, GM_ADDR bias, GM_ADDR y,
                              const AdalnModulateTiling& t) {
    t_ = t;
    const uint64_t elements = uint64_t(t.split.samples) * t.split.rows * t.channels;
    x_ = global<T>(x, elements), y_ = global<T>(y, elements);
    const uint32_t row = lanes(t.channels);
    pipe_.InitBuffer(in_, t.buffers, row * sizeof(T));
    pipe_.InitBuffer(out_, t.buffers, row * sizeof(T));
    pipe_.InitBuffer(rows_, 4 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    row_ = all, scratch_ = all[row], gain_ = all[2 * row], offset_ = all[3 * row];
    norm_.init(pipe_, t.channels, t.eps);
    parameters_.init(pipe_, t.channels);
    modulation_ = {shift, scale, weight, bias, t.shift_stride, t.scale_stride};
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      parameters_.read(gain_, offset_, scratch_, modulation_, run.sample);
      for (uint32_t r = run.begin; r < run.end; ++r) {
        const uint64_t at = (uint64_t(run.sample) * t_.split.rows + r) * t_.channels;
        copy_in(at);
        compute();
        copy_out(at);
      }
    }
  }

 private:
  __aicore__ inline void copy_in(uint64_t at) {
    auto x = in_.template AllocTensor<T>();
    load(x, x_[at], t_.channels);
    in_.EnQue(x);
  }

  __aicore__ inline void compute() {
    auto x = in_.template DeQue<T>();
    widen(row_, x, t_.channels);
    fence();
    in_.FreeTensor(x);
    norm_.normalise(row_, scratch_);
    Mul(row_, row_, gain_, t_.channels);
    fence();
    Add(row_, row_, offset_, t_.channels);
    fence();
    auto y = out_.template AllocTensor<T>();
    narrow(y, row_, t_.channels);
    out_.EnQue(y);
  }

  __aicore__ inline void copy_out(uint64_t at) {
    auto y = out_.template DeQue<T>();
    store(y_[at], y, t_.channels);
    out_.FreeTensor(y);
  }

  AdalnModulateTiling t_;
  TPipe pipe_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> row_, scratch_, gain_, offset_;
  GlobalTensor<T> x_, y_;
  RowNorm norm_;
  ParameterRows<T> parameters_;
  Modulation modulation_;
};

}  // namespace vidgen
