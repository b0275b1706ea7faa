// How CUDA kernels divide shared memory and workspace. Each layout is defined once, by the function that takes its pieces: kernels and
// launchers call it with memory, plans without any, for the size.
#pragma once

#include <cstdint>

#include "cuda_plan.h"
#include "everywhere.h"
#include "pieces.h"

namespace ldmi::plan {

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
