// SPDX-License-Identifier: Apache-2.0
// Part of the CPU twin (kernel_operator.h): the copies and vector instructions themselves.
#pragma once

namespace AscendC {

// Copies. Strides are gaps between the end of a block and the start of the next: bytes in global memory, units of 32
// bytes in the unified buffer, where every block takes a multiple of 32 bytes.

template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& copy,
                 const DataCopyPadExtParams<T>& pad) {
  twin::issue(twin::MTE2);
  twin::check(!pad.isPad, "DataCopyPad: the twin does not know padding with a value");
  dst.aligned("DataCopyPad");
  const uint64_t padded = uint64_t(copy.blockLen + 31) / 32 * 32;
  for (int64_t i = 0; i < copy.blockCount; ++i) {
    const uint64_t from = i * (copy.blockLen + copy.srcStride), to = i * (padded + copy.dstStride * 32);
    twin::check(from + copy.blockLen <= src.n_ * sizeof(T), "DataCopyPad: reads past the end of a GlobalTensor");
    dst.touch(twin::MTE2, to / sizeof(T), padded / sizeof(T), true, "DataCopyPad");
    auto at = reinterpret_cast<uint8_t*>(dst.p_) + to;
    std::memcpy(at, reinterpret_cast<const uint8_t*>(src.p_) + from, copy.blockLen);
    std::memset(at + copy.blockLen, 0xff, padded - copy.blockLen);  // nobody says what is there
  }
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& copy) {
  twin::issue(twin::MTE3);
  src.aligned("DataCopyPad");
  const uint64_t padded = uint64_t(copy.blockLen + 31) / 32 * 32;
  for (int64_t i = 0; i < copy.blockCount; ++i) {
    const uint64_t from = i * (padded + copy.srcStride * 32), to = i * (copy.blockLen + copy.dstStride);
    twin::check(to + copy.blockLen <= dst.n_ * sizeof(T), "DataCopyPad: writes past the end of a GlobalTensor");
    src.touch(twin::MTE3, from / sizeof(T), copy.blockLen / sizeof(T), false, "DataCopyPad");
    twin::write_global(reinterpret_cast<uint8_t*>(dst.p_) + to, reinterpret_cast<const uint8_t*>(src.p_) + from,
                       copy.blockLen);
  }
}

// Vector instructions on `count` consecutive elements.

template <class T>
void operand(const LocalTensor<T>& t, uint64_t n, bool writes, const char* op) {
  t.aligned(op);
  t.touch(twin::V, 0, n, writes, op);
}

template <class T, class F>
void binary(const char* op, const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t n, F f) {
  twin::issue(twin::V);
  operand(a, n, false, op), operand(b, n, false, op), operand(d, n, true, op);
  for (int32_t i = 0; i < n; ++i) d.p_[i] = f(a.p_[i], b.p_[i]);
}
template <class T, class F>
void unary(const char* op, const LocalTensor<T>& d, const LocalTensor<T>& a, int32_t n, F f) {
  twin::issue(twin::V);
  operand(a, n, false, op), operand(d, n, true, op);
  for (int32_t i = 0; i < n; ++i) d.p_[i] = f(a.p_[i]);
}

// Vector instructions by repeats: of up to 256 bytes, in 8 blocks of 32 bytes; the first `mask` elements take part.

constexpr int BLOCK = 32;
template <class T>
uint64_t element(int repeat, int lane, int repeat_stride, int block_stride) {
  constexpr int per_block = BLOCK / sizeof(T);
  return (uint64_t(repeat) * repeat_stride + uint64_t(lane / per_block) * block_stride) * per_block + lane % per_block;
}
template <class T>
void check_repeats(const char* op, uint64_t mask, int64_t repeats) {
  if (mask < 1 || mask > 256 / sizeof(T)) twin::fail(std::string(op) + ": mask does not fit a repeat");
  if (repeats < 1 || repeats > 255) twin::fail(std::string(op) + ": repeatTime must be 1 to 255");
}
template <class T>
void repeated(const LocalTensor<T>& t, uint64_t mask, int repeats, int repeat_stride, int block_stride, bool writes,
              const char* op) {
  constexpr int per_block = BLOCK / sizeof(T);
  t.aligned(op);
  for (int r = 0; r < repeats; ++r) {
    for (int lane = 0; lane < int(mask); lane += per_block) {
      const int n = std::min<int>(per_block, int(mask) - lane);
      t.touch(twin::V, element<T>(r, lane, repeat_stride, block_stride), n, writes, op);
    }
  }
}

