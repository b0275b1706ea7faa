// accumulate_onehot_fp64, for at most 32 labels and classes: one-hot^T diag(w) P on the fp64 tensor cores.
//
// A block takes tiles of rows as they are in memory, turns them into predictions in shared memory, and multiplies them. S stays in
// registers until the end. Any dtype, weights, strides and probabilities are supported; joint_onehot_tf32 is faster where it applies.
#pragma once

#include "partial_sums.cuh"

namespace ldmi::cuda {

// Shared memory of joint_onehot_fp64; used by the kernel and by its launcher.
template <class E, int kWidth>
struct OnehotFp64Space {
  using F = Compute<E>;
  static constexpr int kRows = static_cast<int>(plan::tile_rows(kWidth, sizeof(E)));
  // The pitch spreads the stores of the exponentials (one row per kLanes lanes) over all banks, the reads of fragments over most.
  static constexpr int kPitch = kWidth == 16 ? 18 : 36;
  static constexpr int kLanes = kWidth / 8;                  // lanes of a row, 8 columns each
  static constexpr int kTiles = kWidth / 8;                  // 8 x 8 tiles along a side of S
  static constexpr int kGroups = kThreads / kWarp / kTiles;  // groups of warps, which share the rows
  static constexpr int kNanWords = kWidth * (kWidth / 16);   // one bit per entry of S, 16 bits used per word

  // two stages of rows that are read ahead
  E* raw;
  double* weight;
  int* label;
  F* tile;
  F *maximum, *sum;  // of each row
  uint32_t* nan;
  int values;  // of a stage of raw

