// SPDX-License-Identifier: Apache-2.0
// Rows between global memory and float rows of the unified buffer. With two tensors in a queue, the copy of the next
// row runs while this one is computed: copies and arithmetic are different pipes, and a queue orders them per tensor.
#pragma once
#include "common/vector.h"

namespace vidgen {

template <typename T>
class RowIn {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR from, uint64_t elements, uint32_t buffers, uint32_t row) {
    from_ = global<T>(from, elements);
    pipe.InitBuffer(queue_, buffers, row * sizeof(T));
  }
  __aicore__ inline void fetch(uint64_t at, uint32_t n) { fetch(from_, at, n); }
  // From another place than that of init.
  __aicore__ inline void fetch(const GlobalTensor<T>& from, uint64_t at, uint32_t n) {
    auto row = queue_.template AllocTensor<T>();
    load(row, from[at], one_row(n));
    queue_.EnQue(row);
  }
  __aicore__ inline void take(const LocalTensor<float>& to, uint32_t n) {
    auto row = queue_.template DeQue<T>();
    widen(to, row, n);
    fence();
    queue_.FreeTensor(row);
  }

 private:
  GlobalTensor<T> from_;
  TQue<TPosition::VECIN, 1> queue_;
};

template <typename T>
class RowOut {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR to, uint64_t elements, uint32_t buffers, uint32_t row) {
    to_ = global<T>(to, elements);
    pipe.InitBuffer(queue_, buffers, row * sizeof(T));
  }
  __aicore__ inline void put(const LocalTensor<float>& from, uint32_t n) {
    auto row = queue_.template AllocTensor<T>();
    narrow(row, from, n);
    queue_.EnQue(row);
  }
  // The same, and leaves in `from` what the output's type made of it.
  __aicore__ inline void put_rounded(const LocalTensor<float>& from, uint32_t n) {
    auto row = queue_.template AllocTensor<T>();
    narrow(row, from, n);
    fence();
    widen(from, row, n);
    fence();
    queue_.EnQue(row);
  }
  __aicore__ inline void send(uint64_t at, uint32_t n) { send(to_, at, n); }
  // To another place than that of init.
  __aicore__ inline void send(const GlobalTensor<T>& to, uint64_t at, uint32_t n) {
    auto row = queue_.template DeQue<T>();
    store(to[at], row, one_row(n));
    queue_.FreeTensor(row);
  }

 private:
  GlobalTensor<T> to_;
  TQue<TPosition::VECOUT, 1> queue_;
};

// Parameters, which change once per sample and not per row, through one tensor.
template <typename T>
class Parameters {
 public:
  __aicore__ inline void init(TPipe& pipe, uint32_t row) { pipe.InitBuffer(queue_, 1, row * sizeof(T)); }
  __aicore__ inline void read(const LocalTensor<float>& to, GM_ADDR from, uint64_t at, uint32_t n) {
    auto row = queue_.template AllocTensor<T>();
    load(row, global<T>(from, at + n)[at], one_row(n));
    queue_.EnQue(row);
    row = queue_.template DeQue<T>();
    widen(to, row, n);
    fence();
    queue_.FreeTensor(row);
  }

 private:
  TQue<TPosition::VECIN, 1> queue_;
};

}  // namespace vidgen
