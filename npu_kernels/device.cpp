// SPDX-License-Identifier: Apache-2.0
// The device itself, asked through CANN.
#include "acl/acl_rt.h"
#include "host.h"
#include "torch_npu/csrc/core/npu/NPUFunctions.h"

namespace vidgen {

uint32_t vector_cores() {
  int64_t cores = 0;
  const auto error = aclrtGetDeviceInfo(c10_npu::current_device(), ACL_DEV_ATTR_VECTOR_CORE_NUM, &cores);
  TORCH_CHECK(error == ACL_SUCCESS && cores > 0, "CANN does not say how many vector cores there are (error ", error,
              ")");
  return static_cast<uint32_t>(cores);
}

}  // namespace vidgen
