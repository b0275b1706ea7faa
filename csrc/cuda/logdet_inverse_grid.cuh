// log|det S| and V = S^{-T} of one matrix by all multiprocessors: a Gauss-Jordan elimination in place, as in logdet_inverse.cuh, for
// what no block's shared memory holds, in one launch of a cooperative grid.
//
// The steps are taken at two widths. A strip is kColumns columns that block 0 eliminates by themselves: its threads hold a few whole
// rows of the strip in registers, so that a column costs one barrier. A panel J is a few strips. Eliminating a strip or a panel of M
// by itself leaves G in its place, and then, with p_J the rows where its pivots were,
//
//     M[:, c] <- (M[:, c] with zeros in the rows p_J) + G[:, J] M[p_J, c]          for every column c outside
//
// which is done for a strip in the other columns of its panel, and for a whole panel in the columns outside: the matrix is read and
// written once a panel, not once a strip. Between two barriers of the grid the blocks do, side by side,
//
//     strip t of panel k       takes in what came before it (strip t - 1; or panel k - 1, for the first), and is eliminated
//     the panel's other strips take that in, too
//     the columns outside      a share of what panel k - 1 does to them, in tiles on the fp64 tensor cores
//
// so that the chain of eliminations waits for nothing else. The rows M[p_J, c] of the columns outside are copied beside first: a tile
// may then overwrite them while another tile still needs them. After the last strip one more step ends its effect on the panel.
// Whoever takes a strip or a tile, its operations are the same, so the bits do not depend on the number of blocks.
//
// M is the transpose of R = diag(1/n) S. With wide panels that matters: the rows p_J are multiplied by the explicit inverse of a
// block of M, whose condition may be that of the whole matrix. The residual M^{-1} M - I bears that (it stayed below C eps / 5 of the
// norms where M M^{-1} - I went up to 1e9 C eps), and what is promised is S V^T - I = (M^{-1} M - I)^T, up to the scales.
//
// Rows never move: M^{-1}[k, p_l] = G[p_k, l], and V[k, p_l] = M^{-1}[k, p_l] / n[k]. G stands column after column in the memory of V,
// so at the end the numbers in each row of V are put in the order p, V is transposed, and the numbers are put in the order p again,
// but not if p is the identity. So the pivot is the diagonal's entry if that is at least half of the column's largest, which with a
// class signal it is, or else the largest. (Beside the diagonal's, magnitudes are compared by the exponent and the first 20 bits
// of the fraction.) A multiplier is at most 2. Block 0 first takes the diagonal's for all of a strip, without a search, and starts the
// strip again with one if that was wrong; after kGridFailures strips, and above 1024 classes, it does not try.
#pragma once

#include "logdet_inverse.cuh"

