// log|det S| and V = S^{-T} of one matrix by all multiprocessors, in one launch of a cooperative grid: the Gauss-Jordan elimination of
// block.cuh, for matrices that do not fit into the shared memory of one block.
//
// Panels. A panel J has as many columns as fit into the shared memory of the panel blocks: block 0 alone, or the blocks of the first
// cluster, each with a slice of the rows. The elimination of the panel alone leaves G[:, J] in its place, and then, with p_J the rows
// of its pivots,
//
//     M[:, c] <- (M[:, c] with zeros in the rows p_J) + G[:, J] M[p_J, c]          for every column c outside the panel
//
// in 8 x 8 tiles on the fp64 tensor cores. Between two barriers of the grid two things happen at the same time:
//
//     panel blocks     apply panel k - 1 to panel k, and eliminate panel k
//     update blocks    apply panel k - 1 to the columns outside both, a few columns per block at a time, after a copy of M[p_J, c]
//
// So the chain of eliminations waits only for one barrier per panel. The panel blocks eliminate a panel in strips of 8 columns. Each
// thread holds a few whole rows of the strip in registers, so a column costs one barrier of the block. Then the strip's G is applied
// to the rest of the panel in shared memory, in the same way as a panel's G to the matrix. With a cluster a column also costs a
// barrier of the cluster: each block writes its candidate pivot row to the shared memory of every block in the cluster; the pivot rows
// p_J of a strip are broadcast the same way. The operations of a column do not depend on the block that does them, so the bits do not
// depend on the number of update blocks.
//
// M is the transpose of R = diag(1/n) S, for the reason in block.cuh: the rows p_J are multiplied by the explicit inverse of a block
// of M, and S V^T - I = (M^{-1} M - I)^T, up to the scales, does not grow with the condition number of that block. (It stayed below C
// 2^-52 / 5 of the norms where M M^{-1} - I went up to 1e9 C 2^-52.)
//
// Pivoting. Rows are never exchanged: M^{-1}[k, p_l] = G[p_k, l], and V[k, p_l] = M^{-1}[k, p_l] / n[k]. G is stored column by column
// in the memory of V. So at the end each row of V is permuted by p, V is transposed, and each row is permuted by p again, unless p is
// the identity. The pivot is the diagonal entry if that is at least half of the column's largest entry, which is usual with a class
// signal, and the largest entry otherwise; a multiplier is at most 2. (Magnitudes other than the diagonal's are compared by the
// exponent and the first 20 bits of the fraction.) A single panel block first tries the diagonal entries for a whole strip, without a
// search, and repeats the strip with a search if a multiplier was too large. After kDiagonalPivotFailures strips, and above 1024
// classes, it no longer tries.
#pragma once

#include "grid_strip.cuh"
#include "grid_update.cuh"

namespace ldmi::cuda {

namespace factor {

// Computes M from S, one warp per row of R, and a RowNote of each row. parts: [kThreads / kWarp], in shared memory
template <int kThreads>
LDMI_DEVICE void equilibrate_rows(const double* S, const double* n, int64_t C, double* M, double* norms, double* parts) {
  constexpr int kWarps = kThreads / kWarp;
  double least = 0.0;  // all blocks add in the same order
  for (int64_t i = thread_idx(); i < C; i += kThreads) least += plan::least_part(load_const(n + i));
  least = warp_sum(least);
  if (lane() == 0) parts[warp()] = least;
  sync_block();
  least = 0.0;
  for (int w = 0; w < kWarps; ++w) least += parts[w];
  for (int64_t i = block_idx() * kWarps + warp(); i < C; i += grid_dim() * kWarps) {
    const double weight = load_const(n + i), lift = plan::lift_of(weight);
    const bool here = plan::is_present(weight, least);
    const double scale = here ? 1.0 / (weight * lift) : 0.0;
    bool finite = isfinite(weight);
    double sum = 0.0;
    constexpr int kBatch = 4;
    for (int64_t j0 = lane(); j0 < C; j0 += kBatch * kWarp) {
      double entry[kBatch], other[kBatch];
      LDMI_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        const int64_t j = j0 + kWarp * u;
        entry[u] = j < C ? load_const(S + i * C + j) : 0.0;
        other[u] = j < C ? load_const(n + j) : 0.0;
      }
      LDMI_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        const int64_t j = j0 + kWarp * u;
        if (j >= C) continue;
        finite &= isfinite(entry[u]);
        const double value = here && plan::is_present(other[u], least) ? entry[u] * lift * scale : (i == j ? 1.0 : 0.0);
        sum += abs(value);
        store(M + i * C + j, value);
      }
    }
    sum = warp_sum(sum);
    finite = all(finite);
    if (lane() == 0) store(norms + i, RowNote::of(sum, finite, here).value);
  }
}

