// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <limits>
#include <mutex>
#include <vector>

#include "common/host.h"

namespace vidgen {
namespace {

constexpr int64_t kMargin = 64;
bool guarding = false;
std::mutex mutex;
std::vector<at::Tensor> guarded;  // whole buffers, margins included

}  // namespace

at::Tensor new_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto plain = options.memory_format(at::MemoryFormat::Contiguous);
  if (!guarding) return at::empty(sizes, plain);
  int64_t count = 1;
  for (const auto size : sizes) count *= size;
  const auto buffer = at::full({count + 2 * kMargin}, std::numeric_limits<double>::quiet_NaN(), options);
  const std::lock_guard<std::mutex> lock(mutex);
  guarded.push_back(buffer);
  return buffer.narrow(0, kMargin, count).view(sizes);
}

void guard_outputs(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  guarding = on;
  guarded.clear();
}

int64_t count_damaged_guards() {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t damaged = 0;
  for (const auto& buffer : guarded) {
    const auto head = buffer.narrow(0, 0, kMargin), tail = buffer.narrow(0, buffer.size(0) - kMargin, kMargin);
    damaged += !(head.isnan().all().item<bool>() && tail.isnan().all().item<bool>());
  }
  guarded.clear();
  return damaged;
}

}  // namespace vidgen
