// dloss/dz_i = w_i p_i * (scale * (<p_i, V[y_i]> - V[y_i]) + ce_scale) - w_i ce_scale e_{y_i}: one read of the logits, one write.
//
// | algorithm   | file       | when         |
// |:------------|:-----------|:-------------|
// | grad_tile   | tile.cuh   | few classes  |
// | grad_by_row | by_row.cuh | more classes |
// | grad_soft   | soft.cuh   | soft targets |
//
// csrc/plan (cuda_logits_grad) chooses. A first launch makes the table of V (table.cuh).
//
// The saved lse only keeps the exponentials in range. They are divided by their own sum, so the rounding of an lse far from 0 does not
// reach the result.
#pragma once

#include "../sort.cuh"
#include "../tuning.cuh"
#include "by_row.cuh"
#include "soft.cuh"
#include "tile.cuh"

namespace ldmi::cuda {

template <class E, int kWidth>
int launch_grad_tile(const Batch& batch, const Compute<E>* lse, const Table<Compute<E>>& table, const double* scale,
                     const double* ce_scale, E* grad, const plan::CudaLogitsGrad& plan, Stream stream) {
  Grid grid;
  grid.blocks = plan.blocks;
  grid.threads = kThreads;
  Carve carve;
  const GradTile<E, kWidth> tile(carve, batch.logits.columns, batch.num_labels);
  static_cast<void>(tile);
  grid.smem = carve.bytes();
  return launch(grad_tile<E, kWidth>, grid, stream, batch, lse, table, scale, ce_scale, grad);
}

// A row of logits and a row of V are in the registers of a group of threads. Longer rows are read twice.
template <class E, int kAccess>
struct ByRowTuning {
  static constexpr bool kDouble = sizeof(E) == 8;
  static constexpr bool kNarrow = kDouble || kAccess == 1;  // doubles, or addresses of each value: fewer registers for columns
  static constexpr RowTuning entries[] = {
      // classes, threads per row, columns per thread, rows in flight
      {kAccess <= 4 ? plan::kLanes * 4 : 0, kWarp, 4, kDouble ? 1 : 4},             // an access of 8 values needs 8 columns
      {!kDouble || kAccess > 1 ? plan::kLanes * 8 : 0, kWarp, 8, kDouble ? 1 : 2},  // accesses of one double: too few registers
      {!kNarrow ? plan::kLanes * 16 : 0, kWarp, 16, 1},
      {!kNarrow ? plan::kLanes * 32 : 0, kWarp, 32, 1},
      {kNarrow ? plan::kBlockClasses / 4 : 0, 128, 8, 1},
      {plan::kBlockClasses, kThreads, 16, 1},
  };
};

template <class E>
int launch_grad_by_row(const Batch& batch, const Compute<E>* lse, const Table<Compute<E>>& table, const double* scale,
                       const double* ce_scale, const int64_t* order, E* grad, const plan::CudaLogitsGrad& plan, Stream stream) {
  using F = Compute<E>;
  Matrix both = batch.logits;  // the width of an access has to suit both the logits and the gradient, which is contiguous
  if (reinterpret_cast<uintptr_t>(grad) % 16 != 0) both.data = grad;
  return with_access<E>(both, [&](auto access) {
    constexpr int kAccess = decltype(access)::value;
    using Tuning = ByRowTuning<E, kAccess>;
    const auto start = [&](auto kernel, int group, int kernel_rows) {
      Grid grid;
      grid.blocks = group == 128 ? 2 * plan.blocks : plan.blocks;
      grid.threads = group == kWarp ? kThreads : group;
      Carve carve;
      carve.take<F>(4 * kernel_rows * (group / kWarp));
      grid.smem = carve.bytes();
      return launch(kernel, grid, stream, batch, lse, table, scale, ce_scale, order, grad);
    };
    const int64_t C = batch.logits.columns;
    int status = 0;
    const bool in_registers = with_tuning<Tuning>(C, [&](auto entry) {
      constexpr RowTuning t = Tuning::entries[entry];
      status = start(grad_by_row<E, kAccess, t.group, t.columns, t.rows, false>, t.group, t.rows);
    });
    if (in_registers) return status;
    return start(grad_by_row<E, kAccess, kThreads, 16, 1, true>, kThreads, 1);
  });
}

template <class E>
int launch_logits_grad(const Batch& batch, const void* lse, const double* V, const double* scale, const double* ce_scale, void* grad,
                       void* workspace, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  if (rows == 0) return 0;
  const plan::CudaLogitsGrad plan =
      plan::cuda_logits_grad(rows, C, K, batch.soft.data != nullptr, static_cast<int64_t>(sizeof(E)), limits);
  const F* const row_lse = static_cast<const F*>(lse);
  E* const out = static_cast<E*>(grad);
  Workspace work(workspace);
  const Table<F> table = plan::take_grad_table<F>(work, K, C);
  Grid grid;
  const int64_t wanted = (K + kThreads / kWarp - 1) / (kThreads / kWarp);
  grid.blocks = wanted < 4 * limits.sms ? wanted : 4 * limits.sms;
  grid.threads = kThreads;
  int error = launch(grad_table<F>, grid, stream, V, K, C, table);
  if (error != 0) return error;
  switch (plan.order) {
    case plan::CudaOrder::kSoft: {
      grid.blocks = plan.blocks;
      Carve carve;
      carve.take<F>(kSoftGradRows * kSoftGradPitch);
      carve.take<F>(kSoftGradDepth * kSoftGradColumns);
      carve.take<double>(kThreads / kWarp);
      grid.smem = carve.bytes();
      return launch(grad_soft<E>, grid, stream, batch, row_lse, table, scale, ce_scale, out);
    }
    case plan::CudaOrder::kTile:
      if (plan.width == 16) return launch_grad_tile<E, 16>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
      if (plan.width == 32) return launch_grad_tile<E, 32>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
      return launch_grad_tile<E, 64>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
    case plan::CudaOrder::kByLabel: {
      const LabelOrder sort = take_order(work, plan.sort, rows, K);
      error = launch_sort(batch, sort, plan.sort, stream);
      if (error != 0) return error;
      return launch_grad_by_row<E>(batch, row_lse, table, scale, ce_scale, sort.order, out, plan, stream);
    }
    default:
      return launch_grad_by_row<E>(batch, row_lse, table, scale, ce_scale, nullptr, out, plan, stream);
  }
}

}  // namespace ldmi::cuda
