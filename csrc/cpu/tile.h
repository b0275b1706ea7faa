// For few classes: vectors run across rows, not across classes. A tile is a group of kLanes<float> rows, transposed, with element (row
// l, class c) at tile[c * lanes + l]. So sums and maxima over the classes are plain vector operations, a row that is shorter than a
// vector wastes no lane, and the exponentials of different classes are independent chains of instructions.
#pragma once

#include "rows.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

// Up to this number of classes rows are transposed; longer rows fill vectors well enough as they are.
constexpr int64_t kTileClasses = 64;

// The side of the squares that are transposed in registers: 4 x 4, or 8 x 8 if registers have 32 bytes or more.
constexpr int kSide = LDMI_VECTOR_BYTES >= 32 ? 8 : 4;
typedef float Square __attribute__((vector_size(kSide * 4)));
typedef float SquareInMemory __attribute__((vector_size(kSide * 4), aligned(4), may_alias));

LDMI_INLINE void transpose(Square (&m)[kSide]) {
#if LDMI_VECTOR_BYTES >= 32
  Square a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    b[i + 2] = __builtin_shufflevector(a[i + 1], a[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 3] = __builtin_shufflevector(a[i + 1], a[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    m[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    m[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  const Square a = __builtin_shufflevector(m[0], m[1], 0, 4, 1, 5), b = __builtin_shufflevector(m[0], m[1], 2, 6, 3, 7);
  const Square c = __builtin_shufflevector(m[2], m[3], 0, 4, 1, 5), d = __builtin_shufflevector(m[2], m[3], 2, 6, 3, 7);
  m[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  m[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  m[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  m[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// Sets the pointers to the rows of a group: in place, or converted, or zeros for a row that does not count, which must not be read.
LDMI_INLINE void rows_of_group(const Matrix& m, int64_t first, int count, const int64_t* label, float* scratch, const float** rows) {
  constexpr int lanes = kLanes<float>;
  const int64_t width = padded<float>(m.columns);
  for (int l = 0; l < lanes; ++l) {
    const int r = l < count ? l : count - 1;
    if (label[r] != kUnused) {
      rows[l] = read_row(m, first + r, scratch + l * width);
    } else {
      std::memset(scratch + l * width, 0, static_cast<std::size_t>(width) * sizeof(float));
      rows[l] = scratch + l * width;
    }
  }
}

// Whether `count` rows from `first` on can be read in place, including the padding of the last one.
LDMI_INLINE bool in_place(const Matrix& m, int64_t first, int64_t count) {
  return m.type == Type::kFloat32 && m.column_stride == 1 &&
         (first + count - 1) * m.row_stride + padded<float>(m.columns) <= (m.rows - 1) * m.row_stride + m.columns;
}

// Transposes rows (each with padded<float>(classes) readable values) into a tile.
LDMI_INLINE void gather_tile(const float* const* rows, int64_t classes, float* tile) {
  constexpr int lanes = kLanes<float>;
  for (int r = 0; r < lanes; r += kSide) {
    for (int64_t c = 0; c < classes; c += kSide) {
      Square m[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) m[i] = *reinterpret_cast<const SquareInMemory*>(rows[r + i] + c);
      transpose(m);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) *reinterpret_cast<SquareInMemory*>(tile + (c + i) * lanes + r) = m[i];
    }
  }
}

// Transposes a tile into rows that are `width` >= classes apart. Whole squares are stored. The values that they write past the end of
// a row are at the beginning of the next rows, which are stored later (columns from the last to the first, rows from the first to the
// last), or at most kSide - 1 values after the last row.
LDMI_INLINE void scatter_tile(const float* tile, int64_t classes, float* rows, int64_t width) {
  constexpr int lanes = kLanes<float>;
  for (int r = 0; r < lanes; r += kSide) {
    for (int64_t c = (classes - 1) / kSide * kSide; c >= 0; c -= kSide) {
      Square m[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) m[i] = *reinterpret_cast<const SquareInMemory*>(tile + (c + i) * lanes + r);
      transpose(m);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) *reinterpret_cast<SquareInMemory*>(rows + (r + i) * width + c) = m[i];
    }
  }
}

// Calls body<U>(c) so that all classes are covered, four at a time if possible.
template <class Body>
LDMI_INLINE void by_fours(int64_t classes, Body&& body) {
  int64_t c = 0;
  for (; c + 4 <= classes; c += 4) body.template operator()<4>(c);
  if (c + 2 <= classes) {
    body.template operator()<2>(c);
    c += 2;
  }
  if (c < classes) body.template operator()<1>(c);
}

// Replaces every row of the tile by exp(x - max), and returns the maxima and the sums.
LDMI_INLINE void exponentials_of_tile(float* tile, int64_t classes, Vec<float>& maximum, Vec<float>& sum) {
  constexpr int lanes = kLanes<float>;
  Vec<float> m = load(tile);
  for (int64_t c = 1; c < classes; ++c) m = max(load(tile + c * lanes), m);
  maximum = m;
  Vec<float> total = splat(0.0f);
  by_fours(classes, [&]<int U>(int64_t c) {
    Vec<float> e[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) e[u] = load(tile + (c + u) * lanes) - m;
    exp_each(e);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      store(tile + (c + u) * lanes, e[u]);
      total = total + e[u];
    }
  });
  sum = total;
}

// Replaces every row by its gradient: x becomes e (alpha (V - <p, V>) + gamma) / sum e, with e = exp(x - lse).
LDMI_INLINE void gradient_of_tile(float* tile, const float* V, int64_t classes, Vec<float> lse, Vec<float> alpha, Vec<float> gamma) {
  constexpr int lanes = kLanes<float>;
  Vec<float> total = splat(0.0f), product = splat(0.0f);
  by_fours(classes, [&]<int U>(int64_t c) {
    Vec<float> e[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) e[u] = load(tile + (c + u) * lanes) - lse;
    exp_each(e);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      store(tile + (c + u) * lanes, e[u]);
      total = total + e[u];
      product = fma(e[u], load(V + (c + u) * lanes), product);
    }
  });
  const Vec<float> inverse = splat(1.0f) / total;
  const Vec<float> mean = product * inverse;
  alpha = alpha * inverse;
  gamma = gamma * inverse;
  for (int64_t c = 0; c < classes; ++c) {
    store(tile + c * lanes, load(tile + c * lanes) * fma(alpha, load(V + c * lanes) - mean, gamma));
  }
}

}  // namespace
}  // namespace ldmi::cpu::LDMI_ISA
