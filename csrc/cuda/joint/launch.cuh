// S = sum_i w_i e_{y_i} p_i^T, n, the rows' log-sum-exp and the summed cross entropy: which algorithm runs, and its launches.
//
// | algorithm              | file            | when                                                                             |
// |:-----------------------|:----------------|:---------------------------------------------------------------------------------|
// | accumulate_onehot_tf32 | onehot_tf32.cuh | at most 32 labels and classes; logits of at most 32 bits, contiguous; no weights |
// | accumulate_onehot_fp64 | onehot_fp64.cuh | at most 32 labels and classes, otherwise                                         |
// | accumulate_by_label    | by_label.cuh    | more classes                                                                     |
// | accumulate_soft        | soft.cuh        | soft targets                                                                     |
//
// csrc/plan (cuda_joint) chooses; between the first two the batch decides (is_onehot_tf32).
//
// Accuracy. All algorithms but the first sum products of a prediction (fp32, or fp64 for fp64 logits) and a weight in fp64. So an
// entry of S is off by the softmax's own rounding and N 2^-53 of the sum of its terms; without weights, sums of fp32 numbers are exact
// up to 2^29 rows of like size. Equal rows give equal rows of R, and a singular joint stays singular to 2^-52, which fp32 sums would
// hide. onehot_tf32.cuh says why the first algorithm keeps this property.
//
// Determinism. Partial sums of several blocks are added in a fixed order by a second launch, or after a grid barrier; nothing depends
// on the schedule. Each step is a device function, which reads the results of the step before by load(), and a kernel that calls it.
#pragma once

#include "../tuning.cuh"
#include "by_label.cuh"
#include "onehot_fp64.cuh"
#include "onehot_tf32.cuh"
#include "partial_sums.cuh"
#include "row_logsumexp.cuh"
#include "soft.cuh"

