// Launching from host code: the device's limits, occupancy, and launches with clusters and cooperative grids. nvcc calls the CUDA
// runtime; any other compiler takes the same names from host/launch.h, which runs the kernels on a CPU. Error codes are those of
// cudaError_t: 0 is success.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#endif

#include "../plan/device_limits.h"
#include "device.cuh"

namespace ldmi::simt {

// What to launch: `blocks` of `threads` (a multiple of 32), in clusters of `cluster` blocks, each with `smem` bytes of dynamic
// shared memory (from Carve::bytes). Only in a cooperative grid may a kernel call sync_grid().
struct Grid {
  int64_t blocks = 1;
  int threads = kWarp;
  size_t smem = 0;
  int cluster = 1;
  bool cooperative = false;
};

using Device = plan::DeviceLimits;

}  // namespace ldmi::simt

#ifndef __CUDACC__
#include "host/launch.h"
#else

namespace ldmi::simt {

using Stream = cudaStream_t;

// The limits of the current device, without `clusters`: only code that can launch a kernel can query them (csrc/cuda/device.cu).
inline int device(Device* out) {
  int id = 0, sms = 0, block = 0, sm = 0, l2 = 0, major = 0, minor = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, id);
  };
  get(&sms, cudaDevAttrMultiProcessorCount);
  get(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&l2, cudaDevAttrL2CacheSize);
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&cooperative, cudaDevAttrCooperativeLaunch);
  *out = {sms, block, sm, l2, major * 10 + minor, cooperative != 0};
  return static_cast<int>(error);
}

namespace detail {
// More than the default 48 KB of shared memory, and more than 8 blocks per cluster, must be allowed for each kernel on each device.
inline cudaError_t allow(const void* kernel, size_t smem, int cluster) {
  if (smem <= 48 * 1024 && cluster <= 8) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, std::pair<size_t, int>> allowed;
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  auto& [bytes, blocks] = allowed[{id, kernel}];
  if (smem > bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (error != cudaSuccess) return error;
    bytes = smem;
  }
  if (cluster > 8 && cluster > blocks) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    blocks = cluster;
  }
  return cudaSuccess;
}

// Queried once per kernel, device and size: the runtime takes microseconds to answer, and a launcher asks at every call.
inline cudaError_t resident_blocks(const void* kernel, int threads, size_t smem, int* out) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const auto [place, unknown] = known.try_emplace({id, kernel, threads, smem}, 0);
  if (unknown) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second, kernel, threads, smem);
    if (error != cudaSuccess) {
      known.erase(place);
      return error;
    }
  }
  *out = place->second;
  return cudaSuccess;
}
}  // namespace detail

// Sets *out to the number of the kernel's blocks that run on one SM at once. A cooperative grid has at most Device::sms times as many.
template <class... P>
int blocks_per_sm(void (*kernel)(P...), int threads, size_t smem, int* out) {
  cudaError_t error = detail::allow(reinterpret_cast<const void*>(kernel), smem, 1);
  if (error == cudaSuccess) error = detail::resident_blocks(reinterpret_cast<const void*>(kernel), threads, smem, out);
  return static_cast<int>(error);
}

// Launches the kernel on the stream; the arguments are converted to its parameters.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, Stream stream, A&&... arguments) {
  if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads % kWarp != 0 ||
      grid.blocks % grid.cluster != 0) {
    return static_cast<int>(cudaErrorInvalidConfiguration);
  }
  cudaError_t error = detail::allow(reinterpret_cast<const void*>(kernel), grid.smem, grid.cluster);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.smem;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(arguments))...));
}

// Sets global memory to zero, in stream order.
inline int zero(void* p, size_t bytes, Stream stream) { return static_cast<int>(cudaMemsetAsync(p, 0, bytes, stream)); }
inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ldmi::simt
#endif  // __CUDACC__
