// The kernels around torch's LU factorisation, for sizes that no elimination of ours takes. The host reads nothing; flags stay on the
// device. Two matrices are all the memory: A, which may be the memory of S, and X.
//
// - lu_equilibrate: A = R = diag(1/n) S, with identity rows and columns for absent classes; the norms of its rows, and whether they
//   are finite. X = I. LAPACK and cuSOLVER read A as column-major, that is as R^T, and leave its factors there: P R^T = L U.
// - lu_determinant: the scalars from the factors and the pivots (1-based: row k was exchanged with row pivots[k] - 1).
// - torch solves U^T X = I and then L^T X = X, column-major, in place: R^{-1} = P^T X.
// - lu_order, lu_finish: R^{-1} column-major is R^{-T} row-major, so V[i, j] = X[i, order[j]] / n[i], in the memory of A, whose
//   factors are no longer needed. Zeros and NaN are selected.
#pragma once

#include "kernels.cuh"

namespace ldmi::cuda {

using plan::LuSpace;

namespace factor {

inline constexpr uint32_t kRegular = 0, kZero = 1, kPoison = 2;
inline constexpr int kOrderThreads = 128;

// One block per row of one matrix. X, unless null, becomes the identity. A may be S.
LDMI_KERNEL void LDMI_BOUNDS(kBlockThreads, 1) lu_equilibrate(Matrices matrices, double* A, double* X, LuSpace space) {
  Carve carve;
  double* const sums = carve.take<double>(kBlockThreads / kWarp);
  const int64_t C = matrices.C;
  for (int64_t task = block_idx(); task < matrices.count * C; task += grid_dim()) {
    const int64_t i = task % C;
    const double* const n = matrices.n + (task - i);
    double least = 0.0;
    for (int64_t j = thread_idx(); j < C; j += block_dim()) least += plan::least_part(load_const(n + j));
    least = warp_sum(least);
    if (lane() == 0) sums[warp()] = least;
    sync_block();
    least = 0.0;
    for (int w = 0; w < block_dim() / kWarp; ++w) least += sums[w];
    sync_block();
    const double weight = load_const(n + i), lift = plan::lift_of(weight);
    const bool here = plan::is_present(weight, least);
    const double scale = here ? 1.0 / (weight * lift) : 0.0;
    bool finite = isfinite(weight);
    double sum = 0.0;
    for (int64_t j = thread_idx(); j < C; j += block_dim()) {
      const double entry = load(matrices.S + task * C + j);
      finite &= isfinite(entry);
      const double value = here && plan::is_present(load_const(n + j), least) ? entry * lift * scale : (i == j ? 1.0 : 0.0);
      sum += abs(value);
      store(A + task * C + j, value);
      if (X != nullptr) store(X + task * C + j, i == j ? 1.0 : 0.0);
    }
    sum = warp_sum(sum);
    if (lane() == 0) sums[warp()] = sum;
    finite = !sync_block_or(!finite);
    if (thread_idx() == 0) {
      double norm = 0.0;
      for (int w = 0; w < block_dim() / kWarp; ++w) norm += sums[w];
      store(space.norms + task, RowNote::of(norm, finite, here).value);
    }
    sync_block();
  }
}

// One block per matrix. S and V are not read.
LDMI_KERNEL void LDMI_BOUNDS(kBlockThreads, 1)
    lu_determinant(Matrices matrices, const double* LU, const int32_t* pivots, LuSpace space) {
  Carve carve;
  double* const norms = carve.take<double>(kBlockThreads / kWarp);
  double* const logs = carve.take<double>(kBlockThreads / kWarp);
  int* const counts = carve.take<int>(kBlockThreads / kWarp);
  const int64_t C = matrices.C;
  const int warps = block_dim() / kWarp;
  for (int64_t at = block_idx(); at < matrices.count; at += grid_dim()) {
    double norm = 0.0;
    bool finite = true;
    for (int64_t i = thread_idx(); i < C; i += block_dim()) {
      const double row = RowNote{load_const(space.norms + at * C + i)}.norm();
      finite &= !isnan(row);
      norm = fmax(norm, row);
    }
    norm = warp_max(norm);
    if (lane() == 0) norms[warp()] = norm;
    finite = !sync_block_or(!finite);
    for (int w = 0; w < warps; ++w) norm = fmax(norm, norms[w]);
    const double smallest = threshold(C, norm);
    LogProduct product;
    bool regular = true, odd = false;
    int present = 0;
    for (int64_t i = thread_idx(); i < C; i += block_dim()) {
      const double pivot = load_const(LU + (at * C + i) * C + i);
      if (abs(pivot) > smallest) {
        product.multiply(abs(pivot));
      } else {
        regular = false;
      }
      odd ^= pivot < 0.0;
      odd ^= load_const(pivots + at * C + i) != i + 1;
      if (RowNote{load_const(space.norms + at * C + i)}.here()) {
        product.multiply(load_const(matrices.n + at * C + i));
        ++present;
      }
    }
    const double log_abs_det = product.log();
    present = warp_sum(present);
    if (lane() == 0) {
      logs[warp()] = log_abs_det;
      counts[warp()] = present;
    }
    const bool negative = sync_block_count(odd) % 2 != 0;
    regular = !sync_block_or(!regular);
    if (thread_idx() == 0) {
      double sum = 0.0;
      present = 0;
      for (int w = 0; w < warps; ++w) {
        sum += logs[w];
        present += counts[w];
      }
      const Screening seen{finite, matrices.strict, present, matrices.C};
      Determinant found{sum, negative ? -1.0 : 1.0, seen.kept()};
      if (!seen.regular()) {
        found = seen.answer();
      } else if (!regular) {
        found = seen.singular();
      }
      store(matrices.log_abs_det + at, found.log_abs_det);
      store(matrices.sign + at, found.sign);
      store(matrices.kept + at, found.kept);
      store(space.answer + at, !finite ? kPoison : seen.regular() && regular ? kRegular : kZero);
    }
    sync_block();
  }
}

// One thread per row of R^T follows it through the exchanges: C short steps, for all rows in parallel.
LDMI_KERNEL void LDMI_BOUNDS(kOrderThreads, 1) lu_order(int64_t count, int64_t C, const int32_t* pivots, LuSpace space) {
  const int64_t blocks = (C + kOrderThreads - 1) / kOrderThreads;
  for (int64_t task = block_idx(); task < count * blocks; task += grid_dim()) {
    const int64_t at = task / blocks, row = task % blocks * kOrderThreads + thread_idx();
    int place = static_cast<int>(row);
    LDMI_UNROLL_BY(8)
    for (int64_t k = 0; k < C; ++k) {
      const int other = load_const(pivots + at * C + k) - 1;
      place = place == k ? other : place == other ? static_cast<int>(k) : place;
    }
    if (row < C) store(space.order + at * C + row, place);
  }
}

// One block per row of V.
LDMI_KERNEL void LDMI_BOUNDS(kBlockThreads, 1) lu_finish(Matrices matrices, const double* X, LuSpace space) {
  const int64_t C = matrices.C;
  for (int64_t task = block_idx(); task < matrices.count * C; task += grid_dim()) {
    const int64_t at = task / C;
    const double* const norms = space.norms + at * C;
    const uint32_t answer = load_const(space.answer + at);
    const bool here = answer == kRegular && RowNote{load_const(norms + task % C)}.here();
    const double weight = load_const(matrices.n + task), lift = plan::lift_of(weight), scale = here ? 1.0 / (weight * lift) : 0.0;
    const double* const row = X + task * C;
    for (int64_t j = thread_idx(); j < C; j += block_dim()) {
      double value = answer == kPoison ? kNaN : 0.0;
      if (here && RowNote{load_const(norms + j)}.here()) {
        value = load_const(row + load_const(space.order + at * C + j)) * lift * scale;
      }
      store(matrices.V + task * C + j, value);
    }
  }
}

}  // namespace factor
}  // namespace ldmi::cuda
