// dloss/dz_i = w_i p_i * (scale * (<p_i, V[y_i]> - V[y_i]) + ce_scale) - w_i ce_scale e_{y_i}, in one pass: a row is read, turned into
// exponentials in a tile, and written.
//
// The saved lse only keeps the exponentials in range. They are divided by their own sum, so the rounding of an lse far from 0 does not
// affect the result. V enters as a table in the precision of the logits, each row scaled to magnitude 1 so that tiny sample weights
// (V grows as 1/n) cannot overflow it.

#include "../plan/plan.h"
#include "isa.h"
#include "tile.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

// Writes V / max |V| to to[0 .. width), with zeros in the padding. Returns that maximum (1 for a row of zeros); NaN passes through.
template <class T>
LDMI_INLINE double scaled_row(const double* V, int64_t count, int64_t width, T* to) {
  double largest = 0;
  for (int64_t c = 0; c < count; ++c) {
    const double magnitude = V[c] < 0 ? -V[c] : V[c];
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest == 0) largest = 1;
  const double inverse = 1 / largest;
  for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(V[c] * inverse);
  for (int64_t c = count; c < width; ++c) to[c] = 0;
  return largest;
}

// Replaces the exponentials of one row by the gradient of its logits; the padding stays 0.
//   x: the logits; V: the (scaled) row of V for its label; alpha = -w scale max|V|, gamma = w ce_scale.
template <class T>
LDMI_INLINE void logits_row(const T* x, const T* V, int64_t count, double lse, double alpha, double gamma, T* tile) {
  constexpr int lanes = kLanes<T>;
  const int64_t whole = count / lanes * lanes;
  const Vec<T> shift = splat(static_cast<T>(lse));
  Vec<T> sum = splat(T{0}), product = sum;
  int64_t j = 0;
  for (; j + 4 * lanes <= whole; j += 4 * lanes) {
    Vec<T> e[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) e[u] = load(x + j + u * lanes) - shift;
    exp_each(e);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      store(tile + j + u * lanes, e[u]);
      product = fma(e[u], load(V + j + u * lanes), product);
    }
    sum = sum + ((e[0] + e[1]) + (e[2] + e[3]));
  }
  for (; j < whole; j += lanes) {
    const Vec<T> e = exp(load(x + j) - shift);
    store(tile + j, e);
    sum = sum + e;
    product = fma(e, load(V + j), product);
  }
  if (whole < count) {
    const Vec<T> e = first_lanes(exp(load(x + whole) - shift), static_cast<int>(count - whole), T{0});
    store(tile + whole, e);
    sum = sum + e;
    product = fma(e, load(V + whole), product);
  }
  const T total = reduce_add(sum);
  const double inverse = 1 / static_cast<double>(total);
  const Vec<T> mean = splat(static_cast<T>(static_cast<double>(reduce_add(product)) * inverse));
  const Vec<T> a = splat(static_cast<T>(alpha * inverse)), g = splat(static_cast<T>(gamma * inverse));
  for (j = 0; j < count; j += lanes) {
    const Vec<T> e = load(tile + j);
    store(tile + j, e * fma(a, load(V + j) - mean, g));
  }
}

template <class T>
LDMI_INLINE void narrow_row(const T* from, int64_t count, Type type, void* grad, int64_t at) {
  switch (type) {
    case Type::kFloat16:
      for (int64_t c = 0; c < count; ++c) {
        static_cast<Half*>(grad)[at + c] = narrow(static_cast<float>(from[c]), Half{});
      }
      break;
    case Type::kBFloat16:
      for (int64_t c = 0; c < count; ++c) {
        static_cast<BFloat16*>(grad)[at + c] = narrow(static_cast<float>(from[c]), BFloat16{});
      }
      break;
    default:
      std::memcpy(static_cast<T*>(grad) + at, from, static_cast<std::size_t>(count) * sizeof(T));
  }
}

// Stores consecutive rows as whole vectors: what they write past the end of a row, the next row overwrites. The last row is exact.
template <class T>
LDMI_INLINE void write_rows(const T* tile, int64_t width, int64_t first, int count, int64_t classes, Type type, void* grad) {
  if (type != Type::kFloat32 && type != Type::kFloat64) {
    for (int r = 0; r < count; ++r) narrow_row(tile + r * width, classes, type, grad, (first + r) * classes);
    return;
  }
  T* to = static_cast<T*>(grad) + first * classes;
  for (int r = 0; r + 1 < count; ++r) {
    for (int64_t j = 0; j < classes; j += kLanes<T>) {
      // if rows are shorter than a vector, a vector of the last but one row may reach past the last row
      if (r * classes + j + kLanes<T> <= count * classes) {
        store(to + r * classes + j, load(tile + r * width + j));
      } else {
        for (int64_t c = j; c < classes; ++c) to[r * classes + c] = tile[r * width + c];
      }
    }
  }
  std::memcpy(to + (count - 1) * classes, tile + (count - 1) * width, static_cast<std::size_t>(classes) * sizeof(T));
}