namespace ldmi::cuda {

inline constexpr int kGridThreads = 256;                       // at most: rows of a strip beside each other
inline constexpr int kGridTile = 64, kGridDepth = 32;          // rows and columns of a tile; columns of G that are in shared memory
inline constexpr int kGridCandidates = kGridThreads / 32 + 1;  // for the pivot: one a warp, and the diagonal
inline constexpr int kGridFailures = 4;
inline constexpr int kGridHopeful = 4;  // rows a thread up to which it tries: with 8 the registers are too few, on sm_80
inline constexpr int kGridTurn = 32;    // rows and columns of V that a block transposes at a time

// Global memory besides M, for one matrix at a time; see plan::grid_workspace
struct GridSpace {
  double* matrix;      // [C, C]: M if no V is asked for
  double* outside;     // [C, panel]: M[p_J, c], a column c after the other
  double* norms;       // [C]: of the rows of R; NaN if something there is not finite
  double* pivots;      // [C]
  int32_t* row;        // [C]: p
  int32_t* step;       // [C]: the step whose pivot was in this row; -1: none yet
  uint32_t* odd;       // [blocks]: inversions of p and negative pivots that the block counted
  uint32_t* singular;  // [1]: the number of the panel, from 1 on, that has no pivot; 0: none yet
};

// Shared memory
struct GridShared {
  double* pool;        // a tile's share of G and M[p_J, c]; a strip's M[p_J, c]; two tiles of V
  double* candidates;  // [2, kGridCandidates, 8]: what stands in the strip in the row of each
  unsigned* keys;      // [2, kGridCandidates]: its magnitude; 0: none, or was a pivot's
  int* rows;           // [2, kGridCandidates]
};

inline constexpr int kGridPanelStride = kGridDepth + 4, kGridTileStride = kGridTile + 4;  // no bank conflicts between fragments

// Takes it; host code calls the same for Carve::bytes(), which is plan::kGridSmem.
LDMI_HOST_DEVICE GridShared take_grid_shared(simt::Carve& carve) {
  GridShared shared;
  shared.pool = carve.take<double>(kGridTile * kGridPanelStride + kGridDepth * kGridTileStride);
  shared.candidates = carve.take<double>(2 * kGridCandidates * 8);
  shared.keys = carve.take<unsigned>(2 * kGridCandidates);
  shared.rows = carve.take<int>(2 * kGridCandidates);
  return shared;
}

namespace factor {

// M from S, a warp a row of R, and the norms of these rows
template <int kThreads>
LDMI_DEVICE void equilibrate_rows(const double* S, const double* n, int64_t C, double* M, double* norms) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t i = block_idx() * kWarps + warp(); i < C; i += grid_dim() * kWarps) {
    const double weight = load_const(n + i), scale = weight > 0.0 ? 1.0 / weight : 0.0;
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
        const double value = weight > 0.0 && other[u] > 0.0 ? entry[u] * scale : (i == j ? 1.0 : 0.0);
        sum += abs(value);
        store(M + i * C + j, value);
      }
    }
    sum = warp_sum(sum);
    finite = all(finite);
    if (lane() == 0) store(norms + i, finite ? sum : kNaN);
  }
}

// One matrix, and what all its steps know. The number of threads is a constant: so are the distances of a thread's rows.
template <int kThreads>
struct GridProblem {
  GridSpace space;
  double* M;
  int C;
  int panel;
  bool inverse;

  LDMI_DEVICE double* at(int row, int column) const { return M + static_cast<int64_t>(column) * C + row; }
  // Whether the pivot of one of the steps first..first+count-1 was in this row
  LDMI_DEVICE bool was_pivot(int row, int first, int count) const {
    const int step = load(space.step + row);
    return step >= first && step < first + count;
  }
};

// A strip: a thread holds the rows thread_idx(), + kThreads, ...; zeros where there is no such row or column
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE void load_strip(const GridProblem<kThreads>& problem, int c0, int columns, double (&a)[kSlots][kColumns]) {
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) a[s][c] = i < problem.C && c < columns ? load(problem.at(i, c0 + c)) : 0.0;
  }
}
// from register `lead` of each row on
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE void store_strip(const GridProblem<kThreads>& problem, int c0, int columns, int lead,
                             const double (&a)[kSlots][kColumns]) {
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (i < problem.C && c >= lead && c < lead + columns) store(problem.at(i, c0 + c - lead), a[s][c]);
    }
  }
}

// What the elimination of the columns first..first+count-1 does to the strip at c0
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE void update_strip(const GridProblem<kThreads>& problem, const GridShared& shared, int c0, int columns, int first,
                              int count, double (&a)[kSlots][kColumns]) {
  double* const X = shared.pool;  // [count, kColumns]
  sync_block();
  LDMI_UNROLL_BY(1)
  for (int e = thread_idx(); e < count * kColumns; e += kThreads) {
    const int c = e % kColumns;
    X[e] = c < columns ? load(problem.at(load(problem.space.row + first + e / kColumns), c0 + c)) : 0.0;
  }
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    if (i >= problem.C || !problem.was_pivot(i, first, count)) continue;
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) a[s][c] = 0.0;
  }
  sync_block();
  [[maybe_unused]] constexpr int kAhead = kSlots * kColumns >= 64 ? 1 : 4;  // as many loads as the registers leave room for
  LDMI_UNROLL_BY(kAhead)
  for (int j = 0; j < count; ++j) {
    double g[kSlots], x[kColumns];
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int i = thread_idx() + kThreads * s;
      g[s] = i < problem.C ? load(problem.at(i, first + j)) : 0.0;
    }
    LDMI_UNROLL
    for (int c = 0; c < kColumns; c += 2) {
      const Pack<double> two = shared_load16(X + j * kColumns + c);
      x[c] = two[0];
      x[c + 1] = two[1];
    }
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      LDMI_UNROLL
      for (int c = 0; c < kColumns; ++c) a[s][c] = fma(g[s], x[c], a[s][c]);
    }
  }
}

