// log|det S| and V = S^{-T} of one matrix by all multiprocessors: a Gauss-Jordan elimination in place, as in logdet_inverse.cuh, for
// what no block's shared memory holds, in one launch of a cooperative grid.
//
// A panel J is as many columns as the shared memory of a team holds: of block 0, or of the first cluster's blocks, each with a slice
// of the rows. Eliminating it by itself leaves G[:, J] in its place, and then, with p_J the rows where its pivots were,
//
//     M[:, c] <- (M[:, c] with zeros in the rows p_J) + G[:, J] M[p_J, c]          for every column c outside the panel
//
// in 8 x 8 tiles on the fp64 tensor cores. Between two barriers of the grid the blocks do, side by side,
//
//     the team      panel k takes in panel k - 1, and is eliminated
//     the others    what panel k - 1 does to the columns outside both, a block a few at a time: it copies M[p_J, c] of its own
//
// so that the chain of eliminations waits for nothing else but one barrier a panel. The team takes a panel in strips of 8 columns, of
// which its threads hold a few whole rows in registers, so that a column costs one barrier of the block; a strip's G then goes through
// the rest of the panel in shared memory, as a panel's through the matrix. In a cluster a column costs a barrier of the cluster, too:
// each block lays the row of its largest entry down in all blocks' shared memory, and so come the rows p_J of a strip to all of them.
// Whoever takes columns, its operations are the same, so the bits do not depend on the number of blocks outside the team.
//
// M is the transpose of R = diag(1/n) S, for the reason that logdet_inverse.cuh gives: the rows p_J are multiplied by the explicit
// inverse of a block of M, and S V^T - I = (M^{-1} M - I)^T, up to the scales, does not bear its condition (it stayed below C eps / 5
// of the norms where M M^{-1} - I went up to 1e9 C eps).
//
// Rows never move: M^{-1}[k, p_l] = G[p_k, l], and V[k, p_l] = M^{-1}[k, p_l] / n[k]. G stands column after column in the memory of V,
// so at the end the numbers in each row of V are put in the order p, V is transposed, and the numbers are put in the order p again,
// but not if p is the identity. So the pivot is the diagonal's entry if that is at least half of the column's largest, which with a
// class signal it is, or else the largest. (Beside the diagonal's, magnitudes are compared by the exponent and the first 20 bits
// of the fraction.) A multiplier is at most 2. A team of one block first takes the diagonal's for all of a strip, without a search,
// and starts the strip again with one if that was wrong; after kGridFailures strips, and above 1024 classes, it does not try.
#pragma once

#include "../plan/cuda_plan.h"
#include "logdet_inverse.cuh"

