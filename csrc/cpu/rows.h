// What the kernels share: reading a row of any type and stride into vectors, which rows count, and the order of the labels.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "half.h"
#include "kernels.h"
#include "simd.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

constexpr double kNaN = __builtin_nan("");

// Aligned scratch memory, freed at the end of the scope.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// The number of rows in a block. The phases of one row are short chains of dependent instructions, which overlap with those of the
// other rows; the tile stays in the first-level cache.
constexpr int kBlockRows = 32;
constexpr int64_t kTileElements = 4096;

LDMI_INLINE int block_rows(int64_t padded_classes) {
  const int64_t rows = kTileElements / padded_classes;
  return rows < 1 ? 1 : rows > kBlockRows ? kBlockRows : static_cast<int>(rows);
}

template <class T, class E>
LDMI_INLINE void convert_row(const E* from, int64_t stride, int64_t count, T* to) {
  if constexpr (sizeof(E) == 2) {
    if (stride == 1) {
      for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j * stride]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(from[j * stride]);
  }
}

// Returns row i as `columns` values of type T, of which padded<T>(columns) are readable: in place if possible, else in `scratch`.
template <class T>
LDMI_INLINE const T* read_row(const Matrix& m, int64_t i, T* scratch) {
  constexpr Type native = sizeof(T) == 4 ? Type::kFloat32 : Type::kFloat64;
  const int64_t offset = i * m.row_stride;
  if (m.type == native && m.column_stride == 1 && offset + padded<T>(m.columns) <= (m.rows - 1) * m.row_stride + m.columns) {
    return static_cast<const T*>(m.data) + offset;
  }
  switch (m.type) {
    case Type::kFloat32:
      convert_row(static_cast<const float*>(m.data) + offset, m.column_stride, m.columns, scratch);
      break;
    case Type::kFloat64:
      convert_row(static_cast<const double*>(m.data) + offset, m.column_stride, m.columns, scratch);
      break;
    case Type::kFloat16:
      convert_row(static_cast<const Half*>(m.data) + offset, m.column_stride, m.columns, scratch);
      break;
    case Type::kBFloat16:
      convert_row(static_cast<const BFloat16*>(m.data) + offset, m.column_stride, m.columns, scratch);
      break;
  }
  return scratch;
}

// Rows in the order of labels are far apart in memory: prefetch them this number of rows ahead.
constexpr int64_t kAhead = 4;
LDMI_INLINE void prefetch_row(const Matrix& m, int64_t i) {
  if (m.column_stride != 1) return;
  const int64_t bytes = m.type == Type::kFloat64 ? 8 : m.type == Type::kFloat32 ? 4 : 2;
  const char* row = static_cast<const char*>(m.data) + i * m.row_stride * bytes;
  for (int64_t at = 0; at < m.columns * bytes; at += 64) __builtin_prefetch(row + at);
}

LDMI_INLINE double weight_of(const Weights& w, int64_t i) {
  if (w.data == nullptr) return 1;
  const int64_t at = i * w.stride;
  switch (w.type) {
    case Type::kFloat32:
      return static_cast<const float*>(w.data)[at];
    case Type::kFloat64:
      return static_cast<const double*>(w.data)[at];
    case Type::kFloat16:
      return widen(static_cast<const Half*>(w.data)[at]);
    case Type::kBFloat16:
      return widen(static_cast<const BFloat16*>(w.data)[at]);
  }
  return 1;
}

// Returns a label as a signed number; a value that does not fit becomes INT64_MAX, which no class has.
LDMI_INLINE int64_t label_of(const Labels& y, int64_t i) {
  const int64_t at = i * y.stride;
  switch (y.bytes) {
    case 1:
      return y.is_signed ? static_cast<const int8_t*>(y.data)[at] : static_cast<const uint8_t*>(y.data)[at];
    case 2:
      return y.is_signed ? static_cast<const int16_t*>(y.data)[at] : static_cast<const uint16_t*>(y.data)[at];
    case 4:
      return y.is_signed ? static_cast<const int32_t*>(y.data)[at] : static_cast<int64_t>(static_cast<const uint32_t*>(y.data)[at]);
    default: {
      const int64_t label = static_cast<const int64_t*>(y.data)[at];
      return y.is_signed || label >= 0 ? label : INT64_MAX;
    }
  }
}

// Whether a weight is finite and not negative; NaN fails both comparisons.
LDMI_INLINE bool good_weight(double weight) { return weight >= 0 && weight <= 1.7976931348623157e308; }

constexpr int64_t kUnused = -1;

// Returns the label of row i, and its weight in `weight`; kUnused for a row that does not count. A row whose label or weight is out of
// range does not count either, and sets `bad`.
LDMI_INLINE int64_t used_label(const Batch& batch, int64_t i, double& weight, bool& bad) {
  weight = weight_of(batch.weights, i);
  if (weight == 0) return kUnused;
  const int64_t label = label_of(batch.labels, i);
  if (label == batch.ignore_index) return kUnused;
  if (label < 0 || label >= batch.num_labels || !good_weight(weight)) {
    bad = true;
    return kUnused;
  }
  return label;
}