// Eliminates the strip of the steps k..k+columns-1 by itself, with the diagonal's entries as pivots: one barrier a column, at which
// the thread of its row has laid that down. False: one of them was too small, and what is in `a` is of no use.
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE bool eliminate_strip_diagonal(const GridProblem<kThreads>& problem, const GridShared& shared, int k, int columns,
                                          double threshold, unsigned& used, double (&a)[kSlots][kColumns]) {
  const auto slots = std::make_integer_sequence<int, kSlots>{};
  double* const pivots = shared.candidates + 2 * 8;
  unsigned mine = used;
  bool good = true;
  double pivot = 0.0, inverse = 0.0;  // of the next step, in the warp that has its row
  const auto look = [&](int row) {
    if (row % kThreads / kWarp != warp()) return;
    for_each_slot(slots, [&](auto slot) {
      constexpr int s = decltype(slot)::value;
      if (row / kThreads == s) pivot = a[s][0];
    });
    inverse = reciprocal(pivot);
  };
  look(k);
  for (int j = 0; j < columns; ++j) {
    const int row = k + j;
    double* const line = shared.candidates + (j & 1) * 8;  // two: this column's is read while the next one's is written
    if (row % kThreads == thread_idx()) {
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (row / kThreads != s) return;
        good &= abs(pivot) > threshold && (mine >> s & 1u) == 0;
        LDMI_UNROLL
        for (int c = 1; c < kColumns; ++c) line[c] = a[s][c];
      });
      line[0] = inverse;
      pivots[j] = pivot;
    }
    sync_block();
    const double factor = line[0];
    double minus[kSlots];  // the multipliers
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      minus[s] = -a[s][0] * factor;
      good &= (mine >> s & 1u) != 0 || thread_idx() + kThreads * s >= problem.C || abs(minus[s]) <= kMultiplier;
      if (thread_idx() + kThreads * s == row) {  // becomes (the row with 1 instead of the pivot) / pivot below
        minus[s] = factor;
        mine |= 1u << s;
        LDMI_UNROLL
        for (int c = 1; c < kColumns; ++c) a[s][c] = 0.0;
      }
    }
    LDMI_UNROLL
    for (int c = 1; c < kColumns; ++c) {
      const double entry = line[c];
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) a[s][c - 1] = fma(minus[s], entry, a[s][c]);
      if (c == 1) look(row + 1);  // while the rest of this step goes on
    }
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) a[s][kColumns - 1] = minus[s];
  }
  if (sync_block_or(!good)) return false;
  used = mine;
  if (thread_idx() < columns) {
    store(problem.space.pivots + k + thread_idx(), pivots[thread_idx()]);
    store(problem.space.row + k + thread_idx(), k + thread_idx());
    store(problem.space.step + k + thread_idx(), k + thread_idx());
  }
  return true;
}

