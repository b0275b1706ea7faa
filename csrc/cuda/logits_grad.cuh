// dloss/dz_i = w_i p_i * (scale * (<p_i, V[y_i]> - V[y_i]) + ce_scale) - w_i ce_scale e_{y_i}: one read of the logits, one write.
//
// The saved lse only keeps the exponentials in range; they are divided by their own sum, so the rounding of an lse far from 0 does
// not reach the result. V enters as a table in the precision of the softmax, each row scaled to magnitude 1 so that tiny sample
// weights (V grows as 1/n) cannot overflow it; a first launch makes the table.
//
// - grad_tile, few classes: tiles of rows in shared memory, beside them the table.
// - grad_by_row: a group of threads a row, V's row through the caches; in the order of the labels when the table exceeds level 2.
// - grad_soft: T V in tiles of rows and columns takes the place of V[y_i].
#pragma once

#include "rows.cuh"
#include "sort.cuh"

namespace ldmi::cuda {

// What the gradient needs of V, in the workspace: rows of `pitch` values V[k] / magnitude[k].
template <class F>
struct Table {
  F* values;
  double* magnitude;
  int64_t pitch;  // a multiple of 16 bytes
};

LDMI_HOST_DEVICE int64_t table_pitch(int64_t classes, int64_t size) { return (classes * size + 15) / 16 * 16 / size; }

// A warp a row of V: its largest magnitude (1 for zeros; NaN passes through the quotients), and the quotients.
template <class F>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2) grad_table(const double* V, int64_t labels, int64_t C, Table<F> table) {
  const int64_t warps = grid_dim() * (kThreads / kWarp);
  for (int64_t k = block_idx() * (kThreads / kWarp) + warp(); k < labels; k += warps) {
    double largest = 0;
    for (int64_t c = lane(); c < C; c += kWarp) largest = fmax(largest, abs(load_const(V + k * C + c)));
    largest = warp_max(largest);
    if (largest == 0) largest = 1;
    const double inverse = 1 / largest;
    for (int64_t c = lane(); c < table.pitch; c += kWarp) {
      store(table.values + k * table.pitch + c, c < C ? static_cast<F>(load_const(V + k * C + c) * inverse) : F{0});
    }
    if (lane() == 0) store(table.magnitude + k, largest);
  }
}

// The two factors of a row's gradient
struct RowFactors {
  double alpha;  // -w scale max|V|
  double gamma;  // w ce_scale
};

// A row's factors divided by its sum, and the mean of V's row, as the columns use them: e * (a * (V - mean) + g)
template <class F>
struct ColumnFactors {
  F mean, a, g;
  LDMI_DEVICE ColumnFactors(F sum, F product, const RowFactors& row) {
    const double inverse = 1 / static_cast<double>(sum);
    mean = static_cast<F>(static_cast<double>(product) * inverse);
    a = static_cast<F>(row.alpha * inverse);
    g = static_cast<F>(row.gamma * inverse);
  }
  LDMI_DEVICE F operator()(F e, F v) const { return e * fma(a, v - mean, g); }
};

// --------------------------------------------------------------------------------------------------------------- few classes

