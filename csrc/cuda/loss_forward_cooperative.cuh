// The whole loss_forward in one launch: a cooperative grid does the steps of joint, with a grid barrier after each, and block 0 does
// the tail. The steps are the device functions that the kernels of joint call.
//
//     accumulate_onehot_tf32 or accumulate_onehot_fp64 | reduce_partials | forward_tail
//
// A barrier costs as much as a launch (1.1 and 1.24 us on an H100), so the device gains nothing. The host does: a launch takes it
// about 3 us, and in eager mode a small step waits for the host. The price: registers and shared memory are those of the step that
// needs most, which above kCooperativeClasses is the elimination. The steps over the rows then have half the blocks: at N = 65536, C =
// 100 this took 188 us instead of 163 (H100). So for more classes, and for soft targets, the steps are separate launches.
#pragma once

#include "joint/launch.cuh"
#include "loss_forward.cuh"

namespace ldmi::cuda {

// What block 0 needs for the tail
struct Cooperative {
  ForwardTail end;
  LossOptions options;
  int stride;
};

// The steps write S and n, the tail reads them: at.end has them const
LDMI_DEVICE void reduce_cooperative(const Partial& partial, const Cooperative& at) {
  sync_grid();
  const int64_t C = at.end.C;
  reduce_partials(partial, C * C, C, const_cast<double*>(at.end.S), const_cast<double*>(at.end.n), const_cast<double*>(at.end.ce));
}

// By block 0 alone; the other blocks are done
template <int kMost>
LDMI_DEVICE void tail_cooperative(const Cooperative& at) {
  sync_grid();
  if (block_idx() == 0) forward_tail<kMost>(at.end, at.options, at.stride);
}

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kOnehotTf32Threads, onehot_tf32_blocks(kWidth))
    loss_cooperative_tf32(Batch batch, float* lse, Partial partial, Cooperative at) {
  accumulate_onehot_tf32<E, kWidth>(batch, lse, partial);
  reduce_cooperative(partial, at);
  tail_cooperative<kWidth>(at);
}

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) loss_cooperative_fp64(Batch batch, Compute<E>* lse, Partial partial, Cooperative at) {
  accumulate_onehot_fp64<E, kWidth>(batch, lse, partial);
  reduce_cooperative(partial, at);
  tail_cooperative<kWidth>(at);
}

// ------------------------------------------------------------------------------------------------------------------ launchers

// Sets up a cooperative grid of at most `blocks` blocks, no more than the device can hold at once: grid.blocks.
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
int launch_cooperative_onehot(const Batch& batch, Compute<E>* lse, const Cooperative& at, void* workspace, const plan::CudaJoint& plan,
                              const plan::CudaLogdetInverse& elimination, const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const auto tail_smem = static_cast<size_t>(elimination.smem_bytes);
  const auto start = [&](auto kernel, int threads, size_t smem) {
    Grid grid;
    if (const int error = cooperative_grid(kernel, plan.blocks, threads, smem > tail_smem ? smem : tail_smem, limits, &grid);
        error != 0)
      return error;
    Workspace work(workspace);
    return launch(kernel, grid, stream, batch, lse, take_partial(work, grid.blocks, grid.blocks, C * C + C), at);
  };
  if constexpr (sizeof(E) <= 4) {
    if (is_onehot_tf32<E>(batch)) return start(loss_cooperative_tf32<E, kWidth>, kOnehotTf32Threads, onehot_tf32_smem<E, kWidth>(C));
  }
  return start(loss_cooperative_fp64<E, kWidth>, kThreads, onehot_fp64_smem<E, kWidth>(C));
}

// Where plan::cuda_loss_forward says kCooperative
template <class E>
int launch_cooperative(const Batch& batch, Compute<E>* lse, const Cooperative& at, void* workspace,
                       const plan::CudaLogdetInverse& elimination, const DeviceLimits& limits, Stream stream) {
  const int64_t C = batch.logits.columns;
  const plan::CudaJoint plan = plan::cuda_joint(batch.logits.rows, C, C, false, static_cast<int64_t>(sizeof(E)), limits);
  return launch_cooperative_onehot<E, static_cast<int>(plan::kCooperativeClasses)>(batch, lse, at, workspace, plan, elimination,
                                                                                   limits, stream);
}

}  // namespace ldmi::cuda
