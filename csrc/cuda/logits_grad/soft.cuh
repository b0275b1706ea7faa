// grad_soft, for soft targets: T V, in tiles of rows and columns, takes the place of V[y_i].
#pragma once

#include "table.cuh"

namespace ldmi::cuda {

inline constexpr int kSoftGradRows = 32, kSoftGradColumns = 64, kSoftGradDepth = 32;
inline constexpr int kSoftGradPitch = kSoftGradDepth + 1;

// A block takes 32 rows at a time. Warp w has the rows 4 w .. 4 w + 3, and a lane has two columns of 64. T V of a run of columns is a
// tile in registers. The sums over a row need all columns first, so tiles are computed twice: once for <p, T V>, once for the
// gradient. Products are in fp32 (fp64 for fp64 logits), with the targets as they are and V divided by its largest magnitude.
template <class E>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, (sizeof(E) == 8 ? 1 : 2))
    grad_soft(Batch batch, const Compute<E>* lse, Table<Compute<E>> table, const double* scale, const double* ce_scale, E* grad) {
  using F = Compute<E>;
  constexpr int kMine = kSoftGradRows / (kThreads / kWarp);
  Carve carve;
  F* const targets = carve.take<F>(kSoftGradRows * kSoftGradPitch);
  F* const values = carve.take<F>(kSoftGradDepth * kSoftGradColumns);
  double* const largest_of = carve.take<double>(kThreads / kWarp);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  const double minus_scale = -load_const(scale), with_ce = load_const(ce_scale);
  // the largest magnitude of all rows of V; NaN passes through the quotients
  double largest = 0;
  for (int64_t k = thread_idx(); k < K; k += kThreads) largest = fmax(largest, load_const(table.magnitude + k));
  largest = warp_max(largest);
  if (lane() == 0) largest_of[warp()] = largest;
  sync_block();
  for (int w = 0; w < kThreads / kWarp; ++w) largest = fmax(largest, largest_of[w]);
  const double inverse_largest = 1 / largest;

  for (int64_t base = block_idx() * kSoftGradRows; base < rows; base += grid_dim() * kSoftGradRows) {
    double weight[kMine];
    F shift[kMine], sum[kMine], product[kMine], mass[kMine];
    bool ignored = false;
    LDMI_UNROLL
    for (int u = 0; u < kMine; ++u) {
      const int64_t i = base + warp() * kMine + u;
      weight[u] = i < rows ? used_weight(batch, i, ignored) : 0.0;
      shift[u] = i < rows ? load_const(lse + i) : F{0};
      sum[u] = product[u] = mass[u] = 0;
    }
    F g[kMine][2];
    // g = T V of the columns first + lane, first + 32 + lane
    const auto multiply = [&](int64_t first, bool with_mass) {
      LDMI_UNROLL
      for (int u = 0; u < kMine; ++u) g[u][0] = g[u][1] = 0;
      for (int64_t k0 = 0; k0 < K; k0 += kSoftGradDepth) {
        sync_block();
        for (int at = thread_idx(); at < kSoftGradRows * kSoftGradDepth; at += kThreads) {
          const int r = at / kSoftGradDepth, k = at % kSoftGradDepth;
          // rows that do not count are not read; `weight` holds the rows of this warp only
          const bool inside = base + r < rows && k0 + k < K && used_weight(batch, base + r, ignored) != 0;
          targets[r * kSoftGradPitch + k] = inside ? value_at<F>(batch.soft, base + r, k0 + k) : F{0};
        }
        for (int at = thread_idx(); at < kSoftGradDepth * kSoftGradColumns; at += kThreads) {
          const int64_t k = k0 + at / kSoftGradColumns, c = first + at % kSoftGradColumns;
          const bool inside = k < K && c < C;
          values[at] = inside ? static_cast<F>(static_cast<double>(load_const(table.values + k * table.pitch + c)) *
                                               (load_const(table.magnitude + k) * inverse_largest))
                              : F{0};
        }
        sync_block();
        for (int k = 0; k < kSoftGradDepth; ++k) {
          const F v0 = values[k * kSoftGradColumns + lane()], v1 = values[k * kSoftGradColumns + kWarp + lane()];
          LDMI_UNROLL
          for (int u = 0; u < kMine; ++u) {
            const F target = targets[(warp() * kMine + u) * kSoftGradPitch + k];
            g[u][0] = fma(target, v0, g[u][0]);
            g[u][1] = fma(target, v1, g[u][1]);
            if (with_mass) mass[u] += target;
          }
        }
      }
    };
    const auto logit = [&](int u, int64_t c) {
      return static_cast<F>(widen(load_const(element<E>(batch.logits, base + warp() * kMine + u, c))));
    };
    const bool one_tile = C <= kSoftGradColumns;  // then the tile of the first pass serves the second
    for (int64_t first = 0; first < C && !batch.probs; first += kSoftGradColumns) {
      multiply(first, first == 0);
      LDMI_UNROLL
      for (int u = 0; u < kMine; ++u) {
        LDMI_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int64_t c = first + j * kWarp + lane();
          if (c >= C || weight[u] == 0) continue;
          const F e = exp(logit(u, c) - shift[u]);
          sum[u] += e;
          product[u] = fma(e, g[u][j], product[u]);
        }
      }
    }
    if (!batch.probs) {
      group_reduce<kWarp, false>(sum, static_cast<F*>(nullptr));
      group_reduce<kWarp, false>(product, static_cast<F*>(nullptr));
    }
    for (int64_t first = 0; first < C; first += kSoftGradColumns) {
      if (batch.probs || !one_tile) multiply(first, false);
      LDMI_UNROLL
      for (int u = 0; u < kMine; ++u) {
        const int64_t i = base + warp() * kMine + u;
        if (i >= rows) continue;
        const double gamma = weight[u] * with_ce;
        const RowFactors factors{weight[u] * (minus_scale * largest), gamma * static_cast<double>(mass[u])};
        const ColumnFactors<F> factor(batch.probs ? F{1} : sum[u], product[u], factors);
        LDMI_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int64_t c = first + j * kWarp + lane();
          if (c >= C) continue;
          F value = 0;
          if (weight[u] != 0) {
            const F x = logit(u, c);
            value = batch.probs ? factor.a * g[u][j] : factor(exp(x - shift[u]), g[u][j]);
            if (with_ce != 0) {
              const F target = value_at<F>(batch.soft, i, c);
              if (!batch.probs) {
                value -= static_cast<F>(gamma) * target;
              } else if (target != 0) {
                value -= static_cast<F>(gamma) * target / x;
              }
            }
          }
          store(grad + i * C + c, narrow<E>(value));
        }
      }
    }
  }
}

}  // namespace ldmi::cuda
