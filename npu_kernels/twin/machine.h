// SPDX-License-Identifier: Apache-2.0
// What the twin knows of one vector core: its unified buffer, its pipes and the order among them, and global memory.
//
// A pipe is a queue of instructions that run in order; different pipes run at the same time. The twin executes in
// program order, but keeps for every 32-byte block of the unified buffer which instruction of which pipe wrote and read
// it last, and for every pipe how far it has waited for the others (a vector clock). An access that nothing orders
// after the write it depends on is a fault, although it would go well here.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef TWIN_UB_BYTES
#define TWIN_UB_BYTES (192 * 1024)
#endif

namespace twin {

enum Pipe { S, V, MTE2, MTE3, PIPES };
inline const char* name(Pipe pipe) { return std::vector<const char*>{"S", "V", "MTE2", "MTE3"}[pipe]; }

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Clock = std::vector<uint64_t>;  // for each pipe, how many of its instructions are known to be done

struct Block {  // 32 bytes of the unified buffer
  int writer = -1;
  uint64_t written = 0;
  uint64_t read[PIPES] = {};
};

struct Queue {  // one TQue: what must hold when the kernel ends
  std::vector<int> states;
};

constexpr int EVENT_IDS = 8;  // flags that one pair of pipes can have in flight

struct Core {
  int index = 0, count = 1;
  uint8_t* buffer = nullptr;
  size_t used = 0;
  std::vector<Block> blocks;  // of what is in use
  uint64_t issued[PIPES] = {};
  std::vector<Clock> known = std::vector<Clock>(PIPES, Clock(PIPES, 0));
  std::map<std::pair<int, int>, Clock> flags;  // (event, id) -> what the setting pipe knew
  std::map<int, int> in_flight;                // events that queues hold: of tensors on their way, and freed ones
  std::vector<std::shared_ptr<Queue>> queues;

  Core() : buffer(static_cast<uint8_t*>(std::aligned_alloc(512, TWIN_UB_BYTES))) {}
  ~Core() { std::free(buffer); }
  Core(const Core&) = delete;
};

inline thread_local Core* core = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  throw Fault("core " + std::to_string(core ? core->index : -1) + ": " + what);
}
inline void check(bool ok, const char* what) {
  if (!ok) fail(what);
}

// Global memory

enum class Role { input, output };
struct Memory {
  size_t bytes;
  Role role;
  std::vector<uint8_t> written;
};
inline std::map<const uint8_t*, Memory>& memories() {
  static std::map<const uint8_t*, Memory> all;
  return all;
}
// Names a buffer that the next launch may touch. Outputs are poisoned, and must be written whole, each byte once.
inline void share(void* p, size_t bytes, Role role) {
  auto at = static_cast<uint8_t*>(p);
  if (role == Role::output) std::memset(at, 0xff, bytes);
  memories().insert_or_assign(at, Memory{bytes, role, std::vector<uint8_t>(role == Role::output ? bytes : 0)});
}
inline std::pair<Memory*, size_t> find(const void* p) {
  auto at = static_cast<const uint8_t*>(p);
  auto found = memories().upper_bound(at);
  check(found != memories().begin(), "a global pointer that the host never named");
  --found;
  const size_t offset = at - found->first;
  check(offset <= found->second.bytes, "a global pointer outside its buffer");
  return {&found->second, offset};
}
inline size_t bytes_left(const void* p) {
  auto [memory, offset] = find(p);
  return memory->bytes - offset;
}
inline void write_global(void* to, const void* from, size_t bytes) {
  auto [memory, offset] = find(to);
  check(memory->role == Role::output, "a write to an input");
  check(offset + bytes <= memory->bytes, "a write past the end of global memory");
  for (size_t i = 0; i < bytes; ++i) check(!memory->written[offset + i]++, "global memory is written twice");
  std::memcpy(to, from, bytes);
}

// Order among pipes

inline void join(Clock& into, const Clock& from) {
  for (int p = 0; p < PIPES; ++p) into[p] = std::max(into[p], from[p]);
}
inline Clock snapshot(Pipe pipe) {
  Clock clock = core->known[pipe];
  clock[pipe] = core->issued[pipe];
  return clock;
}
inline void issue(Pipe pipe) { ++core->issued[pipe]; }

inline void depend(Pipe pipe, int on, uint64_t instruction, const char* op, const char* what) {
  // The scalar unit and the two copy engines finish their own instructions in order; the vector unit overlaps them.
  const bool ordered = on < 0 || (on == pipe && pipe != V) || core->known[pipe][on] >= instruction;
  if (!ordered) fail(std::string(op) + " on pipe " + name(pipe) + what + name(Pipe(on)) + ", and nothing orders them");
}
inline void access(Pipe pipe, const void* p, size_t bytes, bool writes, const char* op) {
  const size_t first = static_cast<const uint8_t*>(p) - core->buffer;
  for (size_t b = first / 32; bytes != 0 && b <= (first + bytes - 1) / 32; ++b) {
    Block& block = core->blocks[b];
    depend(pipe, block.writer, block.written, op, " follows a write on ");
    if (!writes) {
      block.read[pipe] = core->issued[pipe];
      continue;
    }
    for (int q = 0; q < PIPES; ++q) {
      if (q != pipe && block.read[q]) depend(pipe, q, block.read[q], op, " overwrites what is read on ");
    }
    block.writer = pipe, block.written = core->issued[pipe];
  }
}

// Kernels

inline std::map<std::string, size_t>& peaks() {  // kernel -> most bytes of unified buffer that a launch took
  static std::map<std::string, size_t> all;
  return all;
}
// True: PipeBarrier does nothing. For tests that every kernel needs its barriers, and that the twin sees it.
inline bool& barriers_are_ignored() {
  static bool ignored = false;
  return ignored;
}

inline void check_end() {
  for (auto& queue : core->queues) {
    for (int state : queue->states) check(state == 0, "the kernel ends with a queue's tensor that was not freed");
  }
  check(core->flags.empty(), "the kernel ends with a flag that nobody waited for");
}

// Runs the kernel on `count` cores one after the other; then looks at the outputs, and forgets the buffers.
inline void launch(const char* kernel, uint32_t count, const std::function<void()>& run) {
  struct Forget {
    ~Forget() { core = nullptr, memories().clear(); }
  } forget;
  try {
    if (count == 0) throw Fault("a launch on no cores");
    for (uint32_t i = 0; i < count; ++i) {
      Core one;
      one.index = int(i), one.count = int(count), core = &one;
      run();
      check_end();
      auto& peak = peaks()[kernel];
      peak = std::max(peak, one.used);
    }
    for (auto& [at, memory] : memories()) {
      size_t missing = 0;
      for (uint8_t written : memory.written) missing += !written;
      if (missing) throw Fault("an output is not written whole: " + std::to_string(missing) + " bytes are missing");
    }
  } catch (const Fault& fault) {
    throw Fault(std::string(kernel) + ": " + fault.what());
  }
}

}  // namespace twin
