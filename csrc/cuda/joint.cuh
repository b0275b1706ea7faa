// S = sum_i w_i e_{y_i} p_i^T, n, the row logsumexp and the summed cross entropy.
//
// Four ways, chosen by csrc/plan and, between the first two, by the batch:
// - joint_rows, up to 32 labels and classes without weights: warps by themselves, one-hot^T P on the tensor cores, P as two tf32.
// - joint_tile, as many otherwise: a block takes tiles of rows as they lie in memory, turns them into predictions in shared memory,
//   and multiplies one-hot^T diag(w) by them on the fp64 tensor cores, S staying in registers to the end.
// - joint_by_label, more classes: in the order of the labels, a group of threads keeps one row of S in registers.
// - joint_soft: a matrix product of targets and predictions in tiles, after a pass for the rows' sums.
//
// All but the first sum products of a prediction (fp32, or fp64 for fp64 logits) and a weight in fp64. So an entry of S is off by the
// softmax's own rounding and N 2^-53 of the sum of its terms; without weights sums of fp32 are exact, up to 2^29 rows of like size.
// Equal rows give equal rows of R, and a singular joint stays singular to 2^-52, which fp32 sums would hide. joint_rows says why it
// does as well. What several blocks summed is added in a fixed order by a second launch, or after a grid barrier; nothing depends on
// the schedule. Each step is a device function, which reads what the step before left by load(), and a kernel of its own.
#pragma once

#include "rows.cuh"
#include "sort.cuh"

namespace ldmi::cuda {

// ------------------------------------------------------------------------------------------------- adding up the partial sums

// The partial sums of S and n of several blocks, and of the cross entropy, and whether a label or weight was out of range.
struct Partial {
  double* sums;   // [parts, entries]: S [K, C], then n [K]
  int64_t parts;  // of S and n
  double* ce;     // [ce_parts]
  uint32_t* bad;  // [ce_parts]
  int64_t ce_parts;
};

// S, n and ce from the parts; NaN throughout when a part is bad. A warp takes 1, 2, 4 ... neighbouring entries, so few that all warps
// of the grid are busy, and spreads the parts over its other lanes, each with kFinishAhead of them on their way from memory at a time.
// The order of the sum depends on the shape of the grid alone.
inline constexpr int kFinishAhead = 4;
LDMI_DEVICE void finish_sums(const Partial& partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce) {
  Carve carve;
  double* const scratch = carve.take<double>(kThreads / kWarp);
  bool bad = false;
  for (int64_t p = thread_idx(); p < partial.ce_parts; p += block_dim()) bad |= load(partial.bad + p) != 0;
  bad = sync_block_or(bad);
  const int64_t entries = S_entries + n_entries, warps = grid_dim() * (block_dim() / kWarp);
  int across = 1;
  while (across < kWarp && warps * across < entries) across *= 2;
  const int down = kWarp / across;
  for (int64_t base = (block_idx() * (block_dim() / kWarp) + warp()) * across; base < entries; base += warps * across) {
    const int64_t entry = base + lane() % across;
    double total = 0;
    if (entry < entries && !bad) {
      for (int64_t first = lane() / across; first < partial.parts; first += down * kFinishAhead) {
        double part[kFinishAhead];
        LDMI_UNROLL
        for (int j = 0; j < kFinishAhead; ++j) {
          const int64_t p = first + j * down;
          part[j] = p < partial.parts ? load(partial.sums + p * entries + entry) : 0.0;
        }
        LDMI_UNROLL
        for (int j = 0; j < kFinishAhead; ++j) total += part[j];
      }
    }
    for (int by = across; by < kWarp; by *= 2) total += shfl_xor(total, by);
    if (bad) total = not_a_number<double>();
    if (lane() < across && entry < entries) store(entry < S_entries ? S + entry : n + (entry - S_entries), total);
  }
  if (block_idx() == 0) {
    double total = 0;
    for (int64_t p = thread_idx(); p < partial.ce_parts; p += block_dim()) total += load(partial.ce + p);
    total = block_sum(total, scratch);
    if (thread_idx() == 0) store(ce, bad ? not_a_number<double>() : total);
  }
}

// (A kernel in a header has to be a template: it is in several objects.)
template <int kBlock>
LDMI_KERNEL void LDMI_BOUNDS(kBlock, 1)
    joint_finish(Partial partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce) {
  finish_sums(partial, S_entries, n_entries, S, n, ce);
}

inline int launch_finish(const Partial& partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce,
                         const DeviceLimits& limits, Stream stream) {
  Grid grid;
  constexpr int64_t kWarps = kThreads / kWarp;
  const int64_t wanted = (S_entries + n_entries + kWarps - 1) / kWarps;
  grid.blocks = wanted < 1 ? 1 : wanted < 4 * limits.sms ? wanted : 4 * limits.sms;
  grid.threads = kThreads;
  Carve carve;
  carve.take<double>(kThreads / kWarp);
  grid.smem = carve.bytes();
  return launch(joint_finish<kThreads>, grid, stream, partial, S_entries, n_entries, S, n, ce);
}

// --------------------------------------------------------------------------------------------------------------- few classes

// Shared memory of joint_tile; used by the kernel and by its launcher.
template <class E, int kWidth>
struct JointTile {
  using F = Compute<E>;
  static constexpr int kRows = static_cast<int>(plan::tile_rows(kWidth, sizeof(E)));
  // The pitch spreads the stores of the exponentials (a row for each kLanes lanes) over all banks, the reads of fragments over most.
  static constexpr int kPitch = kWidth == 16 ? 18 : 36;
  static constexpr int kLanes = kWidth / 8;                  // lanes of a row, 8 columns each
  static constexpr int kTiles = kWidth / 8;                  // 8 x 8 tiles along a side of S
  static constexpr int kGroups = kThreads / kWarp / kTiles;  // groups of warps, which share the rows
  static constexpr int kNanWords = kWidth * (kWidth / 16);   // one bit an entry of S, 16 bits a word used

