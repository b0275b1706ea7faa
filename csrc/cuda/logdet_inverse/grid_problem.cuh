// The elimination by a grid: constants, memory, and the problem as all steps see it. grid.cuh explains the algorithm.
#pragma once

#include "../../plan/layout.h"
#include "kernels.cuh"

namespace ldmi::cuda {

using plan::kGridStrip;
using plan::kGridThreads;
using plan::kTransposeTile;
// Tile columns that an update block takes at a time. It reads G from level 2 each time, which in large matrices is as much traffic as
// all the rest; two at a time halve that.
template <int kBlocks>
inline constexpr int kGridTileColumns = kBlocks > 1 ? 2 : 1;
// The most steps of a panel, in groups of four, as the tensor cores take them
template <int kSlots, int kBlocks>
inline constexpr int kGridQuads = static_cast<int>(plan::grid_most_panel(int64_t{kSlots} * kGridThreads, kBlocks)) / 4;
using plan::kGridCandidates;
inline constexpr int kDiagonalPivotFailures = 4;
inline constexpr int kDiagonalPivotMaxRows = 4;  // rows per thread with which it is tried: with 8 there are too few registers on sm_80

using plan::GridShared;
using plan::GridSpace;
using plan::slice_rows;
using plan::take_grid_shared;

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