namespace ldmi::cuda {

inline constexpr int kGridThreads = 256;  // at most: rows of a strip beside each other
inline constexpr int kGridStrip = 8;      // columns of a strip
// Strips that one of the others takes at a time. It reads G from level 2 for each time, which in large matrices is as much as all
// else: two at a time halve that.
template <int kBlocks>
inline constexpr int kGridStripes = kBlocks > 1 ? 2 : 1;
// Steps of a panel in fours, as tensor cores take them, at most
template <int kSlots, int kBlocks>
inline constexpr int kGridQuads = static_cast<int>(plan::grid_most_panel(int64_t{kSlots} * kGridThreads, kBlocks)) / 4;
inline constexpr int kGridCandidates = kGridThreads / 32 + 1;  // for the pivot: one a warp, and the diagonal
inline constexpr int kGridFailures = 4;
inline constexpr int kGridHopeful = 4;  // rows a thread up to which it tries: with 8 the registers are too few, on sm_80
inline constexpr int kGridTurn = 32;    // rows and columns of V that a block transposes at a time

// Global memory besides M, for one matrix at a time
struct GridSpace {
  double* matrix;      // [C, C]: M if no V is asked for
  double* norms;       // [C]: of the rows of R; NaN if something there is not finite
  double* pivots;      // [C]
  int32_t* row;        // [C]: p
  uint32_t* odd;       // [blocks]: inversions of p and negative pivots that the block counted
  uint32_t* singular;  // [1]: the number of the panel, from 1 on, that has no pivot; 0: none yet
};

// Rows of a panel that a block of the team has, at most: a multiple of 8 where the next one has others. plan::slice_rows is the same.
template <int kBlocks>
LDMI_HOST_DEVICE int slice_rows(int C) {
  return kBlocks == 1 ? C : ((C + kBlocks - 1) / kBlocks + 7) / 8 * 8;
}

// Shared memory
struct GridShared {
  double* candidates;  // [2, kGridCandidates, 8]: what stands in the strip in the row of each
  unsigned* keys;      // [2, kGridCandidates]: its magnitude; 0: none, or was a pivot's
  int* rows;           // [2, kGridCandidates]
  int* row;            // [panel]: p_J
  double* X;           // [panel, pitch]: M[p_J, c], a column c after the other; no bank conflicts between fragments
  double* panel;       // [panel, stride]: the block's rows of the team's, column after column; or two tiles of V
  double* lines;       // [2, kBlocks + 1, 8]: of a cluster, `candidates` of each block, and the diagonal
  unsigned* marks;     // [2, kBlocks + 1]: their keys
  int* places;         // [2, kBlocks + 1]: their rows
  int pitch;
  int stride;  // columns are 4 places apart among the banks, see factor_stride
};

// Takes it; host code calls the same for Carve::bytes(), which is plan::grid_smem(C, panel, kBlocks).
template <int kBlocks>
LDMI_HOST_DEVICE GridShared take_grid_shared(simt::Carve& carve, int C, int panel) {
  constexpr int kTurning = 2 * kGridTurn * (kGridTurn + 1);
  GridShared shared{};
  shared.stride = (slice_rows<kBlocks>(C) + 3) / 8 * 8 + 4;
  shared.pitch = panel + 4;
  // at constant places first: what a strip is eliminated with, when registers are few
  shared.candidates = carve.take<double>(2 * kGridCandidates * kGridStrip);
  shared.keys = carve.take<unsigned>(2 * kGridCandidates);
  shared.rows = carve.take<int>(2 * kGridCandidates);
  if constexpr (kBlocks > 1) {
    shared.lines = carve.take<double>(2 * (kBlocks + 1) * kGridStrip);
    shared.marks = carve.take<unsigned>(2 * (kBlocks + 1));
    shared.places = carve.take<int>(2 * (kBlocks + 1));
  }
  shared.row = carve.take<int>(panel);
  shared.X = carve.take<double>(panel * shared.pitch);
  shared.panel = carve.take<double>(panel * shared.stride > kTurning ? panel * shared.stride : kTurning);
  return shared;
}

namespace factor {

// M from S, a warp a row of R, and a RowNote of each. parts: [kThreads / kWarp], in shared memory
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

// One matrix, and what all its steps know. The number of threads is a constant: so are the distances of a thread's rows.
template <int kThreads, int kBlocks>
struct GridProblem {
  GridSpace space;
  double* M;
  int C;
  int panel;
  bool inverse;
  int begin, rows;  // of the block's slice, in the team

  // Where a row is in the block's slice; -1: elsewhere
  LDMI_DEVICE int place(int row) const {
    if constexpr (kBlocks == 1) return row;
    return row >= begin && row < begin + rows ? row - begin : -1;
  }
  LDMI_DEVICE double* at(int row, int column) const { return M + static_cast<int64_t>(column) * C + row; }
  // Whether two neighbours in a column are one access, from even rows on
  LDMI_DEVICE bool pairs() const { return C % 2 == 0 && reinterpret_cast<uintptr_t>(M) % 16 == 0; }
};

// All threads of the team
template <int kBlocks>
LDMI_DEVICE void sync_team() {
  if constexpr (kBlocks > 1) {
    sync_cluster();
  } else {
    sync_block();
  }
}

// A strip: a thread holds the rows thread_idx(), + kThreads, ... of the slice; zeros where there is no such row or column
template <int kSlots, int kThreads>
LDMI_DEVICE void load_strip(const GridShared& shared, int rows, int c0, int columns, double (&a)[kSlots][kGridStrip]) {
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    LDMI_UNROLL
    for (int c = 0; c < kGridStrip; ++c) a[s][c] = i < rows && c < columns ? shared.panel[(c0 + c) * shared.stride + i] : 0.0;
  }
}
// from the last registers of each row, see `eliminate`
template <int kSlots, int kThreads>
LDMI_DEVICE void store_strip(const GridShared& shared, int rows, int c0, int columns, const double (&a)[kSlots][kGridStrip]) {
  const int lead = kGridStrip - columns;
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    LDMI_UNROLL
    for (int c = 0; c < kGridStrip; ++c) {
      if (i < rows && c >= lead) shared.panel[(c0 + c - lead) * shared.stride + i] = a[s][c];
    }
  }
}