// The panel blocks apply the panel before, of `before` columns, to the panel at column `first`, of `count` columns, and eliminate it.
// Returns false if it is singular.
template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool eliminate_panel_of_grid(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int first, int count,
                                         int before, double threshold, unsigned& used, [[maybe_unused]] int& failures) {
  constexpr int kWarps = kThreads / kWarp;
  const int rows = problem.rows;
  const bool pairs = problem.pairs();
  sync_block();
  for (int c = warp(); c < count; c += kWarps) {
    double* const to = shared.panel + c * shared.stride;
    if (pairs) {
      for (int i = 2 * lane(); i < rows; i += 2 * kWarp) copy_async<16>(to + i, problem.at(problem.begin + i, first + c));
    } else {
      for (int i = lane(); i < rows; i += kWarp) copy_async<8>(to + i, problem.at(problem.begin + i, first + c));
    }
  }
  commit_copies();
  wait_copies();
  sync_block();
  if (before > 0) {
    update_panel<kGridQuads<kSlots, kBlocks>>(
        problem, shared, count, before, shared.row, [](int) { return true; },
        [&](int i, int j) { return load(problem.at(problem.begin + i, first - before + j)); });
    sync_block();
  }
  for (int c0 = 0; c0 < count; c0 += kGridStrip) {
    const int columns = count - c0 < kGridStrip ? count - c0 : kGridStrip, own = c0 / kGridStrip;
    int* const p = shared.row + c0;
    double a[kSlots][kGridStrip];
    bool search = true;
    load_strip<kSlots, kThreads>(shared, rows, c0, columns, a);
    if constexpr (kBlocks == 1 && kSlots <= kDiagonalPivotMaxRows) {
      if (failures < kDiagonalPivotFailures) {
        search = !eliminate_strip_diagonal(problem, shared, first + c0, columns, threshold, used, p, a);
        if (search) {
          ++failures;
          load_strip<kSlots, kThreads>(shared, rows, c0, columns, a);
        }
      }
    }
    if (search && !eliminate_strip(problem, shared, first + c0, columns, threshold, used, p, a)) return false;
    store_strip<kSlots, kThreads>(shared, rows, c0, columns, a);
    sync_block();
    if (count > kGridStrip) {
      update_panel<kGridStrip / 4>(
          problem, shared, count, columns, p, [&](int s) { return s != own; },
          [&](int i, int j) { return shared.panel[(c0 + j) * shared.stride + i]; });
      sync_block();
    }
  }
  if (problem.begin == 0 && thread_idx() < count) store(problem.space.row + first + thread_idx(), shared.row[thread_idx()]);
  for (int c = warp(); c < count; c += kWarps) {
    const double* const from = shared.panel + c * shared.stride;
    if (pairs) {
      for (int i = 2 * lane(); i < rows; i += 2 * kWarp) store16(problem.at(problem.begin + i, first + c), shared_load16(from + i));
    } else {
      for (int i = lane(); i < rows; i += kWarp) store(problem.at(problem.begin + i, first + c), from[i]);
    }
  }
  return true;
}

// All steps, by every thread of the grid. Returns false if the matrix is singular.
template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool eliminate_by_grid(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, double threshold) {
  const int C = problem.C, panel = problem.panel, panels = (C + panel - 1) / panel;
  const int block = static_cast<int>(block_idx()), blocks = static_cast<int>(grid_dim());
  unsigned used = 0;  // in threads of panel blocks: one bit per row of the thread, set if it has been a pivot row
  int failures = 0;   // strips whose pivots are not on the diagonal
  for (int k = 0; k < panels + (problem.inverse ? 1 : 0); ++k) {
    const int begin = k < panels ? k * panel : C, end = C - begin < panel ? C : begin + panel;
    const int first = k > 0 ? (k - 1) * panel : 0, count = begin - first;  // the panel before
    if (block < kBlocks && k < panels) {
      if (!eliminate_panel_of_grid<kSlots>(problem, shared, begin, end - begin, count, threshold, used, failures)) {
        if (block == 0 && thread_idx() == 0) store(problem.space.singular, static_cast<uint32_t>(k) + 1u);
      }
    }
    // the columns after both panels, then, for the inverse, those before them; by all blocks but the panel blocks, unless these have
    // nothing else to do
    const int update_blocks = k < panels && blocks > kBlocks ? blocks - kBlocks : blocks,
              me = update_blocks < blocks ? block - kBlocks : block;
    if (me >= 0 && count > 0) {
      constexpr int kTileColumns = kGridTileColumns<kBlocks>, kWidth = kTileColumns * kGridStrip;
      const int after = (C - end + kWidth - 1) / kWidth, before = problem.inverse ? (first + kWidth - 1) / kWidth : 0;
      for (int task = me; task < after + before; task += update_blocks) {
        const bool later = task < after;
        update_columns<kGridQuads<kSlots, kBlocks>, kTileColumns>(
            problem, shared, first, count, later ? end + task * kWidth : (task - after) * kWidth, later ? C : first);
      }
    }
    sync_grid();
    // A singular panel was left untouched, so the updates above were harmless. A fast block may already have flagged panel k + 1;
    // ignore that here, so that all blocks leave in the same iteration.
    const uint32_t singular = load(problem.space.singular);
    if (singular != 0 && singular <= static_cast<uint32_t>(k) + 1u) return false;
  }
  return true;
}

