// SPDX-License-Identifier: Apache-2.0
// Four bands from two rows of a frame, and back; one output row of every band per step.
#include "cpu/kernels/haar_2d.h"

#include "common/haar.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// bands[c][a] is band 2 c + a, `step` elements after the last.
template <typename T>
struct BandRows {
  T* rows[2][2];
  BandRows(T* first, int64_t step) : rows{{first, first + step}, {first + 2 * step, first + 3 * step}} {}
};

}  // namespace

void haar_2d(const at::Tensor& out, const at::Tensor& x, double filter_constant) {
  const int64_t channels = x.size(1), frames = x.size(2), height = out.size(3), width = out.size(4);
  const int64_t plane = height * width, step = channels * frames * plane;
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "haar_2d", [&] {
    scalar_t* bands = out.mutable_data_ptr<scalar_t>();
    const scalar_t* images = x.const_data_ptr<scalar_t>();
    each_band_row(x.size(0), channels, frames, height, 8 * width * sizeof(scalar_t),
                  [&](int64_t b, int64_t c, int64_t t, int64_t h) {
                    const scalar_t* row =
                        images + b * x.stride(0) + c * x.stride(1) + t * x.stride(2) + 2 * h * x.stride(3);
                    const BandRows to(bands + ((b * 4 * channels + c) * frames + t) * plane + h * width, step);
                    analyse_rows<2>(to.rows, {row, row + x.stride(3)}, width, static_cast<float>(filter_constant));
                  });
  });
}

void inverse_haar_2d(const at::Tensor& out, const at::Tensor& y, double filter_constant) {
  const int64_t channels = out.size(1), frames = y.size(2), height = y.size(3), width = y.size(4);
  VIDGEN_DISPATCH_FLOATS(y.scalar_type(), "inverse_haar_2d", [&] {
    scalar_t* images = out.mutable_data_ptr<scalar_t>();
    const scalar_t* bands = y.const_data_ptr<scalar_t>();
    each_band_row(y.size(0), channels, frames, height, 8 * width * sizeof(scalar_t),
                  [&](int64_t b, int64_t c, int64_t t, int64_t h) {
                    const BandRows from(bands + b * y.stride(0) + c * y.stride(1) + t * y.stride(2) + h * y.stride(3),
                                        channels * y.stride(1));
                    scalar_t* row = images + (((b * channels + c) * frames + t) * height + h) * 4 * width;
                    synthesise_rows<2>({row, row + 2 * width}, from.rows, width, static_cast<float>(filter_constant));
                  });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