// Eliminates the strip of the steps k..k+columns-1 by itself, with the diagonal's entries as pivots: one barrier a column, at which
// the thread of its row has laid that down. p: the rows of the pivots, in shared memory. False: one of them was too small, and what is
// in `a` is of no use.
template <int kSlots, int kThreads>
LDMI_DEVICE bool eliminate_strip_diagonal(const GridProblem<kThreads, 1>& problem, const GridShared& shared, int k, int columns,
                                          double threshold, unsigned& used, int* p, double (&a)[kSlots][kGridStrip]) {
  const auto slots = std::make_integer_sequence<int, kSlots>{};
  double* const pivots = shared.candidates + 2 * kGridStrip;
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
    double* const line = shared.candidates + (j & 1) * kGridStrip;  // two: this column's is read while the next one's is written
    if (row % kThreads == thread_idx()) {
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (row / kThreads != s) return;
        good &= abs(pivot) > threshold && (mine >> s & 1u) == 0;
        LDMI_UNROLL
        for (int c = 1; c < kGridStrip; ++c) line[c] = a[s][c];
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
        for (int c = 1; c < kGridStrip; ++c) a[s][c] = 0.0;
      }
    }
    LDMI_UNROLL
    for (int c = 1; c < kGridStrip; ++c) {
      const double entry = line[c];
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) a[s][c - 1] = fma(minus[s], entry, a[s][c]);
      if (c == 1) look(row + 1);  // while the rest of this step goes on
    }
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) a[s][kGridStrip - 1] = minus[s];
  }
  if (sync_block_or(!good)) return false;
  used = mine;
  if (thread_idx() < columns) {
    store(problem.space.pivots + k + thread_idx(), pivots[thread_idx()]);
    p[thread_idx()] = k + thread_idx();
  }
  return true;
}

