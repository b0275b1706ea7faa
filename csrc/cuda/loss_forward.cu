// The launches of loss_forward.

#include "../plan/layout.h"
#include "fused.cuh"
#include "loss_forward.cuh"
#include "loss_forward_cooperative.cuh"

namespace ldmi::cuda {

int loss_forward(const Batch& batch, const LossOptions& options, void* loss, void* lse, double* V, double* scale, double* ce_scale,
                 void* workspace, const DeviceLimits& limits, simt::Stream stream) {
  constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  const bool soft = batch.soft.data != nullptr, weighted = batch.weights.data != nullptr;
  const Type loss_type = batch.logits.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  const int64_t bytes = batch.logits.type == Type::kFloat64 ? 8 : batch.logits.type == Type::kFloat32 ? 4 : 2;
  const plan::CudaLossForward plan = plan::cuda_loss_forward(rows, C, soft, bytes, weighted, limits, V != nullptr);
  if (batch.num_labels != C || plan.path == plan::CudaLoss::kLu) return kInvalidValue;
  if (plan.path == plan::CudaLoss::kSingleBlock) {
    return with_type(batch.logits.type, [&](auto type) {
      using E = decltype(type);
      using F = Compute<E>;
      return launch_fused<E, false>(batch, options, {static_cast<F*>(loss), nullptr, static_cast<F*>(lse), V, scale, ce_scale},
                                    plan.block, stream);
    });
  }
  Workspace work(workspace);
  const auto [S, n, ce] = plan::take_loss_sums(work, C);
  void* const rest = static_cast<char*>(workspace) + work.bytes();  // of the joint, and then of what follows
  const ForwardTail end{S, n, ce, static_cast<int>(C), !soft, static_cast<double>(rows), loss, loss_type, V, scale, ce_scale};
  const plan::CudaLogdetInverse elimination = plan::cuda_logdet_inverse(1, C, limits);
  if (plan.path == plan::CudaLoss::kCooperative) {
    return with_type(batch.logits.type, [&](auto type) {
      using E = decltype(type);
      return launch_cooperative<E>(batch, static_cast<Compute<E>*>(lse), {end, options, static_cast<int>(elimination.stride)}, rest,
                                   elimination, limits, stream);
    });
  }
  if (const int error = joint(batch, S, n, lse, ce, rest, limits, stream); error != 0) return error;
  if (plan.path == plan::CudaLoss::kFusedTail) return launch_tail<kFactorClasses>(end, options, elimination, stream);
  const auto [log_abs_det, sign, kept] = plan::take_loss_determinant(work);
  void* const sums = static_cast<char*>(workspace) + work.bytes();
  const int error = logdet_inverse(S, n, 1, C, options.strict, log_abs_det, sign, kept, V, sums, limits, stream);
  if (error != 0) return error;
  return combine(batch, log_abs_det, kept, n, ce, options, loss, loss_type, scale, ce_scale, sums, limits, stream);
}

}  // namespace ldmi::cuda