struct Scales {
  double scale, ce_scale;
};

// Writes the gradient of one row that counts into `tile`; V_scale is -scale * max |V| of the row.
template <class T>
LDMI_INLINE void hard_row(const Batch& batch, const T* x, const T* V, double V_scale, double lse, double weight, int64_t column,
                          double ce_scale, T* tile) {
  const int64_t classes = batch.logits.columns;
  const double alpha = weight * V_scale, gamma = weight * ce_scale;
  if (batch.probs) {
    const double own = static_cast<double>(x[column]);
    const Vec<T> a = splat(static_cast<T>(alpha));
    for (int64_t j = 0; j < classes; j += kLanes<T>) store(tile + j, a * load(V + j));
    if (ce_scale != 0) tile[column] -= static_cast<T>(gamma / own);
    return;
  }
  logits_row(x, V, classes, lse, alpha, gamma, tile);
  if (ce_scale != 0) tile[column] -= static_cast<T>(gamma);
}

// Writes the gradients of the rows begin..end, in transposed groups; for few classes. If `grad` is not fp32, it goes through a tile;
// so do the last rows, after which nothing may be written.
LDMI_INLINE void grad_transposed(const Batch& batch, int64_t begin, int64_t end, const float* lse, const float* table,
                                 const double* table_scale, Scales s, void* grad) {
  constexpr int lanes = kLanes<float>;
  const int64_t classes = batch.logits.columns, width = padded<float>(classes);
  alignas(64) float x[kTileClasses * lanes], V[kTileClasses * lanes], scratch[kTileClasses * lanes];
  alignas(64) float tile[kTileClasses * lanes + kSide];
  alignas(64) float shift[lanes], alpha[lanes], gamma[lanes];
  int64_t label[kBlockRows];
  double weight[kBlockRows];
  bool ignored = false;
  const bool same_type = batch.logits.type == Type::kFloat32;
  for (int64_t i = begin; i < end; i += kBlockRows) {
    const int count = static_cast<int>(end - i < kBlockRows ? end - i : kBlockRows);
    const bool all_used = used_labels(batch, i, count, label, weight, ignored);
    const bool direct = all_used && in_place(batch.logits, i, count);
    for (int first = 0; first < count; first += lanes) {
      const int64_t base = i + first;
      const int here = count - first < lanes ? count - first : lanes;
      const float* x_rows[lanes];
      const float* V_rows[lanes];
      if (direct && here == lanes) {
        const float* row = static_cast<const float*>(batch.logits.data) + base * batch.logits.row_stride;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l, row += batch.logits.row_stride) {
          x_rows[l] = row;
          V_rows[l] = table + label[first + l] * width;
          alpha[l] = static_cast<float>(weight[first + l] * table_scale[label[first + l]]);
          gamma[l] = static_cast<float>(weight[first + l] * s.ce_scale);
        }
        store(shift, load(lse + base));
      } else {
        rows_of_group(batch.logits, base, here, label + first, scratch, x_rows);
        for (int l = 0; l < lanes; ++l) {
          const int r = first + (l < here ? l : here - 1);
          const bool used = label[r] != kUnused;
          const int64_t y = used ? label[r] : 0;
          V_rows[l] = table + y * width;
          shift[l] = lse[i + r];
          alpha[l] = used ? static_cast<float>(weight[r] * table_scale[y]) : 0;
          gamma[l] = used ? static_cast<float>(weight[r] * s.ce_scale) : 0;
        }
      }
      gather_tile(x_rows, classes, x);
      gather_tile(V_rows, classes, V);
      gradient_of_tile(x, V, classes, load(shift), load(alpha), load(gamma));
      if (s.ce_scale != 0) {
        for (int l = 0; l < here; ++l) {
          if (label[first + l] != kUnused) x[column_of(label[first + l], classes) * lanes + l] -= gamma[l];
        }
      }
      // the values written past the last row must be in rows that this task writes later
      if (same_type && all_used && here == lanes && (end - base - lanes) * classes >= kSide) {
        scatter_tile(x, classes, static_cast<float*>(grad) + base * classes, classes);
        continue;
      }
      scatter_tile(x, classes, tile, width);
      for (int l = 0; l < here; ++l) {
        if (label[first + l] == kUnused) std::memset(tile + l * width, 0, static_cast<std::size_t>(width) * sizeof(float));
        narrow_row(tile + l * width, classes, batch.logits.type, grad, (base + l) * classes);
      }
    }
  }
}