// Transposes V in place: a block exchanges two tiles at a time.
template <int kThreads>
LDMI_DEVICE void transpose(double* V, int64_t C, double* pool) {
  constexpr int kStride = kTransposeTile + 1;
  const int64_t tiles = (C + kTransposeTile - 1) / kTransposeTile;
  for (int64_t task = block_idx(); task < tiles * tiles; task += grid_dim()) {
    const int64_t i0 = task / tiles * kTransposeTile, j0 = task % tiles * kTransposeTile;
    if (i0 > j0) continue;
    double* const above = pool;
    double* const below = pool + kTransposeTile * kStride;
    sync_block();
    for (int e = thread_idx(); e < kTransposeTile * kTransposeTile; e += kThreads) {
      const int r = e / kTransposeTile, c = e % kTransposeTile;
      if (i0 + r < C && j0 + c < C) above[r * kStride + c] = load(V + (i0 + r) * C + j0 + c);
      if (j0 + r < C && i0 + c < C) below[r * kStride + c] = load(V + (j0 + r) * C + i0 + c);
    }
    sync_block();
    for (int e = thread_idx(); e < kTransposeTile * kTransposeTile; e += kThreads) {
      const int r = e / kTransposeTile, c = e % kTransposeTile;
      if (i0 + r < C && j0 + c < C) store(V + (i0 + r) * C + j0 + c, below[c * kStride + r]);
      if (j0 + r < C && i0 + c < C) store(V + (j0 + r) * C + i0 + c, above[c * kStride + r]);
    }
  }
}

// The screening is computed again where it is needed: the strips need the registers.
LDMI_DEVICE Screening screen(const Matrices& matrices, const double* norms, double* norm) {
  double largest = 0.0;
  bool finite = true;
  int present = 0;
  for (int i = lane(); i < matrices.C; i += kWarp) {
    const RowNote row{load(norms + i)};
    finite &= !isnan(row.norm());
    largest = fmax(largest, row.norm());
    present += row.here() ? 1 : 0;
  }
  *norm = warp_max(largest);
  return {all(finite), matrices.strict, warp_sum(present), matrices.C};
}

template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool screen_and_eliminate(const Matrices& matrices, const GridProblem<kThreads, kBlocks>& problem,
                                      const GridShared& shared) {
  double norm = 0.0;
  const Screening seen = screen(matrices, problem.space.norms, &norm);
  return seen.regular() && eliminate_by_grid<kSlots>(problem, shared, threshold(matrices.C, norm));
}

