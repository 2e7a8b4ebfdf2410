// SPDX-License-Identifier: Apache-2.0
// The kernels as PyTorch operators `vidgen_ascendc::*` on npu tensors. Arguments were checked by vidgen.ops, and have
// elements; tensors are contiguous, modulations per sample with rows of any stride. Built with the CPU twin, the same
// code runs on tensors whose memory the host can reach: those of the CPU, or of an emulated npu.
#include <torch/library.h>

#include "host.h"

namespace vidgen {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Tensor like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

// What a kernel leaves for sum_partials: one float row per run of tokens, here of `runs` runs.
Tensor partials(const Tensor& x, int64_t runs, int64_t width) {
  return at::empty({runs, width}, x.options().dtype(at::kFloat));
}

// (outer * parts, width) of partial sums to (outer, width) in the type of the launch.
Tensor summed(Launch to, const Tensor& x, const Tensor& from, int64_t outer) {
  Tensor sums = at::empty({outer, from.size(1)}, x.options());
  SumPartialsTiling t;
  tile(t, to.type, outer, from.size(0) / outer, from.size(1), to.cores);
  sum_partials(to, in(from), out(sums), t);
  return sums;
}

// Of a parameter that all samples share; no elements where there is no such parameter.
Tensor summed_parameter(Launch to, const Tensor& x, const Tensor& from) {
  return from.defined() ? summed(to, x, from, 1)[0] : at::empty({0}, x.options());
}

struct Workspaces {
  Tensor shift, scale, weight, bias;

  Workspaces(const Tensor& x, int64_t runs, const Optional& weight, const Optional& bias)
      : shift(partials(x, runs, x.size(2))), scale(partials(x, runs, x.size(2))) {
    if (weight.has_value()) this->weight = partials(x, runs, x.size(2));
    if (bias.has_value()) this->bias = partials(x, runs, x.size(2));
  }
  Sums memory() const {
    return {out(shift), out(scale), weight.defined() ? out(weight) : nullptr, bias.defined() ? out(bias) : nullptr};
  }
};

Tensor adaln_modulate_op(const Tensor& x, const Tensor& shift, const Tensor& scale, const Optional& weight,
                         const Optional& bias, double eps) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  const Tensor y = like(x);
  AdalnModulateTiling t;
  require_fit(tile(t, to.type, x.size(0), x.size(1), x.size(2), to.cores), "adaln_modulate", x);
  t.shift_stride = row_stride(shift), t.scale_stride = row_stride(scale), t.eps = float(eps);
  adaln_modulate(to, in(x), in(shift), in(scale), in(weight), in(bias), out(y), t);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_modulate_backward_op(const Tensor& grad, const Tensor& x,
                                                                              const Tensor& scale,
                                                                              const Optional& weight,
                                                                              const Optional& bias, double eps) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  const Tensor grad_x = like(x);
  AdalnBackwardTiling t;
  require_fit(tile(t, to.type, false, x.size(0), x.size(1), x.size(2), to.cores), "adaln_modulate_backward", x);
  t.scale_stride = row_stride(scale), t.gate_stride = 0, t.eps = float(eps);
  const Workspaces sums(x, runs(t.split), weight, bias);
  adaln_modulate_backward(to, in(grad), in(x), in(scale), in(weight), in(bias), out(grad_x), sums.memory(), t);
  return {grad_x, summed(to, x, sums.shift, x.size(0)), summed(to, x, sums.scale, x.size(0)),
          summed_parameter(to, x, sums.weight), summed_parameter(to, x, sums.bias)};
}

Tensor gated_residual_op(const Tensor& x, const Tensor& gate, const Tensor& y) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  const Tensor result = like(x);
  GatedResidualTiling t;
  tile(t, to.type, false, x.size(0), x.size(1), x.size(2), to.cores);
  t.gate_stride = row_stride(gate);
  gated_residual(to, in(x), in(gate), in(y), out(result), t);
  return result;
}

std::tuple<Tensor, Tensor> gated_residual_backward_op(const Tensor& grad, const Tensor& gate, const Tensor& y) {
  const c10::DeviceGuard guard(y.device());
  const Launch to = launch_on(y);
  const Tensor grad_y = like(y);
  GatedResidualTiling t;
  tile(t, to.type, true, y.size(0), y.size(1), y.size(2), to.cores);
  t.gate_stride = row_stride(gate);
  const Tensor sum_gate = partials(y, runs(t.split), y.size(2));
  gated_residual_backward(to, in(grad), in(gate), in(y), out(grad_y), out(sum_gate), t);
  return {summed(to, y, sum_gate, y.size(0)), grad_y};
}

