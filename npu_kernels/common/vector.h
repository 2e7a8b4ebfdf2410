// SPDX-License-Identifier: Apache-2.0
// What the kernels share on the core. All arithmetic is in float; half and bfloat16 are only loaded and stored.
#pragma once
#include "common/tiling.h"
#include "kernel_operator.h"

namespace vidgen {

using namespace AscendC;

constexpr uint32_t REPEAT = 64;    // floats that one repeat of a vector instruction takes
constexpr uint32_t PER_BLOCK = 8;  // floats in 32 bytes
constexpr uint32_t MAX_REPEATS = 255;

// The vector unit overlaps its own instructions. Compilers can be told to find what depends on what; said here, it does
// not hang on their options, and the twin checks it.
__aicore__ inline void fence() { PipeBarrier<PIPE_V>(); }

// One after the other: what the scalar unit wrote to the unified buffer, then vector instructions.
__aicore__ inline void vector_after_scalar() {
  const int32_t id = GetTPipePtr()->FetchEventID(HardEvent::S_V);
  SetFlag<HardEvent::S_V>(id);
  WaitFlag<HardEvent::S_V>(id);
}

// Any type to float. Copies of float go through the vector unit too, as the order among pipes is then the same.
template <typename T>
__aicore__ inline void widen(const LocalTensor<float>& to, const LocalTensor<T>& from, uint32_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Muls(to, from, 1.0f, static_cast<int32_t>(n));
  } else {
    Cast(to, from, RoundMode::CAST_NONE, n);
  }
}
template <typename T>
__aicore__ inline void narrow(const LocalTensor<T>& to, const LocalTensor<float>& from, uint32_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Muls(to, from, 1.0f, static_cast<int32_t>(n));
  } else {
    Cast(to, from, RoundMode::CAST_RINT, n);
  }
}

// `rows` rows of `width` elements: `row_stride` elements apart in global memory, `pitch` in the unified buffer.
struct Rows {
  uint32_t width, rows, row_stride, pitch;
};
template <typename T>
__aicore__ inline uint32_t local_gap(const Rows& r) {
  return (r.pitch * sizeof(T) - round_up(r.width * sizeof(T), BLOCK_BYTES)) / BLOCK_BYTES;
}
template <typename T>
__aicore__ inline void load(const LocalTensor<T>& to, const GlobalTensor<T>& from, const Rows& r) {
  const uint32_t gap = (r.row_stride - r.width) * sizeof(T);
  DataCopyPad(to, from, DataCopyExtParams(r.rows, r.width * sizeof(T), gap, local_gap<T>(r), 0),
              DataCopyPadExtParams<T>());
}
template <typename T>
__aicore__ inline void store(const GlobalTensor<T>& to, const LocalTensor<T>& from, const Rows& r) {
  const uint32_t gap = (r.row_stride - r.width) * sizeof(T);
  DataCopyPad(to, from, DataCopyExtParams(r.rows, r.width * sizeof(T), local_gap<T>(r), gap, 0));
}
__aicore__ inline Rows one_row(uint32_t width) { return {width, 1, width, lanes(width)}; }

template <typename T>
__aicore__ inline GlobalTensor<T> global(GM_ADDR at, uint64_t elements) {
  GlobalTensor<T> t;
  t.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(at), elements);
  return t;
}

// The next instruction of those that cover `left` consecutive floats.
struct Piece {
  uint32_t mask, repeats;
};
__aicore__ inline Piece next_piece(uint32_t left) {
  if (left < REPEAT) return {left, 1};
  return {REPEAT, left / REPEAT < MAX_REPEATS ? left / REPEAT : MAX_REPEATS};
}

// One value for a whole row, kept as a block of 8 equal floats. An instruction that reads it with strides of 0 needs no
// trip to the scalar unit, which would stop the vector unit twice a row.
__aicore__ inline void multiply_by_block(const LocalTensor<float>& to, const LocalTensor<float>& from,
                                         const LocalTensor<float>& block, uint32_t n) {
  for (uint32_t at = 0; at < n;) {
    const Piece piece = next_piece(n - at);
    Mul(to[at], from[at], block, piece.mask, piece.repeats, BinaryRepeatParams(1, 1, 0, 8, 8, 0));
    at += piece.mask * piece.repeats;
  }
}
__aicore__ inline void subtract_block(const LocalTensor<float>& to, const LocalTensor<float>& from,
                                      const LocalTensor<float>& block, uint32_t n) {
  for (uint32_t at = 0; at < n;) {
    const Piece piece = next_piece(n - at);
    Sub(to[at], from[at], block, piece.mask, piece.repeats, BinaryRepeatParams(1, 1, 0, 8, 8, 0));
    at += piece.mask * piece.repeats;
  }
}

}  // namespace vidgen