// Eliminates the strip of the steps k..k+columns-1 by itself: one barrier a column, at which each warp has laid down the row of its
// largest entry. Column j ends up in register kColumns - columns + j, see `eliminate`. False: no pivot exceeds the threshold.
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE bool eliminate_strip(const GridProblem<kThreads>& problem, const GridShared& shared, int k, int columns, double threshold,
                                 unsigned& used, double (&a)[kSlots][kColumns]) {
  constexpr int kWarps = kThreads / kWarp;
  const auto slots = std::make_integer_sequence<int, kSlots>{};
  for (int j = 0; j < columns; ++j) {
    const int turn = (j & 1) * kGridCandidates;  // two sets: this column's are read while the next one's are written
    double* const candidates = shared.candidates + turn * 8;
    unsigned* const keys = shared.keys + turn;
    int* const rows = shared.rows + turn;
    const auto lay_down = [&](int at, unsigned key, int row) {
      keys[at] = key;
      rows[at] = row;
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (thread_idx() + kThreads * s != row) return;
        LDMI_UNROLL
        for (int c = 0; c < kColumns; ++c) candidates[at * 8 + c] = a[s][c];
      });
    };
    if ((k + j) % kThreads == thread_idx()) lay_down(kWarps, ~used >> (k + j) / kThreads & 1u, k + j);
    unsigned key = 0;
    int mine = 0;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int row = thread_idx() + kThreads * s;
      const unsigned magnitude = (static_cast<unsigned>(bit_cast<uint64_t>(a[s][0]) >> 32) & 0x7fffffffu) + 1u;
      const bool open = row < problem.C && (used >> s & 1u) == 0;
      if (open && magnitude > key) {
        key = magnitude;
        mine = row;
      }
    }
    const unsigned best = warp_max(key);
    if (lane() == lowest(ballot(key == best))) lay_down(warp(), best, mine);
    sync_block();
    int from = 0;
    for (int w = 1; w < kWarps; ++w) from = keys[w] > keys[from] ? w : from;
    const double diagonal = abs(candidates[kWarps * 8]);
    if (keys[kWarps] != 0 && diagonal > threshold && diagonal * kMultiplier >= abs(candidates[from * 8])) from = kWarps;
    const int row = rows[from];
    double pivot_row[kColumns];
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) pivot_row[c] = candidates[from * 8 + c];
    const double pivot = pivot_row[0];
    if (!(abs(pivot) > threshold)) return false;
    if (thread_idx() == 0) {
      store(problem.space.pivots + k + j, pivot);
      store(problem.space.row + k + j, row);
      store(problem.space.step + row, k + j);
    }
    const double reciprocal = 1.0 / pivot;
    LDMI_UNROLL
    for (int c = 1; c < kColumns; ++c) pivot_row[c] *= reciprocal;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      if (thread_idx() + kThreads * s == row) {  // becomes (the row with 1 instead of the pivot) / pivot below
        used |= 1u << s;
        a[s][0] = -1.0;
        LDMI_UNROLL
        for (int c = 1; c < kColumns; ++c) a[s][c] = 0.0;
      }
      const double factor = -a[s][0];
      LDMI_UNROLL
      for (int c = 1; c < kColumns; ++c) a[s][c - 1] = fma(factor, pivot_row[c], a[s][c]);
      a[s][kColumns - 1] = factor * reciprocal;
    }
  }
  return true;
}

// The columns outside of two neighbouring panels: those after, then, for the inverse, those before
struct Outside {
  int begin, end, C;  // the panels
  bool inverse;

  LDMI_DEVICE int count() const { return C - end + (inverse ? begin : 0); }
  LDMI_DEVICE int column(int v) const { return v < C - end ? end + v : v - (C - end); }
};

