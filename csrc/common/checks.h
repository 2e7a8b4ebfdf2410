// SPDX-License-Identifier: Apache-2.0
// What the hosts of adaptive conditioning and of norms must know before a kernel may touch memory.
#pragma once

#include "common/host.h"

namespace vidgen {

// `t` has the shape and dtype of x.
inline void check_like(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.sizes() == x.sizes(), op, ": ", name, " must be like x ",
              x.sizes(), ", got ", t.sizes());
}

// `t` is (batch, channels) or (batch, sequence, channels) of x's dtype.
inline void check_modulation(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type() && (t.dim() == 2 || t.dim() == 3) && t.size(0) == x.size(0) &&
                  t.size(-1) == x.size(-1) && (t.dim() == 2 || t.size(1) == x.size(1)),
              op, ": ", name, " must be per sample or per token of x ", x.sizes(), ", got ", t.sizes());
}

// `t`, where it is given, is (channels) of x's dtype.
inline void check_parameter(const char* op, const char* name, const OptionalTensor& t, const at::Tensor& x,
                            int64_t channels) {
  TORCH_CHECK(!t || (t->scalar_type() == x.scalar_type() && t->dim() == 1 && t->size(0) == channels), op, ": ", name,
              " must be (channels) of x's dtype");
}

inline void check_out(const char* op, const at::Tensor& out, const at::Tensor& x) {
  check_like(op, "out", out, x);
  TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
}

}  // namespace vidgen
