// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/haar_3d.h"

#include <torch/library.h>

#include "common/host.h"

namespace vidgen {
namespace {

at::Tensor haar_3d_cpu(const at::Tensor& x, double filter_constant, bool repeat_first_frame);
at::Tensor inverse_haar_3d_cpu(const at::Tensor& y, double filter_constant, bool drop_first_frame);

std::vector<int64_t> band_sizes(const at::Tensor& x, bool repeat_first_frame) {
  TORCH_CHECK(x.dim() == 5 && x.size(2) % 2 == repeat_first_frame && x.size(3) % 2 == 0 && x.size(4) % 2 == 0,
              "haar_3d: frames, height and width of x do not pair up, got ", x.sizes());
  return {x.size(0), 8 * x.size(1), (x.size(2) + repeat_first_frame) / 2, x.size(3) / 2, x.size(4) / 2};
}

std::vector<int64_t> video_sizes(const at::Tensor& y, bool drop_first_frame) {
  TORCH_CHECK(y.dim() == 5 && y.size(1) % 8 == 0 && y.size(2) >= drop_first_frame,
              "inverse_haar_3d: y must hold eight bands and a frame to drop, got ", y.sizes());
  return {y.size(0), y.size(1) / 8, 2 * y.size(2) - drop_first_frame, 2 * y.size(3), 2 * y.size(4)};
}

void haar_3d_out(const at::Tensor& x, double filter_constant, bool repeat_first_frame, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&haar_3d_cpu, "haar_3d", x, filter_constant, repeat_first_frame));
    return;
  }
  require_out("haar_3d", out, band_sizes(x, repeat_first_frame), x);
  if (out.numel() > 0) haar_3d_stub()(out, unit_rows(x), filter_constant, repeat_first_frame);
}

void inverse_haar_3d_out(const at::Tensor& y, double filter_constant, bool drop_first_frame, at::Tensor out) {
  if (!native_dtype(y)) {
    out.copy_(call_reference(&inverse_haar_3d_cpu, "inverse_haar_3d", y, filter_constant, drop_first_frame));
    return;
  }
  require_out("inverse_haar_3d", out, video_sizes(y, drop_first_frame), y);
  if (out.numel() > 0) inverse_haar_3d_stub()(out, unit_rows(y), filter_constant, drop_first_frame);
}

at::Tensor haar_3d_cpu(const at::Tensor& x, double filter_constant, bool repeat_first_frame) {
  auto out = new_output(band_sizes(x, repeat_first_frame), x.options());
  haar_3d_out(x, filter_constant, repeat_first_frame, out);
  return out;
}

at::Tensor inverse_haar_3d_cpu(const at::Tensor& y, double filter_constant, bool drop_first_frame) {
  auto out = new_output(video_sizes(y, drop_first_frame), y.options());
  inverse_haar_3d_out(y, filter_constant, drop_first_frame, out);
  return out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("haar_3d", vidgen::haar_3d_cpu);
  m.impl("haar_3d.out", vidgen::haar_3d_out);
  m.impl("inverse_haar_3d", vidgen::inverse_haar_3d_cpu);
  m.impl("inverse_haar_3d.out", vidgen::inverse_haar_3d_out);
}
