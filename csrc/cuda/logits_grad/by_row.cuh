// grad_by_row, for more classes: one group of threads per row. V's row comes through the caches; when the table exceeds level 2, rows
// are taken in the order of their labels.
#pragma once

#include "table.cuh"

namespace ldmi::cuda {

// What a lane holds of a row: its number (kUnused: none), its label (-1: it does not count) and its factors.
template <class F>
struct RowOf {
  int64_t row = kUnused;
  int label = -1;
  F alpha = 0, gamma = 0, shift = 0;
};

// One group of kGroup threads per row, kColumns columns per thread at a time, in accesses of kAccess values. kLong: rows longer than
// the registers of the group are read twice. `order` may be null: rows in their natural order. Lane u of each warp looks up what row u
// of the next kRows rows needs while the current rows are in flight.
template <class E, int kAccess, int kGroup, int kColumns, int kRows, bool kLong>
LDMI_KERNEL void LDMI_BOUNDS((kGroup == kWarp ? kThreads : kGroup), (kGroup == kThreads ? 1
                                                                     : kGroup == kWarp  ? 2
                                                                                        : 3))
    grad_by_row(Batch batch, const Compute<E>* lse, Table<Compute<E>> table, const double* scale, const double* ce_scale,
                const int64_t* order, E* grad) {
  using F = Compute<E>;
  constexpr int kWarps = kGroup / kWarp;
  Carve carve;
  F* const scratch = carve.take<F>(4 * kRows * kWarps);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  const double minus_scale = -load_const(scale), with_ce = load_const(ce_scale);
  const int groups = block_dim() / kGroup;
  const Columns<kAccess, kGroup> column{thread_idx() % kGroup};
  const int64_t group = block_idx() * groups + thread_idx() / kGroup, all = grid_dim() * groups;
  // one run of rows per group, so that in the order of the labels V's row stays in the caches
  const int64_t end = cut(rows, all, group + 1);
  int stage = 0;
  bool ignored = false;
  const auto look_up = [&](int64_t at) {
    RowOf<F> found;
    if (lane() >= kRows || at + lane() >= end) return found;
    found.row = order == nullptr ? at + lane() : load_const(order + at + lane());
    double weight;
    const int64_t label = used_label(batch, found.row, weight, ignored);
    found.label = static_cast<int>(label);
    if (label >= 0) found.alpha = static_cast<F>(weight * (minus_scale * load_const(table.magnitude + label)));
    found.gamma = static_cast<F>(weight * with_ce);
    found.shift = load_const(lse + found.row);
    return found;
  };
  int64_t at = cut(rows, all, group);
  RowOf<F> mine = look_up(at);
  for (; at < end; at += kRows, stage ^= 1) {
    int64_t row[kRows];
    int label[kRows];
    LDMI_UNROLL
    for (int u = 0; u < kRows; ++u) {
      row[u] = order == nullptr ? (at + u < end ? at + u : kUnused) : shfl(mine.row, u);
      label[u] = shfl(mine.label, u);
    }
    F x[kRows][kColumns], v[kRows][kColumns];
    // logits (-inf outside) and V of the columns from `first` on. Rows that do not count read the V of label 0, and rows past the end
    // read the first row; their results are not stored.
    const auto fetch = [&](int64_t first) {
      const int left = static_cast<int>(C - first < kGroup * kColumns ? C - first : kGroup * kColumns);
      LDMI_UNROLL
      for (int u = 0; u < kRows; ++u) {
        load_columns(element<E>(batch.logits, row[u] < 0 ? row[0] : row[u], first), batch.logits.column_stride, column, left,
                     -infinity<F>(), x[u]);
        const F* const V = table.values + (label[u] < 0 ? 0 : label[u]) * table.pitch + first;
        LDMI_UNROLL
        for (int j = 0; j < kColumns; j += kAccess) {
          constexpr int kVector = kAccess * sizeof(F) >= 16 ? static_cast<int>(16 / sizeof(F)) : 1;
          LDMI_UNROLL
          for (int k = 0; k < kAccess; k += kVector) {
            if constexpr (kVector > 1) {
              Pack<F> some{};
              if (column(j) < left) some = load16_const(V + column(j) + k);
              LDMI_UNROLL
              for (int i = 0; i < kVector; ++i) v[u][j + k + i] = some[i];
            } else {
              v[u][j + k] = column(j) < left ? load_const(V + column(j) + k) : F{0};
            }
          }
        }
      }
    };
    const auto write = [&](int64_t first, const auto& value_of) {
      const int left = static_cast<int>(C - first < kGroup * kColumns ? C - first : kGroup * kColumns);
      LDMI_UNROLL
      for (int u = 0; u < kRows; ++u) {
        if (row[u] < 0) continue;
        E* const to = grad + row[u] * C + first;
        LDMI_UNROLL
        for (int j = 0; j < kColumns; j += kAccess) {
          E out[kAccess];
          LDMI_UNROLL
          for (int k = 0; k < kAccess; ++k) out[k] = label[u] >= 0 ? narrow<E>(value_of(u, j + k)) : E{};
          if (column(j) < left) store_values<E, kAccess>(to + column(j), out);
        }
      }
    };
    // which of this thread's columns is the row's own, if the cross entropy counts; -1: none
    const auto own_column = [&](int u, int64_t first) {
      if (with_ce == 0 || label[u] < 0) return -1;
      const int64_t own = column_of(label[u], C) - first;
      return own >= 0 && own < kGroup * kColumns ? static_cast<int>(own) : -1;
    };
    fetch(0);
    const RowOf<F> next = look_up(at + kRows);
    if (batch.probs) {
      for (int64_t first = 0; first < C; first += kGroup * kColumns) {
        if (first > 0) fetch(first);
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          const F alpha = shfl(mine.alpha, u), gamma = shfl(mine.gamma, u);
          const int own = own_column(u, first);
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) v[u][j] = alpha * v[u][j] - (own == column(j) ? gamma / x[u][j] : F{0});
        }
        write(first, [&](int u, int j) { return v[u][j]; });
      }
    } else {
      F sum[kRows], product[kRows], shift[kRows];
      LDMI_UNROLL
      for (int u = 0; u < kRows; ++u) {
        sum[u] = product[u] = 0;
        shift[u] = shfl(mine.shift, u);
      }
      for (int64_t first = 0; first < C; first += kGroup * kColumns) {
        if (first > 0) fetch(first);
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) {
            x[u][j] = exp(x[u][j] - shift[u]);
            sum[u] += x[u][j];
            product[u] = fma(x[u][j], v[u][j], product[u]);
          }
        }
        if (!kLong) break;
      }
      group_reduce<kGroup, false>(sum, scratch + 2 * stage * kRows * kWarps);
      group_reduce<kGroup, false>(product, scratch + (2 * stage + 1) * kRows * kWarps);
      F mean[kRows], a[kRows], g[kRows], gamma[kRows];
      LDMI_UNROLL
      for (int u = 0; u < kRows; ++u) {
        const F inverse = 1 / sum[u];
        gamma[u] = shfl(mine.gamma, u);
        mean[u] = product[u] * inverse;
        a[u] = shfl(mine.alpha, u) * inverse;
        g[u] = gamma[u] * inverse;
      }
      for (int64_t first = 0; first < C; first += kGroup * kColumns) {
        if (kLong) fetch(first);
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) {
            const F e = kLong ? exp(x[u][j] - shift[u]) : x[u][j];
            x[u][j] = e * fma(a[u], v[u][j] - mean[u], g[u]);
          }
          const int own = own_column(u, first);
          if (own < 0) continue;  // the same in the whole group
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) x[u][j] -= own == column(j) ? gamma[u] : F{0};
        }
        write(first, [&](int u, int j) { return x[u][j]; });
        if (!kLong) break;
      }
    }
    mine = next;
  }
}

}  // namespace ldmi::cuda
