// How CUDA kernels divide shared memory and workspace. Each layout is defined once, by the function that takes its pieces: kernels and
// launchers call it with memory, plans without any, for the size.
#pragma once

#include <cstdint>

#include "cuda_plan.h"
#include "everywhere.h"
#include "pieces.h"

namespace ldmi::plan {

// ------------------------------------------------------------------------------------------------------------------- joint

// The partial sums of S and n of several blocks, and of the cross entropy, and whether a label or weight was out of range.
struct Partial {
  double* sums;   // [parts, entries]: S [K, C], then n [K]
  int64_t parts;  // of S and n
  double* ce;     // [ce_parts]
  uint32_t* bad;  // [ce_parts]
  int64_t ce_parts;
};
inline Partial take_partial(Workspace& work, int64_t parts, int64_t ce_parts, int64_t entries) {
  Partial out{};
  out.sums = work.take<double>(parts * entries);
  out.parts = parts;
  out.ce = work.take<double>(ce_parts);
  out.bad = work.take<uint32_t>(ce_parts);
  out.ce_parts = ce_parts;
  return out;
}

// The sums of the first label of a run of rows, if that label began in an earlier run: the label, its row of S and its weight.
struct BoundarySums {
  int64_t* label;  // [segments], kUnused when there is none
  double* sums;    // [segments, C]
  double* weight;  // [segments]
  double* ce;      // [segments]
};
inline BoundarySums take_boundary_sums(Workspace& work, int64_t segments, int64_t C) {
  BoundarySums out{};
  out.label = work.take<int64_t>(segments);
  out.sums = work.take<double>(segments * C);
  out.weight = work.take<double>(segments);
  out.ce = work.take<double>(segments);
  return out;
}

// The shift (maximum) and the inverse of the sum of each row, for rows whose softmax takes a separate pass.
template <class F>
struct RowSoftmax {
  F* shift;    // [N]
  F* inverse;  // [N]
};
template <class F>
RowSoftmax<F> take_row_softmax(Workspace& work, int64_t rows) {
  RowSoftmax<F> out{};
  out.shift = work.take<F>(rows);
  out.inverse = work.take<F>(rows);
  return out;
}

// What the blocks of that pass leave: their cross entropy, and whether a label or weight was out of range.
struct RowParts {
  double* ce;     // [blocks]
  uint32_t* bad;  // [blocks]
};
inline RowParts take_row_parts(Workspace& work, int64_t blocks) {
  RowParts out{};
  out.ce = work.take<double>(blocks);
  out.bad = work.take<uint32_t>(blocks);
  return out;
}

// ------------------------------------------------------------------------------------------------------------- logits_grad

// What the gradient needs of V, in the workspace: rows of `pitch` values V[k] / magnitude[k].
template <class F>
struct GradTable {
  F* values;
  double* magnitude;
  int64_t pitch;  // a multiple of 16 bytes
};

LDMI_EVERYWHERE constexpr int64_t table_pitch(int64_t classes, int64_t size) { return (classes * size + 15) / 16 * 16 / size; }
template <class F>
GradTable<F> take_grad_table(Workspace& work, int64_t labels, int64_t classes) {
  GradTable<F> table{};
  table.pitch = table_pitch(classes, sizeof(F));
  table.values = work.take<F>(labels * table.pitch);
  table.magnitude = work.take<double>(labels);
  return table;
}

// ---------------------------------------------------------------------------------------------------------- logdet_inverse

inline constexpr int kFactorWarp = 32;  // up to this number of classes one warp factors a matrix

// Shared memory of one block's elimination. `stride` is factor_stride: even, at least C.
struct FactorSpace {
  double* found = nullptr;       // [4]: the result, for all threads; before that [1] is lift_of
  double* columns = nullptr;     // [C, stride]: M = R^T, column after column
  double* parts = nullptr;       // [32]: one number per warp
  uint32_t* present = nullptr;   // [8]: one bit per class
  uint8_t* pivot_row = nullptr;  // [256]: p
  int* tickets = nullptr;        // [2]: the number of update tile columns that have been taken; panels take turns
  int stride = 0;
};

template <class Carve>
LDMI_EVERYWHERE FactorSpace take_factor_space(Carve& carve, int C, int stride) {
  const int64_t block = C > kFactorWarp ? 1 : 0;  // no branch, so that the compiler sees that every pointer is to shared memory
  FactorSpace space;
  space.found = carve.template take<double>(4);
  space.columns = carve.template take<double>(block * C * stride);
  space.parts = carve.template take<double>(block * 32);
  space.present = carve.template take<uint32_t>(block * 8);
  space.pivot_row = carve.template take<uint8_t>(block * 256);
  space.tickets = carve.template take<int>(block * 2);
  space.stride = stride;
  return space;
}

inline constexpr int kGridThreads = 256;                       // at most; each thread has rows of a strip
inline constexpr int kGridStrip = 8;                           // columns of a strip
inline constexpr int kGridCandidates = kGridThreads / 32 + 1;  // for the pivot: one per warp, and the diagonal
inline constexpr int kTransposeTile = 32;                      // rows and columns of V that a block transposes at a time

// Global memory besides M, for one matrix at a time
struct GridSpace {
  double* matrix;      // [C, C]: M if no V is asked for
  double* norms;       // [C]: of the rows of R; NaN if something there is not finite
  double* pivots;      // [C]
  int32_t* row;        // [C]: p
  uint32_t* odd;       // [blocks]: inversions of p and negative pivots that the block counted
  uint32_t* singular;  // [1]: the number of the panel, from 1 on, that has no pivot; 0: none yet
};

// The most rows of a panel that one panel block has: a multiple of 8 if there are several blocks. The same as the function of
// two arguments, in the arithmetic of the kernels.
template <int kBlocks>
LDMI_EVERYWHERE constexpr int slice_rows(int C) {
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

template <int kBlocks, class Carve>
LDMI_EVERYWHERE GridShared take_grid_shared(Carve& carve, int C, int panel) {
  constexpr int kTransposing = 2 * kTransposeTile * (kTransposeTile + 1);
  GridShared shared{};
  shared.stride = (slice_rows<kBlocks>(C) + 3) / 8 * 8 + 4;
  shared.pitch = panel + 4;
  // first, at constant offsets, what the elimination of a strip uses, when registers are scarce
  shared.candidates = carve.template take<double>(2 * kGridCandidates * kGridStrip);
  shared.keys = carve.template take<unsigned>(2 * kGridCandidates);
  shared.rows = carve.template take<int>(2 * kGridCandidates);
  if constexpr (kBlocks > 1) {
    shared.cluster_candidates = carve.template take<double>(2 * (kBlocks + 1) * kGridStrip);
    shared.cluster_keys = carve.template take<unsigned>(2 * (kBlocks + 1));
    shared.cluster_rows = carve.template take<int>(2 * (kBlocks + 1));
  }
  shared.row = carve.template take<int>(panel);
  shared.X = carve.template take<double>(panel * shared.pitch);
  shared.panel = carve.template take<double>(panel * shared.stride > kTransposing ? panel * shared.stride : kTransposing);
  return shared;
}

inline GridSpace take_grid_space(Workspace& work, int64_t classes, int64_t sms, bool inverse) {
  GridSpace space{};
  space.norms = work.take<double>(classes);
  space.pivots = work.take<double>(classes);
  space.row = work.take<int32_t>(classes);
  space.odd = work.take<uint32_t>(sms);
  space.singular = work.take<uint32_t>(1);
  space.matrix = inverse ? nullptr : work.take<double>(classes * classes);
  return space;
}

// The workspace of `count` matrices
struct LuSpace {
  double* norms;     // [count, C]: a RowNote of each row of R
  uint32_t* answer;  // [count]: what finish selects
  int32_t* order;    // [count, C]: the position of each row of R^T after all exchanges
};
inline LuSpace take_lu_space(Workspace& work, int64_t count, int64_t classes) {
  LuSpace space{};
  space.norms = work.take<double>(count * classes);
  space.answer = work.take<uint32_t>(count);
  space.order = work.take<int32_t>(count * classes);
  return space;
}

// ------------------------------------------------------------------------------------------------------------------- fused

// What cuda_fused chose; see CudaFused.
struct FusedTiles {
  int wide, splits, stride;
};

// Shared memory of fused.
template <class F, int kWidth>
struct FusedSpace {
  static constexpr int kThreads = static_cast<int>(fused_threads(kWidth));
  static constexpr int kLanes = kWidth / 4;                             // per row
  static constexpr int kPitch = static_cast<int>(fused_pitch(kWidth));  // of V
  static constexpr int kPack = 16 / sizeof(F);                          // values per 16-byte access

  F* tile;           // [N, C], rounded up to whole packs: logits, probabilities, gradient
  double* weight;    // [N], if there are weights
  uint8_t* label;    // [N]
  uint32_t* rows;    // [N / 32, wide]: bit r of (i, k) means that row 32 i + r has label k
  double* n;         // [wide]
  double* alpha;     // [wide]: -scale / n
  double* part_n;    // [splits, wide]; with one split n itself
  double* part;      // [splits, wide, wide + 1]: sums of S
  F* V;              // [C, kPitch], in the memory of `part`, once S has been read
  double* ce;        // [warps]
  double* ce_scale;  // [1]
  FactorSpace factor;

  template <class Carve>
  LDMI_EVERYWHERE FusedSpace(Carve& carve, int N, int C, bool weighted, const FusedTiles& tiles) {
    const int wide = tiles.wide, splits = tiles.splits;
    tile = carve.template take<F>((N * C + kPack - 1) / kPack * kPack);
    weight = carve.template take<double>(weighted ? N : 0);
    label = carve.template take<uint8_t>(N);
    rows = carve.template take<uint32_t>((N + 31) / 32 * wide);
    n = carve.template take<double>(wide);
    alpha = carve.template take<double>(wide);
    part_n = carve.template take<double>(splits * wide);
    const int sums = splits * wide * (wide + 1), table = C * kPitch * static_cast<int>(sizeof(F)) / 8;
    part = carve.template take<double>(sums > table ? sums : table);
    V = reinterpret_cast<F*>(part);
    ce = carve.template take<double>(kThreads / 32);
    ce_scale = carve.template take<double>(1);
    factor = take_factor_space(carve, C, tiles.stride);
  }
};

// ------------------------------------------------------------------------------------------------------------ loss_forward

// The sums of the batch, which every launch of loss_forward reads or writes; first in its workspace.
struct LossSums {
  double* S;   // [C, C]
  double* n;   // [C]
  double* ce;  // [1]
};
inline LossSums take_loss_sums(Workspace& work, int64_t classes) {
  LossSums sums{};
  sums.S = work.take<double>(classes * classes);
  sums.n = work.take<double>(classes);
  sums.ce = work.take<double>(1);
  return sums;
}

// What logdet_inverse returns to combine, if they are separate launches.
struct LossDeterminant {
  double* log_abs_det;  // [1]
  double* sign;         // [1]
  int64_t* kept;        // [1]
};
inline LossDeterminant take_loss_determinant(Workspace& work) {
  LossDeterminant out{};
  out.log_abs_det = work.take<double>(1);
  out.sign = work.take<double>(1);
  out.kept = work.take<int64_t>(1);
  return out;
}

// -------------------------------------------------------------------------------------------------------------------- sort

// What the launches of the counting sort share.
struct LabelOrder {
  int64_t* order;    // [N] rows
  int64_t* start;    // [K + 2] where each bucket begins; start[K] is the number of rows that count, start[K + 1] is N
  int64_t* offset;   // [pieces, K + 1] counts; then where the piece's rows of a bucket go, relative to the bucket's beginning
  uint32_t* counts;  // [pieces, warps, K + 1] if they do not fit in shared memory, else null
  uint32_t* bad;     // [pieces] whether a label or a weight is out of range
  int64_t pieces;
};

inline LabelOrder take_order(Workspace& work, const CudaSort& plan, int64_t rows, int64_t labels) {
  LabelOrder sort{};
  sort.order = work.take<int64_t>(rows);
  sort.start = work.take<int64_t>(labels + 2);
  sort.offset = work.take<int64_t>(plan.pieces * (labels + 1));
  if (!plan.shared) sort.counts = work.take<uint32_t>(plan.pieces * plan.warps * (labels + 1));
  sort.bad = work.take<uint32_t>(plan.pieces);
  sort.pieces = plan.pieces;
  return sort;
}

}  // namespace ldmi::plan