// Eliminates the strip of the steps k..k+columns-1 by itself: one barrier a column, at which each warp has laid down the row of its
// largest entry. Column j ends up in register kGridStrip - columns + j, see `eliminate`. False: no pivot exceeds the threshold.
template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool eliminate_strip(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int k, int columns,
                                 double threshold, unsigned& used, int* p, double (&a)[kSlots][kGridStrip]) {
  constexpr int kWarps = kThreads / kWarp, kCandidates = kBlocks > 1 ? kBlocks : kWarps;
  const auto slots = std::make_integer_sequence<int, kSlots>{};
  [[maybe_unused]] const int rank = static_cast<int>(block_idx());
  for (int j = 0; j < columns; ++j) {
    const int turn = (j & 1) * kGridCandidates;  // two sets: this column's are read while the next one's are written
    double* const candidates = shared.candidates + turn * kGridStrip;
    unsigned* const keys = shared.keys + turn;
    int* const rows = shared.rows + turn;
    const auto lay_down = [&](int at, unsigned key, int row) {
      keys[at] = key;
      rows[at] = problem.begin + row;
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (thread_idx() + kThreads * s != row) return;
        LDMI_UNROLL
        for (int c = 0; c < kGridStrip; ++c) candidates[at * kGridStrip + c] = a[s][c];
      });
    };
    const int diagonal_row = problem.place(k + j);
    if (diagonal_row >= 0 && diagonal_row % kThreads == thread_idx()) {
      lay_down(kWarps, ~used >> diagonal_row / kThreads & 1u, diagonal_row);
    }
    unsigned key = 0;
    int mine = 0;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int row = thread_idx() + kThreads * s;
      const unsigned magnitude = (static_cast<unsigned>(bit_cast<uint64_t>(a[s][0]) >> 32) & 0x7fffffffu) + 1u;
      const bool open = row < problem.rows && (used >> s & 1u) == 0;
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
    const double* lines = candidates;
    const unsigned* marks = keys;
    const int* places = rows;
    if constexpr (kBlocks > 1) {  // the block's largest, and the diagonal if it is here, to every block
      const int other = (j & 1) * (kBlocks + 1);
      LDMI_UNROLL_BY(1)
      for (int e = thread_idx(); e < 2 * kBlocks * kGridStrip; e += kThreads) {
        const int c = e % kGridStrip, to = e / kGridStrip % kBlocks;
        const bool largest = e < kBlocks * kGridStrip;
        if (!largest && diagonal_row < 0) continue;
        const int source = largest ? from : kWarps, at = other + (largest ? rank : kBlocks);
        map_shared(shared.lines, to)[at * kGridStrip + c] = candidates[source * kGridStrip + c];
        if (c == 0) {
          map_shared(shared.marks, to)[at] = keys[source];
          map_shared(shared.places, to)[at] = rows[source];
        }
      }
      sync_cluster();
      lines = shared.lines + other * kGridStrip;
      marks = shared.marks + other;
      places = shared.places + other;
      from = 0;
      for (int b = 1; b < kBlocks; ++b) from = marks[b] > marks[from] ? b : from;
    }
    const double diagonal = abs(lines[kCandidates * kGridStrip]);
    if (marks[kCandidates] != 0 && diagonal > threshold && diagonal * kMultiplier >= abs(lines[from * kGridStrip])) from = kCandidates;
    const int row = problem.place(places[from]);
    double pivot_row[kGridStrip];
    LDMI_UNROLL
    for (int c = 0; c < kGridStrip; ++c) pivot_row[c] = lines[from * kGridStrip + c];
    const double pivot = pivot_row[0];
    if (!(abs(pivot) > threshold)) return false;
    if (thread_idx() == 0) {
      if (problem.begin == 0) store(problem.space.pivots + k + j, pivot);
      p[j] = places[from];
    }
    const double reciprocal = 1.0 / pivot;
    LDMI_UNROLL
    for (int c = 1; c < kGridStrip; ++c) pivot_row[c] *= reciprocal;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      if (thread_idx() + kThreads * s == row) {  // becomes (the row with 1 instead of the pivot) / pivot below
        used |= 1u << s;
        a[s][0] = -1.0;
        LDMI_UNROLL
        for (int c = 1; c < kGridStrip; ++c) a[s][c] = 0.0;
      }
      const double factor = -a[s][0];
      LDMI_UNROLL
      for (int c = 1; c < kGridStrip; ++c) a[s][c - 1] = fma(factor, pivot_row[c], a[s][c]);
      a[s][kGridStrip - 1] = factor * reciprocal;
    }
  }
  return true;
}

