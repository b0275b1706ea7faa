#include "joint/launch.cuh"

namespace ldmi::cuda {

int joint(const Batch& batch, double* S, double* n, void* lse, double* ce, void* workspace, const DeviceLimits& limits,
          simt::Stream stream) {
  return with_type(batch.logits.type,
                   [&](auto type) { return launch_joint<decltype(type)>(batch, S, n, lse, ce, workspace, limits, stream); });
}

}  // namespace ldmi::cuda