template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE void logdet_inverse_by_grid(const Matrices& matrices, int64_t at, const GridSpace& space, int panel,
                                        const GridShared& shared) {
  constexpr int kRows = kSlots * kBlocks;  // rows of the whole matrix per thread
  const int C = matrices.C, slice = slice_rows<kBlocks>(C);
  const int begin = kBlocks == 1 ? 0 : static_cast<int>(block_idx()) * slice, left = C - begin;
  const int rows = left < 0 ? 0 : left < slice ? left : slice;
  const bool inverse = matrices.V != nullptr;
  const double* const n = matrices.n + at * C;
  double* const V = inverse ? matrices.V + at * C * C : space.matrix;
  const GridProblem<kThreads, kBlocks> problem{space, V, C, panel, inverse, begin, rows};
  equilibrate_rows<kThreads>(matrices.S + at * C * C, n, C, V, space.norms, shared.X);
  if (block_idx() == 0 && thread_idx() == 0) store(space.singular, 0u);
  sync_grid();
  const auto answer = [&](const Determinant& found) {
    if (block_idx() != 0 || thread_idx() != 0) return;
    store(matrices.log_abs_det + at, found.log_abs_det);
    store(matrices.sign + at, found.sign);
    store(matrices.kept + at, found.kept);
  };
  if (!screen_and_eliminate<kSlots>(matrices, problem, shared)) {
    double norm = 0.0;
    const Screening seen = screen(matrices, space.norms, &norm);
    LDMI_UNROLL_BY(1)
    for (int e = static_cast<int>(block_idx()) * kThreads + thread_idx(); inverse && e < C * C;
         e += static_cast<int>(grid_dim()) * kThreads) {
      store(V + e, seen.finite ? 0.0 : kNaN);
    }
    return answer(seen.regular() ? seen.singular() : seen.answer());
  }

  bool odd = false, moved = false;
  for (int l = static_cast<int>(block_idx()); l < C; l += static_cast<int>(grid_dim())) {
    const int row = load(space.row + l);
    for (int64_t i = thread_idx(); i < l; i += kThreads) odd ^= load(space.row + i) > row;
    if (thread_idx() == 0) odd ^= load(space.pivots + l) < 0.0;
    if (!inverse) continue;
    const bool here = RowNote{load(space.norms + row)}.here();
    double* const values = V + int64_t{C} * l;
    double value[kRows];
    LDMI_UNROLL
    for (int s = 0; s < kRows; ++s) {
      const int i = thread_idx() + kThreads * s;
      const bool both = here && i < C && RowNote{load(space.norms + i)}.here();
      value[s] = both ? load(values + load(space.row + i)) / load_const(n + i) : 0.0;
    }
    sync_block();
    LDMI_UNROLL
    for (int s = 0; s < kRows; ++s) {
      const int i = thread_idx() + kThreads * s;
      if (i < C) store(values + i, value[s]);
    }
  }
  const int ones = sync_block_count(odd);
  if (thread_idx() == 0) store(space.odd + block_idx(), static_cast<uint32_t>(ones));
  for (int i = thread_idx(); i < C; i += kThreads) moved |= load(space.row + i) != i;
  moved = sync_block_or(moved);
  sync_grid();
  if (inverse) {
    transpose<kThreads>(V, C, shared.panel);
    if (moved) {
      sync_grid();
      for (int k = static_cast<int>(block_idx()); k < C; k += static_cast<int>(grid_dim())) {
        double* const values = V + int64_t{C} * k;
        double value[kRows];
        LDMI_UNROLL
        for (int s = 0; s < kRows; ++s) {
          const int l = thread_idx() + kThreads * s;
          value[s] = l < C ? load(values + l) : 0.0;
        }
        sync_block();
        LDMI_UNROLL
        for (int s = 0; s < kRows; ++s) {
          const int l = thread_idx() + kThreads * s;
          if (l < C) store(values + load(space.row + l), value[s]);
        }
      }
    }
  }
  if (block_idx() != 0 || warp() != 0) return;
  LogProduct product;
  int present = 0;
  for (int i = lane(); i < C; i += kWarp) {
    product.multiply(abs(load(space.pivots + i)));
    if (RowNote{load(space.norms + i)}.here()) {
      product.multiply(load_const(n + i));
      ++present;
    }
  }
  unsigned negative = 0;
  for (int64_t b = lane(); b < grid_dim(); b += kWarp) negative += load(space.odd + b);
  const double log_abs_det = product.log();
  const double sign = warp_sum(negative) % 2 == 0 ? 1.0 : -1.0;
  answer({log_abs_det, sign, warp_sum(present)});  // with strict, all classes are present
}

// One matrix after the other. kBlocks: blocks of a cluster; those of the first cluster are the panel blocks.
template <int kSlots, int kThreads, int kBlocks>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1) logdet_inverse_grid(Matrices matrices, GridSpace space, int panel) {
  Carve carve;
  const GridShared shared = take_grid_shared<kBlocks>(carve, matrices.C, panel);
  if constexpr (kBlocks > 1) sync_cluster();  // from here to the last barrier of the grid all blocks of the cluster are running
  for (int64_t at = 0; at < matrices.count; ++at) {
    if (at > 0) sync_grid();
    logdet_inverse_by_grid<kSlots, kThreads, kBlocks>(matrices, at, space, panel, shared);
  }
}

}  // namespace factor

}  // namespace ldmi::cuda
