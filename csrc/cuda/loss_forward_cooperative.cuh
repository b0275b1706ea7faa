// The whole loss_forward in one launch: a cooperative grid goes through the steps of joint, with a grid barrier after each, and block
// 0 through the end. The steps are the device functions that the launches of joint are made of.
//
//     rows_sums or tile_sums | finish_sums | end_of_loss
//
// A barrier costs what a launch does (1.1 and 1.24 us on an H100), so the device gains nothing. The host does: a launch takes it some
// 3 us, and in eager mode a small step waits for the host. The price: registers and shared memory are those of the hungriest step,
// which above kWholeClasses is the elimination. Where the steps over the rows then have half the blocks, N = 65536, C = 100, this took
// 188 us instead of 163 (H100); so for more classes, and for soft targets, the steps are launches.
#pragma once

#include "joint/launch.cuh"
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
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) loss_whole_tile(Batch batch, Compute<E>* lse, Partial partial, Whole at) {
  tile_sums<E, kWidth>(batch, lse, partial);
  finish_whole(partial, at);
  end_whole<kWidth>(at);
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

template <class E, int kWidth>
int launch_whole_tile(const Batch& batch, Compute<E>* lse, const Whole& at, void* workspace, const plan::CudaJoint& plan,
                      const plan::CudaLogdetInverse& elimination, const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const auto end_smem = static_cast<size_t>(elimination.smem_bytes);
  const auto start = [&](auto kernel, int threads, size_t smem) {
    Grid grid;
    if (const int error = cooperative_grid(kernel, plan.blocks, threads, smem > end_smem ? smem : end_smem, limits, &grid); error != 0)
      return error;
    Workspace work(workspace);
    return launch(kernel, grid, stream, batch, lse, take_partial(work, grid.blocks, grid.blocks, C * C + C), at);
  };
  if constexpr (sizeof(E) <= 4) {
    if (by_rows<E>(batch)) return start(loss_whole_rows<E, kWidth>, kRowsThreads, rows_smem<E, kWidth>(C));
  }
  return start(loss_whole_tile<E, kWidth>, kThreads, tile_smem<E, kWidth>(C));
}

// Where plan::cuda_loss_forward says kWhole
template <class E>
int launch_whole(const Batch& batch, Compute<E>* lse, const Whole& at, void* workspace, const plan::CudaLogdetInverse& elimination,
                 const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const plan::CudaJoint plan = plan::cuda_joint(batch.logits.rows, C, C, false, static_cast<int64_t>(sizeof(E)), limits);
  return launch_whole_tile<E, static_cast<int>(plan::kWholeClasses)>(batch, lse, at, workspace, plan, elimination, limits, stream);
}

}  // namespace ldmi::cuda