  // two stages of what is read ahead
  E* raw;
  double* weight;
  int* label;
  F* tile;
  F *maximum, *sum;  // of each row
  uint32_t* nan;
  int values;  // of a stage of raw

  LDMI_HOST_DEVICE JointTile(Carve& carve, int64_t classes) {
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

// A part of every sum for each block
template <class E, int kWidth>
LDMI_DEVICE void tile_sums(const Batch& batch, Compute<E>* lse, const Partial& partial) {
  using Tile = JointTile<E, kWidth>;
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
    sync_block();  // the tile and the labels are there; nobody uses the one before any more
    if (flat) {
      const int64_t next = chunk + grid_dim();
      if (next < chunks) copy_flat(batch.logits, next * R, rows_of(next), s.raw + (stage ^ 1) * s.values);
      commit_copies();
    }

    // Predictions. A row that does not count, or whose sum is NaN, is zeros: its weight carries the NaN, to row y of S alone.
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
          // in this order nothing is lost when all logits are far from 0
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
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) joint_tile(Batch batch, Compute<E>* lse, Partial partial) {
  tile_sums<E, kWidth>(batch, lse, partial);
}

// ------------------------------------------------------------------------------------- few classes, without weights: the fast way

inline constexpr int kRowsThreads = 128;
inline constexpr int kRowsFlush = 4;  // steps of 32 rows between two additions of the fp32 sums to those in fp64

// Shared memory of joint_rows; a warp uses nothing of another's before the end.
template <class E, int kWidth>
struct JointRows {
  static constexpr int kWarps = kRowsThreads / kWarp;
  static constexpr int kStages = kWidth == 16 ? 4 : 2;
  static constexpr int kPitch = kWidth + 4;  // stores of 16 bytes by neighbouring rows, and fragments, fall on different banks
  E* raw;                                    // [warps, stages, 32 * C]
  float* tile;                               // [warps, 32, kPitch]
  double* sums;                              // [warps, kWidth, kWidth]
  uint32_t* count;                           // [kWidth]
  double* scratch;
  int values;  // of a stage

  LDMI_HOST_DEVICE JointRows(Carve& carve, int64_t classes) {
    values = kWarp * static_cast<int>(classes);
    raw = carve.take<E>(kWarps * kStages * values);
    tile = carve.take<float>(kWarps * kWarp * kPitch);
    sums = carve.take<double>(kWarps * kWidth * kWidth);
    count = carve.take<uint32_t>(kWidth);
    scratch = carve.take<double>(kWarps);
  }
};

// Flat logits of at most 32 bits, labels without weights, at most 32 labels and classes. Every warp works by itself: 32 rows a step, a
// lane a row for the softmax, and then one-hot^T P on the tensor cores. P, fp32, enters as hi + lo, both tf32 rounded to nearest: what
// is lost is at most 2^-11 of 2^-11 of it, four units of fp32, less than its own rounding by the softmax. Products with 0 and 1 are
// exact. hi and lo have sums of their own, so rows that are equal add up without any rounding (11 bits each, 128 rows), and a joint of
// equal rows stays singular. Otherwise a partial sum of fp32 is over 16 steps of the tensor core, 2^-23 of itself at most each (which
// may truncate), before it is added to fp64. A part of every sum for each block
template <class E, int kWidth>
LDMI_DEVICE void rows_sums(const Batch& batch, float* lse, const Partial& partial) {
  using Rows = JointRows<E, kWidth>;
  constexpr int P = Rows::kPitch, M = kWidth / 16, N = kWidth / 8, kStages = Rows::kStages;
  const int64_t rows = batch.logits.rows, steps = (rows + kWarp - 1) / kWarp;
  const int C = static_cast<int>(batch.logits.columns), K = static_cast<int>(batch.num_labels);
  Carve carve;
  const Rows s(carve, C);
  E* const raw = s.raw + warp() * kStages * s.values;
  float* const tile = s.tile + warp() * kWarp * P;
  double* const sums = s.sums + warp() * kWidth * kWidth;
  for (int at = lane(); at < kWidth * kWidth; at += kWarp) sums[at] = 0;
  for (int k = thread_idx(); k < kWidth; k += kRowsThreads) s.count[k] = 0;
  sync_block();
  M16N8K8::C high[M][N], low[M][N];
  const auto clear = [&] {
    LDMI_UNROLL
    for (int m = 0; m < M; ++m) {
      LDMI_UNROLL
      for (int n = 0; n < N; ++n) {
        LDMI_UNROLL
        for (int i = 0; i < 4; ++i) high[m][n].value[i] = low[m][n].value[i] = 0;
      }
    }
  };
  clear();
  const auto flush = [&] {  // every lane has the same entries each time
    LDMI_UNROLL
    for (int m = 0; m < M; ++m) {
      LDMI_UNROLL
      for (int n = 0; n < N; ++n) {
        LDMI_UNROLL
        for (int i = 0; i < 4; ++i) {
          double& sum = sums[(m * 16 + M16N8K8::c_row(lane(), i)) * kWidth + n * 8 + M16N8K8::c_col(lane(), i)];
          sum = (sum + static_cast<double>(high[m][n].value[i])) + static_cast<double>(low[m][n].value[i]);
        }
      }
    }
    clear();
  };
  const int64_t stride = grid_dim() * Rows::kWarps, begin = block_idx() * Rows::kWarps + warp();
  const auto copy = [&](int64_t step, int stage) {
    if (step < steps) {
      const int64_t first = step * kWarp;
      const int bytes = static_cast<int>(rows - first < kWarp ? rows - first : kWarp) * C * static_cast<int>(sizeof(E));
      const char* const from = reinterpret_cast<const char*>(static_cast<const E*>(batch.logits.data) + first * C);
      char* const to = reinterpret_cast<char*>(raw + stage * s.values);
      for (int at = lane() * 16; at < bytes; at += kWarp * 16) copy_async<16>(to + at, from + at, bytes - at < 16 ? bytes - at : 16);
    }
    commit_copies();
  };
  double ce = 0;
  bool bad = false;
  const auto read_label = [&](int64_t step) {
    const int64_t i = step * kWarp + lane();
    double one;
    return i < rows ? static_cast<int>(used_label(batch, i, one, bad)) : -1;
  };
  LDMI_UNROLL
  for (int ahead = 0; ahead < kStages - 1; ++ahead) copy(begin + ahead * stride, ahead);
  int stage = 0, unflushed = 0, label = read_label(begin);
  for (int64_t step = begin; step < steps; step += stride) {
    copy(step + (kStages - 1) * stride, (stage + kStages - 1) % kStages);
    const int next_label = read_label(step + stride);
    wait_copies<kStages - 1>();
    sync_warp();
    const E* const row = raw + stage * s.values + lane() * C;

    // The softmax of this lane's row. One that does not count is zeros; so is one whose sum is NaN, which is put into its 1 instead.
    float x[kWidth], maximum = -infinity<float>();
    if (C % 2 == 0) {
      struct alignas(2 * sizeof(E)) Pair {
        E value[2];
      };
      LDMI_UNROLL
      for (int c = 0; c < kWidth; c += 2) {
        x[c] = x[c + 1] = -infinity<float>();
        if (c < C) {
          const Pair two = *reinterpret_cast<const Pair*>(row + c);
          x[c] = widen(two.value[0]);
          x[c + 1] = widen(two.value[1]);
        }
      }
    } else {
      LDMI_UNROLL
      for (int c = 0; c < kWidth; ++c) x[c] = c < C ? widen(row[c]) : -infinity<float>();
    }
    LDMI_UNROLL
    for (int c = 0; c < kWidth; ++c) maximum = fmax(maximum, x[c]);
    float part[4] = {0, 0, 0, 0};
    LDMI_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      x[c] = exp(x[c] - maximum);  // of the padding: 0, or NaN in a row without any finite value
      part[c % 4] += x[c];
    }
    const float sum = (part[0] + part[1]) + (part[2] + part[3]), inverse = 1 / sum;
    const bool whole = isfinite(sum) && label >= 0;
    if (!whole) {
      LDMI_UNROLL
      for (int c = 0; c < kWidth; ++c) x[c] = 0;
    }
    const float factor = whole ? inverse : 0.0f;
    LDMI_UNROLL
    for (int c = 0; c < kWidth; c += 4) {
      Pack<float> four;
      LDMI_UNROLL
      for (int k = 0; k < 4; ++k) four[k] = x[c + k] * factor;
      shared_store16(tile + lane() * P + c, four);
    }
    if (step * kWarp + lane() < rows) {
      float row_lse = 0;
      if (label >= 0) {
        const float log_sum = log(sum);
        row_lse = maximum + log_sum;
        // in this order nothing is lost when all logits are far from 0
        ce += static_cast<double>(log_sum + (maximum - widen(row[static_cast<int>(column_of(label, C))])));
        atomic_add(s.count + label, 1u);
      }
      store(lse + step * kWarp + lane(), row_lse);
    }
    const bool broken = any(label >= 0 && !whole);
    const float one = label >= 0 && !whole ? not_a_number<float>() : 1.0f;
    sync_warp();

    LDMI_UNROLL
    for (int k = 0; k < kWarp; k += 8) {
      int labels[2];
      float ones[2] = {1, 1};
      LDMI_UNROLL
      for (int h = 0; h < 2; ++h) {
        labels[h] = shfl(label, k + h * 4 + lane() % 4) - lane() / 4;
        if (broken) ones[h] = shfl(one, k + h * 4 + lane() % 4);
      }
      M16N8K8::A hot[M];
      LDMI_UNROLL
      for (int m = 0; m < M; ++m) {
        LDMI_UNROLL
        for (int i = 0; i < 4; ++i) hot[m].value[i] = labels[i / 2] == m * 16 + i % 2 * 8 ? ones[i / 2] : 0.0f;
      }
      LDMI_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n * 8 >= C) continue;
        M16N8K8::B upper, lower;
        LDMI_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float p = tile[(k + i * 4 + lane() % 4) * P + n * 8 + lane() / 4];
          upper.value[i] = to_tf32(p);
          lower.value[i] = to_tf32(p - upper.value[i]);
        }
        LDMI_UNROLL
        for (int m = 0; m < M; ++m) {
          if (m * 16 >= K) continue;
          high[m][n] = mma(hot[m], upper, high[m][n]);
          low[m][n] = mma(hot[m], lower, low[m][n]);
        }
      }
    }
    // All lanes have been through the products: the tile and the stage are free.
    if (++unflushed == kRowsFlush) {
      flush();
      unflushed = 0;
    }
    label = next_label;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  flush();
  wait_copies<0>();
  const bool any_bad = sync_block_or(bad);
  double* const mine = partial.sums + block_idx() * (static_cast<int64_t>(K) * C + K);
  for (int at = thread_idx(); at < K * C; at += kRowsThreads) {
    double total = 0;
    LDMI_UNROLL
    for (int w = 0; w < Rows::kWarps; ++w) total += s.sums[(w * kWidth + at / C) * kWidth + at % C];
    store(mine + at, total);
  }
  for (int k = thread_idx(); k < K; k += kRowsThreads) store(mine + K * C + k, static_cast<double>(s.count[k]));
  ce = block_sum(ce, s.scratch);
  if (thread_idx() == 0) {
    store(partial.ce + block_idx(), ce);
    store(partial.bad + block_idx(), any_bad ? 1u : 0u);
  }
}

