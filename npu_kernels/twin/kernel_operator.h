// SPDX-License-Identifier: Apache-2.0
// The CPU twin of the part of Ascend C that the kernels here use, written from its public interface (API.md) so that
// they compile with g++ and run core by core. It stands on the include path in place of CANN's header of this name.
//
// It checks what goes wrong without a word on the device: the unified buffer's size, 32-byte alignment, accesses
// outside a local or global tensor, lanes and repeats out of range, the life of queue tensors, the order among pipes
// (machine.h), outputs not written whole, or written twice. Memory that nobody wrote reads as NaN. It says nothing
// about speed, about what the vendor's compiler accepts, or about the last bits of the device's arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "half.h"
#include "machine.h"

#define VIDGEN_ASCENDC_TWIN 1
#define __aicore__
#define __global__
#define __vector__
#define __gm__
#define GM_ADDR uint8_t*

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

enum class TPosition { VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;
enum class RoundMode { CAST_NONE, CAST_RINT };
enum class HardEvent { V_S, S_V, V_MTE2, MTE2_V, V_MTE3, MTE3_V };

inline std::pair<twin::Pipe, twin::Pipe> pipes_of(HardEvent event) {
  constexpr std::pair<twin::Pipe, twin::Pipe> all[] = {{twin::V, twin::S},    {twin::S, twin::V},
                                                       {twin::V, twin::MTE2}, {twin::MTE2, twin::V},
                                                       {twin::V, twin::MTE3}, {twin::MTE3, twin::V}};
  return all[int(event)];
}

inline int64_t GetBlockIdx() { return twin::core->index; }
inline int64_t GetBlockNum() { return twin::core->count; }

// Parameters; the twin takes wide integers and refuses what the device's narrow fields would cut off.

struct DataCopyExtParams {
  int64_t blockCount, blockLen, srcStride, dstStride;
  DataCopyExtParams(int64_t count, int64_t bytes, int64_t src_gap, int64_t dst_gap, int64_t)
      : blockCount(count), blockLen(bytes), srcStride(src_gap), dstStride(dst_gap) {
    twin::check(count >= 1 && count <= 4095, "DataCopyPad: blockCount must be 1 to 4095");
    twin::check(bytes >= 1 && bytes <= 2097151, "DataCopyPad: blockLen must be 1 to 2097151 bytes");
    twin::check(src_gap >= 0 && dst_gap >= 0 && src_gap < 1ll << 32 && dst_gap < 1ll << 32,
                "DataCopyPad: strides must fit 32 bits");
  }
};
template <class T>
struct DataCopyPadExtParams {
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  T paddingValue = {};
};

inline int stride(int64_t blocks) {
  twin::check(blocks >= 0 && blocks <= 255, "a stride of a repeat or block must be 0 to 255 blocks of 32 bytes");
  return int(blocks);
}
struct BinaryRepeatParams {
  int dst_block, src0_block, src1_block, dst_repeat, src0_repeat, src1_repeat;
  BinaryRepeatParams(int64_t d, int64_t a, int64_t b, int64_t dr, int64_t ar, int64_t br)
      : dst_block(stride(d)),
        src0_block(stride(a)),
        src1_block(stride(b)),
        dst_repeat(stride(dr)),
        src0_repeat(stride(ar)),
        src1_repeat(stride(br)) {}
};
struct UnaryRepeatParams {
  int dst_block, src_block, dst_repeat, src_repeat;
  UnaryRepeatParams(int64_t d, int64_t s, int64_t dr, int64_t sr)
      : dst_block(stride(d)), src_block(stride(s)), dst_repeat(stride(dr)), src_repeat(stride(sr)) {}
};
struct BrcbRepeatParams {
  int dst_block, dst_repeat;
  BrcbRepeatParams(int64_t block, int64_t repeat) : dst_block(stride(block)), dst_repeat(stride(repeat)) {}
};

// Tensors

template <class T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(__gm__ T* p, uint64_t n) {
    twin::check(n * sizeof(T) <= twin::bytes_left(p), "SetGlobalBuffer: longer than the buffer");
    p_ = p, n_ = n;
  }
  GlobalTensor operator[](uint64_t offset) const {
    twin::check(offset <= n_, "GlobalTensor: offset past the end");
    GlobalTensor t;
    t.p_ = p_ + offset, t.n_ = n_ - offset;
    return t;
  }

