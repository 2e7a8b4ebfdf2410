// SPDX-License-Identifier: Apache-2.0
// The kernels as PyTorch operators `vidgen_ascendc::*` on npu tensors. Arguments were checked by vidgen.ops; tensors
// are contiguous, modulations per sample with rows of any stride. Built with the CPU twin, the same code runs on
// tensors whose memory the host can reach: those of the CPU, or of an emulated npu.
#include <torch/library.h>

#include "host.h"

namespace vidgen {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Tensor adaln_modulate_op(const Tensor& x, const Tensor& shift, const Tensor& scale, const Optional& weight,
                         const Optional& bias, double eps) {
  Tensor y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  const Launch to = launch_on(x);
  AdalnModulateTiling t{};
  require_fit(tile(t, to.type, x.size(0), x.size(1), x.size(2), to.cores), "adaln_modulate", x);
  t.shift_stride = row_stride(shift), t.scale_stride = row_stride(scale), t.eps = float(eps);
  adaln_modulate(to, in(x), in(shift), in(scale), in(weight), in(bias), out(y), t);
  return y;
}

// The longest row that fits the unified buffer. Bytes grow with the row, so the limit can be halved in on.
template <typename F>
int64_t longest(const F& fits) {
  int64_t most = 0, too_long = 1 << 16;
  while (too_long - most > 1) {
    const int64_t middle = (most + too_long) / 2;
    (fits(uint32_t(middle)) ? most : too_long) = middle;
  }
  return most;
}

int64_t longest_row(const std::string& op, at::ScalarType dtype) {
  const Float type = float_type(dtype);
  return longest([&](uint32_t row) {
    if (op == "adaln_modulate") return adaln_modulate_bytes(row, type, 1) <= UB_BYTES;
    TORCH_CHECK(false, "longest_row: no kernel ", op);
  });
}

}  // namespace

TORCH_LIBRARY(vidgen_ascendc, m) {
  m.def("longest_row(str op, ScalarType dtype) -> int", &longest_row);
  m.def("adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(vidgen_ascendc, VIDGEN_KEY, m) { m.impl("adaln_modulate", &adaln_modulate_op); }

}  // namespace vidgen
