// The elimination by a grid: one strip of 8 columns of a panel, by the panel blocks. Each thread holds whole rows of it in registers.
#pragma once

#include "grid_problem.cuh"

namespace ldmi::cuda {

namespace factor {

// Loads a strip. A thread holds the rows thread_idx(), + kThreads, ... of the slice, with zeros where there is no such row or column.
template <int kSlots, int kThreads>
LDMI_DEVICE void load_strip(const GridShared& shared, int rows, int c0, int columns, double (&a)[kSlots][kGridStrip]) {
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int i = thread_idx() + kThreads * s;
    LDMI_UNROLL
    for (int c = 0; c < kGridStrip; ++c) a[s][c] = i < rows && c < columns ? shared.panel[(c0 + c) * shared.stride + i] : 0.0;
  }
}
// Stores a strip, from the last registers of each row; see `eliminate`.
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

// Eliminates the strip of the steps k..k+columns-1 alone, with diagonal entries as pivots: one barrier per column, before which the
// thread that has the pivot row writes it to shared memory. p: the rows of the pivots, in shared memory. Returns false if one of the
// pivots was too small; then `a` must not be used.
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
    double* const pivot_line =
        shared.candidates + (j & 1) * kGridStrip;  // two buffers: one is read while the next column's is written
    if (row % kThreads == thread_idx()) {
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (row / kThreads != s) return;
        good &= abs(pivot) > threshold && (mine >> s & 1u) == 0;
        LDMI_UNROLL
        for (int c = 1; c < kGridStrip; ++c) pivot_line[c] = a[s][c];
      });
      pivot_line[0] = inverse;
      pivots[j] = pivot;
    }
    sync_block();
    const double factor = pivot_line[0];
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
      const double entry = pivot_line[c];
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

// Eliminates the strip of the steps k..k+columns-1 alone: one barrier per column, before which each warp writes the row of its largest
// entry as a candidate. Column j ends up in register kGridStrip - columns + j; see `eliminate`. Returns false if no pivot exceeds the
// threshold.
template <int kSlots, int kThreads, int kBlocks>
LDMI_DEVICE bool eliminate_strip(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int k, int columns,
                                 double threshold, unsigned& used, int* p, double (&a)[kSlots][kGridStrip]) {
  constexpr int kWarps = kThreads / kWarp, kCandidates = kBlocks > 1 ? kBlocks : kWarps;
  const auto slots = std::make_integer_sequence<int, kSlots>{};
  [[maybe_unused]] const int rank = static_cast<int>(block_idx());
  for (int j = 0; j < columns; ++j) {
    const int turn = (j & 1) * kGridCandidates;  // two buffers: one is read while the next column's is written
    double* const candidates = shared.candidates + turn * kGridStrip;
    unsigned* const keys = shared.keys + turn;
    int* const rows = shared.rows + turn;
    const auto write_candidate = [&](int at, unsigned key, int row) {
      keys[at] = key;
      rows[at] = problem.begin + row;
      for_each_slot(slots, [&](auto slot) {
        constexpr int s = decltype(slot)::value;
        if (thread_idx() + kThreads * s != row) return;
        LDMI_UNROLL
        for (int c = 0; c < kGridStrip; ++c) candidates[at * kGridStrip + c] = a[s][c];
      });
    };
    const int diagonal_row = problem.slice_row(k + j);
    if (diagonal_row >= 0 && diagonal_row % kThreads == thread_idx()) {
      write_candidate(kWarps, ~used >> diagonal_row / kThreads & 1u, diagonal_row);
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
    if (lane() == lowest(ballot(key == best))) write_candidate(warp(), best, mine);
    sync_block();
    int from = 0;
    for (int w = 1; w < kWarps; ++w) from = keys[w] > keys[from] ? w : from;
    const double* found_values = candidates;
    const unsigned* found_keys = keys;
    const int* found_rows = rows;
    if constexpr (kBlocks > 1) {  // write the block's best candidate, and the diagonal if this block has it, to every block
      const int other = (j & 1) * (kBlocks + 1);
      LDMI_UNROLL_BY(1)
      for (int e = thread_idx(); e < 2 * kBlocks * kGridStrip; e += kThreads) {
        const int c = e % kGridStrip, to = e / kGridStrip % kBlocks;
        const bool largest = e < kBlocks * kGridStrip;
        if (!largest && diagonal_row < 0) continue;
        const int source = largest ? from : kWarps, at = other + (largest ? rank : kBlocks);
        map_shared(shared.cluster_candidates, to)[at * kGridStrip + c] = candidates[source * kGridStrip + c];
        if (c == 0) {
          map_shared(shared.cluster_keys, to)[at] = keys[source];
          map_shared(shared.cluster_rows, to)[at] = rows[source];
        }
      }
      sync_cluster();
      found_values = shared.cluster_candidates + other * kGridStrip;
      found_keys = shared.cluster_keys + other;
      found_rows = shared.cluster_rows + other;
      from = 0;
      for (int b = 1; b < kBlocks; ++b) from = found_keys[b] > found_keys[from] ? b : from;
    }
    const double diagonal = abs(found_values[kCandidates * kGridStrip]);
    if (found_keys[kCandidates] != 0 && diagonal > threshold && diagonal * kMultiplier >= abs(found_values[from * kGridStrip]))
      from = kCandidates;
    const int row = problem.slice_row(found_rows[from]);
    double pivot_row[kGridStrip];
    LDMI_UNROLL
    for (int c = 0; c < kGridStrip; ++c) pivot_row[c] = found_values[from * kGridStrip + c];
    const double pivot = pivot_row[0];
    if (!(abs(pivot) > threshold)) return false;
    if (thread_idx() == 0) {
      if (problem.begin == 0) store(problem.space.pivots + k + j, pivot);
      p[j] = found_rows[from];
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
