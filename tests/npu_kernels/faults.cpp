// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, of the kinds that the CPU twin is there to catch. fault(name) returns what the twin says
// to it, or an empty string.
#include <map>

#include "adaln_modulate/adaln_modulate.h"

namespace {

using namespace AscendC;

constexpr uint32_t N = 64;  // floats, 256 bytes

// Two inputs and an output of N floats, and the buffers most kernels use.
struct Kernel {
  alignas(64) float x[N] = {}, y[N] = {};
  GlobalTensor<float> from, to;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> work;
  LocalTensor<float> a, b;

  void init() {
    from.SetGlobalBuffer(x, N);
    to.SetGlobalBuffer(y, N);
    pipe.InitBuffer(in, 1, N * sizeof(float));
    pipe.InitBuffer(out, 1, N * sizeof(float));
    pipe.InitBuffer(work, 2 * N * sizeof(float));
    a = work.Get<float>(), b = a[N];
  }
  LocalTensor<float> fetched() {
    auto t = in.AllocTensor<float>();
    DataCopyPad(t, from, whole(), {});
    in.EnQue(t);
    return in.DeQue<float>();
  }
  void send(LocalTensor<float> t) {
    out.EnQue(t);
    t = out.DeQue<float>();
    DataCopyPad(to, t, whole());
    out.FreeTensor(t);
  }
  static DataCopyExtParams whole() { return {1, N * sizeof(float), 0, 0, 0}; }
  static BinaryRepeatParams plain() { return {1, 1, 1, 8, 8, 8}; }
};

// What a right kernel does: y = x + x.
void right(Kernel& k) {
  auto x = k.fetched();
  auto y = k.out.AllocTensor<float>();
  Add(y, x, x, N);
  k.in.FreeTensor(x);
  k.send(y);
}

void barrier() { PipeBarrier<PIPE_V>(); }

using Body = void (*)(Kernel&);
const std::map<std::string, Body> FAULTS = {
    {"none", right},
    {"unified buffer too small",
     [](Kernel& k) {
       TBuf<> more;
       k.pipe.InitBuffer(more, 192 * 1024);
     }},
    {"buffer length not whole blocks",
     [](Kernel& k) {
       TBuf<> more;
       k.pipe.InitBuffer(more, 40);
     }},
    {"unaligned address", [](Kernel& k) { Duplicate(k.a[1], 0.0f, 8); }},
    {"past a local tensor", [](Kernel& k) { Duplicate(k.b, 0.0f, N + 1); }},
    {"scalar past a local tensor", [](Kernel& k) { k.b.SetValue(N, 0.0f); }},
    {"read past global memory",
     [](Kernel& k) { DataCopyPad(k.in.AllocTensor<float>(), k.from[1], Kernel::whole(), {}); }},
    {"write past global memory",
     [](Kernel& k) {
       auto y = k.out.AllocTensor<float>();
       Duplicate(y, 0.0f, N);
       k.out.EnQue(y);
       DataCopyPad(k.to[1], k.out.DeQue<float>(), Kernel::whole());
     }},
    {"tensor longer than its memory", [](Kernel& k) { k.from.SetGlobalBuffer(k.x, N + 1); }},
    {"memory the host never named",
     [](Kernel& k) {
       float other;
       k.from.SetGlobalBuffer(&other, 1);
     }},
    {"write to an input",
     [](Kernel& k) {
       auto y = k.out.AllocTensor<float>();
       Duplicate(y, 0.0f, N);
       k.out.EnQue(y);
       DataCopyPad(k.from, k.out.DeQue<float>(), Kernel::whole());
     }},
    {"output not written",
     [](Kernel& k) {
       auto x = k.fetched();
       k.in.FreeTensor(x);
     }},
    {"output written in part",
     [](Kernel& k) {
       auto y = k.out.AllocTensor<float>();
       Duplicate(y, 0.0f, N);
       k.out.EnQue(y);
       y = k.out.DeQue<float>();
       DataCopyPad(k.to, y, DataCopyExtParams(1, N * 4 - 4, 0, 0, 0));
       k.out.FreeTensor(y);
     }},
    {"output written twice",
     [](Kernel& k) {
       right(k);
       right(k);
     }},
    {"too many blocks in a copy", [](Kernel&) { DataCopyExtParams(4096, 32, 0, 0, 0); }},
    {"mask larger than a repeat", [](Kernel& k) { Add(k.a, k.a, k.a, 65, 1, Kernel::plain()); }},
    {"too many repeats", [](Kernel& k) { Add(k.a, k.a, k.a, 64, 256, Kernel::plain()); }},
    {"stride too wide", [](Kernel&) { BinaryRepeatParams(1, 1, 1, 256, 8, 8); }},
    {"gather past its source",
     [](Kernel& k) {
       auto offsets = k.b.ReinterpretCast<int32_t>();
       Duplicate(offsets, int32_t(3 * N * sizeof(float)), 8);
       barrier();
       Gather(k.a, k.a, offsets.ReinterpretCast<uint32_t>(), 0, 8);
     }},
    {"gather between elements",
     [](Kernel& k) {
       auto offsets = k.b.ReinterpretCast<int32_t>();
       Duplicate(offsets, 2, 8);
       barrier();
       Gather(k.a, k.a, offsets.ReinterpretCast<uint32_t>(), 0, 8);
     }},
    {"no tensor left",
     [](Kernel& k) {
       k.in.AllocTensor<float>();
       k.in.AllocTensor<float>();
     }},
    {"take from an empty queue", [](Kernel& k) { k.in.DeQue<float>(); }},
    {"free twice",
     [](Kernel& k) {
       auto x = k.fetched();
       k.in.FreeTensor(x);
       k.in.FreeTensor(x);
     }},
    {"tensor never freed",
     [](Kernel& k) {
       right(k);
       k.in.AllocTensor<float>();
     }},
    {"vector before copy",  // never queued, so nothing waits for the copy
     [](Kernel& k) {
       auto x = k.in.AllocTensor<float>();
       DataCopyPad(x, k.from, Kernel::whole(), {});
       Add(k.a, x, x, N);
     }},
    {"copy before vector",
     [](Kernel& k) {
       Duplicate(k.a, 0.0f, N);
       DataCopyPad(k.to, k.a, Kernel::whole());
     }},
    {"copy over what is read",
     [](Kernel& k) {
       auto x = k.fetched();
       Add(k.a, x, x, N);
       DataCopyPad(x, k.from, Kernel::whole(), {});
     }},
    {"vector after vector",
     [](Kernel& k) {
       Duplicate(k.a, 0.0f, N);
       Add(k.b, k.a, k.a, N);
     }},
    {"scalar after vector",
     [](Kernel& k) {
       Duplicate(k.a, 0.0f, N);
       k.a.GetValue(0);
     }},
    {"vector after scalar",
     [](Kernel& k) {
       k.a.SetValue(0, 1.0f);
       Adds(k.b, k.a, 1.0f, 1);
     }},
    {"too many events",
     [](Kernel& k) {
       TQue<TPosition::VECIN, 1> many;
       k.pipe.InitBuffer(many, 9, 32);
       for (int i = 0; i < 9; ++i) {
         auto t = many.AllocTensor<float>();
         many.EnQue(t);
         t = many.DeQue<float>();
         many.FreeTensor(t);
       }
     }},
    {"flag nobody waits for", [](Kernel& k) { right(k), SetFlag<HardEvent::V_S>(0); }},
    {"flag nobody sets", [](Kernel&) { WaitFlag<HardEvent::V_S>(0); }},
    {"flag set twice", [](Kernel&) { SetFlag<HardEvent::V_S>(0), SetFlag<HardEvent::V_S>(0); }},
};

std::string said;

// Runs `body` on `cores` cores as a launch does, and keeps what the twin says.
template <typename F>
const char* run(uint32_t cores, const F& body) {
  said.clear();
  try {
    twin::launch("kernel", cores, body);
  } catch (const twin::Fault& fault) {
    said = fault.what();
  }
  return said.c_str();
}

}  // namespace

