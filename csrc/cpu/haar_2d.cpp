// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/haar_2d.h"

#include <torch/library.h>

#include "common/host.h"

namespace vidgen {
namespace {

at::Tensor haar_2d_cpu(const at::Tensor& x, double filter_constant);
at::Tensor inverse_haar_2d_cpu(const at::Tensor& y, double filter_constant);

std::vector<int64_t> band_sizes(const at::Tensor& x) {
  TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && x.size(-2) % 2 == 0 && x.size(-1) % 2 == 0,
              "haar_2d: height and width of x do not pair up, got ", x.sizes());
  auto sizes = x.sizes().vec();
  sizes[1] *= 4;
  for (const auto i : {x.dim() - 2, x.dim() - 1}) sizes[i] /= 2;
  return sizes;
}

std::vector<int64_t> image_sizes(const at::Tensor& y) {
  TORCH_CHECK((y.dim() == 4 || y.dim() == 5) && y.size(1) % 4 == 0, "inverse_haar_2d: y must hold four bands, got ",
              y.sizes());
  auto sizes = y.sizes().vec();
  sizes[1] /= 4;
  for (const auto i : {y.dim() - 2, y.dim() - 1}) sizes[i] *= 2;
  return sizes;
}

// An image as a video of one frame.
at::Tensor as_video(const at::Tensor& t) { return t.dim() == 4 ? t.unsqueeze(2) : t; }

void haar_2d_out(const at::Tensor& x, double filter_constant, at::Tensor out) {
  if (!native_dtype(x)) {
    out.copy_(call_reference(&haar_2d_cpu, "haar_2d", x, filter_constant));
    return;
  }
  require_out("haar_2d", out, band_sizes(x), x);
  if (out.numel() > 0) haar_2d_stub()(as_video(out), unit_rows(as_video(x)), filter_constant);
}

void inverse_haar_2d_out(const at::Tensor& y, double filter_constant, at::Tensor out) {
  if (!native_dtype(y)) {
    out.copy_(call_reference(&inverse_haar_2d_cpu, "inverse_haar_2d", y, filter_constant));
    return;
  }
  require_out("inverse_haar_2d", out, image_sizes(y), y);
  if (out.numel() > 0) inverse_haar_2d_stub()(as_video(out), unit_rows(as_video(y)), filter_constant);
}

at::Tensor haar_2d_cpu(const at::Tensor& x, double filter_constant) {
  auto out = new_output(band_sizes(x), x.options());
  haar_2d_out(x, filter_constant, out);
  return out;
}

at::Tensor inverse_haar_2d_cpu(const at::Tensor& y, double filter_constant) {
  auto out = new_output(image_sizes(y), y.options());
  inverse_haar_2d_out(y, filter_constant, out);
  return out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("haar_2d", vidgen::haar_2d_cpu);
  m.impl("haar_2d.out", vidgen::haar_2d_out);
  m.impl("inverse_haar_2d", vidgen::inverse_haar_2d_cpu);
  m.impl("inverse_haar_2d.out", vidgen::inverse_haar_2d_out);
}