template <class T>
void grad_natural(const Batch& batch, const plan::CpuLogitsGrad& plan, const T* lse, const double* V, Scales s, void* grad,
                  const Threads& threads) {
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, labels = batch.num_labels;
  const int64_t width = padded<T>(classes);
  Buffer<T> table(labels * width);
  Buffer<double> table_scale(labels);
  const int64_t table_tasks = labels * classes > 16384 ? 8 : 1;
  for_each_task(threads, table_tasks, [&](int64_t task) {
    const int64_t end = cut(labels, table_tasks, task + 1);
    for (int64_t k = cut(labels, table_tasks, task); k < end; ++k) {
      table_scale[k] = -s.scale * scaled_row(V + k * classes, classes, width, table.get() + k * width);
    }
  });
  for_each_task(threads, plan.tasks, [&](int64_t task) {
    const int64_t end = cut(rows, plan.tasks, task + 1);
    if constexpr (sizeof(T) == 4) {
      if (classes <= kTileClasses && !batch.probs) {
        grad_transposed(batch, cut(rows, plan.tasks, task), end, lse, table.get(), table_scale.get(), s, grad);
        return;
      }
    }
    const int most = block_rows(width);
    Buffer<T> tile(most * width), scratch(width);
    bool ignored = false;
    for (int64_t i = cut(rows, plan.tasks, task); i < end; i += most) {
      const int count = static_cast<int>(end - i < most ? end - i : most);
      int64_t label[kBlockRows];
      double weight[kBlockRows];
      (void)used_labels(batch, i, count, label, weight, ignored);
      for (int r = 0; r < count; ++r) {
        T* to = tile.get() + r * width;
        if (label[r] == kUnused) {
          std::memset(to, 0, static_cast<std::size_t>(width) * sizeof(T));
          continue;
        }
        hard_row(batch, read_row(batch.logits, i + r, scratch.get()), table.get() + label[r] * width, table_scale[label[r]],
                 static_cast<double>(lse[i + r]), weight[r], column_of(label[r], classes), s.ce_scale, to);
      }
      write_rows(tile.get(), width, i, count, classes, batch.logits.type, grad);
    }
  });
}

// In the order of the labels: a run of rows reads one row of V from L1.
template <class T>
void grad_by_label(const Batch& batch, const plan::CpuLogitsGrad& plan, const T* lse, const double* V, Scales s, void* grad,
                   const Threads& threads) {
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, width = padded<T>(classes);
  LabelOrder order(batch, plan::sort_tasks(rows, batch.num_labels), threads);
  for_each_task(threads, plan.tasks, [&](int64_t task) {
    Buffer<T> tile(width), scratch(width), V_row(width);
    // rows of whole vectors are written directly to the gradient
    const bool direct = width == classes && (batch.logits.type == Type::kFloat32 || batch.logits.type == Type::kFloat64);
    double V_scale = 1;
    int64_t current = kUnused;
    bool ignored = false;
    const int64_t end = cut(rows, plan.tasks, task + 1);
    for (int64_t at = cut(rows, plan.tasks, task); at < end; ++at) {
      const int64_t i = order.rows()[at];
      if (at + kAhead < end) prefetch_row(batch.logits, order.rows()[at + kAhead]);
      T* to = direct ? static_cast<T*>(grad) + i * classes : tile.get();
      if (at >= order.used()) {
        std::memset(to, 0, static_cast<std::size_t>(width) * sizeof(T));
      } else {
        double weight;
        const int64_t label = used_label(batch, i, weight, ignored);
        if (label != current) {
          current = label;
          V_scale = -s.scale * scaled_row(V + label * classes, classes, width, V_row.get());
        }
        hard_row(batch, read_row(batch.logits, i, scratch.get()), V_row.get(), V_scale, static_cast<double>(lse[i]), weight,
                 column_of(label, classes), s.ce_scale, to);
      }
      if (!direct) narrow_row(to, classes, batch.logits.type, grad, i * classes);
    }
  });
}

