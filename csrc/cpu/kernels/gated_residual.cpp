// SPDX-License-Identifier: Apache-2.0
// out = x + gate * y, float32 inside. Compiled once per instruction set.
#include "cpu/kernels/gated_residual.h"

#include "common/modulation.h"
#include "common/stream.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// As gate_row, past the caches.
template <typename T>
void stream_gate_row(T* out, const T* x, const T* gate, const T* y, int64_t channels) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  for (int64_t c = 0; c < channels; c += kWidth) {
    prefetch_pack<false>(x + c + kAhead);
    prefetch_pack<false>(y + c + kAhead);
    alignas(kLine) T pack[kWidth];
    store_pack(pack, gated(x + c, gate + c, y + c, Whole{}));
    stream_copy<kWidth>(out + c, pack);
  }
}

}  // namespace

void gated_residual(const at::Tensor& out, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& y) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "gated_residual", [&] {
    using T = scalar_t;
    const auto to = write_tokens<T>(out);
    const auto of_x = read_tokens<T>(x), of_gate = read_tokens<T>(gate), of_y = read_tokens<T>(y);
    if (should_stream(to.base, x.size(2), kWidth, 3 * out.nbytes())) {
      const int64_t sequence = x.size(1), rows = x.size(0) * sequence;
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / sequence, l = row % sequence;
          stream_gate_row(to.at(b, l), of_x.at(b, l), of_gate.at(b, l), of_y.at(b, l), x.size(2));
        }
        end_stream();
      });
      return;
    }
    each_token(x, [&](int64_t b, int64_t l) {
      gate_row(to.at(b, l), of_x.at(b, l), of_gate.at(b, l), of_y.at(b, l), x.size(2));
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
