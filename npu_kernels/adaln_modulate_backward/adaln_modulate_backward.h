// SPDX-License-Identifier: Apache-2.0
// grad_x of adaln_modulate, and partial sums of the gradients of its parameters.
#pragma once
#include "common/adaln_gradients.h"
#include "common/adaln_gradients_tiling.h"

namespace vidgen {

template <typename T>
class AdalnModulateBackward {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR grad, GM_ADDR x, const NormParameters& norm, GM_ADDR grad_x,
                              const PartialSums& sums, const AdalnBackwardTiling& t) {
    t_ = t;
    const uint32_t row = lanes(t.channels);
    const uint64_t elements = elements_of(t.split, t.channels);
    grad_.init(pipe, grad, elements, t.buffers, row);
    x_.init(pipe, x, elements, t.buffers, row);
    grad_x_.init(pipe, grad_x, elements, t.buffers, row);
    gradients_.init(pipe, norm, sums, runs(t.split), t.channels, t.eps);
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < runs(t_.split); i += GetBlockNum()) {
      const Run run = run_of(t_.split, i);
      gradients_.begin(run.sample);
      for (uint32_t r = run.begin; r < run.end; ++r) one(row_at(t_.split, run, r) * t_.channels);
      gradients_.finish(i, run.sample);
    }
  }

 private:
  __aicore__ inline void one(uint64_t at) {
    const uint32_t n = t_.channels;
    grad_.fetch(at, n);
    x_.fetch(at, n);
    grad_.take(gradients_.grad, n);
    x_.take(gradients_.x, n);
    gradients_.one();
    grad_x_.put(gradients_.grad, n);
    grad_x_.send(at, n);
  }

  AdalnBackwardTiling t_;
  RowIn<T> grad_, x_;
  RowOut<T> grad_x_;
  AdalnGradients<T> gradients_;
};

}  // namespace vidgen