// What the elimination of the columns first..first+count-1 does to a tile of 64 rows from i0 on and 64 columns outside from v0 on. The
// product's rows are columns of M, so that a lane has neighbours in memory.
template <int kThreads>
LDMI_DEVICE void update_tile(const GridProblem<kThreads>& problem, const GridShared& shared, const Outside& outside, int first,
                             int count, int i0, int v0) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kParts = 8, kDown = 4, kAcross = 2;  // of the tile: 32 rows by 16 columns, 8 by 8 at a time
  double* const X = shared.pool;                     // [kGridTile, kGridPanelStride]: M[p_J, c]
  double* const G = X + kGridTile * kGridPanelStride;
  const int C = problem.C, columns = outside.count(), m = lane() / 4, q = lane() % 4;
  const bool pairs = C % 2 == 0 && reinterpret_cast<uintptr_t>(problem.M) % 16 == 0;
  for (int part0 = 0; part0 < kParts; part0 += kWarps) {
    const int part = part0 + warp(), row0 = i0 + part / 4 * 32 + 2 * q, column0 = v0 + part % 4 * 16 + m;
    const bool busy = part < kParts;
    M8N8K4::C tile[kAcross][kDown];
    LDMI_UNROLL
    for (int d = 0; d < kDown; ++d) {
      const int i = row0 + 8 * d;
      const bool one = busy && i < C && !problem.was_pivot(i, first, count);
      const bool two = busy && i + 1 < C && !problem.was_pivot(i + 1, first, count);
      LDMI_UNROLL
      for (int x = 0; x < kAcross; ++x) {
        const int v = column0 + 8 * x;
        tile[x][d] = {};
        if (v >= columns) continue;
        const double* const from = problem.at(i, outside.column(v));
        if (pairs && busy && i < C) {
          const Pack<double> both = load16(from);
          tile[x][d].value[0] = one ? both[0] : 0.0;
          tile[x][d].value[1] = two ? both[1] : 0.0;
        } else {
          if (one) tile[x][d].value[0] = load(from);
          if (two) tile[x][d].value[1] = load(from + 1);
        }
      }
    }
    for (int j0 = 0; j0 < count; j0 += kGridDepth) {
      sync_block();
      // on their way without registers; rolled up, for the addresses would take as many
      LDMI_UNROLL_BY(1)
      for (int e = thread_idx(); e < kGridTile * kGridDepth; e += kThreads) {
        const int v = v0 + e / kGridDepth, j = j0 + e % kGridDepth;
        const bool there = v < columns && j < count;
        copy_async<8>(X + e / kGridDepth * kGridPanelStride + e % kGridDepth,
                      problem.space.outside + (there ? v * problem.panel + j : 0), there ? 8 : 0);
      }
      LDMI_UNROLL_BY(1)
      for (int e = thread_idx(); e < kGridTile * kGridDepth; e += kThreads) {
        const int i = i0 + e % kGridTile, j = j0 + e / kGridTile;
        const bool there = i < C && j < count;
        copy_async<8>(G + e / kGridTile * kGridTileStride + e % kGridTile, there ? problem.at(i, first + j) : problem.M,
                      there ? 8 : 0);
      }
      commit_copies();
      wait_copies();
      sync_block();
      if (!busy) continue;
      const double* const x = X + (part % 4 * 16 + m) * kGridPanelStride + q;
      const double* const g = G + q * kGridTileStride + part / 4 * 32 + m;
      const int depth = count - j0 < kGridDepth ? count - j0 : kGridDepth;
      for (int j = 0; j < depth; j += 4) {
        double b[kDown];
        LDMI_UNROLL
        for (int d = 0; d < kDown; ++d) b[d] = g[j * kGridTileStride + 8 * d];
        LDMI_UNROLL
        for (int c = 0; c < kAcross; ++c) {
          const double entry = x[c * 8 * kGridPanelStride + j];
          LDMI_UNROLL
          for (int d = 0; d < kDown; ++d) tile[c][d] = mma(entry, b[d], tile[c][d]);
        }
      }
    }
    LDMI_UNROLL
    for (int d = 0; d < kDown; ++d) {
      LDMI_UNROLL
      for (int x = 0; x < kAcross; ++x) {
        const int i = row0 + 8 * d, v = column0 + 8 * x;
        if (!busy || i >= C || v >= columns) continue;
        double* const to = problem.at(i, outside.column(v));
        if (pairs) {
          store16(to, Pack<double>{{tile[x][d].value[0], tile[x][d].value[1]}});
        } else {
          store(to, tile[x][d].value[0]);
          if (i + 1 < C) store(to + 1, tile[x][d].value[1]);
        }
      }
    }
  }
}

