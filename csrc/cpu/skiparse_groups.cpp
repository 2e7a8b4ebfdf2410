// SPDX-License-Identifier: Apache-2.0
// Tokens in the order of their Skiparse groups, the text behind each group. Only moves: any dtype, one pass.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "common/host.h"

namespace vidgen {
namespace {

constexpr const char* kOp = "skiparse_groups";

// (batch, tokens, heads, head_dim) as bytes. Heads need not lie side by side, channels do.
struct Rows {
  const char* base;
  int64_t sample, token, head, heads, head_bytes;

  explicit Rows(const at::Tensor& t)
      : base(static_cast<const char*>(t.const_data_ptr())),
        sample(t.stride(0) * t.element_size()),
        token(t.stride(1) * t.element_size()),
        head(t.stride(2) * t.element_size()),
        heads(t.size(2)),
        head_bytes(t.size(3) * t.element_size()) {
    if (heads == 1 || head == head_bytes) {  // one copy does
      head_bytes *= heads;
      heads = 1;
    }
  }
  void copy(char* to, int64_t b, int64_t t) const {
    const char* from = base + b * sample + t * token;
    for (int64_t h = 0; h < heads; ++h) std::memcpy(to + h * head_bytes, from + h * head, head_bytes);
  }
};

void check(const at::Tensor& x, const OptionalTensor& text, int64_t k, std::string_view pattern) {
  TORCH_CHECK(x.dim() == 4 && k >= 1, kOp, ": x must be (batch, tokens, heads, head_dim) and sparse_n 1 or more");
  TORCH_CHECK(pattern == "single" || pattern == "group", kOp, ": unknown pattern ", pattern);
  TORCH_CHECK(!text || (text->dim() == 4 && text->scalar_type() == x.scalar_type() && text->size(0) == x.size(0) &&
                        text->size(2) == x.size(2) && text->size(3) == x.size(3)),
              kOp, ": text must be like x ", x.sizes(), " but for its length");
}

at::Tensor skiparse_groups_cpu(const at::Tensor& x, const OptionalTensor& text, int64_t k, std::string_view pattern) {
  check(x, text, k, pattern);
  const bool single = pattern == "single";
  const int64_t batch = x.size(0), tokens = x.size(1), places = (tokens + k * k - 1) / (k * k) * k;
  const int64_t length = places + (text ? text->size(1) : 0);
  auto sizes = std::vector<int64_t>{batch, single ? length : k, single ? k : length, x.size(2), x.size(3)};
  const auto out = new_output(sizes, x.options());
  if (out.numel() != 0) {
    const auto visual = unit_rows(x), words = text ? unit_rows(*text) : visual;
    const Rows of_visual(visual), of_text(words);
    char* to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t row_bytes = x.size(2) * x.size(3) * x.element_size();
    at::parallel_for(0, batch * k * length, std::max<int64_t>(1, 32768 / row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {  // in the order of memory
        const int64_t b = row / (k * length), within = row % (k * length);
        const int64_t group = single ? within % k : within / length, place = single ? within / k : within % length;
        const int64_t token = single ? place * k + group : place / k * k * k + group * k + place % k;
        if (place >= places) {
          of_text.copy(to + row * row_bytes, b, place - places);
        } else if (token < tokens) {
          of_visual.copy(to + row * row_bytes, b, token);
        } else {
          std::memset(to + row * row_bytes, 0, row_bytes);
        }
      }
    });
  }
  return single ? out.transpose(1, 2) : out;
}

}  // namespace
}  // namespace vidgen

TORCH_LIBRARY_IMPL(vidgen, CPU, m) { m.impl("skiparse_groups", vidgen::skiparse_groups_cpu); }
