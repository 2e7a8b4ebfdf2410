// SPDX-License-Identifier: Apache-2.0
// What the host side of several ops shares: csrc/cpu checks what memory safety needs, allocates and calls the stub.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>

namespace vidgen {

using OptionalTensor = std::optional<at::Tensor>;

// Kernels compute in float32 and take these dtypes; everything else, float64 above all, goes to the reference.
inline bool native_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

// Kernels index rows themselves but want unit stride inside a row.
inline at::Tensor unit_rows(const at::Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

// A small parameter, contiguous, where it is given at all.
inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// Every output that a kernel fills comes from here: contiguous and uninitialised. While tests guard outputs, each lies
// between two margins, and both it and they are filled with NaN: an element left unwritten or written outside shows.
at::Tensor new_output(at::IntArrayRef sizes, const at::TensorOptions& options);
void guard_outputs(bool on);
int64_t count_damaged_guards();

// Kernels write `out` as one block of memory.
inline void require_out(const char* op, const at::Tensor& out, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK(out.is_contiguous() && out.sizes() == sizes && out.scalar_type() == like.scalar_type(), op,
              ": out must be contiguous ", sizes, " of ", like.scalar_type(), ", got ", out.sizes(), " of ",
              out.scalar_type());
}

// Calls the Python reference of an op, `vidgen::<name>_reference`, with the signature of that op's kernel.
template <typename Result, typename... Args, typename... Given>
Result call_reference(Result (*)(Args...), const char* name, Given&&... given) {
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string("vidgen::") + name + "_reference").c_str(), "");
  return op.typed<Result(Args...)>().call(std::forward<Given>(given)...);
}

}  // namespace vidgen
