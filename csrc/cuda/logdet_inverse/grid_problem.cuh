// The elimination by a grid: constants, memory, and what all its steps know of the problem. grid.cuh explains the algorithm.
#pragma once

#include "../../plan/cuda_plan.h"
#include "kernels.cuh"

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

}  // namespace factor

}  // namespace ldmi::cuda