// Calls used_label for `count` rows from `first` on; the usual case, 64-bit labels without weights, has its own loop. Returns whether
// all rows count.
LDMI_INLINE bool used_labels(const Batch& batch, int64_t first, int count, int64_t* label, double* weight, bool& bad) {
  if (batch.weights.data == nullptr && batch.labels.bytes == 8 && batch.labels.stride == 1 && batch.labels.is_signed) {
    const int64_t* y = static_cast<const int64_t*>(batch.labels.data) + first;
    const uint64_t limit = static_cast<uint64_t>(batch.num_labels);
    int64_t unused = 0, wrong = 0;
    for (int r = 0; r < count; ++r) {
      const int64_t ignored = -static_cast<int64_t>(y[r] == batch.ignore_index);
      const int64_t outside = -static_cast<int64_t>(static_cast<uint64_t>(y[r]) >= limit);
      label[r] = y[r] | ignored | outside;  // kUnused is all ones
      weight[r] = 1;
      unused |= ignored | outside;
      wrong |= outside & ~ignored;
    }
    bad |= wrong != 0;
    return unused == 0;
  }
  bool all = true;
  for (int r = 0; r < count; ++r) {
    label[r] = used_label(batch, first + r, weight[r], bad);
    all &= label[r] != kUnused;
  }
  return all;
}

// The column of a label: stacked problems have labels y + b C.
LDMI_INLINE int64_t column_of(int64_t label, int64_t classes) { return label < classes ? label : label % classes; }

// Writes exp(x - max) of a row into `tile` (zeros in the padding), and returns its maximum and its sum. For a row with a NaN, with
// +inf, or without a finite value all of them are NaN.
template <class T>
LDMI_INLINE void exponentials(const T* x, int64_t count, T* tile, T& maximum, T& sum) {
  constexpr int lanes = kLanes<T>;
  const int64_t whole = count / lanes * lanes;
  const int rest = static_cast<int>(count - whole);
  constexpr T low = -__builtin_inff();
  Vec<T> m = splat(low), m2 = m;
  int64_t j = 0;
  for (; j + 2 * lanes <= whole; j += 2 * lanes) {
    m = max(load(x + j), m);
    m2 = max(load(x + j + lanes), m2);
  }
  if (j < whole) m = max(load(x + j), m);
  if (rest > 0) m2 = max(first_lanes(load(x + whole), rest, low), m2);
  maximum = reduce_max(max(m, m2));
  const Vec<T> shift = splat(maximum);
  Vec<T> total = splat(T{0});
  j = 0;
  for (; j + 4 * lanes <= whole; j += 4 * lanes) {
    Vec<T> e[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) e[u] = load(x + j + u * lanes) - shift;
    exp_each(e);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) store(tile + j + u * lanes, e[u]);
    total = total + ((e[0] + e[1]) + (e[2] + e[3]));
  }
  for (; j < whole; j += lanes) {
    const Vec<T> e = exp(load(x + j) - shift);
    store(tile + j, e);
    total = total + e;
  }
  if (rest > 0) {
    const Vec<T> e = first_lanes(exp(load(x + whole) - shift), rest, T{0});
    store(tile + whole, e);
    total = total + e;
  }
  sum = reduce_add(total);
}

// Copies a row of probabilities into `tile`; values that are not finite become NaN.
template <class T>
LDMI_INLINE void probabilities(const T* x, int64_t count, T* tile) {
  const int64_t whole = count / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < whole; j += kLanes<T>) {
    const Vec<T> p = load(x + j);
    store(tile + j, fma(p, splat(T{0}), p));
  }
  if (whole < count) {
    const Vec<T> p = first_lanes(load(x + whole), static_cast<int>(count - whole), T{0});
    store(tile + whole, fma(p, splat(T{0}), p));
  }
}

// Splits `count` items into `tasks` runs of nearly equal length; returns where run `task` begins.
LDMI_INLINE int64_t cut(int64_t count, int64_t tasks, int64_t task) {
  return count / tasks * task + (count % tasks < task ? count % tasks : task);
}

// The rows in the order of their labels (stable), those that do not count last: a counting sort in `pieces` pieces of rows.
class LabelOrder {
 public:
  LabelOrder(const Batch& batch, int64_t pieces, const Threads& threads) : order_(batch.logits.rows) {
    const int64_t rows = batch.logits.rows, buckets = batch.num_labels + 1;
    Buffer<int64_t> counters(pieces * buckets);
    Buffer<uint8_t> bad(pieces);
    const auto visit = [&](int64_t piece, auto&& each) {
      bool wrong = false;
      const int64_t end = cut(rows, pieces, piece + 1);
      for (int64_t i = cut(rows, pieces, piece); i < end; ++i) {
        double weight;
        const int64_t label = used_label(batch, i, weight, wrong);
        each(i, label == kUnused ? buckets - 1 : label);
      }
      bad[piece] = wrong;
    };
    for_each_task(threads, pieces, [&](int64_t piece) {
      int64_t* mine = counters.get() + piece * buckets;
      std::memset(mine, 0, static_cast<std::size_t>(buckets) * sizeof(int64_t));
      visit(piece, [&](int64_t, int64_t bucket) { ++mine[bucket]; });
    });
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      if (bucket == buckets - 1) used_ = total;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        int64_t& counter = counters[piece * buckets + bucket];
        const int64_t here = counter;
        counter = total;
        total += here;
      }
    }
    for_each_task(threads, pieces, [&](int64_t piece) {
      int64_t* next = counters.get() + piece * buckets;
      visit(piece, [&](int64_t i, int64_t bucket) { order_[next[bucket]++] = i; });
    });
    for (int64_t piece = 0; piece < pieces; ++piece) bad_ |= bad[piece] != 0;
  }

  const int64_t* rows() { return order_.get(); }
  int64_t used() const { return used_; }  // the number of rows that count
  bool bad() const { return bad_; }       // whether a label or a weight is out of range

 private:
  Buffer<int64_t> order_;
  int64_t used_ = 0;
  bool bad_ = false;
};

}  // namespace
}  // namespace ldmi::cpu::LDMI_ISA
