// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/qk_norm_rope.h"

#include <torch/library.h>

#include <string>
#include <tuple>

#include "common/host.h"

namespace vidgen {
namespace {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

int64_t padded_length(int64_t tokens, int64_t k) { return (tokens + k * k - 1) / (k * k) * (k * k); }

void check_parameter(const at::Tensor& x, const OptionalTensor& t) {
  TORCH_CHECK(!t || (t->scalar_type() == x.scalar_type() && t->dim() == 1 && t->size(0) == x.size(3)),
              "qk_norm_rope: weights and biases must be (head_dim) of q's dtype");
}

OptionalTensor unit_table(const OptionalTensor& t) { return t ? OptionalTensor(unit_rows(*t)) : t; }

NormRope how_to(const at::Tensor& x, std::string_view norm, double eps, const OptionalTensor& cos,
                const OptionalTensor& sin, std::string_view style, at::OptionalIntArrayRef sections, int64_t sparse_n) {
  TORCH_CHECK(x.dim() == 4, "qk_norm_rope: q must be (batch, sequence, heads, head_dim), got ", x.sizes());
  TORCH_CHECK(norm == "rms" || norm == "layer", "qk_norm_rope: unknown norm ", norm);
  TORCH_CHECK(cos.has_value() == sin.has_value(), "qk_norm_rope: cos and sin go together");
  TORCH_CHECK(sparse_n >= 1, "qk_norm_rope: sparse_n must be 1 or more, got ", sparse_n);
  Pairs pairs;
  if (cos) {
    check_tables(x, *cos, *sin);
    pairs = make_pairs(style, sections, x.size(3));
  }
  return {norm == "layer", eps, unit_table(cos), unit_table(sin), pairs, sparse_n};
}

Three qk_norm_rope_cpu(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& v,
                       const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& q_bias,
                       const OptionalTensor& k_bias, std::string_view norm, double eps, const OptionalTensor& cos,
                       const OptionalTensor& sin, std::string_view style, at::OptionalIntArrayRef sections,
                       int64_t sparse_n) {
  if (!native_dtype(q)) {
    return call_reference(&qk_norm_rope_cpu, "qk_norm_rope", q, k, v, q_weight, k_weight, q_bias, k_bias, norm, eps,
                          cos, sin, style, sections, sparse_n);
  }
  const auto how = how_to(q, norm, eps, cos, sin, style, sections, sparse_n);
  for (const auto& t : {k, v.value_or(k)}) {
    TORCH_CHECK(t.sizes() == q.sizes() && t.scalar_type() == q.scalar_type(), "qk_norm_rope: k and v must be like q ",
                q.sizes(), ", got ", t.sizes());
  }
  for (const auto& t : {q_weight, k_weight, q_bias, k_bias}) check_parameter(q, t);
  auto sizes = q.sizes().vec();
  sizes[1] = padded_length(sizes[1], sparse_n);
  auto new_q = new_output(sizes, q.options()), new_k = new_output(sizes, q.options());
  auto new_v = v ? new_output(sizes, q.options()) : new_output({0}, q.options());
  if (new_q.numel() == 0) return {new_q, new_k, new_v};
  const NormRopeTensors tensors{new_q,           new_k,           new_v,
                                unit_rows(q),    unit_rows(k),    v ? OptionalTensor(unit_rows(*v)) : v,
                                dense(q_weight), dense(k_weight), dense(q_bias),
                                dense(k_bias)};
  qk_norm_rope_stub()(tensors, how);
  return {new_q, new_k, new_v};
}

Three qk_norm_rope_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                std::string_view norm, double eps, const OptionalTensor& cos, const OptionalTensor& sin,
                                std::string_view style, at::OptionalIntArrayRef sections, int64_t sparse_n) {
  if (!native_dtype(x)) {
    return call_reference(&qk_norm_rope_backward_cpu, "qk_norm_rope_backward", grad, x, weight, norm, eps, cos, sin,
                          style, sections, sparse_n);
  }
  const auto how = how_to(x, norm, eps, cos, sin, style, sections, sparse_n);
  auto sizes = x.sizes().vec();
  sizes[1] = padded_length(sizes[1], sparse_n);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(sizes) && grad.scalar_type() == x.scalar_type(),
              "qk_norm_rope_backward: grad must be ", sizes, " of x's dtype, got ", grad.sizes());
  check_parameter(x, weight);
  auto grad_x = new_output(x.sizes(), x.options());
  auto grad_weight = new_output({x.size(3)}, x.options()), grad_bias = new_output({x.size(3)}, x.options());
  qk_norm_rope_backward_stub()(grad_x, grad_weight, grad_bias, unit_rows(grad), unit_rows(x), dense(weight), how);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) {
  m.impl("qk_norm_rope", vidgen::qk_norm_rope_cpu);
  m.impl("qk_norm_rope_backward", vidgen::qk_norm_rope_backward_cpu);
}