// All steps; every thread of the grid. False: singular.
template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE bool eliminate_by_grid(const GridProblem<kThreads>& problem, const GridShared& shared, double threshold) {
  const int C = problem.C, panel = problem.panel, panels = (C + panel - 1) / panel;
  const GridSpace& space = problem.space;
  const int block = static_cast<int>(block_idx()), blocks = static_cast<int>(grid_dim());
  unsigned used = 0;  // of block 0's threads: a bit for each of the thread's rows that have been a pivot's
  bool regular = true;
  [[maybe_unused]] int failures = 0;  // strips whose pivots are not on the diagonal
  double a[kSlots][kColumns];
  for (int k = 0; k < panels + (problem.inverse ? 1 : 0); ++k) {
    const int begin = k < panels ? k * panel : C, end = C - begin < panel ? C : begin + panel;
    const int strips = (end - begin + kColumns - 1) / kColumns, steps = strips > 0 ? strips : 1;
    const int before = k > 0 ? (k - 1) * panel : 0, count = begin - before;  // the panel before
    const Outside outside{before, end, C, problem.inverse};
    for (int t = 0; t <= steps; ++t) {
      const bool next = t < strips;
      // who shares the rest: all but block 0, which has the strip to do, unless it is alone
      const int crew = next && blocks > 1 ? blocks - 1 : blocks, me = crew < blocks ? block - 1 : block;
      const int first = t == 0 ? before : begin + (t - 1) * kColumns, width = t == 0                   ? count
                                                                              : end - first < kColumns ? end - first
                                                                                                       : kColumns;
      // block 0 begins with strip t, and goes on with the others if it is alone
      for (int turn = next && block == 0 ? -1 : me; turn < strips;) {
        const bool eliminates = turn < 0;
        const int s = eliminates ? t : turn;
        turn = !eliminates ? turn + crew : me >= 0 ? me : strips;
        if (!eliminates && (width == 0 || s == t || s == t - 1)) continue;
        const int c0 = begin + s * kColumns, columns = end - c0 < kColumns ? end - c0 : kColumns;
        load_strip(problem, c0, columns, a);
        if (width > 0) update_strip(problem, shared, c0, columns, first, width, a);
        bool search = eliminates && regular;
        if constexpr (kSlots <= kGridHopeful) {
          if (search && failures < kGridFailures) {
            search = !eliminate_strip_diagonal(problem, shared, c0, columns, threshold, used, a);
            if (search) {
              ++failures;
              load_strip(problem, c0, columns, a);
              if (width > 0) update_strip(problem, shared, c0, columns, first, width, a);
            }
          }
        }
        if (search) regular = eliminate_strip(problem, shared, c0, columns, threshold, used, a);
        int lead = 0;
        if (eliminates) {
          lead = kColumns - columns;
          if (!regular) {
            if (thread_idx() == 0) store(space.singular, static_cast<uint32_t>(k) + 1u);
            continue;
          }
        }
        store_strip(problem, c0, columns, lead, a);
      }
      if (me >= 0 && count > 0 && t == 0) {
        const int all = outside.count() * count;
        for (int e = me * kThreads + thread_idx(); e < all; e += crew * kThreads) {
          const int v = e / count, j = e % count;
          store(space.outside + static_cast<int64_t>(v) * panel + j,
                load(problem.at(load(space.row + before + j), outside.column(v))));
        }
      } else if (me >= 0 && count > 0) {
        const int down = (C + kGridTile - 1) / kGridTile, across = (outside.count() + kGridTile - 1) / kGridTile;
        const int share_begin = down * across * (t - 1) / steps, share_end = down * across * t / steps;
        for (int task = share_begin + (me + crew - strips % crew) % crew; task < share_end; task += crew) {
          update_tile(problem, shared, outside, before, count, task % down * kGridTile, task / down * kGridTile);
        }
      }
      sync_grid();
    }
    // Until here a strip that has no pivot has been left as it was: no harm in what followed. The next panel may have told already
    // that it is singular, to those who are slow: they find that out with all others.
    const uint32_t singular = load(space.singular);
    if (singular != 0 && singular <= static_cast<uint32_t>(k) + 1u) return false;
  }
  return true;
}

// V's transpose in its place, a block two tiles that change places
template <int kThreads>
LDMI_DEVICE void transpose(double* V, int64_t C, double* pool) {
  constexpr int kStride = kGridTurn + 1;
  const int64_t tiles = (C + kGridTurn - 1) / kGridTurn;
  for (int64_t task = block_idx(); task < tiles * tiles; task += grid_dim()) {
    const int64_t i0 = task / tiles * kGridTurn, j0 = task % tiles * kGridTurn;
    if (i0 > j0) continue;
    double* const above = pool;
    double* const below = pool + kGridTurn * kStride;
    sync_block();
    for (int e = thread_idx(); e < kGridTurn * kGridTurn; e += kThreads) {
      const int r = e / kGridTurn, c = e % kGridTurn;
      if (i0 + r < C && j0 + c < C) above[r * kStride + c] = load(V + (i0 + r) * C + j0 + c);
      if (j0 + r < C && i0 + c < C) below[r * kStride + c] = load(V + (j0 + r) * C + i0 + c);
    }
    sync_block();
    for (int e = thread_idx(); e < kGridTurn * kGridTurn; e += kThreads) {
      const int r = e / kGridTurn, c = e % kGridTurn;
      if (i0 + r < C && j0 + c < C) store(V + (i0 + r) * C + j0 + c, below[c * kStride + r]);
      if (j0 + r < C && i0 + c < C) store(V + (j0 + r) * C + i0 + c, above[c * kStride + r]);
    }
  }
}

