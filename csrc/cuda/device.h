// The device that a tensor is on: made the current one for as long as a call takes, and its limits.
#pragma once

#include "../plan/cuda_plan.h"

namespace ldmi::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // the device to go back to; -1: none
};

// The limits of a device, asked once; all zero if there is no such device. LDMI_FAST_CUDA_STAGED=1 in the
// environment takes cooperative grids away, to compare a forward in one launch with one step by step, and the grid's elimination with
// torch's LU.
const plan::DeviceLimits& limits_of(int device);

// The runtime's text for the error code of a launch. The runtime forgets the error: else whoever launches next would find it and take
// it for their own, such as torch on the path that is taken instead. What a device does not recover from, stays.
const char* refused(int code);

}  // namespace ldmi::cuda