extern "C" const char* fault(const char* name) {
  Kernel k;
  twin::share(k.x, sizeof(k.x), twin::Role::input);
  twin::share(k.y, sizeof(k.y), twin::Role::output);
  return run(1, [&] {
    k.init();
    FAULTS.at(name)(k);
  });
}

extern "C" const char* names() {
  said.clear();
  for (auto& [name, body] : FAULTS) said += name + "\n";
  return said.c_str();
}

// The real adaln_modulate with a wrong tiling: a share of the rows is left out, done twice, or rows are too long.
extern "C" const char* wrong_tiling(const char* what) {
  const std::string wrong(what);
  const bool long_rows = wrong == "too long";
  const uint32_t rows = 12, channels = long_rows ? 20000 : 40;
  std::vector<float> x(rows * channels, 1.0f), y(rows * channels), shift(channels), scale(channels);
  vidgen::AdalnModulateTiling t{};
  tile(t, vidgen::Float::float32, 1, rows, channels, 4, long_rows ? 1 << 30 : vidgen::UB_BYTES);
  if (wrong == "left out") t.split.parts -= 1;
  auto bytes = [](std::vector<float>& v) { return reinterpret_cast<uint8_t*>(v.data()); };
  for (auto v : {&x, &shift, &scale}) twin::share(v->data(), v->size() * sizeof(float), twin::Role::input);
  twin::share(y.data(), y.size() * sizeof(float), twin::Role::output);
  return run(4, [&] {
    TPipe pipe;
    vidgen::AdalnModulate<float> kernel;
    kernel.init(pipe, bytes(x), {bytes(shift), bytes(scale), nullptr, nullptr, channels, channels}, bytes(y), t);
    kernel.process();
    if (wrong == "twice") kernel.process();
  });
}
