// What stands around a library's LU factorisation where no kernel of our own takes C: S to R before it, the determinant and V after
// it. The host looks at nothing; the flags stay on the device.
//
// - equilibrate: R = diag(1/n) S, column-major, with identity rows and columns for absent classes; its norm, and whether it is finite.
// - determinant: from LU (column-major) and the pivots (1-based: row k was exchanged with row pivots[k] - 1).
// - finish: V in the place of R^{-1} column-major, which is R^{-T} row-major: rows scaled by 1/n, zeros and NaN selected.
#pragma once

#include "logdet_inverse.cuh"

namespace ldmi::cuda {

// The workspace of `count` matrices
struct LibrarySpace {
  double* norms;     // [count, blocks]: the largest row sum of a block's rows; NaN if something there is not finite
  uint32_t* answer;  // [count]: what finish selects
  int64_t blocks;    // of equilibrate, a matrix
};

namespace factor {

inline constexpr int kLibraryRows = 8, kLibraryColumns = 128;  // of R that a block turns over at a time
inline constexpr int kLibraryStride = kLibraryColumns + 2;     // 8 rows by 2 columns come from different banks
inline constexpr int kLibraryThreads = kLibraryRows * kWarp;
inline constexpr uint32_t kRegular = 0, kZero = 1, kPoison = 2;

// A block 8 rows of one matrix, a warp each. V, unless null, becomes the identity.
LDMI_KERNEL void LDMI_BOUNDS(kLibraryThreads, 1) library_equilibrate(Matrices matrices, double* R, LibrarySpace space) {
  Carve carve;
  double* const tile = carve.take<double>(kLibraryRows * kLibraryStride);
  double* const sums = carve.take<double>(kLibraryRows);
  const int64_t C = matrices.C;
  for (int64_t task = block_idx(); task < matrices.count * space.blocks; task += grid_dim()) {
    const int64_t at = task / space.blocks, i0 = task % space.blocks * kLibraryRows;
    const double* const n = matrices.n + at * C;
    const int64_t i = i0 + warp();
    const double weight = i < C ? load_const(n + i) : 0.0;
    const double scale = weight > 0.0 ? 1.0 / weight : 0.0;
    bool finite = isfinite(weight);
    double sum = 0.0;
    for (int64_t j0 = 0; j0 < C; j0 += kLibraryColumns) {
      LDMI_UNROLL
      for (int u = 0; u < kLibraryColumns / kWarp; ++u) {
        const int64_t j = j0 + kWarp * u + lane();
        if (i >= C || j >= C) continue;
        const double entry = load_const(matrices.S + (at * C + i) * C + j);
        finite &= isfinite(entry);
        const double value = weight > 0.0 && load_const(n + j) > 0.0 ? entry * scale : (i == j ? 1.0 : 0.0);
        sum += abs(value);
        tile[warp() * kLibraryStride + kWarp * u + lane()] = value;
      }
      sync_block();
      const int row = thread_idx() % kLibraryRows;
      LDMI_UNROLL
      for (int u = 0; u < kLibraryColumns / kWarp; ++u) {
        const int column = kWarp * u + thread_idx() / kLibraryRows;
        if (i0 + row >= C || j0 + column >= C) continue;
        const int64_t entry = (at * C + j0 + column) * C + i0 + row;
        store(R + entry, tile[row * kLibraryStride + column]);
        if (matrices.V != nullptr) store(matrices.V + entry, i0 + row == j0 + column ? 1.0 : 0.0);
      }
      sync_block();
    }
    sum = warp_sum(sum);
    if (lane() == 0) sums[warp()] = sum;
    finite = !sync_block_or(!finite);
    if (thread_idx() == 0) {
      double norm = 0.0;
      for (int w = 0; w < kLibraryRows; ++w) norm = fmax(norm, sums[w]);
      store(space.norms + task, finite ? norm : kNaN);
    }
    sync_block();
  }
}

// A block a matrix. S and V are not looked at.
LDMI_KERNEL void LDMI_BOUNDS(kBlockThreads, 1)
    library_determinant(Matrices matrices, const double* LU, const int32_t* pivots, LibrarySpace space) {
  Carve carve;
  double* const norms = carve.take<double>(kBlockThreads / kWarp);
  double* const logs = carve.take<double>(kBlockThreads / kWarp);
  int* const counts = carve.take<int>(kBlockThreads / kWarp);
  const int64_t C = matrices.C;
  const int warps = block_dim() / kWarp;
  for (int64_t at = block_idx(); at < matrices.count; at += grid_dim()) {
    double norm = 0.0;
    bool finite = true;
    for (int64_t b = thread_idx(); b < space.blocks; b += block_dim()) {
      const double part = load_const(space.norms + at * space.blocks + b);
      finite &= !isnan(part);
      norm = fmax(norm, part);
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
      const double pivot = load_const(LU + (at * C + i) * C + i), n = load_const(matrices.n + at * C + i);
      if (abs(pivot) > smallest) {
        product.multiply(abs(pivot));
      } else {
        regular = false;
      }
      odd ^= pivot < 0.0;
      odd ^= load_const(pivots + at * C + i) != i + 1;
      if (n > 0.0) {
        product.multiply(n);
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

// A block a row of V, in place.
LDMI_KERNEL void LDMI_BOUNDS(kBlockThreads, 1) library_finish(Matrices matrices, LibrarySpace space) {
  const int64_t C = matrices.C;
  for (int64_t task = block_idx(); task < matrices.count * C; task += grid_dim()) {
    const int64_t at = task / C;
    const double* const n = matrices.n + at * C;
    const uint32_t answer = load_const(space.answer + at);
    const double weight = load_const(n + task % C);
    const bool here = answer == kRegular && weight > 0.0;
    const double scale = here ? 1.0 / weight : 0.0;
    double* const row = matrices.V + task * C;
    for (int64_t j = thread_idx(); j < C; j += block_dim()) {
      double value = answer == kPoison ? kNaN : 0.0;
      if (here && load_const(n + j) > 0.0) value = load(row + j) * scale;
      store(row + j, value);
    }
  }
}

}  // namespace factor
}  // namespace ldmi::cuda
