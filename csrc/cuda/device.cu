#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "../simt/launch.cuh"
#include "device.h"

namespace ldmi::cuda {
namespace {

__global__ void idle() {}

// Returns the number of clusters of a cooperative grid that run at once if a block takes all the shared memory that it can have. It is
// 0 if the driver compiled the kernels from PTX of an older architecture: in those every cluster is one block, see simt/device.cuh.
int clusters_of(const plan::DeviceLimits& device) {
  const auto kernel = reinterpret_cast<const void*>(idle);
  cudaFuncAttributes compiled{};
  if (device.capability < 90 || cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess || compiled.ptxVersion < 90) return 0;
  const int smem = static_cast<int>(device.smem_block);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = plan::kClusterBlocks;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan::kClusterBlocks);
  config.blockDim = dim3(simt::kWarp);
  config.dynamicSmemBytes = static_cast<size_t>(device.smem_block);
  config.attrs = attributes;
  config.numAttrs = 2;
  int found = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return std::min(found, device.sms / plan::kClusterBlocks);
}

}  // namespace

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
    plan::DeviceLimits found;
    if (simt::device(&found) != 0) return;
    const char* const staged = std::getenv("LDMI_FAST_CUDA_STAGED");
    if (staged != nullptr && std::string_view(staged) == "1") found.cooperative = false;
    found.clusters = clusters_of(found);
    known[static_cast<size_t>(device)] = found;
  });
  return known[static_cast<size_t>(device)];
}

const char* refused(int code) {
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace ldmi::cuda
