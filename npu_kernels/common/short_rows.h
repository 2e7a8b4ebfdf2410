// SPDX-License-Identifier: Apache-2.0
// Many short rows at once: one repeat of an instruction is up to 64 elements of one row, so an instruction does a
// column of up to 64 elements of all rows.
#pragma once
#include "common/vector.h"

namespace vidgen {

struct ShortRows {
  uint32_t rows, width, pitch;  // at most 255 rows; the pitch is a multiple of 8, at most 2040

  // How many of the columns from `at` on one instruction takes.
  __aicore__ inline uint32_t columns(uint32_t at) const { return width - at < REPEAT ? width - at : REPEAT; }

  // One sum per row, side by side; `work` is as long as `sums`.
  __aicore__ inline void sum(const LocalTensor<float>& sums, const LocalTensor<float>& from,
                             const LocalTensor<float>& work) const {
    const int32_t step = static_cast<int32_t>(pitch / PER_BLOCK);
    for (uint32_t at = 0; at < width; at += REPEAT) {
      WholeReduceSum(at == 0 ? sums : work, from[at], static_cast<int32_t>(columns(at)), static_cast<int32_t>(rows), 1,
                     1, step);
      fence();
      if (at == 0) continue;
      Add(sums, sums, work, static_cast<int32_t>(rows));
      fence();
    }
  }
  // A block of 8 equal values for each of `values`, which are read in eights.
  __aicore__ inline void broadcast(const LocalTensor<float>& blocks, const LocalTensor<float>& values) const {
    Brcb(blocks, values, ceil_div(rows, 8), BrcbRepeatParams(1, PER_BLOCK));
    fence();
  }
  // Each row with its own block.
  __aicore__ inline void multiply_by_blocks(const LocalTensor<float>& x, const LocalTensor<float>& blocks) const {
    const uint32_t step = pitch / PER_BLOCK;
    for (uint32_t at = 0; at < width; at += REPEAT) {
      Mul(x[at], x[at], blocks, columns(at), rows, BinaryRepeatParams(1, 1, 0, step, step, 1));
    }
    fence();
  }
  __aicore__ inline void subtract_blocks(const LocalTensor<float>& x, const LocalTensor<float>& blocks) const {
    const uint32_t step = pitch / PER_BLOCK;
    for (uint32_t at = 0; at < width; at += REPEAT) {
      Sub(x[at], x[at], blocks, columns(at), rows, BinaryRepeatParams(1, 1, 0, step, step, 1));
    }
    fence();
  }
  // All rows with one row.
  __aicore__ inline void multiply_by_row(const LocalTensor<float>& x, const LocalTensor<float>& row) const {
    const uint32_t step = pitch / PER_BLOCK;
    for (uint32_t at = 0; at < width; at += REPEAT) {
      Mul(x[at], x[at], row[at], columns(at), rows, BinaryRepeatParams(1, 1, 1, step, step, 0));
    }
    fence();
  }
  __aicore__ inline void add_row(const LocalTensor<float>& x, const LocalTensor<float>& row) const {
    const uint32_t step = pitch / PER_BLOCK;
    for (uint32_t at = 0; at < width; at += REPEAT) {
      Add(x[at], x[at], row[at], columns(at), rows, BinaryRepeatParams(1, 1, 1, step, step, 0));
    }
    fence();
  }
  // The columns [from, from + n) of all rows into others; all three are multiples of 8.
  __aicore__ inline void copy_columns(const LocalTensor<float>& to, uint32_t to_column, const LocalTensor<float>& x,
                                      uint32_t from_column, uint32_t n) const {
    const uint32_t step = pitch / PER_BLOCK;
    for (uint32_t at = 0; at < n; at += REPEAT) {
      Muls(to[to_column + at], x[from_column + at], 1.0f, n - at < REPEAT ? n - at : REPEAT, rows,
           UnaryRepeatParams(1, 1, step, step));
    }
  }
};

}  // namespace vidgen
