// SPDX-License-Identifier: Apache-2.0
// Rotates pairs of channels by the angles of their token, float32 inside. Compiled once per instruction set.
#include "cpu/kernels/rope_3d.h"

#include <ATen/Parallel.h>

#include "common/rotation.h"

namespace vidgen {
namespace CPU_CAPABILITY {

void rope_3d(const at::Tensor& out, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
             const Pairs& pairs) {
  const int64_t sequence = x.size(1), heads = x.size(2), dim = x.size(3), channels = heads * dim;
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "rope_3d", [&] {
    const int64_t grain = std::max<int64_t>(1, 32768 / (channels * sizeof(scalar_t)));
    at::parallel_for(0, x.size(0) * sequence, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(2 * channels + dim, 4);
      float *plain = scratch.row(channels), *rotated = scratch.row(channels);
      Angles angles(scratch, dim / 2);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / sequence, l = row % sequence;
        const Turn turn = angles.read(cos, sin, b, l, false);
        const scalar_t* from = x.const_data_ptr<scalar_t>() + b * x.stride(0) + l * x.stride(1);
        widen_heads(plain, from, heads, dim, x.stride(2));
        rotate_heads({rotated, plain, heads, dim, nullptr}, turn, pairs,
                     [&](int64_t h) { prefetch_head(from + x.stride(1) + h * x.stride(2), dim); });
        narrow_row(out.mutable_data_ptr<scalar_t>() + row * channels, rotated, channels);
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
