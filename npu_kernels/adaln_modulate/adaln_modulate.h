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
  __aicore__ inline void init(TPipe& pipe, GM_ADDR x, const Modulation& modulation, GM_ADDR y,
                              const AdalnModulateTiling& t) {
    t_ = t, modulation_ = modulation;
    const uint32_t row = lanes(t.channels);
    const uint64_t elements = elements_of(t.split, t.channels);
    x_.init(pipe, x, elements, t.buffers, row);
    y_.init(pipe, y, elements, t.buffers, row);
    parameters_.init(pipe, row);
    pipe.InitBuffer(rows_, 4 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    row_ = all, scratch_ = all[row], gain_ = all[2 * row], offset_ = all[3 * row];
    norm_.init(pipe, t.channels, t.eps);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      read_modulation(parameters_, gain_, offset_, scratch_, modulation_, run.sample, t_.channels);
      for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels);
    }
  }

 private:
  __aicore__ inline void one(uint64_t at) {
    const uint32_t n = t_.channels;
    x_.fetch(at, n);
    x_.take(row_, n);
    norm_.normalise(row_, scratch_);
    Mul(row_, row_, gain_, n);
    fence();
    Add(row_, row_, offset_, n);
    fence();
    y_.put(row_, n);
    y_.send(at, n);
  }

  AdalnModulateTiling t_;
  Modulation modulation_;
  RowIn<T> x_;
  RowOut<T> y_;
  Parameters<T> parameters_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> row_, scratch_, gain_, offset_;
  RowNorm norm_;
};

}  // namespace vidgen