// Blocks of it that an SM is to hold
constexpr int rows_blocks(int width) { return width == 16 ? 4 : 2; }

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kRowsThreads, rows_blocks(kWidth)) joint_rows(Batch batch, float* lse, Partial partial) {
  rows_sums<E, kWidth>(batch, lse, partial);
}

// ------------------------------------------------------------------------------------------------------------ rows' sums alone

// A group of threads a row, online: shift (the maximum), inverse = 1 / sum (0 in rows that do not count) and, if K == C, the
// cross entropy. For soft targets and for rows longer than registers. ce_part and bad_part [blocks]
template <class E, int kGroup>
LDMI_DEVICE void sums_of_rows(const Batch& batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part,
                              uint32_t* bad_part) {
  using F = Compute<E>;
  constexpr int kGroups = kThreads / kGroup, kBatch = 4;
  Carve carve;
  F* const scratch = carve.take<F>(2 * kThreads / kWarp);
  double* const ce_scratch = carve.take<double>(kThreads / kWarp);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  const bool soft = batch.soft.data != nullptr;
  const int t = thread_idx() % kGroup;
  double ce = 0;
  bool bad = false;
  for (int64_t i = block_idx() * kGroups + thread_idx() / kGroup; i < rows; i += grid_dim() * kGroups) {
    double weight;
    int64_t label = 0;
    if (soft) {
      weight = used_weight(batch, i, bad);
    } else {
      label = used_label(batch, i, weight, bad);
    }
    if (weight == 0) {  // alike in the whole group
      if (t == 0) {
        store(lse + i, F{0});
        store(shift + i, F{0});
        store(inverse + i, F{0});
      }
      continue;
    }
    F maximum[1] = {-infinity<F>()}, sum[1] = {0};
    double log_sum = 0;
    if (batch.probs) {
      maximum[0] = 0;
      sum[0] = 1;
    } else {
      F mine = 0;
      for (int64_t c = t; c < C; c += kGroup * kBatch) {
        F x[kBatch], top = maximum[0];
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          const int64_t at = c + j * kGroup;
          x[j] = at < C ? static_cast<F>(widen(load_const(element<E>(batch.logits, i, at)))) : -infinity<F>();
        }
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) top = fmax(top, x[j]);
        if (top != maximum[0]) mine *= exp(maximum[0] - top);
        maximum[0] = top;
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) mine += x[j] == -infinity<F>() ? F{0} : exp(x[j] - top);
      }
      const F own = maximum[0];
      group_reduce<kGroup, true>(maximum, scratch);
      sum[0] = own == maximum[0] ? mine : mine * exp(own - maximum[0]);
      group_reduce<kGroup, false>(sum, scratch + kThreads / kWarp);
      if (!isfinite(maximum[0])) sum[0] = not_a_number<F>();
      log_sum = log(static_cast<double>(sum[0]));
    }
    if (t == 0) {
      store(lse + i, batch.probs ? F{0} : static_cast<F>(maximum[0] + static_cast<F>(log_sum)));
      store(shift + i, maximum[0]);
      store(inverse + i, 1 / sum[0]);
    }
    const auto minus_log = [&](int64_t c) {
      const double x = static_cast<double>(widen(load_const(element<E>(batch.logits, i, c))));
      return batch.probs ? -log(x) : log_sum + (static_cast<double>(maximum[0]) - x);
    };
    if (!soft) {
      if (t == 0) ce += weight * minus_log(column_of(label, C));
    } else if (batch.num_labels == C) {
      for (int64_t c = t; c < C; c += kGroup) {
        const F target = value_at<F>(batch.soft, i, c);
        // a zero in the target contributes nothing, also where the prediction is 0
        if (target != 0) ce += weight * static_cast<double>(target) * minus_log(c);
      }
    }
  }
  bad = sync_block_or(bad);
  ce = block_sum(ce, ce_scratch);
  if (thread_idx() == 0) {
    store(ce_part + block_idx(), ce);
    store(bad_part + block_idx(), bad ? 1u : 0u);
  }
}

