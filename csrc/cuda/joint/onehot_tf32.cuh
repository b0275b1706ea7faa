// accumulate_onehot_tf32, for at most 32 labels and classes without weights: one-hot^T P on the tensor cores, P as two tf32 numbers.
#pragma once

#include "partial_sums.cuh"

namespace ldmi::cuda {

inline constexpr int kOnehotTf32Threads = 128;
inline constexpr int kOnehotTf32Flush = 4;  // steps of 32 rows between two additions of the fp32 sums to those in fp64

// Shared memory of joint_onehot_tf32. Before the end each warp uses its own part only.
template <class E, int kWidth>
struct OnehotTf32Space {
  static constexpr int kWarps = kOnehotTf32Threads / kWarp;
  static constexpr int kStages = kWidth == 16 ? 4 : 2;
  static constexpr int kPitch = kWidth + 4;  // stores of 16 bytes by neighbouring rows, and fragments, fall on different banks
  E* raw;                                    // [warps, stages, 32 * C]
  float* tile;                               // [warps, 32, kPitch]
  double* sums;                              // [warps, kWidth, kWidth]
  uint32_t* count;                           // [kWidth]
  double* scratch;
  int values;  // of a stage

  LDMI_HOST_DEVICE OnehotTf32Space(Carve& carve, int64_t classes) {
    values = kWarp * static_cast<int>(classes);
    raw = carve.take<E>(kWarps * kStages * values);
    tile = carve.take<float>(kWarps * kWarp * kPitch);
    sums = carve.take<double>(kWarps * kWidth * kWidth);
    count = carve.take<uint32_t>(kWidth);
    scratch = carve.take<double>(kWarps);
  }
};

// Contiguous logits of at most 32 bits, labels without weights, at most 32 labels and classes. Each warp works alone: 32 rows per
// step, one lane per row for the softmax, and then one-hot^T P on the tensor cores.
//
// Accuracy. P is fp32 and enters as hi + lo, both tf32, rounded to nearest. At most 2^-11 of 2^-11 of it is lost, four units of fp32,
// which is less than its own rounding by the softmax. Products with 0 and 1 are exact. hi and lo have separate sums, so equal rows add
// up without any rounding (11 bits each, 128 rows), and a joint of equal rows stays singular. Otherwise an fp32 partial sum goes
// through 16 steps of the tensor core, with an error of at most 2^-23 of itself per step (the hardware may truncate), before it is
// added to fp64.
//
// Each block writes its part of every sum.
template <class E, int kWidth>
LDMI_DEVICE void accumulate_onehot_tf32(const Batch& batch, float* lse, const Partial& partial) {
  using Rows = OnehotTf32Space<E, kWidth>;
  constexpr int P = Rows::kPitch, M = kWidth / 16, N = kWidth / 8, kStages = Rows::kStages;
  const int64_t rows = batch.logits.rows, steps = (rows + kWarp - 1) / kWarp;
  const int C = static_cast<int>(batch.logits.columns), K = static_cast<int>(batch.num_labels);
  Carve carve;
  const Rows s(carve, C);
  E* const raw = s.raw + warp() * kStages * s.values;
  float* const tile = s.tile + warp() * kWarp * P;
  double* const sums = s.sums + warp() * kWidth * kWidth;
  for (int at = lane(); at < kWidth * kWidth; at += kWarp) sums[at] = 0;
  for (int k = thread_idx(); k < kWidth; k += kOnehotTf32Threads) s.count[k] = 0;
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

    // The softmax of this lane's row. A row that does not count becomes zeros. So does a row whose sum is NaN; its 1 becomes NaN
    // instead.
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
        // this order of operations loses no digits when all logits are far from 0
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
    // All lanes have done the products: the tile and the stage are free.
    if (++unflushed == kOnehotTf32Flush) {
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
  for (int at = thread_idx(); at < K * C; at += kOnehotTf32Threads) {
    double total = 0;
    LDMI_UNROLL
    for (int w = 0; w < Rows::kWarps; ++w) total += s.sums[(w * kWidth + at / C) * kWidth + at % C];
    store(mine + at, total);
  }
  for (int k = thread_idx(); k < K; k += kOnehotTf32Threads) store(mine + K * C + k, static_cast<double>(s.count[k]));
  ce = block_sum(ce, s.scratch);
  if (thread_idx() == 0) {
    store(partial.ce + block_idx(), ce);
    store(partial.bad + block_idx(), any_bad ? 1u : 0u);
  }
}

// Resident blocks per SM that the registers have to allow
constexpr int onehot_tf32_blocks(int width) { return width == 16 ? 4 : 2; }

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kOnehotTf32Threads, onehot_tf32_blocks(kWidth))
    joint_onehot_tf32(Batch batch, float* lse, Partial partial) {
  accumulate_onehot_tf32<E, kWidth>(batch, lse, partial);
}

template <class E, int kWidth>
size_t onehot_tf32_smem(int64_t C) {
  Carve carve;
  const OnehotTf32Space<E, kWidth> rows(carve, C);
  static_cast<void>(rows);
  return carve.bytes();
}

}  // namespace ldmi::cuda