std::tuple<Tensor, Tensor> gated_residual_adaln_op(const Tensor& x, const Tensor& gate, const Tensor& y,
                                                   const Tensor& shift, const Tensor& scale, const Optional& weight,
                                                   const Optional& bias, double eps) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  const Tensor h = like(x), modulated = like(x);
  GatedResidualAdalnTiling t;
  require_fit(tile(t, to.type, x.size(0), x.size(1), x.size(2), to.cores), "gated_residual_adaln", x);
  t.gate_stride = row_stride(gate), t.shift_stride = row_stride(shift), t.scale_stride = row_stride(scale);
  t.eps = float(eps);
  gated_residual_adaln(to, in(x), in(gate), in(y), in(shift), in(scale), in(weight), in(bias), out(h), out(modulated),
                       t);
  return {h, modulated};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_backward_op(
    const Tensor& grad_h, const Tensor& grad_modulated, const Tensor& h, const Tensor& gate, const Tensor& y,
    const Tensor& scale, const Optional& weight, const Optional& bias, double eps) {
  const c10::DeviceGuard guard(h.device());
  const Launch to = launch_on(h);
  const Tensor grad_x = like(h), grad_y = like(h);
  AdalnBackwardTiling t;
  require_fit(tile(t, to.type, true, h.size(0), h.size(1), h.size(2), to.cores), "gated_residual_adaln_backward", h);
  t.scale_stride = row_stride(scale), t.gate_stride = row_stride(gate), t.eps = float(eps);
  const Workspaces sums(h, runs(t.split), weight, bias);
  const Tensor sum_gate = partials(h, runs(t.split), h.size(2));
  gated_residual_adaln_backward(to, in(grad_h), in(grad_modulated), in(h), in(gate), in(y), in(scale), in(weight),
                                in(bias), out(grad_x), out(grad_y), out(sum_gate), sums.memory(), t);
  return {grad_x,
          summed(to, h, sum_gate, h.size(0)),
          grad_y,
          summed(to, h, sums.shift, h.size(0)),
          summed(to, h, sums.scale, h.size(0)),
          summed_parameter(to, h, sums.weight),
          summed_parameter(to, h, sums.bias)};
}

Tensor haar_3d_op(const Tensor& x, double filter_constant, bool repeat_first_frame) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  HaarTiling t{uint32_t(x.size(0)),
               uint32_t(x.size(1)),
               uint32_t(x.size(2) + repeat_first_frame) / 2,
               uint32_t(x.size(3) / 2),
               uint32_t(x.size(4) / 2),
               uint32_t(x.size(2)),
               0,
               0,
               float(filter_constant)};
  tile(t, to.type, false);
  const Tensor y = at::empty({x.size(0), 8 * x.size(1), t.frames, t.height, t.width}, x.options());
  haar_3d(to, in(x), out(y), t);
  return y;
}

Tensor inverse_haar_3d_op(const Tensor& y, double filter_constant, bool drop_first_frame) {
  const c10::DeviceGuard guard(y.device());
  const Launch to = launch_on(y);
  HaarTiling t{uint32_t(y.size(0)),
               uint32_t(y.size(1) / 8),
               uint32_t(y.size(2)),
               uint32_t(y.size(3)),
               uint32_t(y.size(4)),
               uint32_t(2 * y.size(2) - drop_first_frame),
               0,
               0,
               float(filter_constant)};
  tile(t, to.type, true);
  const Tensor x = at::empty({y.size(0), y.size(1) / 8, t.video_frames, 2 * y.size(3), 2 * y.size(4)}, y.options());
  inverse_haar_3d(to, in(y), out(x), t);
  return x;
}

// What the forward and the gradient of one of q, k, v share.
QkNormRopeTiling head_tiling(const Tensor& x, const std::string& norm, double eps, const Optional& cos,
                             const std::string& style, at::OptionalIntArrayRef sections, int64_t sparse_n) {
  const uint32_t k = uint32_t(sparse_n);
  TORCH_CHECK((x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3)),
              "the heads of a token must be contiguous");
  QkNormRopeTiling t{};
  t.tokens = x.size(1), t.heads = x.size(2), t.head_dim = x.size(3);
  t.batch_stride = x.stride(0), t.token_stride = x.stride(1);
  t.sparse_n = k, t.padded = round_up(t.tokens, k * k);
  t.norm = norm == "layer" ? Norm::layer : norm == "rms" ? Norm::rms : Norm::none;
  t.rotates = cos.has_value(), t.interleaved = style == "interleaved", t.eps = float(eps);
  t.table_stride = cos.has_value() && cos->dim() == 3 ? cos->size(1) * cos->size(2) : 0;
  t.sections[0] = t.head_dim;
  if (sections.has_value()) {
    TORCH_CHECK(sections->size() <= MAX_SECTIONS, "at most ", MAX_SECTIONS, " sections, got ", sections->size());
    std::fill(t.sections, t.sections + MAX_SECTIONS, 0);
    std::copy(sections->begin(), sections->end(), t.sections);
  }
  return t;
}