template <class E, int kGroup>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2)
    joint_row_sums(Batch batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part, uint32_t* bad_part) {
  sums_of_rows<E, kGroup>(batch, lse, shift, inverse, ce_part, bad_part);
}

// -------------------------------------------------------------------------------------------------------------- many classes

// What a run of rows leaves when its first label began in an earlier run: that label, its row of S and its weight.
struct Sides {
  int64_t* label;  // [segments], kUnused when there is none
  double* sums;    // [segments, C]
  double* weight;  // [segments]
  double* ce;      // [segments]
};

// A group of kGroup threads (a warp or a block) walks a run of rows in the order of labels, kColumns columns a thread in accesses of
// kAccess values. Each label that begins in the run has its row of S and n stored; sort.start says which labels have none. With
// kGiven, shift and inverse are known: rows longer than a group's registers, by runs of columns.
template <class E, int kAccess, int kGroup, int kColumns, int kRows, bool kGiven>
LDMI_DEVICE void label_sums(const Batch& batch, const LabelOrder& sort, int64_t segments, const Compute<E>* shift,
                            const Compute<E>* inverse, Compute<E>* lse, double* S, double* n, const Sides& sides) {
  using F = Compute<E>;
  static_assert(kColumns % kAccess == 0);
  constexpr int kWarps = kGroup / kWarp;
  Carve carve;
  F* const scratch = carve.take<F>(2 * kRows * kWarps);
  const int64_t C = batch.logits.columns, used = load(sort.start + batch.num_labels);
  const int groups = block_dim() / kGroup, t = thread_idx() % kGroup;
  const Columns<kAccess, kGroup> column{t};
  const int64_t segment = block_idx() * groups + thread_idx() / kGroup;
  double ce = 0;
  if (segment < segments) {
    const int64_t begin = cut(used, segments, segment), end = cut(used, segments, segment + 1);
    int64_t side = kUnused;
    bool ignored = false;
    double unused_weight;
    // the label that the run before this one ends with
    const int64_t before =
        begin > 0 && begin < end ? used_label(batch, load(sort.order + begin - 1), unused_weight, ignored) : kUnused;
    for (int64_t first_column = 0; first_column < C; first_column += kGroup * kColumns) {
      const int left = static_cast<int>(C - first_column < kGroup * kColumns ? C - first_column : kGroup * kColumns);
      double sums[kColumns], run_weight = 0;
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) sums[j] = 0;
      int64_t current = kUnused;
      const auto finish_run = [&] {
        if (current == kUnused) return;
        double* const to = (current == before ? sides.sums + segment * C : S + current * C) + first_column;
        LDMI_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          if (column(j) < left) store(to + column(j), sums[j]);
          sums[j] = 0;
        }
        if (t == 0 && first_column == 0) store(current == before ? sides.weight + segment : n + current, run_weight);
        if (current == before) side = current;
        run_weight = 0;
      };
      const auto row_at = [&](int64_t at) { return lane() < kRows && at + lane() < end ? load(sort.order + at + lane()) : kUnused; };
      int64_t following = row_at(begin);
      for (int64_t at = begin; at < end; at += kRows) {
        F x[kRows][kColumns], maximum[kRows], sum[kRows];
        // lane u of each warp knows about row u
        const int64_t mine = following;
        following = row_at(at + kRows);
        int64_t row[kRows];
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          row[u] = shfl(mine, u);
          load_columns(element<E>(batch.logits, row[u] < 0 ? 0 : row[u], first_column), batch.logits.column_stride, column,
                       row[u] < 0 ? 0 : left, -infinity<F>(), x[u]);
        }
        double my_weight = 0;
        const int64_t my_label = mine < 0 ? kUnused : used_label(batch, mine, my_weight, ignored);
        if (batch.probs) {
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            LDMI_UNROLL
            for (int j = 0; j < kColumns; ++j) {
              x[u][j] = column(j) >= left ? F{0} : isfinite(x[u][j]) ? x[u][j] : not_a_number<F>();
            }
            maximum[u] = 0;
            sum[u] = 1;
          }
        } else {
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            maximum[u] = x[u][0];
            LDMI_UNROLL
            for (int j = 1; j < kColumns; ++j) maximum[u] = fmax(maximum[u], x[u][j]);
            if constexpr (kGiven) maximum[u] = row[u] >= 0 ? load(shift + row[u]) : F{0};
          }
          if constexpr (!kGiven) group_reduce<kGroup, true>(maximum, scratch);
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            sum[u] = 0;
            LDMI_UNROLL
            for (int j = 0; j < kColumns; ++j) {
              x[u][j] = column(j) < left ? exp(x[u][j] - maximum[u]) : F{0};
              sum[u] += x[u][j];
            }
          }
          if constexpr (!kGiven) group_reduce<kGroup, false>(sum, scratch + kRows * kWarps);
        }
        F my_inverse = 0;
        if (mine >= 0) {
          if constexpr (kGiven) {
            my_inverse = load(inverse + mine);
          } else {
            F my_maximum = maximum[0], my_sum = sum[0];
            LDMI_UNROLL
            for (int u = 1; u < kRows; ++u) {
              my_maximum = lane() == u ? maximum[u] : my_maximum;
              my_sum = lane() == u ? sum[u] : my_sum;
            }
            my_inverse = 1 / my_sum;
            if (t < kWarp) {
              const F own = static_cast<F>(widen(load_const(element<E>(batch.logits, mine, column_of(my_label, C)))));
              if (batch.probs) {
                ce -= my_weight * log(static_cast<double>(own));
                store(lse + mine, F{0});
              } else {
                const F log_sum = log(my_sum);
                // in this order nothing is lost when all logits are far from 0
                ce += my_weight * static_cast<double>(log_sum + (my_maximum - own));
                store(lse + mine, my_maximum + log_sum);
              }
            }
          }
        }
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          if (row[u] < 0) continue;  // alike in the whole group, as all of this is
          const int64_t label = shfl(my_label, u);
          if (label != current) {
            finish_run();
            current = label;
          }
          const double weight = shfl(my_weight, u);
          const F factor = shfl(my_inverse, u);
          run_weight += weight;
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) sums[j] = fma(static_cast<double>(x[u][j] * factor), weight, sums[j]);
        }
      }
      finish_run();
    }
    ce = warp_sum(ce);  // of the lanes of a group's first warp
    if (t == 0) {
      store(sides.label + segment, side);
      store(sides.ce + segment, ce);
    }
  }
  if constexpr (!kGiven) {
    const int64_t threads = grid_dim() * block_dim(), all = batch.logits.rows;
    for (int64_t at = used + block_idx() * block_dim() + thread_idx(); at < all; at += threads) {
      store(lse + load(sort.order + at), F{0});
    }
  }
}

