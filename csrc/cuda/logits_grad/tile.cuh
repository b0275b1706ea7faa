// grad_tile, for few classes: tiles of rows in shared memory, next to the table of V.
#pragma once

#include "table.cuh"

namespace ldmi::cuda {

template <class E, int kWidth>
struct GradTile {
  using F = Compute<E>;
  static constexpr int kRows = static_cast<int>(plan::tile_rows(kWidth, sizeof(E)));
  static constexpr int kLanes = kWidth / 8;
  // two stages of rows that are read ahead; gradients are written in the place of logits
  E* raw;
  RowFactors* factors;
  F* shift;
  int* label;
  F* table;
  double* magnitude;
  int values;

  LDMI_HOST_DEVICE GradTile(Carve& carve, int64_t classes, int64_t labels) {
    values = kRows * static_cast<int>(classes);
    raw = carve.take<E>(2 * values);
    factors = carve.take<RowFactors>(2 * kRows);
    shift = carve.take<F>(2 * kRows);
    label = carve.take<int>(2 * kRows);
    table = carve.take<F>(labels * classes);
    magnitude = carve.take<double>(labels);
  }
};

template <class E, int kWidth>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2)
    grad_tile(Batch batch, const Compute<E>* lse, Table<Compute<E>> table, const double* scale, const double* ce_scale, E* grad) {
  using Tile = GradTile<E, kWidth>;
  using F = Compute<E>;
  constexpr int R = Tile::kRows, L = Tile::kLanes;
  const int64_t rows = batch.logits.rows, chunks = (rows + R - 1) / R;
  const int C = static_cast<int>(batch.logits.columns), K = static_cast<int>(batch.num_labels);
  const bool flat = is_flat(batch.logits), flat_out = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const double minus_scale = -load_const(scale), with_ce = load_const(ce_scale);
  Carve carve;
  const Tile s(carve, C, K);
  for (int at = thread_idx(); at < K * C; at += kThreads) s.table[at] = load_const(table.values + at / C * table.pitch + at % C);
  for (int k = thread_idx(); k < K; k += kThreads) s.magnitude[k] = load_const(table.magnitude + k);
  sync_block();
  bool ignored = false;
  const auto rows_of = [&](int64_t chunk) { return static_cast<int>(rows - chunk * R < R ? rows - chunk * R : R); };
  int stage = 0;
  if (flat) {
    if (block_idx() < chunks) copy_flat(batch.logits, block_idx() * R, rows_of(block_idx()), s.raw);
    commit_copies();
  }
  for (int64_t chunk = block_idx(); chunk < chunks; chunk += grid_dim(), stage ^= 1) {
    const int here = rows_of(chunk);
    E* const raw = s.raw + stage * s.values;
    RowFactors* const factors = s.factors + stage * R;
    F* const shift = s.shift + stage * R;
    int* const labels = s.label + stage * R;
    if (!flat) copy_strided(batch.logits, chunk * R, here, raw);
    if (thread_idx() < here) {
      const int r = thread_idx();
      double weight;
      const int64_t label = used_label(batch, chunk * R + r, weight, ignored);
      labels[r] = static_cast<int>(label);
      factors[r] = {label >= 0 ? weight * (minus_scale * s.magnitude[label]) : 0.0, weight * with_ce};
      shift[r] = load_const(lse + chunk * R + r);
    }
    if (flat) wait_copies<0>();
    sync_block();  // the tile and the factors of its rows are complete; the previous tile has been written
    if (flat) {
      const int64_t next = chunk + grid_dim();
      if (next < chunks) copy_flat(batch.logits, next * R, rows_of(next), s.raw + (stage ^ 1) * s.values);
      commit_copies();
    }

    for (int r = thread_idx() / L; r < R; r += kThreads / L) {
      const bool inside = r < here;
      const int label = inside ? labels[r] : -1, first = lane() % L;
      const F* const V = s.table + (label >= 0 ? label : 0) * C;
      E* const row = raw + r * C;
      F x[8], v[8], sum[1] = {0}, product[1] = {0};
      LDMI_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int c = first + L * j;
        x[j] = label >= 0 && c < C ? static_cast<F>(widen(row[c])) : F{0};
        v[j] = label >= 0 && c < C ? V[c] : F{0};
      }
      const RowFactors row_factors = inside ? factors[r] : RowFactors{0, 0};
      const int own = label >= 0 ? static_cast<int>(column_of(label, C)) : -1;
      if (batch.probs) {
        const F a = static_cast<F>(row_factors.alpha);
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          F value = a * v[j];
          if (first + L * j == own && with_ce != 0) value -= static_cast<F>(row_factors.gamma / static_cast<double>(x[j]));
          x[j] = value;
        }
      } else {
        const F m = inside ? shift[r] : F{0};
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          x[j] = label >= 0 && first + L * j < C ? exp(x[j] - m) : F{0};
          sum[0] += x[j];
          product[0] = fma(x[j], v[j], product[0]);
        }
        group_reduce<L, false>(sum, static_cast<F*>(nullptr));
        group_reduce<L, false>(product, static_cast<F*>(nullptr));
        const ColumnFactors<F> column(sum[0], product[0], row_factors);
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          x[j] = column(x[j], v[j]);
          if (first + L * j == own && with_ce != 0) x[j] -= static_cast<F>(row_factors.gamma);
        }
      }
      if (inside) {
        LDMI_UNROLL
        for (int j = 0; j < 8; ++j) {
          const int c = first + L * j;
          if (c < C) row[c] = label >= 0 ? narrow<E>(x[j]) : E{};
        }
      }
    }
    sync_block();

    E* const to = grad + chunk * R * C;
    const int count = here * C, whole = flat_out ? count / Pack<E>::kCount * Pack<E>::kCount : 0;
    for (int at = thread_idx() * Pack<E>::kCount; at < whole; at += kThreads * Pack<E>::kCount) {
      store16_streaming(to + at, shared_load16(raw + at));
    }
    for (int at = whole + thread_idx(); at < count; at += kThreads) store_streaming(to + at, raw[at]);
  }
  wait_copies<0>();
}

}  // namespace ldmi::cuda