Tensor qk_norm_rope_op(const Tensor& x, const Optional& weight, const Optional& bias, std::string norm, double eps,
                       const Optional& cos, const Optional& sin, std::string style, at::OptionalIntArrayRef sections,
                       int64_t sparse_n) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  QkNormRopeTiling t = head_tiling(x, norm, eps, cos, style, sections, sparse_n);
  require_fit(tile(t, to.type, false, x.size(0), to.cores), "qk_norm_rope", x);
  const Tensor y = at::empty({x.size(0), t.padded, x.size(2), x.size(3)}, x.options());
  qk_norm_rope(to, in(x), in(weight), in(bias), in(cos), in(sin), out(y), t);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward_op(const Tensor& grad, const Tensor& x, const Optional& weight,
                                                            std::string norm, double eps, const Optional& cos,
                                                            const Optional& sin, std::string style,
                                                            at::OptionalIntArrayRef sections, int64_t sparse_n) {
  const c10::DeviceGuard guard(x.device());
  const Launch to = launch_on(x);
  QkNormRopeTiling t = head_tiling(x, norm, eps, cos, style, sections, sparse_n);
  require_fit(tile(t, to.type, true, x.size(0), to.cores), "qk_norm_rope_backward", x);
  const Tensor grad_x = like(x);
  const Tensor sum_weight = partials(x, runs(t.split), x.size(3)), sum_bias = partials(x, runs(t.split), x.size(3));
  qk_norm_rope_backward(to, in(grad), in(x), in(weight), in(cos), in(sin), out(grad_x), out(sum_weight), out(sum_bias),
                        t);
  return {grad_x, summed_parameter(to, x, sum_weight), summed_parameter(to, x, sum_bias)};
}

// The longest row of an op that must have whole rows in the unified buffer. Bytes grow with the row.
int64_t longest_row(const std::string& op, at::ScalarType dtype) {
  const Float type = float_type(dtype);
  const auto bytes = [&](uint32_t row) {
    if (op == "adaln_modulate") return adaln_modulate_bytes(row, type, 1);
    if (op == "gated_residual_adaln") return gated_residual_adaln_bytes(row, type, 1);
    if (op == "adaln_modulate_backward") return adaln_backward_bytes(row, type, false, 1);
    if (op == "gated_residual_adaln_backward") return adaln_backward_bytes(row, type, true, 1);
    if (op == "qk_norm_rope") return row > MOST_LANES ? UB_BYTES + 1 : qk_norm_rope_bytes(8, lanes(row), type, false);
    if (op == "qk_norm_rope_backward") {
      return row > MOST_LANES ? UB_BYTES + 1 : qk_norm_rope_bytes(8, lanes(row), type, true);
    }
    TORCH_CHECK(false, "longest_row: ", op, " has no such limit");
  };
  int64_t row = 0;
  while (bytes(uint32_t(row) + 16) <= UB_BYTES) row += 16;
  return row;
}

}  // namespace

TORCH_LIBRARY(vidgen_ascendc, m) {
  m.def("longest_row(str op, ScalarType dtype) -> int", &longest_row);
  m.def("adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "adaln_modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_residual(Tensor x, Tensor gate, Tensor y) -> Tensor");
  m.def("gated_residual_backward(Tensor grad, Tensor gate, Tensor y) -> (Tensor, Tensor)");
  m.def(
      "gated_residual_adaln(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, "
      "float eps) -> (Tensor, Tensor)");
  m.def(
      "gated_residual_adaln_backward(Tensor grad_h, Tensor grad_modulated, Tensor h, Tensor gate, Tensor y, "
      "Tensor scale, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("haar_3d(Tensor x, float filter_constant, bool repeat_first_frame) -> Tensor");
  m.def("inverse_haar_3d(Tensor y, float filter_constant, bool drop_first_frame) -> Tensor");
  m.def(
      "qk_norm_rope(Tensor x, Tensor? weight, Tensor? bias, str norm, float eps, Tensor? cos, Tensor? sin, str style, "
      "int[]? sections, int sparse_n) -> Tensor");
  m.def(
      "qk_norm_rope_backward(Tensor grad, Tensor x, Tensor? weight, str norm, float eps, Tensor? cos, Tensor? sin, "
      "str style, int[]? sections, int sparse_n) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vidgen_ascendc, VIDGEN_KEY, m) {
  m.impl("adaln_modulate", &adaln_modulate_op);
  m.impl("adaln_modulate_backward", &adaln_modulate_backward_op);
  m.impl("gated_residual", &gated_residual_op);
  m.impl("gated_residual_backward", &gated_residual_backward_op);
  m.impl("gated_residual_adaln", &gated_residual_adaln_op);
  m.impl("gated_residual_adaln_backward", &gated_residual_adaln_backward_op);
  m.impl("qk_norm_rope", &qk_norm_rope_op);
  m.impl("qk_norm_rope_backward", &qk_norm_rope_backward_op);
  m.impl("haar_3d", &haar_3d_op);
  m.impl("inverse_haar_3d", &inverse_haar_3d_op);
}

}  // namespace vidgen