template <class E, int kAccess, int kGroup, int kColumns, int kRows, bool kGiven>
LDMI_KERNEL void LDMI_BOUNDS((kGroup == kWarp ? static_cast<int>(plan::walk_threads(kWarp * kColumns)) : kGroup),
                             (kGroup == kThreads ? 1
                              : kGroup == kWarp  ? static_cast<int>(plan::walk_blocks(kWarp * kColumns))
                                                 : 3))
    joint_by_label(Batch batch, LabelOrder sort, int64_t segments, const Compute<E>* shift, const Compute<E>* inverse, Compute<E>* lse,
                   double* S, double* n, Sides sides) {
  label_sums<E, kAccess, kGroup, kColumns, kRows, kGiven>(batch, sort, segments, shift, inverse, lse, S, n, sides);
}

// Adds what labels left in the sides of later runs, zeros for labels that have no rows, NaN throughout when something is bad, and
// the cross entropy from `ce_part`. A block a label, in the order of the runs.
LDMI_DEVICE void add_sides(int64_t labels, int64_t C, const LabelOrder& sort, int64_t segments, const Sides& sides,
                           const double* ce_part, int64_t ce_parts, double* S, double* n, double* ce) {
  Carve carve;
  double* const scratch = carve.take<double>(kThreads / kWarp);
  bool bad = false;
  for (int64_t p = thread_idx(); p < sort.pieces; p += kThreads) bad |= load(sort.bad + p) != 0;
  bad = sync_block_or(bad);
  const int64_t used = load(sort.start + labels);
  for (int64_t k = block_idx(); k < labels; k += grid_dim()) {
    const int64_t begin = load(sort.start + k), end = load(sort.start + k + 1);
    // the runs first .. last begin within the label, not with it
    int64_t low = 0, high = segments;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cut(used, segments, middle) > begin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t first = low;
    int64_t last = first;
    while (last < segments && cut(used, segments, last) < end) ++last;
    if (begin == end || bad || first < last) {
      for (int64_t c = thread_idx(); c < C; c += kThreads) {
        double total = begin == end ? 0.0 : load(S + k * C + c);
        for (int64_t s = first; s < last && !bad; ++s) {
          if (load(sides.label + s) == k) total += load(sides.sums + s * C + c);
        }
        store(S + k * C + c, bad ? not_a_number<double>() : total);
      }
      if (thread_idx() == 0) {
        double total = begin == end ? 0.0 : load(n + k);
        for (int64_t s = first; s < last && !bad; ++s) {
          if (load(sides.label + s) == k) total += load(sides.weight + s);
        }
        store(n + k, bad ? not_a_number<double>() : total);
      }
    }
  }
  if (block_idx() == 0) {
    double total = 0;
    for (int64_t p = thread_idx(); p < ce_parts; p += kThreads) total += load(ce_part + p);
    total = block_sum(total, scratch);
    if (thread_idx() == 0) store(ce, bad ? not_a_number<double>() : total);
  }
}