  LDMI_HOST_DEVICE OnehotFp64Space(Carve& carve, int64_t classes) {
    values = kRows * static_cast<int>(classes);  // kRows * sizeof(E) is a multiple of 16
    raw = carve.take<E>(2 * values);
    weight = carve.take<double>(2 * kRows);
    label = carve.take<int>(2 * kRows);
    tile = carve.take<F>(kRows * kPitch);
    maximum = carve.take<F>(kRows);
    sum = carve.take<F>(kRows);
    nan = carve.take<uint32_t>(kNanWords);
  }
};

// Each block writes its part of every sum.
template <class E, int kWidth>
LDMI_DEVICE void accumulate_onehot_fp64(const Batch& batch, Compute<E>* lse, const Partial& partial) {
  using Tile = OnehotFp64Space<E, kWidth>;
  using F = Compute<E>;
  constexpr int R = Tile::kRows, P = Tile::kPitch, L = Tile::kLanes, M = Tile::kTiles;
  const int64_t rows = batch.logits.rows, chunks = (rows + R - 1) / R;
  const int C = static_cast<int>(batch.logits.columns), K = static_cast<int>(batch.num_labels);
  const bool flat = is_flat(batch.logits);
  const int column = warp() % M * 8, group = warp() / M;  // this warp's columns of S, and which rows it takes of a tile

  Carve carve;
  const Tile s(carve, C);
  for (int at = thread_idx(); at < Tile::kNanWords; at += kThreads) s.nan[at] = 0;
  M8N8K4::C product[M];
  double count[M];
  LDMI_UNROLL
  for (int m = 0; m < M; ++m) product[m].value[0] = product[m].value[1] = count[m] = 0;
  double ce = 0;
  bool bad = false;

  const auto rows_of = [&](int64_t chunk) { return static_cast<int>(rows - chunk * R < R ? rows - chunk * R : R); };
  int stage = 0;
  if (flat) {
    if (block_idx() < chunks) copy_flat(batch.logits, block_idx() * R, rows_of(block_idx()), s.raw);
    commit_copies();
  }
  for (int64_t chunk = block_idx(); chunk < chunks; chunk += grid_dim(), stage ^= 1) {
    const int here = rows_of(chunk);
    if (!flat) copy_strided(batch.logits, chunk * R, here, s.raw + stage * s.values);
    const E* const raw = s.raw + stage * s.values;
    int* const labels = s.label + stage * R;
    double* const weights = s.weight + stage * R;
    if (thread_idx() < R) {
      double weight = 0;
      int64_t label = kUnused;
      if (thread_idx() < here) label = used_label(batch, chunk * R + thread_idx(), weight, bad);
      labels[thread_idx()] = static_cast<int>(label);
      weights[thread_idx()] = weight;
    }
    if (flat) wait_copies<0>();
    sync_block();  // the tile and the labels are complete; no thread uses the previous tile any more
    if (flat) {
      const int64_t next = chunk + grid_dim();
      if (next < chunks) copy_flat(batch.logits, next * R, rows_of(next), s.raw + (stage ^ 1) * s.values);
      commit_copies();
    }

    // Predictions. A row that does not count, or whose sum is NaN, becomes zeros. Its weight carries the NaN, to row y of S alone.
    for (int r = thread_idx() / L; r < R; r += kThreads / L) {
      const int label = labels[r], first = lane() % L;
      F* const to = s.tile + r * P;
      F x[8];
      LDMI_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int c = first + L * j;
        x[j] = label >= 0 && c < C ? static_cast<F>(widen(raw[r * C + c])) : -infinity<F>();
      }
      F sum[1] = {0}, maximum[1] = {x[0]};
      if (batch.probs) {
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          const int c = first + L * j;
          const bool inside = label >= 0 && c < C;
          if (inside && !isfinite(x[j])) atomic_or(s.nan + label * (kWidth / 16) + c / 16, 1u << c % 16);
          to[c] = inside && isfinite(x[j]) ? x[j] : F{0};
        }
        maximum[0] = 0;
        sum[0] = 1;
      } else {
        LDMI_UNROLL
        for (int j = 1; j < 8; ++j) maximum[0] = fmax(maximum[0], x[j]);
        group_reduce<L, true>(maximum, static_cast<F*>(nullptr));
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          x[j] = label >= 0 && first + L * j < C ? exp(x[j] - maximum[0]) : F{0};
          sum[0] += x[j];
        }
        group_reduce<L, false>(sum, static_cast<F*>(nullptr));
        const F inverse = 1 / sum[0];
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) to[first + L * j] = isfinite(sum[0]) && label >= 0 ? x[j] * inverse : F{0};
      }
      if (first == 0) {
        s.maximum[r] = maximum[0];
        s.sum[r] = sum[0];
      }
    }
    sync_block();

    if (thread_idx() < here) {
      const int r = thread_idx(), label = labels[r];
      const double weight = weights[r];
      F row_lse = 0;
      if (label >= 0) {
        const F own = static_cast<F>(widen(raw[r * C + static_cast<int>(column_of(label, C))]));
        if (batch.probs) {
          ce -= weight * log(static_cast<double>(own));
        } else {
          const F log_sum = log(s.sum[r]);
          row_lse = s.maximum[r] + log_sum;
          // this order of operations loses no digits when all logits are far from 0
          ce += weight * static_cast<double>(log_sum + (s.maximum[r] - own));
        }
      }
      store(lse + chunk * R + r, row_lse);
    }

    if (column < C) {
      for (int step = group; step * 4 < here; step += Tile::kGroups) {
        const int r = step * 4 + lane() % 4;
        const double b = static_cast<double>(s.tile[r * P + column + lane() / 4]);
        const int label = labels[r] - lane() / 4;  // m * 8 in the lane whose row of S it is
        const double w = weights[r], a = isfinite(s.sum[r]) ? w : not_a_number<double>();
        LDMI_UNROLL
        for (int m = 0; m < M; ++m) {
          if (m * 8 >= K) continue;
          product[m] = mma(label == m * 8 ? a : 0.0, b, product[m]);
          if (column == 0) count[m] += label == m * 8 ? w : 0.0;
        }
      }
    }
  }

  // The groups' sums, one group after the other
  wait_copies<0>();
  uint32_t nan_of_mine[M];
  sync_block();
  LDMI_UNROLL
  for (int m = 0; m < M; ++m) nan_of_mine[m] = s.nan[(m * 8 + lane() / 4) * (kWidth / 16) + column / 16];
  const bool any_bad = sync_block_or(bad);
  Carve again;
  double* const sums = again.take<double>(kWidth * kWidth);
  double* const counts = again.take<double>(kWidth);
  double* const scratch = again.take<double>(kThreads / kWarp);
  for (int g = 0; g < Tile::kGroups; ++g) {
    if (group == g) {
      LDMI_UNROLL
      for (int m = 0; m < M; ++m) {
        const int k = m * 8 + lane() / 4;
        LDMI_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = column + M8N8K4::c_col(lane(), i);
          double value = product[m].value[i];
          if ((nan_of_mine[m] >> c % 16 & 1u) != 0) value = not_a_number<double>();
          if (g > 0) value += sums[k * kWidth + c];
          sums[k * kWidth + c] = value;
        }
        const double total = warp_sum<4>(count[m]);
        if (column == 0 && lane() % 4 == 0) counts[k] = g > 0 ? counts[k] + total : total;
      }
    }
    sync_block();
  }
  double* const mine = partial.sums + block_idx() * (static_cast<int64_t>(K) * C + K);
  for (int at = thread_idx(); at < K * C; at += kThreads) store(mine + at, sums[at / C * kWidth + at % C]);
  for (int k = thread_idx(); k < K; k += kThreads) store(mine + K * C + k, counts[k]);
  ce = block_sum(ce, scratch);
  if (thread_idx() == 0) {
    store(partial.ce + block_idx(), ce);
    store(partial.bad + block_idx(), any_bad ? 1u : 0u);
  }
}

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) joint_onehot_fp64(Batch batch, Compute<E>* lse, Partial partial) {
  accumulate_onehot_fp64<E, kWidth>(batch, lse, partial);
}

template <class E, int kWidth>
size_t onehot_fp64_smem(int64_t C) {
  Carve carve;
  const OnehotFp64Space<E, kWidth> tile(carve, C);
  static_cast<void>(tile);
  Carve again;  // the groups' sums, in the same place
  again.take<double>(kWidth * kWidth);
  again.take<double>(kWidth);
  again.take<double>(kThreads / kWarp);
  return carve.bytes() > again.bytes() ? carve.bytes() : again.bytes();
}

}  // namespace ldmi::cuda
