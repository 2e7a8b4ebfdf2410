// SPDX-License-Identifier: Apache-2.0
// PyTorch tensors as kernels take them.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "launch.h"
#ifdef VIDGEN_TWIN
#include "twin/machine.h"
#endif
#ifdef VIDGEN_TORCH_NPU
#include "acl/acl_base.h"
#include "torch_npu/csrc/core/npu/NPUFormat.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#define VIDGEN_KEY PrivateUse1
#else
#define VIDGEN_KEY CPU
#endif

namespace vidgen {

inline Float float_type(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "no kernel for ", type);
  return type == at::kFloat ? Float::float32 : type == at::kBFloat16 ? Float::bfloat16 : Float::float16;
}

inline Launch launch_on(const at::Tensor& x) {
  void* stream = nullptr;
#ifdef VIDGEN_TORCH_NPU
  // Waits until torch_npu's own queue has launched what it holds. With stream(false) a kernel could overtake the
  // operators that make its inputs, as they are launched later than they are called.
  stream = c10_npu::getCurrentNPUStream().stream();
#endif
  return {float_type(x.scalar_type()), vector_cores(), stream};
}

inline void require_fit(bool fits, const char* op, const at::Tensor& x) {
  TORCH_CHECK(fits, op, ": a row of ", x.sizes(), " does not fit the unified buffer");
}

// torch_npu can keep a tensor in an order of the hardware's own, whatever its strides say; kernels read rows.
inline void require_plain_order([[maybe_unused]] const at::Tensor& t) {
#ifdef VIDGEN_TORCH_NPU
  const int64_t format = at_npu::native::get_npu_format(t);
  TORCH_CHECK(format == ACL_FORMAT_ND || format == ACL_FORMAT_NCHW || format == ACL_FORMAT_NCDHW,
              "the kernels cannot read a tensor of torch_npu's internal format ", format,
              "; set torch.npu.config.allow_internal_format = False");
#endif
}

inline Memory in(const at::Tensor& t) {
  require_plain_order(t);
  auto at = static_cast<Memory>(t.data_ptr());
#ifdef VIDGEN_TWIN
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  twin::share(at, (last + 1) * t.element_size(), twin::Role::input);
#endif
  return at;
}
inline Memory in(const std::optional<at::Tensor>& t) { return t.has_value() ? in(*t) : nullptr; }

inline Memory out(const at::Tensor& t) {
  auto at = static_cast<Memory>(t.data_ptr());
#ifdef VIDGEN_TWIN
  twin::share(at, t.nbytes(), twin::Role::output);
#endif
  return at;
}

// Of a modulation (batch, channels) whose channels lie side by side.
inline uint32_t row_stride(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1), "modulation rows must be contiguous");
  return uint32_t(t.stride(0));
}

}  // namespace vidgen