template <int kBlock>
LDMI_KERNEL void LDMI_BOUNDS(kBlock, 1) joint_add_sides(int64_t labels, int64_t C, LabelOrder sort, int64_t segments, Sides sides,
                                                        const double* ce_part, int64_t ce_parts, double* S, double* n, double* ce) {
  add_sides(labels, C, sort, segments, sides, ce_part, ce_parts, S, n, ce);
}

// -------------------------------------------------------------------------------------------------------------- soft targets

inline constexpr int kSoftTile = 64, kSoftRows = 32, kSoftPitch = 72;

// S = T^T diag(w) P, a tile of 64 x 64 of S and a split of the rows a block; 8 warps, 16 x 32 of the tile each.
// partial [splits, K * C + K]
template <class E>
LDMI_DEVICE void soft_sums(const Batch& batch, const Compute<E>* shift, const Compute<E>* inverse, int64_t splits, double* partial) {
  using F = Compute<E>;
  Carve carve;
  F* const predictions = carve.take<F>(kSoftRows * kSoftPitch);
  F* const targets = carve.take<F>(kSoftRows * kSoftPitch);
  double* const weights = carve.take<double>(kSoftRows);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  const int64_t across = (C + kSoftTile - 1) / kSoftTile, down = (K + kSoftTile - 1) / kSoftTile;
  const int my_k = warp() % 4 * 16, my_c = warp() / 4 * 32;
  for (int64_t job = block_idx(); job < across * down * splits; job += grid_dim()) {
    const int64_t split = job / (across * down), k0 = job / across % down * kSoftTile, c0 = job % across * kSoftTile;
    const int64_t begin = cut(rows, splits, split), end = cut(rows, splits, split + 1);
    M8N8K4::C product[2][4];
    double count[2] = {0, 0};
    LDMI_UNROLL
    for (int m = 0; m < 2; ++m) {
      LDMI_UNROLL
      for (int j = 0; j < 4; ++j) product[m][j].value[0] = product[m][j].value[1] = 0;
    }
    for (int64_t base = begin; base < end; base += kSoftRows) {
      sync_block();  // the product before is done
      if (thread_idx() < kSoftRows) {
        const int64_t i = base + thread_idx();
        bool ignored = false;
        weights[thread_idx()] = i < end ? used_weight(batch, i, ignored) : 0.0;
      }
      sync_block();
      for (int at = thread_idx(); at < kSoftRows * kSoftTile; at += kThreads) {
        const int r = at / kSoftTile, j = at % kSoftTile;
        const int64_t i = base + r;
        F p = 0, target = 0;
        if (weights[r] != 0) {
          if (c0 + j < C) {
            p = static_cast<F>(widen(load_const(element<E>(batch.logits, i, c0 + j))));
            if (batch.probs) {
              if (!isfinite(p)) p = not_a_number<F>();
            } else {
              p = exp(p - load(shift + i)) * load(inverse + i);
            }
          }
          if (k0 + j < K) target = value_at<F>(batch.soft, i, k0 + j);
        }
        predictions[r * kSoftPitch + j] = p;
        targets[r * kSoftPitch + j] = target;
      }
      sync_block();
      for (int step = 0; step < kSoftRows / 4; ++step) {
        const int r = step * 4 + lane() % 4;
        double a[2], b[4];
        LDMI_UNROLL
        for (int m = 0; m < 2; ++m) {
          a[m] = static_cast<double>(targets[r * kSoftPitch + my_k + m * 8 + lane() / 4]) * weights[r];
          if (my_c == 0 && c0 == 0) count[m] += a[m];
        }
        LDMI_UNROLL
        for (int j = 0; j < 4; ++j) b[j] = static_cast<double>(predictions[r * kSoftPitch + my_c + j * 8 + lane() / 4]);
        LDMI_UNROLL
        for (int m = 0; m < 2; ++m) {
          LDMI_UNROLL
          for (int j = 0; j < 4; ++j) product[m][j] = mma(a[m], b[j], product[m][j]);
        }
      }
    }
    double* const mine = partial + split * (K * C + K);
    LDMI_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int64_t k = k0 + my_k + m * 8 + lane() / 4;
      LDMI_UNROLL
      for (int j = 0; j < 4; ++j) {
        LDMI_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int64_t c = c0 + my_c + j * 8 + M8N8K4::c_col(lane(), i);
          if (k < K && c < C) store(mine + k * C + c, product[m][j].value[i]);
        }
      }
      const double total = warp_sum<4>(count[m]);
      if (my_c == 0 && c0 == 0 && k < K && lane() % 4 == 0) store(mine + K * C + k, total);
    }
  }
}