// For soft targets T_i V replaces V[y_i]: one small matrix product for every few rows.
template <class T>
void grad_soft(const Batch& batch, const T* lse, const double* V, Scales s, void* grad, const Threads& threads) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t kRows = 32, kTile = 4;
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, labels = batch.num_labels;
  const int64_t width = padded<T>(classes), target_width = padded<T>(labels);
  double largest = 0;
  for (int64_t i = 0; i < labels * classes; ++i) {
    const double magnitude = V[i] < 0 ? -V[i] : V[i];
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest == 0) largest = 1;
  Buffer<T> table(labels * width);
  for (int64_t k = 0; k < labels; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      table[k * width + c] = c < classes ? static_cast<T>(V[k * classes + c] / largest) : T{0};
    }
  }
  for_each_task(threads, (rows + kRows - 1) / kRows, [&](int64_t task) {
    Buffer<T> targets(kRows * target_width), product(kRows * width), tile(width), scratch(width), target_scratch(target_width);
    double weight[kRows];
    const int64_t base = task * kRows, count = rows - base < kRows ? rows - base : kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      T* t = targets.get() + r * target_width;
      weight[r] = r < count ? weight_of(batch.weights, base + r) : 0;
      std::memset(t, 0, static_cast<std::size_t>(target_width) * sizeof(T));
      if (weight[r] != 0) {
        const T* target = read_row(batch.soft, base + r, target_scratch.get());
        for (int64_t k = 0; k < labels; ++k) t[k] = target[k];
      }
    }
    for (int64_t j = 0; j < width; j += lanes) {
      for (int64_t r = 0; r < kRows; r += kTile) {
        Vec<T> sum[kTile];
        for (auto& each : sum) each = splat(T{0});
        for (int64_t k = 0; k < labels; ++k) {
          const Vec<T> v = load(table.get() + k * width + j);
#pragma GCC unroll 4
          for (int64_t q = 0; q < kTile; ++q) sum[q] = fma(splat(targets[(r + q) * target_width + k]), v, sum[q]);
        }
        for (int64_t q = 0; q < kTile; ++q) store(product.get() + (r + q) * width + j, sum[q]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = base + r;
      std::memset(tile.get(), 0, static_cast<std::size_t>(width) * sizeof(T));
      if (weight[r] != 0) {
        const T* x = read_row(batch.logits, i, scratch.get());
        const T* t = targets.get() + r * target_width;
        const T* g = product.get() + r * width;
        const double alpha = -weight[r] * s.scale * largest, gamma = weight[r] * s.ce_scale;
        if (batch.probs) {
          for (int64_t c = 0; c < classes; ++c) {
            tile[c] = static_cast<T>(alpha) * g[c];
            if (s.ce_scale != 0 && t[c] != 0) tile[c] -= static_cast<T>(gamma) * t[c] / x[c];
          }
        } else {
          double mass = 0;
          for (int64_t k = 0; k < labels; ++k) mass += static_cast<double>(t[k]);
          logits_row(x, g, classes, static_cast<double>(lse[i]), alpha, gamma * mass, tile.get());
          if (s.ce_scale != 0) {
            for (int64_t c = 0; c < classes; ++c) tile[c] -= static_cast<T>(gamma) * t[c];
          }
        }
      }
      narrow_row(tile.get(), classes, batch.logits.type, grad, i * classes);
    }
  });
}

template <class T>
void grad_of(const Batch& batch, const T* lse, const double* V, Scales s, void* grad, const Threads& threads) {
  if (batch.logits.rows == 0) return;
  if (batch.soft.data != nullptr) {
    grad_soft(batch, lse, V, s, grad, threads);
    return;
  }
  const plan::CpuLogitsGrad plan = plan::cpu_logits_grad(batch.logits.rows, batch.logits.columns, batch.num_labels, sizeof(T));
  if (plan.order == plan::Order::kNatural) {
    grad_natural(batch, plan, lse, V, s, grad, threads);
  } else {
    grad_by_label(batch, plan, lse, V, s, grad, threads);
  }
}

}  // namespace

void logits_grad(const Batch& batch, const void* lse, const double* V, double scale, double ce_scale, void* grad,
                 const Threads& threads) {
  const Scales s{scale, ce_scale};
  if (batch.logits.type == Type::kFloat64) {
    grad_of(batch, static_cast<const double*>(lse), V, s, grad, threads);
  } else {
    grad_of(batch, static_cast<const float*>(lse), V, s, grad, threads);
  }
}

}  // namespace ldmi::cpu::LDMI_ISA