template <class T, class F>
void binary(const char* op, const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, uint64_t mask,
            int64_t repeats, const BinaryRepeatParams& p, F f) {
  twin::issue(twin::V);
  check_repeats<T>(op, mask, repeats);
  repeated(a, mask, repeats, p.src0_repeat, p.src0_block, false, op);
  repeated(b, mask, repeats, p.src1_repeat, p.src1_block, false, op);
  repeated(d, mask, repeats, p.dst_repeat, p.dst_block, true, op);
  for (int r = 0; r < int(repeats); ++r) {
    for (int lane = 0; lane < int(mask); ++lane) {
      d.p_[element<T>(r, lane, p.dst_repeat, p.dst_block)] = f(a.p_[element<T>(r, lane, p.src0_repeat, p.src0_block)],
                                                               b.p_[element<T>(r, lane, p.src1_repeat, p.src1_block)]);
    }
  }
}
template <class T, class F>
void unary(const char* op, const LocalTensor<T>& d, const LocalTensor<T>& a, uint64_t mask, int64_t repeats,
           const UnaryRepeatParams& p, F f) {
  twin::issue(twin::V);
  check_repeats<T>(op, mask, repeats);
  repeated(a, mask, repeats, p.src_repeat, p.src_block, false, op);
  repeated(d, mask, repeats, p.dst_repeat, p.dst_block, true, op);
  for (int r = 0; r < int(repeats); ++r) {
    for (int lane = 0; lane < int(mask); ++lane) {
      d.p_[element<T>(r, lane, p.dst_repeat, p.dst_block)] = f(a.p_[element<T>(r, lane, p.src_repeat, p.src_block)]);
    }
  }
}

