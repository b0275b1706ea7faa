// The whole loss_forward in one launch: a cooperative grid goes through the steps of joint, with a grid barrier after each, and block
// 0 through the end. The steps are the device functions that the launches of joint are made of.
//
//     few classes      rows_sums or tile_sums | finish_sums | end_of_loss
//     soft targets     sums_of_rows, and the sum of the weights | soft_sums | finish_sums | end_of_loss
//
// A barrier costs what a launch does (1.1 and 1.24 us on an H100), so the device gains nothing. The host does: a launch takes it some
// 3 us, and in eager mode a small step waits for the host. The price: registers and shared memory are those of the hungriest step.
// Above kTileClasses that is the elimination, with which the steps over the rows have one block a multiprocessor instead of two: at
// N = 65536, C = 100 that took 188 us instead of 163 (H100), so there the steps are launches.
#pragma once

#include "joint.cuh"
#include "loss_forward.cuh"

namespace ldmi::cuda {

// What the elimination's stride is for block 0
struct Whole {
  LossEnd end;
  LossOptions options;
  int stride;
};

// S and n are written by the steps, and read by the end: at.end has them const
LDMI_DEVICE void finish_whole(const Partial& partial, const Whole& at) {
  sync_grid();
  const int64_t C = at.end.C;
  finish_sums(partial, C * C, C, const_cast<double*>(at.end.S), const_cast<double*>(at.end.n), const_cast<double*>(at.end.ce));
}

// Block 0 alone; the others are done
template <int kMost>
LDMI_DEVICE void end_whole(const Whole& at) {
  sync_grid();
  if (block_idx() == 0) end_of_loss<kMost>(at.end, at.options, at.stride);
}

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kRowsThreads, rows_blocks(kWidth)) loss_whole_rows(Batch batch, float* lse, Partial partial, Whole at) {
  rows_sums<E, kWidth>(batch, lse, partial);
  finish_whole(partial, at);
  end_whole<kWidth>(at);
}

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, (kWidth == 32 ? 1 : 2))
    loss_whole_tile(Batch batch, Compute<E>* lse, Partial partial, Whole at) {
  tile_sums<E, kWidth>(batch, lse, partial);
  finish_whole(partial, at);
  end_whole<kWidth>(at);
}

template <class E>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1)
    loss_whole_soft(Batch batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, Partial partial, double* weights, Whole at) {
  sums_of_rows<E, kWarp>(batch, lse, shift, inverse, partial.ce, partial.bad);
  if (batch.weights.data != nullptr) {
    sync_block();
    Carve carve;
    double* const scratch = carve.take<double>(kThreads / kWarp);
    double total = 0;
    for (int64_t i = block_idx() * kThreads + thread_idx(); i < batch.logits.rows; i += grid_dim() * kThreads) {
      total += weight_of(batch.weights, i);
    }
    total = block_sum(total, scratch);
    if (thread_idx() == 0) store(weights + block_idx(), total);
  }
  sync_grid();
  soft_sums<E>(batch, shift, inverse, partial.parts, partial.sums);
  finish_whole(partial, at);
  if (at.end.C <= kFactorWarp) {
    end_whole<kFactorWarp>(at);
  } else {
    end_whole<kFactorClasses>(at);
  }
}

// ------------------------------------------------------------------------------------------------------------------ launchers

// A cooperative grid of at most `blocks`, as many as the device holds at once: grid.blocks. Then `start(grid)`.
template <class... P>
int cooperative_grid(void (*kernel)(P...), int64_t blocks, int threads, size_t smem, const DeviceLimits& limits, Grid* grid) {
  int resident = 0;
  if (const int error = blocks_per_sm(kernel, threads, smem, &resident); error != 0) return error;
  grid->blocks = blocks < resident * int64_t{limits.sms} ? blocks : resident * int64_t{limits.sms};
  grid->threads = threads;
  grid->smem = smem;
  grid->cooperative = true;
  return 0;
}

inline size_t most(size_t a, size_t b) { return a > b ? a : b; }

template <class E, int kWidth>
int launch_whole_tile(const Batch& batch, Compute<E>* lse, const Whole& at, void* workspace, const plan::CudaJoint& plan,
                      const plan::CudaLogdetInverse& elimination, const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const auto start = [&](auto kernel, int threads, size_t smem) {
    Grid grid;
    if (const int error = cooperative_grid(kernel, plan.blocks, threads, most(smem, elimination.smem_bytes), limits, &grid);
        error != 0)
      return error;
    Workspace work(workspace);
    return launch(kernel, grid, stream, batch, lse, take_partial(work, grid.blocks, grid.blocks, C * C + C), at);
  };
  if constexpr (kWidth <= 32 && sizeof(E) <= 4) {
    if (by_rows<E, kWidth>(batch)) return start(loss_whole_rows<E, kWidth>, kRowsThreads, rows_smem<E, kWidth>(C));
  }
  return start(loss_whole_tile<E, kWidth>, kThreads, tile_smem<E, kWidth>(C));
}

template <class E>
int launch_whole_soft(const Batch& batch, Compute<E>* lse, Whole at, void* workspace, const plan::CudaJoint& plan,
                      const plan::CudaLogdetInverse& elimination, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  const auto kernel = loss_whole_soft<E>;
  Grid grid;
  const size_t smem = most(most(row_sums_smem<F>(), soft_smem<F>()), elimination.smem_bytes);
  if (const int error = cooperative_grid(kernel, plan.blocks, kThreads, smem, limits, &grid); error != 0) return error;
  Workspace work(workspace);
  F* const shift = work.take<F>(rows);
  F* const inverse = work.take<F>(rows);
  const Partial partial = take_partial(work, plan.segments, grid.blocks, C * C + C);
  double* const weights = batch.weights.data == nullptr ? nullptr : work.take<double>(grid.blocks);
  at.end.weights = weights;
  at.end.weight_parts = grid.blocks;
  return launch(kernel, grid, stream, batch, lse, shift, inverse, partial, weights, at);
}

// Where plan::cuda_loss_forward says kWhole
template <class E>
int launch_whole(const Batch& batch, Compute<E>* lse, const Whole& at, void* workspace, const plan::CudaLogdetInverse& elimination,
                 const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const plan::CudaJoint plan =
      plan::cuda_joint(batch.logits.rows, C, C, batch.soft.data != nullptr, static_cast<int64_t>(sizeof(E)), limits);
  if (plan.order == plan::CudaOrder::kSoft) return launch_whole_soft<E>(batch, lse, at, workspace, plan, elimination, limits, stream);
  if (plan.width == 16) return launch_whole_tile<E, 16>(batch, lse, at, workspace, plan, elimination, limits, stream);
  if (plan.width == 32) return launch_whole_tile<E, 32>(batch, lse, at, workspace, plan, elimination, limits, stream);
  return launch_whole_tile<E, 64>(batch, lse, at, workspace, plan, elimination, limits, stream);
}

}  // namespace ldmi::cuda