  T* p_ = nullptr;
  uint64_t n_ = 0;
};

template <class T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(uint8_t* begin, size_t bytes) : p_(reinterpret_cast<T*>(begin)), n_(bytes / sizeof(T)) {}
  LocalTensor operator[](uint32_t offset) const {
    twin::check(offset <= n_, "LocalTensor: offset past the end");
    LocalTensor t(*this);
    t.p_ += offset, t.n_ -= offset;
    return t;
  }
  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(reinterpret_cast<uint8_t*>(p_), n_ * sizeof(T));
  }
  void SetValue(uint32_t i, T value) const {
    twin::issue(twin::S);
    touch(twin::S, i, 1, true, "SetValue");
    p_[i] = value;
  }
  T GetValue(uint32_t i) const {
    twin::issue(twin::S);
    touch(twin::S, i, 1, false, "GetValue");
    return p_[i];
  }

  // The elements [first, first + n) must lie inside and be ordered after what wrote them.
  void touch(twin::Pipe pipe, uint64_t first, uint64_t n, bool writes, const char* op) const {
    if (p_ == nullptr || first + n > n_) twin::fail(std::string(op) + ": past the end of a LocalTensor");
    twin::access(pipe, p_ + first, n * sizeof(T), writes, op);
  }
  void aligned(const char* op) const {
    if (reinterpret_cast<uintptr_t>(p_) % 32) twin::fail(std::string(op) + ": local address is not 32-byte aligned");
  }

  T* p_ = nullptr;
  uint64_t n_ = 0;
};

// Buffers

inline uint8_t* take(uint32_t bytes) {
  twin::check(bytes > 0 && bytes % 32 == 0, "InitBuffer: the length is not a multiple of 32 bytes");
  if (twin::core->used + bytes > TWIN_UB_BYTES) {
    twin::fail("unified buffer overflow: " + std::to_string(twin::core->used + bytes) + " bytes");
  }
  auto at = twin::core->buffer + twin::core->used;
  twin::core->used += bytes;
  twin::core->blocks.resize(twin::core->used / 32);
  std::memset(at, 0xff, bytes);
  return at;
}

// VECIN: filled by MTE2, used by V. VECOUT: filled by V, drained by MTE3.
template <TPosition POSITION, int32_t DEPTH>
class TQue {
  enum { FREE, FILLING, QUEUED, IN_USE };
  static constexpr bool in = POSITION == TPosition::VECIN;
  static constexpr twin::Pipe source = in ? twin::MTE2 : twin::V, sink = in ? twin::V : twin::MTE3;
  struct Slot {
    uint8_t* at = nullptr;
    twin::Clock filled, freed = twin::Clock(twin::PIPES, 0);
    bool waits = false;  // an event says when the tensor is free, until it is allocated again
  };

 public:
  void init(uint8_t count, uint32_t bytes) {
    bytes_ = bytes;
    slots_.resize(count);
    for (auto& slot : slots_) slot.at = take(bytes);
    states_ = std::make_shared<twin::Queue>();
    states_->states.assign(count, FREE);
    twin::core->queues.push_back(states_);
  }
  template <class T>
  LocalTensor<T> AllocTensor() {
    for (size_t n = 0; n < slots_.size(); ++n) {
      const size_t i = (next_ + n) % slots_.size();
      if (states_->states[i] != FREE) continue;
      next_ = i + 1;
      states_->states[i] = FILLING;
      twin::join(twin::core->known[source], slots_[i].freed);
      if (slots_[i].waits) --twin::core->in_flight[2 + in];
      slots_[i].waits = false;
      std::memset(slots_[i].at, 0xff, bytes_);
      return LocalTensor<T>(slots_[i].at, bytes_);
    }
    twin::fail("AllocTensor: every tensor of the queue is in use (the device would hang)");
  }
  template <class T>
  bool EnQue(const LocalTensor<T>& t) {
    const size_t i = slot(t, FILLING, "EnQue");
    twin::check(int(fifo_.size()) < DEPTH, "EnQue: the queue is full");
    twin::check(++twin::core->in_flight[in] <= twin::EVENT_IDS, "EnQue: no event id is left");
    states_->states[i] = QUEUED;
    slots_[i].filled = twin::snapshot(source);
    fifo_.push_back(i);
    return true;
  }
  template <class T>
  LocalTensor<T> DeQue() {
    twin::check(!fifo_.empty(), "DeQue: the queue is empty (the device would hang)");
    const size_t i = fifo_.front();
    fifo_.pop_front();
    --twin::core->in_flight[in];
    states_->states[i] = IN_USE;
    twin::join(twin::core->known[sink], slots_[i].filled);
    return LocalTensor<T>(slots_[i].at, bytes_);
  }
  template <class T>
  void FreeTensor(LocalTensor<T>& t) {
    const size_t i = slot(t, IN_USE, "FreeTensor");
    states_->states[i] = FREE;
    slots_[i].freed = twin::snapshot(sink);
    slots_[i].waits = true;
    twin::check(++twin::core->in_flight[2 + in] <= twin::EVENT_IDS, "FreeTensor: no event id is left");
  }

