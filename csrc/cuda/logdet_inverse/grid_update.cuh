// The elimination by a grid: what the elimination of some columns does to others, as products of 8 x 8 tiles on the fp64 tensor cores.
//
// update_panel works on the panel in shared memory, update_columns on the rest of the matrix in global memory. Both call tile_update,
// as the block's update_tile_column does. The loops around it differ: how many loads are in flight decides how many registers each
// takes.
#pragma once

#include "grid_problem.cuh"

namespace ldmi::cuda {

namespace factor {

// Applies the elimination of `count` steps, at most 4 kQuads, to those tile columns s (8 columns) of the panel in shared memory for
// which takes(s) is true. p: the rows of the pivots, in shared memory; multiplier(i, j) is G[i, j]. The rows of the product are
// columns of M, so the two entries of a lane are neighbours in memory. The caller has a barrier before and after.
template <int kQuads, int kThreads, int kBlocks, class Takes, class Multiplier>
LDMI_DEVICE void update_panel(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int columns, int count,
                              const int* p, const Takes& takes, const Multiplier& multiplier) {
  constexpr int kWarps = kThreads / kWarp, kSteps = kQuads <= 2 ? 8 : 32;  // a power of two
  constexpr int kTogether = 2, kAhead = kQuads > 2 ? 2 : 4;                // tile columns, and tiles of 8 rows
  const int rows = problem.rows, tile_columns = (columns + kGridStrip - 1) / kGridStrip, m = lane() / 4, q = lane() % 4;
  LDMI_UNROLL_BY(1)  // here and below: an unrolled loop would compute addresses ahead, in registers that the strips need
  for (int e = thread_idx(); e < tile_columns * kGridStrip * kSteps; e += kThreads) {
    const int c = e / kSteps, j = e % kSteps;
    if (j >= shared.pitch || !takes(c / kGridStrip)) continue;
    const int at = c * shared.pitch + j;
    if (j >= count || c >= columns) {
      shared.X[at] = 0.0;
      continue;
    }
    const int row = problem.slice_row(p[j]);
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
  sync_panel_blocks<kBlocks>();
  for (int s0 = 0; s0 < tile_columns; s0 += kTogether) {
    double x[kTogether][kQuads];
    bool taken[kTogether];
    LDMI_UNROLL
    for (int s = 0; s < kTogether; ++s) {
      taken[s] = s0 + s < tile_columns && takes(s0 + s);
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
          if (!taken[s]) continue;  // the same for the whole warp
          double* const at = shared.panel + ((s0 + s) * kGridStrip + m) * shared.stride + i;
          M8N8K4::C tile{};
          if (i < rows) tile = shared_load_tile(at);
          tile_update(tile, x[s], g[u]);
          if (i < rows) shared_store_tile(at, tile);
        }
      }
    }
  }
}

// One block applies the elimination of the columns first..first+count-1 to the columns c0..c0+8*kTileColumns-1 outside of them (those
// below `end`).
template <int kQuads, int kTileColumns, int kThreads, int kBlocks>
LDMI_DEVICE void update_columns(const GridProblem<kThreads, kBlocks>& problem, const GridShared& shared, int first, int count, int c0,
                                int end) {
  constexpr int kWarps = kThreads / kWarp, kAhead = 3, kWidth = kTileColumns * kGridStrip;
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
  double x[kTileColumns][kQuads];
  LDMI_UNROLL
  for (int s = 0; s < kTileColumns; ++s) {
    LDMI_UNROLL
    for (int h = 0; h < kQuads; ++h) {
      const int own = kGridStrip * s + m, j = 4 * h + q;
      x[s][h] = c0 + own < end && j < count ? shared.X[own * shared.pitch + j] : 0.0;
    }
  }
  LDMI_UNROLL_BY(1)
  for (int i0 = 8 * warp(); i0 < C; i0 += 8 * kWarps * kAhead) {
    double g[kAhead][kQuads];
    M8N8K4::C tile[kAhead][kTileColumns];
    LDMI_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int own = i0 + 8 * kWarps * u, i = own + 2 * q;
      LDMI_UNROLL
      for (int s = 0; s < kTileColumns; ++s) {
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
      for (int s = 0; s < kTileColumns; ++s) {
        const int c = c0 + kGridStrip * s + m;
        M8N8K4::C& sum = tile[u][s];
        tile_update(sum, x[s], g[u]);
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

}  // namespace factor

}  // namespace ldmi::cuda