#define TWIN_BINARY(NAME, EXPRESSION)                                                                                  \
  template <class T>                                                                                                   \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& n) {             \
    static_assert(std::is_arithmetic_v<T>, #NAME " of half or bfloat16: Cast to float first");                         \
    binary(#NAME, d, a, b, n, [](T x, T y) { return EXPRESSION; });                                                    \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, uint64_t mask, int64_t repeats, \
            const BinaryRepeatParams& p) {                                                                             \
    static_assert(std::is_arithmetic_v<T>, #NAME " of half or bfloat16: Cast to float first");                         \
    binary(#NAME, d, a, b, mask, repeats, p, [](T x, T y) { return EXPRESSION; });                                     \
  }
TWIN_BINARY(Add, x + y)
TWIN_BINARY(Sub, x - y)
TWIN_BINARY(Mul, x* y)
TWIN_BINARY(Div, x / y)

#define TWIN_SCALAR(NAME, EXPRESSION)                                                                     \
  template <class T>                                                                                      \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& a, const T& y, const int32_t& n) {             \
    unary(#NAME, d, a, n, [y](T x) { return EXPRESSION; });                                               \
  }                                                                                                       \
  template <class T>                                                                                      \
  void NAME(const LocalTensor<T>& d, const LocalTensor<T>& a, const T& y, uint64_t mask, int64_t repeats, \
            const UnaryRepeatParams& p) {                                                                 \
    unary(#NAME, d, a, mask, repeats, p, [y](T x) { return EXPRESSION; });                                \
  }
TWIN_SCALAR(Adds, x + y)
TWIN_SCALAR(Muls, x* y)

template <class T>
void Sqrt(const LocalTensor<T>& d, const LocalTensor<T>& a, const int32_t& n) {
  unary("Sqrt", d, a, n, [](T x) { return std::sqrt(x); });
}

template <class T>
void Duplicate(const LocalTensor<T>& d, const T& value, const int32_t& n) {
  twin::issue(twin::V);
  operand(d, n, true, "Duplicate");
  std::fill(d.p_, d.p_ + n, value);
}

template <class D, class U>
void Cast(const LocalTensor<D>& d, const LocalTensor<U>& a, const RoundMode& mode, const uint32_t n) {
  static_assert(sizeof(D) != sizeof(U), "Cast: to or from float");
  twin::check((mode == RoundMode::CAST_RINT) == (sizeof(D) < sizeof(U)),
              "Cast: CAST_NONE where nothing is lost, CAST_RINT where something is");
  twin::issue(twin::V);
  operand(a, n, false, "Cast"), operand(d, n, true, "Cast");
  for (uint32_t i = 0; i < n; ++i) twin::narrow(twin::widen(a.p_[i]), d.p_[i]);
}

inline float tree_sum(const float* x, int n) {
  return n == 1 ? x[0] : tree_sum(x, n / 2) + tree_sum(x + n / 2, n - n / 2);
}

// All of `count` elements into dst[0]; `work` holds one partial sum per 64 elements.
template <class T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& work, const int32_t n) {
  static_assert(std::is_same_v<T, float>, "ReduceSum: of float here");
  twin::issue(twin::V);
  operand(src, n, false, "ReduceSum");
  operand(work, (n + 511) / 512 * 8, true, "ReduceSum");
  operand(dst, 1, true, "ReduceSum");
  dst.p_[0] = tree_sum(src.p_, n);
}

// The first `mask` elements of every repeat into one element of dst each, `dst_stride` elements apart.
template <class T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask, const int32_t repeats,
                    const int32_t dst_stride, const int32_t block_stride, const int32_t repeat_stride) {
  static_assert(std::is_same_v<T, float>, "WholeReduceSum: of float here");
  twin::issue(twin::V);
  check_repeats<T>("WholeReduceSum", mask, repeats);
  repeated(src, mask, repeats, repeat_stride, block_stride, false, "WholeReduceSum");
  dst.touch(twin::V, 0, uint64_t(repeats - 1) * dst_stride + 1, true, "WholeReduceSum");
  for (int r = 0; r < repeats; ++r) {
    float lanes[64];
    for (int lane = 0; lane < mask; ++lane) lanes[lane] = src.p_[element<T>(r, lane, repeat_stride, block_stride)];
    dst.p_[r * dst_stride] = tree_sum(lanes, mask);
  }
}

// Each of 8 elements a repeat fills one block of 32 bytes.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint8_t repeats, const BrcbRepeatParams& p) {
  static_assert(sizeof(T) == 4, "Brcb: of float here");
  twin::issue(twin::V);
  check_repeats<T>("Brcb", 1, repeats);
  operand(src, 8ull * repeats, false, "Brcb");
  repeated(dst, 64, repeats, p.dst_repeat, p.dst_block, true, "Brcb");
  for (int r = 0; r < repeats; ++r) {
    for (int lane = 0; lane < 64; ++lane) {
      dst.p_[element<T>(r, lane, p.dst_repeat, p.dst_block)] = src.p_[8 * r + lane / 8];
    }
  }
}

// dst[i] = the element of src that starts `base + offsets[i]` bytes after its start.
template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offsets,
            const uint32_t base, const uint32_t n) {
  twin::issue(twin::V);
  src.aligned("Gather");
  operand(offsets, n, false, "Gather");
  for (uint32_t i = 0; i < n; ++i) {
    const uint64_t at = uint64_t(base) + offsets.p_[i];
    twin::check(at % sizeof(T) == 0, "Gather: an offset is not a multiple of the element's size");
    src.touch(twin::V, at / sizeof(T), 1, false, "Gather");
  }
  operand(dst, n, true, "Gather");
  std::vector<T> got(n);
  for (uint32_t i = 0; i < n; ++i) got[i] = src.p_[(uint64_t(base) + offsets.p_[i]) / sizeof(T)];
  std::copy(got.begin(), got.end(), dst.p_);
}

}  // namespace AscendC
