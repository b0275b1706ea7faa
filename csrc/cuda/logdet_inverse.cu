// The launches of logdet_inverse.

#include "kernels.h"
#include "logdet_inverse/grid.cuh"
#include "logdet_inverse/lu.cuh"
#include "rows.cuh"

namespace ldmi::cuda {
namespace {

template <int kMost>
int launch_warps(const Matrices& matrices, const DeviceLimits& limits, simt::Stream stream) {
  if constexpr (kMost > 8) {
    if (matrices.C <= kMost - 8) return launch_warps<kMost - 8>(matrices, limits, stream);
  }
  constexpr int64_t warps = factor::kWarpThreads / simt::kWarp;
  simt::Grid grid;
  // One matrix takes one warp. Several matrices go to different multiprocessors before they share blocks.
  const int64_t spread = (matrices.count + limits.sms - 1) / limits.sms;
  grid.threads = static_cast<int>(spread < warps ? spread : warps) * simt::kWarp;
  const int64_t blocks = (matrices.count * simt::kWarp + grid.threads - 1) / grid.threads;
  grid.blocks = blocks < 0x7fffffff ? blocks : 0x7fffffff;
  return simt::launch(factor::logdet_inverse_warps<kMost>, grid, stream, matrices);
}

template <int kMost>
int launch_blocks(const Matrices& matrices, const plan::CudaLogdetInverse& plan, simt::Stream stream) {
  if constexpr (kMost > 2 * simt::kWarp) {
    if (matrices.C <= kMost - simt::kWarp) return launch_blocks<kMost - simt::kWarp>(matrices, plan, stream);
  }
  simt::Grid grid;
  grid.threads = factor::factor_threads(kMost);
  grid.blocks = matrices.count < 0x7fffffff ? matrices.count : 0x7fffffff;
  grid.smem = static_cast<size_t>(plan.smem_bytes);
  return simt::launch(factor::logdet_inverse_blocks<kMost>, grid, stream, matrices, static_cast<int>(plan.stride));
}

// kSlots: the most rows of a panel that a thread of a panel block has
template <int kSlots, int kBlocks>
int launch_grid(const Matrices& matrices, const plan::CudaLogdetInverse& plan, void* workspace, const DeviceLimits& limits,
                simt::Stream stream) {
  if constexpr (kSlots > 1) {
    if (plan::slice_rows(matrices.C, kBlocks) <= kSlots / 2 * kGridThreads)
      return launch_grid<kSlots / 2, kBlocks>(matrices, plan, workspace, limits, stream);
  }
  const auto kernel = factor::logdet_inverse_grid<kSlots, kGridThreads, kBlocks>;
  const auto smem = static_cast<size_t>(plan.smem_bytes);
  // one block per multiprocessor: panel blocks do not share theirs
  simt::Grid grid{int64_t{limits.sms}, kGridThreads, smem, kBlocks, true};
  if constexpr (kBlocks > 1) {
    grid.blocks = int64_t{limits.clusters} * kBlocks;
  } else {
    int resident = 0;
    if (const int error = simt::blocks_per_sm(kernel, kGridThreads, smem, &resident); error != 0) return error;
    if (resident == 0) grid.blocks = 0;
  }
  Workspace work(workspace);
  const GridSpace space = plan::take_grid_space(work, matrices.C, limits.sms, matrices.V != nullptr);
  return simt::launch(kernel, grid, stream, matrices, space, static_cast<int>(plan.panel));
}

LuSpace lu_space(int64_t count, int64_t C, void* workspace) {
  Workspace work(workspace);
  return plan::take_lu_space(work, count, C);
}

int64_t at_most(int64_t blocks, const DeviceLimits& limits) {
  const int64_t most = int64_t{16} * limits.sms;
  return blocks < most ? blocks : most;
}

}  // namespace

int logdet_inverse(const double* S, const double* n, int64_t count, int64_t C, bool strict, double* log_abs_det, double* sign,
                   int64_t* kept, double* V, void* workspace, const DeviceLimits& limits, simt::Stream stream) {
  if (count == 0) return 0;
  const Matrices matrices{S, n, count, static_cast<int>(C), strict, log_abs_det, sign, kept, V};
  const plan::CudaLogdetInverse plan = plan::cuda_logdet_inverse(count, C, limits, V != nullptr);
  if (plan.factor == plan::CudaFactor::kWarp) return launch_warps<kFactorWarp>(matrices, limits, stream);
  if (plan.factor == plan::CudaFactor::kBlock) return launch_blocks<kFactorClasses>(matrices, plan, stream);
  if (plan.factor == plan::CudaFactor::kGrid) {
    constexpr int kPanelBlocks = plan::kClusterBlocks;
    return plan.panel_blocks == 1 ? launch_grid<plan::kGridClasses / kGridThreads, 1>(matrices, plan, workspace, limits, stream)
                                  : launch_grid<plan::kClusterClasses / kPanelBlocks / kGridThreads, kPanelBlocks>(
                                        matrices, plan, workspace, limits, stream);
  }
  constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
  return kInvalidValue;
}

int logdet_inverse_equilibrate(const double* S, const double* n, int64_t count, int64_t C, double* A, double* X, void* workspace,
                               const DeviceLimits& limits, simt::Stream stream) {
  if (count == 0) return 0;
  simt::Carve carve;
  carve.take<double>(factor::kBlockThreads / simt::kWarp);
  const simt::Grid grid{at_most(count * C, limits), factor::kBlockThreads, carve.bytes()};
  const Matrices matrices{S, n, count, static_cast<int>(C), false, nullptr, nullptr, nullptr, nullptr};
  return simt::launch(factor::lu_equilibrate, grid, stream, matrices, A, X, lu_space(count, C, workspace));
}

int logdet_inverse_determinant(const double* LU, const int32_t* pivots, const double* n, int64_t count, int64_t C, bool strict,
                               double* log_abs_det, double* sign, int64_t* kept, void* workspace, const DeviceLimits& limits,
                               simt::Stream stream) {
  if (count == 0) return 0;
  constexpr int64_t warps = factor::kBlockThreads / simt::kWarp;
  simt::Carve carve;
  carve.take<double>(warps);
  carve.take<double>(warps);
  carve.take<int>(warps);
  const simt::Grid grid{at_most(count, limits), factor::kBlockThreads, carve.bytes()};
  const Matrices matrices{nullptr, n, count, static_cast<int>(C), strict, log_abs_det, sign, kept, nullptr};
  return simt::launch(factor::lu_determinant, grid, stream, matrices, LU, pivots, lu_space(count, C, workspace));
}

int logdet_inverse_finish(const double* X, const int32_t* pivots, const double* n, int64_t count, int64_t C, double* V,
                          void* workspace, const DeviceLimits& limits, simt::Stream stream) {
  if (count == 0) return 0;
  const LuSpace space = lu_space(count, C, workspace);
  const int64_t blocks = (C + factor::kOrderThreads - 1) / factor::kOrderThreads;
  const simt::Grid ordering{at_most(count * blocks, limits), factor::kOrderThreads};
  if (const int error = simt::launch(factor::lu_order, ordering, stream, count, C, pivots, space); error != 0) return error;
  const simt::Grid grid{at_most(count * C, limits), factor::kBlockThreads};
  const Matrices matrices{nullptr, n, count, static_cast<int>(C), false, nullptr, nullptr, nullptr, V};
  return simt::launch(factor::lu_finish, grid, stream, matrices, X, space);
}

}  // namespace ldmi::cuda