// What the screening saw is not kept: the registers are the strips'.
LDMI_DEVICE Screening screen(const Matrices& matrices, const double* n, const double* norms, double* norm) {
  double largest = 0.0;
  bool finite = true;
  int present = 0;
  for (int i = lane(); i < matrices.C; i += kWarp) {
    const double row = load(norms + i);
    finite &= !isnan(row);
    largest = fmax(largest, row);
    present += load_const(n + i) > 0.0 ? 1 : 0;
  }
  *norm = warp_max(largest);
  return {all(finite), matrices.strict, warp_sum(present), matrices.C};
}

template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE bool screen_and_eliminate(const Matrices& matrices, const double* n, const GridProblem<kThreads>& problem,
                                      const GridShared& shared) {
  double norm = 0.0;
  const Screening seen = screen(matrices, n, problem.space.norms, &norm);
  return seen.regular() && eliminate_by_grid<kSlots, kColumns>(problem, shared, threshold(matrices.C, norm));
}

template <int kSlots, int kColumns, int kThreads>
LDMI_DEVICE void logdet_inverse_by_grid(const Matrices& matrices, int64_t at, const GridSpace& space, int panel,
                                        const GridShared& shared) {
  const int C = matrices.C;
  const bool inverse = matrices.V != nullptr;
  const double* const n = matrices.n + at * C;
  double* const V = inverse ? matrices.V + at * C * C : space.matrix;
  const GridProblem<kThreads> problem{space, V, C, panel, inverse};
  equilibrate_rows<kThreads>(matrices.S + at * C * C, n, C, V, space.norms);
  if (block_idx() == 0) {
    for (int i = thread_idx(); i < C; i += kThreads) {
      store(space.row + i, i);
      store(space.step + i, -1);
    }
    if (thread_idx() == 0) store(space.singular, 0u);
  }
  sync_grid();
  const auto answer = [&](const Determinant& found) {
    if (block_idx() != 0 || thread_idx() != 0) return;
    store(matrices.log_abs_det + at, found.log_abs_det);
    store(matrices.sign + at, found.sign);
    store(matrices.kept + at, found.kept);
  };
  if (!screen_and_eliminate<kSlots, kColumns>(matrices, n, problem, shared)) {
    double norm = 0.0;
    const Screening seen = screen(matrices, n, space.norms, &norm);
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
    const bool here = load_const(n + row) > 0.0;
    double* const values = V + int64_t{C} * l;
    double value[kSlots];
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int i = thread_idx() + kThreads * s;
      const double weight = i < C ? load_const(n + i) : 0.0;
      value[s] = here && weight > 0.0 ? load(values + load(space.row + i)) / weight : 0.0;
    }
    sync_block();
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
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
    transpose<kThreads>(V, C, shared.pool);
    if (moved) {
      sync_grid();
      for (int k = static_cast<int>(block_idx()); k < C; k += static_cast<int>(grid_dim())) {
        double* const values = V + int64_t{C} * k;
        double value[kSlots];
        LDMI_UNROLL
        for (int s = 0; s < kSlots; ++s) {
          const int l = thread_idx() + kThreads * s;
          value[s] = l < C ? load(values + l) : 0.0;
        }
        sync_block();
        LDMI_UNROLL
        for (int s = 0; s < kSlots; ++s) {
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
    const double weight = load_const(n + i);
    if (weight > 0.0) {
      product.multiply(weight);
      ++present;
    }
  }
  unsigned negative = 0;
  for (int64_t b = lane(); b < grid_dim(); b += kWarp) negative += load(space.odd + b);
  const double log_abs_det = product.log();
  const double sign = warp_sum(negative) % 2 == 0 ? 1.0 : -1.0;
  answer({log_abs_det, sign, warp_sum(present)});  // with strict, all are
}

// One matrix after the other
template <int kSlots, int kColumns, int kThreads>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1) logdet_inverse_grid(Matrices matrices, GridSpace space, int panel) {
  Carve carve;
  const GridShared shared = take_grid_shared(carve);
  for (int64_t at = 0; at < matrices.count; ++at) {
    if (at > 0) sync_grid();
    logdet_inverse_by_grid<kSlots, kColumns, kThreads>(matrices, at, space, panel, shared);
  }
}

}  // namespace factor
}  // namespace ldmi::cuda