 private:
  template <class T>
  size_t slot(const LocalTensor<T>& t, int state, const char* op) {
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].at == reinterpret_cast<uint8_t*>(t.p_) && states_->states[i] == state) return i;
    }
    twin::fail(std::string(op) + ": not a tensor of this queue in the state for it");
  }

  std::vector<Slot> slots_;
  std::deque<size_t> fifo_;
  std::shared_ptr<twin::Queue> states_;
  size_t next_ = 0;
  uint32_t bytes_ = 0;
};

template <TPosition POSITION = TPosition::VECCALC>
class TBuf {
 public:
  void init(uint32_t bytes) { at_ = take(bytes), bytes_ = bytes; }
  template <class T>
  LocalTensor<T> Get() {
    return LocalTensor<T>(at_, bytes_);
  }

 private:
  uint8_t* at_ = nullptr;
  uint32_t bytes_ = 0;
};

class TPipe {
 public:
  template <TPosition POSITION, int32_t DEPTH>
  bool InitBuffer(TQue<POSITION, DEPTH>& queue, uint8_t count, uint32_t bytes) {
    queue.init(count, bytes);
    return true;
  }
  template <TPosition POSITION>
  bool InitBuffer(TBuf<POSITION>& buffer, uint32_t bytes) {
    buffer.init(bytes);
    return true;
  }
  int32_t FetchEventID(HardEvent event) {
    for (int id = 0; id < twin::EVENT_IDS; ++id) {
      if (!twin::core->flags.count({int(event), id})) return id;
    }
    twin::fail("FetchEventID: no event id is left");
  }
};

// Order

template <HardEvent EVENT>
void SetFlag(int32_t id) {
  twin::check(!twin::core->flags.count({int(EVENT), id}), "SetFlag: the flag is set already");
  twin::core->flags[{int(EVENT), id}] = twin::snapshot(pipes_of(EVENT).first);
}
template <HardEvent EVENT>
void WaitFlag(int32_t id) {
  auto flag = twin::core->flags.find({int(EVENT), id});
  twin::check(flag != twin::core->flags.end(), "WaitFlag: nothing sets the flag (the device would hang)");
  twin::join(twin::core->known[pipes_of(EVENT).second], flag->second);
  twin::core->flags.erase(flag);
}
template <pipe_t PIPE>
void PipeBarrier() {
  static_assert(PIPE != PIPE_S, "the scalar unit orders itself; a barrier on it is an error of the hardware");
  if (twin::barriers_are_ignored()) return;
  if constexpr (PIPE != PIPE_ALL) {
    twin::core->known[PIPE][PIPE] = twin::core->issued[PIPE];
  } else {
    for (int p = 0; p < twin::PIPES; ++p) {
      for (int q = 0; q < twin::PIPES; ++q) twin::core->known[p][q] = twin::core->issued[q];
    }
  }
}

}  // namespace AscendC

inline AscendC::TPipe* GetTPipePtr() {
  static AscendC::TPipe pipe;
  return &pipe;
}

#include "instructions.h"