template <class E, int kWidth>
struct GradTile {
  using F = Compute<E>;
  static constexpr int kRows = static_cast<int>(plan::tile_rows(kWidth, sizeof(E)));
  static constexpr int kLanes = kWidth / 8;
  // two stages of what is read ahead; gradients take the place of logits
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
    sync_block();  // the tile and the rows' factors are there; the tile before has been written
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

// -------------------------------------------------------------------------------------------------------------- many classes

// What a lane knows of a row: which it is (kUnused: none), its label (-1: it does not count) and its factors.
template <class F>
struct RowOf {
  int64_t row = kUnused;
  int label = -1;
  F alpha = 0, gamma = 0, shift = 0;
};

// A group of kGroup threads a row, kColumns columns a thread at a time in accesses of kAccess values. kLong: rows longer than the
// group's registers are read twice. `order` may be null: rows as they come. Lane u of each warp looks up what row u of the next kRows
// needs while these are under way.
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
  // a run of rows for each group, so that in the order of the labels V's row stays near
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
    // logits (-inf outside) and V of the columns from `first` on. Rows that do not count read label 0's V, and rows that are not there
    // the first one: they are left out at the end.
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
          if (own < 0) continue;  // alike in the whole group
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

// -------------------------------------------------------------------------------------------------------------- soft targets

inline constexpr int kSoftGradRows = 32, kSoftGradColumns = 64, kSoftGradDepth = 32;
inline constexpr int kSoftGradPitch = kSoftGradDepth + 1;

// 32 rows a block at a time; warp w has the rows 4 w .. 4 w + 3, a lane two columns of 64. T V of a run of columns is a tile in
// registers; the sums over a row need all columns first, so tiles are made twice: once for <p, T V>, once for the gradient. Products
// are in fp32 (fp64 for fp64 logits), targets as they are and V scaled by its largest magnitude of all.
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
          // rows that do not count are not looked at; `weight` of another warp's row is not at hand
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

// ------------------------------------------------------------------------------------------------------------------ launchers

template <class E, int kWidth>
int launch_grad_tile(const Batch& batch, const Compute<E>* lse, const Table<Compute<E>>& table, const double* scale,
                     const double* ce_scale, E* grad, const plan::CudaLogitsGrad& plan, Stream stream) {
  Grid grid;
  grid.blocks = plan.blocks;
  grid.threads = kThreads;
  Carve carve;
  const GradTile<E, kWidth> tile(carve, batch.logits.columns, batch.num_labels);
  static_cast<void>(tile);
  grid.smem = carve.bytes();
  return launch(grad_tile<E, kWidth>, grid, stream, batch, lse, table, scale, ce_scale, grad);
}

template <class E>
int launch_grad_by_row(const Batch& batch, const Compute<E>* lse, const Table<Compute<E>>& table, const double* scale,
                       const double* ce_scale, const int64_t* order, E* grad, const plan::CudaLogitsGrad& plan, Stream stream) {
  using F = Compute<E>;
  Matrix both = batch.logits;  // accesses suit the logits and the gradient, which is contiguous
  if (reinterpret_cast<uintptr_t>(grad) % 16 != 0) both.data = grad;
  return with_access<E>(both, [&](auto access) {
    constexpr int kAccess = decltype(access)::value;
    constexpr int kWide = sizeof(E) == 8 ? 1 : 2;
    const auto start = [&](auto kernel, int group, int kernel_rows) {
      Grid grid;
      grid.blocks = group == 128 ? 2 * plan.blocks : plan.blocks;
      grid.threads = group == kWarp ? kThreads : group;
      Carve carve;
      carve.take<F>(4 * kernel_rows * (group / kWarp));
      grid.smem = carve.bytes();
      return launch(kernel, grid, stream, batch, lse, table, scale, ce_scale, order, grad);
    };
    const int64_t C = batch.logits.columns;
    if constexpr (kAccess <= 4) {
      constexpr int kRows = sizeof(E) == 8 ? 1 : 4;
      if (C <= plan::kLanes * 4) return start(grad_by_row<E, kAccess, kWarp, 4, kRows, false>, kWarp, kRows);
    }
    // doubles value by value take too many registers for a warp
    if constexpr (sizeof(E) < 8 || kAccess > 1) {
      if (C <= plan::kLanes * 8) return start(grad_by_row<E, kAccess, kWarp, 8, kWide, false>, kWarp, kWide);
    }
    if constexpr (sizeof(E) < 8 && kAccess > 1) {
      if (C <= plan::kLanes * 16) return start(grad_by_row<E, kAccess, kWarp, 16, 1, false>, kWarp, 1);
      if (C <= plan::kLanes * 32) return start(grad_by_row<E, kAccess, kWarp, 32, 1, false>, kWarp, 1);
    } else {
      if (C <= plan::kBlockClasses / 4) return start(grad_by_row<E, kAccess, 128, 8, 1, false>, 128, 1);
    }
    if (C <= plan::kBlockClasses) return start(grad_by_row<E, kAccess, kThreads, 16, 1, false>, kThreads, 1);
    return start(grad_by_row<E, kAccess, kThreads, 16, 1, true>, kThreads, 1);
  });
}

template <class E>
int launch_logits_grad(const Batch& batch, const void* lse, const double* V, const double* scale, const double* ce_scale, void* grad,
                       void* workspace, const DeviceLimits& limits, Stream stream) {
  using F = Compute<E>;
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  if (rows == 0) return 0;
  const plan::CudaLogitsGrad plan =
      plan::cuda_logits_grad(rows, C, K, batch.soft.data != nullptr, static_cast<int64_t>(sizeof(E)), limits);
  const F* const row_lse = static_cast<const F*>(lse);
  E* const out = static_cast<E*>(grad);
  Workspace work(workspace);
  Table<F> table{};
  table.pitch = table_pitch(C, sizeof(F));
  table.values = work.take<F>(K * table.pitch);
  table.magnitude = work.take<double>(K);
  Grid grid;
  const int64_t wanted = (K + kThreads / kWarp - 1) / (kThreads / kWarp);
  grid.blocks = wanted < 4 * limits.sms ? wanted : 4 * limits.sms;
  grid.threads = kThreads;
  int error = launch(grad_table<F>, grid, stream, V, K, C, table);
  if (error != 0) return error;
  switch (plan.order) {
    case plan::CudaOrder::kSoft: {
      grid.blocks = plan.blocks;
      Carve carve;
      carve.take<F>(kSoftGradRows * kSoftGradPitch);
      carve.take<F>(kSoftGradDepth * kSoftGradColumns);
      carve.take<double>(kThreads / kWarp);
      grid.smem = carve.bytes();
      return launch(grad_soft<E>, grid, stream, batch, row_lse, table, scale, ce_scale, out);
    }
    case plan::CudaOrder::kTile:
      if (plan.width == 16) return launch_grad_tile<E, 16>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
      if (plan.width == 32) return launch_grad_tile<E, 32>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
      return launch_grad_tile<E, 64>(batch, row_lse, table, scale, ce_scale, out, plan, stream);
    case plan::CudaOrder::kByLabel: {
      const LabelOrder sort = take_order(work, plan.sort, rows, K);
      error = launch_sort(batch, sort, plan.sort, stream);
      if (error != 0) return error;
      return launch_grad_by_row<E>(batch, row_lse, table, scale, ce_scale, sort.order, out, plan, stream);
    }
    default:
      return launch_grad_by_row<E>(batch, row_lse, table, scale, ce_scale, nullptr, out, plan, stream);
  }
}

}  // namespace ldmi::cuda
