// The elimination by a grid: one strip of 8 columns of a panel, by the panel blocks. Each thread holds whole rows of it in registers.
#pragma once

#include "grid_problem.cuh"

namespace ldmi::cuda {

namespace factor {

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

}  // namespace factor

}  // namespace ldmi::cuda