template <class E>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2)
    joint_soft(Batch batch, const Compute<E>* shift, const Compute<E>* inverse, int64_t splits, double* partial) {
  soft_sums<E>(batch, shift, inverse, splits, partial);
}

// ------------------------------------------------------------------------------------------------------------------ launchers

// The memory of each way, as csrc/plan counts it, and the shared memory of its steps

inline Partial take_partial(Workspace& work, int64_t parts, int64_t ce_parts, int64_t entries) {
  Partial out{};
  out.sums = work.take<double>(parts * entries);
  out.parts = parts;
  out.ce = work.take<double>(ce_parts);
  out.bad = work.take<uint32_t>(ce_parts);
  out.ce_parts = ce_parts;
  return out;
}

inline Sides take_sides(Workspace& work, int64_t segments, int64_t C) {
  Sides out{};
  out.label = work.take<int64_t>(segments);
  out.sums = work.take<double>(segments * C);
  out.weight = work.take<double>(segments);
  out.ce = work.take<double>(segments);
  return out;
}

// Whether joint_rows takes the batch, and not joint_tile
template <class E>
bool by_rows(const Batch& batch) {
  return sizeof(E) <= 4 && batch.weights.data == nullptr && !batch.probs && is_flat(batch.logits);
}

template <class E, int kWidth>
size_t rows_smem(int64_t C) {
  Carve carve;
  const JointRows<E, kWidth> rows(carve, C);
  static_cast<void>(rows);
  return carve.bytes();
}

template <class E, int kWidth>
size_t tile_smem(int64_t C) {
  Carve carve;
  const JointTile<E, kWidth> tile(carve, C);
  static_cast<void>(tile);
  Carve again;  // the groups' sums, in the same place
  again.take<double>(kWidth * kWidth);
  again.take<double>(kWidth);
  again.take<double>(kThreads / kWarp);
  return carve.bytes() > again.bytes() ? carve.bytes() : again.bytes();
}

template <class F>
size_t row_sums_smem() {
  Carve carve;
  carve.take<F>(2 * kThreads / kWarp);
  carve.take<double>(kThreads / kWarp);
  return carve.bytes();
}

template <class F>
size_t soft_smem() {
  Carve carve;
  carve.take<F>(kSoftRows * kSoftPitch);
  carve.take<F>(kSoftRows * kSoftPitch);
  carve.take<double>(kSoftRows);
  return carve.bytes();
}

template <class E, int kWidth>
int launch_joint_tile(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                      const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  const int64_t entries = batch.num_labels * batch.logits.columns;
  Workspace work(workspace);
  const Partial partial = take_partial(work, plan.blocks, plan.blocks, entries + batch.num_labels);
  Grid grid;
  grid.blocks = plan.blocks;
  int error = 0;
  if (by_rows<E>(batch)) {
    if constexpr (sizeof(E) <= 4) {
      grid.threads = kRowsThreads;
      grid.smem = rows_smem<E, kWidth>(batch.logits.columns);
      error = launch(joint_rows<E, kWidth>, grid, stream, batch, lse, partial);
    }
  } else {
    grid.threads = kThreads;
    grid.smem = tile_smem<E, kWidth>(batch.logits.columns);
    error = launch(joint_tile<E, kWidth>, grid, stream, batch, lse, partial);
  }
  if (error != 0) return error;
  return launch_finish(partial, entries, batch.num_labels, S, n, ce, limits, stream);
}

