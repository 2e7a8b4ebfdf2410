// SPDX-License-Identifier: Apache-2.0
// Eight bands from two rows of each of two frames, and back; one output row of every band per step.
#include "cpu/kernels/haar_3d.h"

#include "common/haar.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// Where band rows lie: bands[c][r] with r = 2 v + a is band 4 v + 2 a + c = 2 r + c, `step` elements after the last.
template <typename T>
struct BandRows {
  T* rows[2][4];
  BandRows(T* first, int64_t step) {
    for (int band = 0; band < 8; ++band) rows[band % 2][band / 2] = first + band * step;
  }
};

}  // namespace

void haar_3d(const at::Tensor& out, const at::Tensor& x, double filter_constant, bool repeat_first_frame) {
  const int64_t channels = x.size(1), frames = out.size(2), height = out.size(3), width = out.size(4);
  const int64_t plane = height * width, step = channels * frames * plane;
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "haar_3d", [&] {
    scalar_t* bands = out.mutable_data_ptr<scalar_t>();
    const scalar_t* video = x.const_data_ptr<scalar_t>();
    const auto analyse = [&](int64_t b, int64_t c, int64_t t, int64_t h, auto streamed) {
      const int64_t earlier = repeat_first_frame ? std::max<int64_t>(2 * t - 1, 0) : 2 * t;
      const int64_t later = repeat_first_frame ? 2 * t : 2 * t + 1;
      const scalar_t* rows = video + b * x.stride(0) + c * x.stride(1) + 2 * h * x.stride(3);
      const scalar_t *first = rows + earlier * x.stride(2), *second = rows + later * x.stride(2);
      const BandRows to(bands + ((b * 8 * channels + c) * frames + t) * plane + h * width, step);
      analyse_rows<4, streamed.value>(to.rows, {first, first + x.stride(3), second, second + x.stride(3)}, width,
                                      static_cast<float>(filter_constant));
    };
    const int64_t row_bytes = 16 * width * sizeof(scalar_t);
    if (should_stream(bands, width, kPairs, x.nbytes() + out.nbytes())) {
      const auto row = [&](int64_t b, int64_t c, int64_t t, int64_t h) { analyse(b, c, t, h, std::true_type{}); };
      each_band_row(x.size(0), channels, frames, height, row_bytes, row, end_stream);
    } else {
      const auto row = [&](int64_t b, int64_t c, int64_t t, int64_t h) { analyse(b, c, t, h, std::false_type{}); };
      each_band_row(x.size(0), channels, frames, height, row_bytes, row);
    }
  });
}

void inverse_haar_3d(const at::Tensor& out, const at::Tensor& y, double filter_constant, bool drop_first_frame) {
  const int64_t channels = out.size(1), height = y.size(3), width = y.size(4);
  const int64_t plane = 4 * height * width;
  VIDGEN_DISPATCH_FLOATS(y.scalar_type(), "inverse_haar_3d", [&] {
    scalar_t* video = out.mutable_data_ptr<scalar_t>();
    const scalar_t* bands = y.const_data_ptr<scalar_t>();
    each_band_row(y.size(0), channels, y.size(2), height, 16 * width * sizeof(scalar_t),
                  [&](int64_t b, int64_t c, int64_t t, int64_t h) {
                    const int64_t earlier = 2 * t - drop_first_frame;
                    const BandRows from(bands + b * y.stride(0) + c * y.stride(1) + t * y.stride(2) + h * y.stride(3),
                                        channels * y.stride(1));
                    scalar_t* rows = video + (b * channels + c) * out.size(2) * plane + 4 * h * width;
                    scalar_t *first = earlier < 0 ? nullptr : rows + earlier * plane,
                             *first_below = earlier < 0 ? nullptr : first + 2 * width,
                             *second = rows + (earlier + 1) * plane;
                    synthesise_rows<4>({first, first_below, second, second + 2 * width}, from.rows, width,
                                       static_cast<float>(filter_constant));
                  });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
