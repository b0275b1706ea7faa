#include "logits_grad/launch.cuh"

namespace ldmi::cuda {

int logits_grad(const Batch& batch, const void* lse, const double* V, const double* scale, const double* ce_scale, void* grad,
                void* workspace, const DeviceLimits& limits, simt::Stream stream) {
  return with_type(batch.logits.type, [&](auto type) {
    return launch_logits_grad<decltype(type)>(batch, lse, V, scale, ce_scale, grad, workspace, limits, stream);
  });
}

}  // namespace ldmi::cuda