template <class E>
int launch_row_sums(const Batch& batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part, uint32_t* bad_part,
                    int64_t blocks, Stream stream) {
  Grid grid;
  grid.blocks = blocks;
  grid.threads = kThreads;
  grid.smem = row_sums_smem<Compute<E>>();
  if (batch.logits.columns <= plan::kWarpSums) {
    return launch(joint_row_sums<E, kWarp>, grid, stream, batch, lse, shift, inverse, ce_part, bad_part);
  }
  return launch(joint_row_sums<E, kThreads>, grid, stream, batch, lse, shift, inverse, ce_part, bad_part);
}

template <class E>
int launch_joint_by_label(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                          const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  Workspace work(workspace);
  const LabelOrder sort = take_order(work, plan.sort, rows, K);
  const Sides sides = take_sides(work, plan.segments, C);
  int error = launch_sort(batch, sort, plan.sort, stream);
  if (error != 0) return error;
  const bool given = C > plan::kBlockClasses;
  F *shift = nullptr, *inverse = nullptr;
  double* ce_part = sides.ce;
  int64_t ce_parts = plan.segments;
  if (given) {
    ce_parts = plan.blocks;
    shift = work.take<F>(rows);
    inverse = work.take<F>(rows);
    ce_part = work.take<double>(ce_parts);
    uint32_t* const bad_part = work.take<uint32_t>(ce_parts);
    error = launch_row_sums<E>(batch, lse, shift, inverse, ce_part, bad_part, ce_parts, stream);
    if (error != 0) return error;
  }
  error = with_access<E>(batch.logits, [&](auto access) {
    constexpr int kAccess = decltype(access)::value;
    constexpr int kWide = sizeof(E) == 8 ? 1 : 2;
    const auto start = [&](auto kernel, int group, int kernel_rows) {
      Grid grid;
      grid.threads = group == kWarp ? static_cast<int>(plan::walk_threads(C)) : group;
      grid.blocks = group == kWarp ? plan.blocks : plan.segments;
      Carve carve;
      carve.take<F>(2 * kernel_rows * (group / kWarp));
      grid.smem = carve.bytes();
      return launch(kernel, grid, stream, batch, sort, plan.segments, shift, inverse, lse, S, n, sides);
    };
    // value by value the addresses take registers: fewer rows under way, and fewer columns a thread
    constexpr int kRows = kAccess == 1 ? kWide : 2 * kWide;
    if constexpr (kAccess <= 4) {
      if (C <= plan::kLanes * 4) return start(joint_by_label<E, kAccess, kWarp, 4, kRows, false>, kWarp, kRows);
    }
    if (C <= plan::kLanes * 8) return start(joint_by_label<E, kAccess, kWarp, 8, kRows, false>, kWarp, kRows);
    if constexpr (sizeof(E) < 8 && kAccess > 1) {
      if (C <= plan::kLanes * 16) return start(joint_by_label<E, kAccess, kWarp, 16, 2, false>, kWarp, 2);
    }
    // 32 columns a lane leave registers for too few warps: at 65536 x 1000 that took 314 us, this 230 (H100)
    if (C <= plan::kBlockClasses / 4) return start(joint_by_label<E, kAccess, 128, 8, 2 * kWide, false>, 128, 2 * kWide);
    if (!given) return start(joint_by_label<E, kAccess, kThreads, 16, kWide, false>, kThreads, kWide);
    return start(joint_by_label<E, kAccess, kThreads, 16, kWide, true>, kThreads, kWide);
  });
  if (error != 0) return error;
  Grid grid;
  grid.blocks = K < 4 * limits.sms ? K : 4 * limits.sms;
  grid.threads = kThreads;
  Carve carve;
  carve.take<double>(kThreads / kWarp);
  grid.smem = carve.bytes();
  return launch(joint_add_sides<kThreads>, grid, stream, K, C, sort, plan.segments, sides, ce_part, ce_parts, S, n, ce);
}

template <class E>
int launch_joint_soft(const Batch& batch, double* S, double* n, Compute<E>* lse, double* ce, void* workspace,
                      const plan::CudaJoint& plan, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels, splits = plan.segments;
  Workspace work(workspace);
  F* const shift = work.take<F>(rows);
  F* const inverse = work.take<F>(rows);
  const Partial partial = take_partial(work, splits, plan.blocks, K * C + K);
  if (const int error = launch_row_sums<E>(batch, lse, shift, inverse, partial.ce, partial.bad, plan.blocks, stream); error != 0)
    return error;
  Grid grid;
  const int64_t jobs = (C + kSoftTile - 1) / kSoftTile * ((K + kSoftTile - 1) / kSoftTile) * splits;
  grid.blocks = jobs < 2 * limits.sms ? jobs : 2 * limits.sms;
  grid.threads = kThreads;
  grid.smem = soft_smem<F>();
  if (const int error = launch(joint_soft<E>, grid, stream, batch, shift, inverse, splits, partial.sums); error != 0) return error;
  return launch_finish(partial, K * C, K, S, n, ce, limits, stream);
}

template <class E>
int launch_joint(const Batch& batch, double* S, double* n, void* lse, double* ce, void* workspace, const DeviceLimits& limits,
                 Stream stream) {
  const plan::CudaJoint plan = plan::cuda_joint(batch.logits.rows, batch.logits.columns, batch.num_labels, batch.soft.data != nullptr,
                                                static_cast<int64_t>(sizeof(E)), limits);
  Compute<E>* const row_lse = static_cast<Compute<E>*>(lse);
  if (plan.order == plan::CudaOrder::kSoft) return launch_joint_soft<E>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  if (plan.order == plan::CudaOrder::kByLabel)
    return launch_joint_by_label<E>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  if (plan.width == 16) return launch_joint_tile<E, 16>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
  return launch_joint_tile<E, 32>(batch, S, n, row_lse, ce, workspace, plan, limits, stream);
}

}  // namespace ldmi::cuda
