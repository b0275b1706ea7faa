// The elimination by a grid: constants, memory, and the problem as all steps see it. grid.cuh explains the algorithm.
#pragma once

#include "../../plan/cuda_plan.h"
#include "kernels.cuh"

namespace ldmi::cuda {

inline constexpr int kGridThreads = 256;  // at most; each thread has rows of a strip
inline constexpr int kGridStrip = 8;      // columns of a strip
// Tile columns that an update block takes at a time. It reads G from level 2 each time, which in large matrices is as much traffic as
// all the rest; two at a time halve that.
template <int kBlocks>
inline constexpr int kGridTileColumns = kBlocks > 1 ? 2 : 1;
// The most steps of a panel, in groups of four, as the tensor cores take them
template <int kSlots, int kBlocks>
inline constexpr int kGridQuads = static_cast<int>(plan::grid_most_panel(int64_t{kSlots} * kGridThreads, kBlocks)) / 4;
inline constexpr int kGridCandidates = kGridThreads / 32 + 1;  // for the pivot: one per warp, and the diagonal
inline constexpr int kDiagonalPivotFailures = 4;
inline constexpr int kDiagonalPivotMaxRows = 4;  // rows per thread with which it is tried: with 8 there are too few registers on sm_80
inline constexpr int kTransposeTile = 32;        // rows and columns of V that a block transposes at a time

// Global memory besides M, for one matrix at a time
struct GridSpace {
  double* matrix;      // [C, C]: M if no V is asked for
  double* norms;       // [C]: of the rows of R; NaN if something there is not finite
  double* pivots;      // [C]
  int32_t* row;        // [C]: p
  uint32_t* odd;       // [blocks]: inversions of p and negative pivots that the block counted
  uint32_t* singular;  // [1]: the number of the panel, from 1 on, that has no pivot; 0: none yet
};

// The most rows of a panel that one panel block has: a multiple of 8 if there are several blocks. Equal to plan::slice_rows.
template <int kBlocks>
LDMI_HOST_DEVICE int slice_rows(int C) {
  return kBlocks == 1 ? C : ((C + kBlocks - 1) / kBlocks + 7) / 8 * 8;
}

// Shared memory
struct GridShared {
  double* candidates;          // [2, kGridCandidates, 8]: the entries of the strip in each candidate row
  unsigned* keys;              // [2, kGridCandidates]: its magnitude; 0: none, or it has been a pivot row
  int* rows;                   // [2, kGridCandidates]
  int* row;                    // [panel]: p_J
  double* X;                   // [panel, pitch]: M[p_J, c], one column c after the other; no bank conflicts between fragments
  double* panel;               // [panel, stride]: the block's rows of the panel, column by column; or two tiles of V
  double* cluster_candidates;  // [2, kBlocks + 1, 8]: of a cluster, `candidates` of each block, and the diagonal
  unsigned* cluster_keys;      // [2, kBlocks + 1]: their keys
  int* cluster_rows;           // [2, kBlocks + 1]: their rows
  int pitch;
  int stride;  // neighbouring columns are offset by 4 banks, see factor_stride
};

// Carves it. Host code calls the same function for Carve::bytes(), which is plan::grid_smem(C, panel, kBlocks).
template <int kBlocks>
LDMI_HOST_DEVICE GridShared take_grid_shared(simt::Carve& carve, int C, int panel) {
  constexpr int kTransposing = 2 * kTransposeTile * (kTransposeTile + 1);
  GridShared shared{};
  shared.stride = (slice_rows<kBlocks>(C) + 3) / 8 * 8 + 4;
  shared.pitch = panel + 4;
  // first, at constant offsets, what the elimination of a strip uses, when registers are scarce
  shared.candidates = carve.take<double>(2 * kGridCandidates * kGridStrip);
  shared.keys = carve.take<unsigned>(2 * kGridCandidates);
  shared.rows = carve.take<int>(2 * kGridCandidates);
  if constexpr (kBlocks > 1) {
    shared.cluster_candidates = carve.take<double>(2 * (kBlocks + 1) * kGridStrip);
    shared.cluster_keys = carve.take<unsigned>(2 * (kBlocks + 1));
    shared.cluster_rows = carve.take<int>(2 * (kBlocks + 1));
  }
  shared.row = carve.take<int>(panel);
  shared.X = carve.take<double>(panel * shared.pitch);
  shared.panel = carve.take<double>(panel * shared.stride > kTransposing ? panel * shared.stride : kTransposing);
  return shared;
}

namespace factor {

// One matrix, as all steps see it. The number of threads is a constant, and so are the distances between the rows of a thread.
template <int kThreads, int kBlocks>
struct GridProblem {
  GridSpace space;
  double* M;
  int C;
  int panel;
  bool inverse;
  int begin, rows;  // of the slice of this panel block

  // The index of a row in the slice of this block; -1: it is in another block
  LDMI_DEVICE int slice_row(int row) const {
    if constexpr (kBlocks == 1) return row;
    return row >= begin && row < begin + rows ? row - begin : -1;
  }
  LDMI_DEVICE double* at(int row, int column) const { return M + static_cast<int64_t>(column) * C + row; }
  // Whether two neighbouring entries of a column, from an even row on, are one access
  LDMI_DEVICE bool pairs() const { return C % 2 == 0 && reinterpret_cast<uintptr_t>(M) % 16 == 0; }
};

// A barrier of all threads of the panel blocks
template <int kBlocks>
LDMI_DEVICE void sync_panel_blocks() {
  if constexpr (kBlocks > 1) {
    sync_cluster();
  } else {
    sync_block();
  }
}

}  // namespace factor

}  // namespace ldmi::cuda
