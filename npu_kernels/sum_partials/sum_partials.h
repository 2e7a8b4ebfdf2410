// SPDX-License-Identifier: Apache-2.0
// Second half of every sum over tokens. In the first, each core leaves one float row per run of tokens in a workspace
// of its own place; here the rows are added in their order. No atomic addition: results are the same bits every time.
#pragma once
#include "common/rows.h"
#include "sum_partials/sum_partials_tiling.h"

namespace vidgen {

template <typename T>
class SumPartials {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR partials, GM_ADDR sums, const SumPartialsTiling& t) {
    t_ = t;
    const uint32_t row = lanes(t.columns);
    partials_.init(pipe, partials, uint64_t(t.outer) * t.parts * t.width, 2, row);
    sums_.init(pipe, sums, uint64_t(t.outer) * t.width, 1, row);
    pipe.InitBuffer(rows_, 3 * row * sizeof(float));
    auto all = rows_.template Get<float>();
    sum_ = all, group_ = all[row], next_ = all[2 * row];
  }

  __aicore__ inline void process() {
    const uint32_t pieces = ceil_div(t_.width, t_.columns);
    for (uint32_t i = GetBlockIdx(); i < t_.outer * pieces; i += GetBlockNum()) {
      const uint32_t column = i % pieces * t_.columns;
      const uint32_t n = t_.width - column < t_.columns ? t_.width - column : t_.columns;
      one(i / pieces, column, n);
    }
  }

 private:
  __aicore__ inline void one(uint64_t outer, uint32_t column, uint32_t n) {
    const uint64_t first = outer * t_.parts * t_.width + column;
    Duplicate(sum_, 0.0f, n);
    fence();
    for (uint32_t group = 0; group < t_.parts; group += GROUP_SUMMED) {
      const uint32_t end = t_.parts - group < GROUP_SUMMED ? t_.parts : group + GROUP_SUMMED;
      add_group(first + uint64_t(group) * t_.width, end - group, n);
      Add(sum_, sum_, group_, n);
      fence();
    }
    sums_.put(sum_, n);
    sums_.send(outer * t_.width + column, n);
  }

  __aicore__ inline void add_group(uint64_t first, uint32_t parts, uint32_t n) {
    partials_.fetch(first, n);
    partials_.take(group_, n);
    for (uint32_t part = 1; part < parts; ++part) {
      partials_.fetch(first + uint64_t(part) * t_.width, n);
      partials_.take(next_, n);
      Add(group_, group_, next_, n);
      fence();
    }
  }

  SumPartialsTiling t_;
  RowIn<float> partials_;
  RowOut<T> sums_;
  TBuf<TPosition::VECCALC> rows_;
  LocalTensor<float> sum_, group_, next_;
};

}  // namespace vidgen