// What the elimination of `count` steps, at most 4 kQuads, does to the stripes of 8 columns of the panel in shared memory that
// takes(s) says. p: the rows of their pivots, in shared memory; multiplier(i, j) is G[i, j]. The product's rows are columns of M, so
// that a lane has neighbours in memory. Between two barriers of the caller's.
template <int kQuads, int kThreads, int kBlocks, class Takes, class Multiplier>
LDMI_DEVICE void update_panel(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int columns, int count,
                              const int* p, const Takes& takes, const Multiplier& multiplier) {
  constexpr int kWarps = kThreads / kWarp, kSteps = kQuads <= 2 ? 8 : 32;  // a power of two
  constexpr int kTogether = 2, kAhead = kQuads > 2 ? 2 : 4;                // stripes, and tiles of 8 rows
  const int rows = problem.rows, stripes = (columns + kGridStrip - 1) / kGridStrip, m = lane() / 4, q = lane() % 4;
  LDMI_UNROLL_BY(1)  // here and below: what an unrolled loop would look up ahead takes registers from the strips
  for (int e = thread_idx(); e < stripes * kGridStrip * kSteps; e += kThreads) {
    const int c = e / kSteps, j = e % kSteps;
    if (j >= shared.pitch || !takes(c / kGridStrip)) continue;
    const int at = c * shared.pitch + j;
    if (j >= count || c >= columns) {
      shared.X[at] = 0.0;
      continue;
    }
    const int row = problem.place(p[j]);
    if (row < 0) continue;
    double* const entry = shared.panel + c * shared.stride + row;
    const double value = *entry;
    *entry = 0.0;
    if constexpr (kBlocks > 1) {
      for (int b = 0; b < kBlocks; ++b) map_shared(shared.X, b)[at] = value;
    } else {
      shared.X[at] = value;
    }
  }
  sync_team<kBlocks>();
  for (int s0 = 0; s0 < stripes; s0 += kTogether) {
    double x[kTogether][kQuads];
    bool taken[kTogether];
    LDMI_UNROLL
    for (int s = 0; s < kTogether; ++s) {
      taken[s] = s0 + s < stripes && takes(s0 + s);
      LDMI_UNROLL
      for (int h = 0; h < kQuads; ++h) {
        const int j = 4 * h + q;
        x[s][h] = taken[s] && j < count ? shared.X[((s0 + s) * kGridStrip + m) * shared.pitch + j] : 0.0;
      }
    }
    LDMI_UNROLL_BY(1)
    for (int i0 = 8 * warp(); i0 < rows; i0 += 8 * kWarps * kAhead) {
      double g[kAhead][kQuads];
      LDMI_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int i = i0 + 8 * kWarps * u + m;
        LDMI_UNROLL
        for (int h = 0; h < kQuads; ++h) {
          const int j = 4 * h + q;
          g[u][h] = i < rows && j < count ? multiplier(i, j) : 0.0;
        }
      }
      LDMI_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int i = i0 + 8 * kWarps * u + 2 * q;
        LDMI_UNROLL
        for (int s = 0; s < kTogether; ++s) {
          if (!taken[s]) continue;  // alike for the whole warp
          double* const at = shared.panel + ((s0 + s) * kGridStrip + m) * shared.stride + i;
          M8N8K4::C tile{};
          if (i < rows) {
            const Pack<double> two = shared_load16(at);
            tile.value[0] = two[0];
            tile.value[1] = two[1];
          }
          LDMI_UNROLL
          for (int h = 0; h < kQuads; ++h) tile = mma(x[s][h], g[u][h], tile);
          if (i < rows) shared_store16(at, Pack<double>{{tile.value[0], tile.value[1]}});
        }
      }
    }
  }
}

// Panel `first`, of `count` columns, by the team: takes in the one before it, of `before` columns, and is eliminated. False: singular.
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
    if constexpr (kBlocks == 1 && kSlots <= kGridHopeful) {
      if (failures < kGridFailures) {
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

// What the elimination of the columns first..first+count-1 does to the columns c0..c0+8*kStripes-1 outside (those below `end`); a
// block.
template <int kQuads, int kStripes, int kThreads, int kBlocks>
LDMI_DEVICE void update_columns(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int first, int count, int c0,
                                int end) {
  constexpr int kWarps = kThreads / kWarp, kAhead = 3, kWidth = kStripes * kGridStrip;
  const int C = problem.C, m = lane() / 4, q = lane() % 4;
  const bool pairs = problem.pairs();
  sync_block();
  LDMI_UNROLL_BY(1)
  for (int e = thread_idx(); e < count * kWidth; e += kThreads) {
    const int j = e / kWidth, column = c0 + e % kWidth;
    if (column >= end) continue;
    double* const entry = problem.at(load(problem.space.row + first + j), column);
    shared.X[e % kWidth * shared.pitch + j] = load(entry);
    store(entry, 0.0);
  }
  sync_block();
  double x[kStripes][kQuads];
  LDMI_UNROLL
  for (int s = 0; s < kStripes; ++s) {
    LDMI_UNROLL
    for (int h = 0; h < kQuads; ++h) {
      const int own = kGridStrip * s + m, j = 4 * h + q;
      x[s][h] = c0 + own < end && j < count ? shared.X[own * shared.pitch + j] : 0.0;
    }
  }
  LDMI_UNROLL_BY(1)
  for (int i0 = 8 * warp(); i0 < C; i0 += 8 * kWarps * kAhead) {
    double g[kAhead][kQuads];
    M8N8K4::C tile[kAhead][kStripes];
    LDMI_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int own = i0 + 8 * kWarps * u, i = own + 2 * q;
      LDMI_UNROLL
      for (int s = 0; s < kStripes; ++s) {
        const int c = c0 + kGridStrip * s + m;
        tile[u][s] = {};
        if (c >= end || i >= C) continue;
        if (pairs) {
          const Pack<double> two = load16(problem.at(i, c));
          tile[u][s].value[0] = two[0];
          tile[u][s].value[1] = two[1];
        } else {
          tile[u][s].value[0] = load(problem.at(i, c));
          if (i + 1 < C) tile[u][s].value[1] = load(problem.at(i + 1, c));
        }
      }
      LDMI_UNROLL
      for (int h = 0; h < kQuads; ++h) {
        const int j = 4 * h + q;
        g[u][h] = own + m < C && j < count ? load(problem.at(own + m, first + j)) : 0.0;
      }
    }
    LDMI_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int i = i0 + 8 * kWarps * u + 2 * q;
      LDMI_UNROLL
      for (int s = 0; s < kStripes; ++s) {
        const int c = c0 + kGridStrip * s + m;
        M8N8K4::C& sum = tile[u][s];
        LDMI_UNROLL
        for (int h = 0; h < kQuads; ++h) sum = mma(x[s][h], g[u][h], sum);
        if (c >= end || i >= C) continue;
        if (pairs) {
          store16(problem.at(i, c), Pack<double>{{sum.value[0], sum.value[1]}});
        } else {
          store(problem.at(i, c), sum.value[0]);
          if (i + 1 < C) store(problem.at(i + 1, c), sum.value[1]);
        }
      }
    }
  }
}

