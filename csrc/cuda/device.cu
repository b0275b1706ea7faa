#include <array>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "device.h"
#include "simt.cuh"

namespace ldmi::cuda {

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current != device && cudaSetDevice(device) == cudaSuccess) before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) static_cast<void>(cudaSetDevice(before_));
}

const plan::DeviceLimits& limits_of(int device) {
  constexpr int kDevices = 128;
  static std::array<std::once_flag, kDevices> asked;
  static std::array<plan::DeviceLimits, kDevices> known;
  static const plan::DeviceLimits none;
  if (device < 0 || device >= kDevices) return none;
  std::call_once(asked[static_cast<size_t>(device)], [&] {
    const DeviceGuard guard(device);
    simt::Device found{};
    if (simt::device(&found) != 0) return;
    const char* const staged = std::getenv("LDMI_FAST_CUDA_STAGED");
    known[static_cast<size_t>(device)] = {found.sms,
                                          static_cast<int64_t>(found.smem_block),
                                          static_cast<int64_t>(found.smem_sm),
                                          static_cast<int64_t>(found.l2),
                                          found.capability,
                                          found.cooperative && (staged == nullptr || std::string_view(staged) != "1")};
  });
  return known[static_cast<size_t>(device)];
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ldmi::cuda
