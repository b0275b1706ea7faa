// The launch of fused.

#include "fused.cuh"

namespace ldmi::cuda {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <class E>
int launch_of(const Batch& batch, const LossOptions& options, void* loss, void* grad, const plan::CudaFused& plan,
              simt::Stream stream) {
  const FusedResult<E> result{static_cast<E*>(loss), static_cast<E*>(grad), nullptr, nullptr, nullptr, nullptr};
  return launch_fused<E, true>(batch, options, result, plan, stream);
}

}  // namespace

int fused(const Batch& batch, const LossOptions& options, void* loss, void* grad, const DeviceLimits& limits, simt::Stream stream) {
  const bool wide = batch.logits.type == Type::kFloat64;
  const bool right =
      (wide || batch.logits.type == Type::kFloat32) && batch.soft.data == nullptr && batch.num_labels == batch.logits.columns;
  const plan::CudaFused plan =
      plan::cuda_fused(batch.logits.rows, batch.logits.columns, wide ? 8 : 4, batch.weights.data != nullptr, limits);
  if (!right || !plan.runs) return kInvalidValue;
  return wide ? launch_of<double>(batch, options, loss, grad, plan, stream)
              : launch_of<float>(batch, options, loss, grad, plan, stream);
}

}  // namespace ldmi::cuda