// All steps; every thread of the grid. False: singular.
template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool eliminate_by_grid(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, double threshold) {
  const int C = problem.C, panel = problem.panel, panels = (C + panel - 1) / panel;
  const int block = static_cast<int>(block_idx()), blocks = static_cast<int>(grid_dim());
  unsigned used = 0;  // of the team's threads: a bit for each of the thread's rows that have been a pivot's
  int failures = 0;   // strips whose pivots are not on the diagonal
  for (int k = 0; k < panels + (problem.inverse ? 1 : 0); ++k) {
    const int begin = k < panels ? k * panel : C, end = C - begin < panel ? C : begin + panel;
    const int first = k > 0 ? (k - 1) * panel : 0, count = begin - first;  // the panel before
    if (block < kBlocks && k < panels) {
      if (!eliminate_panel_of_grid<kSlots>(problem, shared, begin, end - begin, count, threshold, used, failures)) {
        if (block == 0 && thread_idx() == 0) store(problem.space.singular, static_cast<uint32_t>(k) + 1u);
      }
    }
    // the columns after both panels, then, for the inverse, those before; all blocks but the team, unless that has nothing else to do
    const int crew = k < panels && blocks > kBlocks ? blocks - kBlocks : blocks, me = crew < blocks ? block - kBlocks : block;
    if (me >= 0 && count > 0) {
      constexpr int kStripes = kGridStripes<kBlocks>, kWidth = kStripes * kGridStrip;
      const int after = (C - end + kWidth - 1) / kWidth, before = problem.inverse ? (first + kWidth - 1) / kWidth : 0;
      for (int task = me; task < after + before; task += crew) {
        const bool later = task < after;
        update_columns<kGridQuads<kSlots, kBlocks>, kStripes>(
            problem, shared, first, count, later ? end + task * kWidth : (task - after) * kWidth, later ? C : first);
      }
    }
    sync_grid();
    // Until here a panel that has no pivot has been left as it was: no harm in what followed. The next panel may have told already
    // that it is singular, to those who are slow: they find that out with all others.
    const uint32_t singular = load(problem.space.singular);
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
  constexpr int kRows = kSlots * kBlocks;  // of all of them, a thread
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
  answer({log_abs_det, sign, warp_sum(present)});  // with strict, all are
}

// One matrix after the other. kBlocks: of a cluster; the first one is the team.
template <int kSlots, int kThreads, int kBlocks>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1) logdet_inverse_grid(Matrices matrices, GridSpace space, int panel) {
  Carve carve;
  const GridShared shared = take_grid_shared<kBlocks>(carve, matrices.C, panel);
  if constexpr (kBlocks > 1) sync_cluster();  // from here on its blocks are there, until the last barrier of the grid
  for (int64_t at = 0; at < matrices.count; ++at) {
    if (at > 0) sync_grid();
    logdet_inverse_by_grid<kSlots, kThreads, kBlocks>(matrices, at, space, panel, shared);
  }
}

}  // namespace factor
}  // namespace ldmi::cuda