namespace ldmi::cuda {

// Whether joint_onehot_tf32 takes the batch, and not joint_onehot_fp64
template <class E>
bool is_onehot_tf32(const Batch& batch) {
  return sizeof(E) <= 4 && batch.weights.data == nullptr && !batch.probs && is_flat(batch.logits);
}

template <class E, int kWidth>
int launch_joint_onehot(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                        const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  const int64_t entries = batch.num_labels * batch.logits.columns;
  Workspace work(workspace);
  const Partial partial = take_partial(work, plan.blocks, plan.blocks, entries + batch.num_labels);
  Grid grid;
  grid.blocks = plan.blocks;
  int error = 0;
  if (is_onehot_tf32<E>(batch)) {
    if constexpr (sizeof(E) <= 4) {
      grid.threads = kOnehotTf32Threads;
      grid.smem = onehot_tf32_smem<E, kWidth>(batch.logits.columns);
      error = launch(joint_onehot_tf32<E, kWidth>, grid, stream, batch, lse, partial);
    }
  } else {
    grid.threads = kThreads;
    grid.smem = onehot_fp64_smem<E, kWidth>(batch.logits.columns);
    error = launch(joint_onehot_fp64<E, kWidth>, grid, stream, batch, lse, partial);
  }
  if (error != 0) return error;
  return launch_reduce_partials(partial, entries, batch.num_labels, S, n, ce, limits, stream);
}

template <class E>
int launch_row_logsumexp(const Batch& batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part,
                         uint32_t* bad_part, int64_t blocks, Stream stream) {
  Grid grid;
  grid.blocks = blocks;
  grid.threads = kThreads;
  grid.smem = row_logsumexp_smem<Compute<E>>();
  if (batch.logits.columns <= plan::kWarpSums) {
    return launch(joint_row_logsumexp<E, kWarp>, grid, stream, batch, lse, shift, inverse, ce_part, bad_part);
  }
  return launch(joint_row_logsumexp<E, kThreads>, grid, stream, batch, lse, shift, inverse, ce_part, bad_part);
}

// Rows of one label are summed by a group of threads that holds a row of S in registers, in fp64. Longer rows are read twice.
template <class E, int kAccess>
struct ByLabelTuning {
  static constexpr bool kDouble = sizeof(E) == 8;
  static constexpr int kWide = kDouble ? 1 : 2;  // rows in flight: doubles take twice the registers
  // With accesses of one value the addresses take registers too, so there are fewer rows in flight.
  static constexpr int kRows = kAccess == 1 ? kWide : 2 * kWide;
  static constexpr RowTuning entries[] = {
      // classes, threads per row, columns per thread, rows in flight
      {kAccess <= 4 ? plan::kLanes * 4 : 0, kWarp, 4, kRows},  // an access of 8 values needs 8 columns
      {plan::kLanes * 8, kWarp, 8, kRows},
      {!kDouble && kAccess > 1 ? plan::kLanes * 16 : 0, kWarp, 16, 2},  // else too few registers for 16 columns
      // 32 columns per lane would leave registers for too few warps: at 65536 x 1000 that took 314 us, this takes 230 (H100)
      {plan::kBlockClasses / 4, 128, 8, 2 * kWide},
      {plan::kBlockClasses, kThreads, 16, kWide},  // the whole block: 256 threads with 16 columns
  };
};

template <class E>
int launch_joint_by_label(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                          const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  Workspace work(workspace);
  const LabelOrder sort = take_order(work, plan.sort, rows, K);
  const BoundarySums boundary = take_boundary_sums(work, plan.segments, C);
  int error = launch_sort(batch, sort, plan.sort, stream);
  if (error != 0) return error;
  const bool given = C > plan::kBlockClasses;
  plan::RowSoftmax<F> row{};
  double* ce_part = boundary.ce;
  int64_t ce_parts = plan.segments;
  if (given) {
    ce_parts = plan.blocks;
    row = plan::take_row_softmax<F>(work, rows);
    const plan::RowParts parts = plan::take_row_parts(work, ce_parts);
    ce_part = parts.ce;
    error = launch_row_logsumexp<E>(batch, lse, row.shift, row.inverse, parts.ce, parts.bad, ce_parts, stream);
    if (error != 0) return error;
  }
  error = with_access<E>(batch.logits, [&](auto access) {
    constexpr int kAccess = decltype(access)::value;
    using Tuning = ByLabelTuning<E, kAccess>;
    const auto start = [&](auto kernel, int group, int kernel_rows) {
      Grid grid;
      grid.threads = group == kWarp ? static_cast<int>(plan::walk_threads(C)) : group;
      grid.blocks = group == kWarp ? plan.blocks : plan.segments;
      Carve carve;
      carve.take<F>(2 * kernel_rows * (group / kWarp));
      grid.smem = carve.bytes();
      return launch(kernel, grid, stream, batch, sort, plan.segments, row.shift, row.inverse, lse, S, n, boundary);
    };
    int status = 0;
    const bool in_registers = with_tuning<Tuning>(C, [&](auto entry) {
      constexpr RowTuning t = Tuning::entries[entry];
      status = start(joint_by_label<E, kAccess, t.group, t.columns, t.rows, false>, t.group, t.rows);
    });
    if (in_registers) return status;
    return start(joint_by_label<E, kAccess, kThreads, 16, Tuning::kWide, true>, kThreads, Tuning::kWide);
  });
  if (error != 0) return error;
  Grid grid;
  grid.blocks = K < 4 * limits.sms ? K : 4 * limits.sms;
  grid.threads = kThreads;
  Carve carve;
  carve.take<double>(kThreads / kWarp);
  grid.smem = carve.bytes();
  return launch(joint_add_boundary_sums<kThreads>, grid, stream, K, C, sort, plan.segments, boundary, ce_part, ce_parts, S, n, ce);
}

template <class E>
int launch_joint_soft(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                      const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels, splits = plan.segments;
  Workspace work(workspace);
  const plan::RowSoftmax<F> row = plan::take_row_softmax<F>(work, rows);
  const Partial partial = take_partial(work, splits, plan.blocks, K * C + K);
  if (const int error = launch_row_logsumexp<E>(batch, lse, row.shift, row.inverse, partial.ce, partial.bad, plan.blocks, stream);
      error != 0)
    return error;
  Grid grid;
  const int64_t jobs = (C + kSoftTile - 1) / kSoftTile * ((K + kSoftTile - 1) / kSoftTile) * splits;
  grid.blocks = jobs < 2 * limits.sms ? jobs : 2 * limits.sms;
  grid.threads = kThreads;
  grid.smem = soft_smem<F>();
  if (const int error = launch(joint_soft<E>, grid, stream, batch, row.shift, row.inverse, splits, partial.sums); error != 0)
    return error;
  return launch_reduce_partials(partial, K * C, K, S, n, ce, limits, stream);
}

template <class E>
int launch_joint(const Batch& batch, double* S, double* n, void* lse, double* ce, void* workspace, const DeviceLimits& limits,
                 Stream stream) {
  const plan::CudaJoint plan = plan::cuda_joint(batch.logits.rows, batch.logits.columns, batch.num_labels, batch.soft.data != nullptr,
                                                static_cast<int64_t>(sizeof(E)), limits);
  Compute<E>* const row_lse = static_cast<Compute<E>*>(lse);
  if (plan.order == plan::CudaOrder::kSoft) return launch_joint_soft<E>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  if (plan.order == plan::CudaOrder::kByLabel)
    return launch_joint_by_label<E>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  if (plan.width == 16) return launch_joint_onehot<E, 16>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  return launch_joint_onehot<E, 32>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
}

}  // namespace ldmi::cuda
