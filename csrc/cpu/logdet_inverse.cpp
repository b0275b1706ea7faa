// log|det| and inverse of a matrix by Gauss-Jordan elimination in place, with partial pivoting: 2 C^3 operations for both.
//
// Step k divides row k by its pivot and subtracts multiples of it from every other row; the column that it clears contains column k of
// the inverse from then on. Row exchanges of the matrix are undone as column exchanges of the inverse, in reverse order. The product
// of the pivots is the determinant. Without the inverse the same steps are done only on the remaining rows and columns, which is an LU
// factorisation: every entry that both compute goes through the same operations, so the determinant has the same bits.
//
// The steps are taken in panels of columns J, whose effect on the rest is one matrix product,
//
//     D = M[J, J] after the exchanges      G[J] = D^{-1}      G[i] = -M[i, J] D^{-1} for the other rows i
//     M[:, c] <- (M[:, c] with zeros in the rows J) + G M[J, c]       for every column c outside the panel
//
// and eliminating the panel alone leaves G in its place. The next panel is eliminated while the other columns are still being updated.
// The operations on a block of columns do not depend on the thread that does them, so the bits do not depend on the number of threads.
//
// The matrix that is eliminated is M = R^T, the transpose of R = diag(1/n) S. D^{-1} is an explicit inverse, and its condition number
// may be that of the whole matrix. If all rows are nearly equal, as those of a classifier that has hardly learned, M M^{-1} - I has
// that error (1e5 C * 2^-52 of the norms), and M^{-1} M - I does not. The contract is S V^T = I, and S V^T - I is (M^{-1} M - I)^T, up
// to the scales.

#include "../plan/plan.h"
#include "../plan/presence.h"
#include "../plan/singular.h"
#include "isa.h"
#include "rows.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

// The logarithm of a product of positive numbers, with one call of log: fractions in [1, 2) are multiplied, and the exponents are
// added as integers.
class LogProduct {
 public:
  void multiply(double factor) {
    uint64_t bits;
    std::memcpy(&bits, &factor, 8);
    const int64_t exponent = static_cast<int64_t>(bits >> 52);
    if (exponent == 0) {  // subnormal
      multiply(factor * 0x1p54);
      exponents_ -= 54;
      return;
    }
    exponents_ += exponent - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double fraction;
    std::memcpy(&fraction, &bits, 8);
    product_ *= fraction;
    if (product_ >= 0x1p900) {
      product_ *= 0x1p-900;
      exponents_ += 900;
    }
  }
  double log() const {
    // ln 2 in two parts: the first has so few bits that its product with the exponents is exact
    const double e = static_cast<double>(exponents_);
    return e * 6.93147180369123816490e-01 + (e * 1.90821492927058770002e-10 + __builtin_log(product_));
  }

 private:
  double product_ = 1;
  int64_t exponents_ = 0;
};

// What the elimination computes besides the inverse, and the limit at which it stops.
struct Elimination {
  double threshold;  // the largest magnitude that is no pivot
  double sign = 1;
  LogProduct determinant;
  bool take(double pivot, bool exchanged) {
    const double magnitude = __builtin_fabs(pivot);
    if (!(magnitude > threshold)) return false;
    sign = (pivot < 0) != exchanged ? -sign : sign;
    determinant.multiply(magnitude);
    return true;
  }
};

// Returns the index of the entry of largest magnitude among begin..end-1; of equal ones the first.
LDMI_INLINE int64_t pivot_row(const double* column, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<double>;
  Vec<double> most = splat(-1.0);
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    const Vec<double> x = load(column + i);
    most = max(max(x, Vec<double>{-x.v}), most);
  }
  double largest = reduce_max(most);
  for (; i < end; ++i) {
    const double magnitude = __builtin_fabs(column[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  for (i = begin; i < end; ++i) {
    if (__builtin_fabs(column[i]) == largest) return i;
  }
  return begin;  // all are NaN
}

// The block of the matrix that stays in registers during a product.
constexpr int kTileVectors = 3;
constexpr int64_t kTileRows = kTileVectors * kLanes<double>;
#if LDMI_VECTOR_BYTES == 64
constexpr int64_t kTileColumns = 8;  // 32 registers instead of 16
#else
constexpr int64_t kTileColumns = 4;
#endif
// Columns that are updated together: their rows J stay in L1.
constexpr int64_t kChunk = 32;
// Panels up to this width are eliminated column by column; wider ones half by half.
constexpr int64_t kNarrow = 8;
constexpr int64_t kWidest = 64;

// A column-major matrix [C, C], column c at data + c * C, and the state of its elimination.
struct Panels {
  double* data;
  int64_t C;
  bool inverse;
  int64_t* exchanged;
  Elimination& found;
  double* scratch;  // [panel_doubles(C, kWidest / 2)]

  double* column(int64_t c) const { return data + c * C; }
};

constexpr int64_t panel_doubles(int64_t C, int64_t width) { return (C + kTileRows - 1) / kTileRows * kTileRows * width; }

// Packs the rows from first_row on of the columns k..k+width-1 tile by tile, for the products with them.
void pack(const Panels& p, int64_t first_row, int64_t k, int64_t width, double* to) {
  constexpr int lanes = kLanes<double>;
  for (int64_t i = first_row; i < p.C; i += kTileRows, to += kTileRows * width) {
    const int64_t rows = p.C - i < kTileRows ? p.C - i : kTileRows;
    for (int64_t j = 0; j < width; ++j) {
      const double* from = p.column(k + j) + i;
      double* tile = to + j * kTileRows;
      if (rows == kTileRows) {
        for (int v = 0; v < kTileVectors; ++v) store(tile + v * lanes, load(from + v * lanes));
      } else {
        for (int64_t r = 0; r < kTileRows; ++r) tile[r] = r < rows ? from[r] : 0;
      }
    }
  }
}

// Adds the product of G's tile [width, kTileRows] and X [width, kTileColumns] to one tile of the matrix.
LDMI_INLINE void multiply_tile(const double* G, const double* X, int64_t width, double* to, int64_t stride, int64_t rows,
                               int64_t columns) {
  constexpr int lanes = kLanes<double>;
  Vec<double> sum[kTileColumns][kTileVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[c][v] = splat(0.0);
  }
  for (int64_t j = 0; j < width; ++j) {
    Vec<double> g[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) g[v] = load(G + j * kTileRows + v * lanes);
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) {
      const Vec<double> x = splat(X[j * kTileColumns + c]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] = fma(g[v], x, sum[c][v]);
    }
  }
  if (rows == kTileRows && columns == kTileColumns) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        double* at = to + c * stride + v * lanes;
        store(at, load(at) + sum[c][v]);
      }
    }
    return;
  }
  double tile[kTileColumns][kTileRows];
#pragma GCC unroll 8
  for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(tile[c] + v * lanes, sum[c][v]);
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * stride + r] += tile[c][r];
  }
}

// Applies an eliminated panel (columns k..k+width-1; G: its rows from first_row on, packed) to the columns begin..end-1 outside it.
void update(const Panels& p, const double* G, int64_t first_row, int64_t k, int64_t width, int64_t begin, int64_t end) {
  alignas(64) double X[kChunk * kWidest];
  for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
    const int64_t count = end - c0 < kChunk ? end - c0 : kChunk;
    for (int64_t c = 0; c < (count + kTileColumns - 1) / kTileColumns * kTileColumns; ++c) {
      double* x = X + c / kTileColumns * kTileColumns * width + c % kTileColumns;
      if (c >= count) {
        for (int64_t j = 0; j < width; ++j) x[j * kTileColumns] = 0;
        continue;
      }
      double* column = p.column(c0 + c);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t other = p.exchanged[k + j];
        const double value = column[other];
        column[other] = column[k + j];
        column[k + j] = value;
      }
      for (int64_t j = 0; j < width; ++j) {
        x[j * kTileColumns] = column[k + j];
        column[k + j] = 0;
      }
    }
    const double* g = G;
    for (int64_t i = first_row; i < p.C; i += kTileRows, g += kTileRows * width) {
      const int64_t rows = p.C - i < kTileRows ? p.C - i : kTileRows;
      for (int64_t c = 0; c < count; c += kTileColumns) {
        const int64_t columns = count - c < kTileColumns ? count - c : kTileColumns;
        multiply_tile(g, X + c * width, width, p.column(c0 + c) + i, p.C, rows, columns);
      }
    }
  }
}

// Eliminates only the columns k..k+width-1, width <= kNarrow; afterwards they contain G.
bool eliminate_narrow(const Panels& p, int64_t first_row, int64_t k, int64_t width) {
  constexpr int lanes = kLanes<double>;
  for (int64_t j = 0; j < width; ++j) {
    double* column = p.column(k + j);
    const int64_t row = k + j, pivot = pivot_row(column, row, p.C);
    if (!p.found.take(column[pivot], pivot != row)) return false;
    p.exchanged[row] = pivot;
    double factor[kNarrow] = {}, *others[kNarrow];
    int64_t count = 0;
    const double reciprocal = 1 / column[pivot];
    for (int64_t c = 0; c < width; ++c) {
      double* other = p.column(k + c);
      const double value = other[pivot];
      other[pivot] = other[row];
      other[row] = value;
      if (c == j) continue;
      factor[count] = -value * reciprocal;
      others[count++] = other;
    }
    int64_t i = first_row;
    for (; i + lanes <= p.C; i += lanes) {
      const Vec<double> x = load(column + i);
      for (int64_t c = 0; c < count; ++c) store(others[c] + i, fma(x, splat(factor[c]), load(others[c] + i)));
      store(column + i, x * splat(-reciprocal));
    }
    for (; i < p.C; ++i) {
      for (int64_t c = 0; c < count; ++c) others[c][i] = column[i] * factor[c] + others[c][i];
      column[i] *= -reciprocal;
    }
    for (int64_t c = 0; c < count; ++c) others[c][row] = -factor[c];
    column[row] = reciprocal;
  }
  return true;
}

bool eliminate_panel(const Panels& p, int64_t first_row, int64_t k, int64_t width) {
  if (width <= kNarrow) return eliminate_narrow(p, first_row, k, width);
  const int64_t half = (width / 2 + kNarrow - 1) / kNarrow * kNarrow;
  if (!eliminate_panel(p, first_row, k, half)) return false;
  pack(p, first_row, k, half, p.scratch);
  update(p, p.scratch, first_row, k, half, k + half, k + width);
  if (!eliminate_panel(p, first_row, k + half, width - half)) return false;
  pack(p, first_row, k + half, width - half, p.scratch);
  update(p, p.scratch, first_row, k + half, width - half, k, k + half);
  return true;
}

bool eliminate(double* data, int64_t C, bool inverse, int64_t* exchanged, Elimination& found, const Threads& threads) {
  const plan::CpuLogdetInverse plan = plan::cpu_logdet_inverse(C);
  const int64_t width = plan.panel;
  Buffer<double> packed(2 * panel_doubles(C, width)), scratch(panel_doubles(C, width / 2));
  const Panels p{data, C, inverse, exchanged, found, scratch.get()};
  // the first row that is still needed: with the inverse all rows are, else those from the panel on
  const auto first_row = [&](int64_t k) { return inverse ? 0 : k; };
  const auto panel = [&](int64_t k, double* G) {
    const int64_t columns = C - k < width ? C - k : width;
    if (!eliminate_panel(p, first_row(k), k, columns)) return false;
    pack(p, first_row(k), k, columns, G);
    return true;
  };
  double *G = packed.get(), *next_G = G + panel_doubles(C, width);
  bool regular = panel(0, G);
  for (int64_t k = 0; regular && k < C; k += width) {
    const int64_t columns = C - k < width ? C - k : width, next = k + columns;
    const int64_t next_end = C - next < width ? C : next + width;
    // piece 0 is the next panel, which the next step waits for; then follow the columns after it, and those before it
    const int64_t after = (C - next_end + kChunk - 1) / kChunk, before = inverse ? k / kChunk : 0;
    const int64_t pieces = 1 + after + before;
    int64_t taken = 0;
    const auto work = [&](int64_t) {
      for (;;) {
        const int64_t piece = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return;
        if (piece == 0) {
          if (next >= C) continue;
          update(p, G, first_row(k), k, columns, next, next_end);
          regular = panel(next, next_G);
        } else {
          const int64_t begin = piece <= after ? next_end + (piece - 1) * kChunk : (piece - 1 - after) * kChunk;
          update(p, G, first_row(k), k, columns, begin, C - begin < kChunk ? C : begin + kChunk);
        }
      }
    };
    for_each_task(threads, !plan.parallel ? 1 : pieces < 64 ? pieces : 64, work);
    double* const done = G;
    G = next_G;
    next_G = done;
  }
  return regular;
}

// What equilibrate finds in S and n while it computes R = diag(1/n) S of the present classes.
struct Screening {
  double norm = 0;  // ||R||_inf
  bool finite = true;
};

constexpr int64_t kBlock = 32;

void exchange(double* a, double* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double value = a[i];
    a[i] = b[i];
    b[i] = value;
  }
}

// The k present classes, in order, and their weights.
struct Present {
  int64_t k = 0;
  Buffer<int64_t> classes;
  Buffer<double> weights;

  Present(const double* n, int64_t C) : classes(C), weights(C) {
    double least = 0;
    for (int64_t i = 0; i < C; ++i) least += plan::least_part(n[i]);
    for (int64_t i = 0; i < C; ++i) {
      if (!plan::is_present(n[i], least)) continue;
      classes[k] = i;
      weights[k++] = n[i];
    }
  }
};

bool all_finite(const double* values, int64_t count) {
  double all = 0;
  for (int64_t j = 0; j < count; ++j) all += values[j] * 0;  // NaN if any entry is NaN or infinite
  return all == 0;
}

// Computes the rows begin..end-1 of R, which are columns of M [k, k].
Screening equilibrate(const double* S, const Present& present, int64_t C, int64_t begin, int64_t end, double* M) {
  Screening out;
  for (int64_t i = begin; i < end; ++i) {
    const double* const row = S + present.classes[i] * C;
    double* const to = M + i * present.k;
    const double n = present.weights[i], lift = plan::lift_of(n), scale = 1 / (n * lift);
    double sum = 0;
    if (present.k == C) {
      double all = n * 0;
      for (int64_t j = 0; j < C; ++j) {
        all += row[j] * 0;
        to[j] = row[j] * lift * scale;
        sum += __builtin_fabs(to[j]);
      }
      out.finite &= all == 0;
    } else {
      for (int64_t j = 0; j < present.k; ++j) {
        to[j] = row[present.classes[j]] * lift * scale;
        sum += __builtin_fabs(to[j]);
      }
    }
    out.norm = sum > out.norm ? sum : out.norm;
  }
  return out;
}

// Replaces M^{-1} = R^{-T} (column-major) by V = diag(1/n) R^{-T} (row-major): exchanges blocks of kBlock rows from `begin` on with
// blocks of kBlock columns, from the diagonal on.
void transpose(const double* n, int64_t k, int64_t begin, int64_t end, double* V) {
  for (int64_t j0 = begin; j0 < k; j0 += kBlock) {
    const int64_t j1 = k - j0 < kBlock ? k : j0 + kBlock;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = j0 > i ? j0 : i; j < j1; ++j) {
        const double above = V[j * k + i], below = V[i * k + j];  // M^{-1}[i, j] and [j, i]
        V[i * k + j] = above / n[i];
        V[j * k + i] = below / n[j];
      }
    }
  }
}

// Spreads V in place from the present classes [k, k] to all classes [C, C], with zeros in the rows and columns of the others. No entry
// moves towards the beginning, so going from the last to the first overwrites no entry that has not moved yet.
void spread(const Present& present, int64_t C, double* V) {
  const int64_t k = present.k;
  for (int64_t i = C - 1, r = k - 1; i >= 0; --i) {
    const bool here = r >= 0 && present.classes[r] == i;
    double* const to = V + i * C;
    const double* const from = V + r * k;
    for (int64_t j = C - 1, c = k - 1; j >= 0; --j) {
      const bool both = here && c >= 0 && present.classes[c] == j;
      to[j] = both ? from[c--] : 0.0;
    }
    r -= here;
  }
}

}  // namespace

Determinant logdet_inverse(const double* S, const double* n, int64_t C, bool strict, double* V, const Threads& threads) {
  const Present present(n, C);
  const int64_t k = present.k;
  const bool inverse = V != nullptr;
  const int64_t kept = strict && k > 0 ? C : k;
  const auto for_each_block = [&](int64_t size, auto body) {
    const int64_t blocks = (size + kBlock - 1) / kBlock;
    const auto run = [&](int64_t b) { body(b, b * kBlock, size - b * kBlock < kBlock ? size : (b + 1) * kBlock); };
    if (plan::cpu_logdet_inverse(size).parallel) {
      for_each_task(threads, blocks, run);
    } else {
      for (int64_t b = 0; b < blocks; ++b) run(b);
    }
  };
  const auto without_inverse = [&](double log_abs_det, double sign, double everywhere) {
    for (int64_t i = 0; inverse && i < C * C; ++i) V[i] = everywhere;
    return Determinant{log_abs_det, sign, kept};
  };
  bool finite = all_finite(n, C);
  if (k != C) {  // else equilibrate checks the entries
    Buffer<uint8_t> fine((C + kBlock - 1) / kBlock);
    for_each_block(C, [&](int64_t b, int64_t begin, int64_t end) { fine[b] = all_finite(S + begin * C, (end - begin) * C); });
    for (int64_t b = 0; b * kBlock < C; ++b) finite &= fine[b] != 0;
  }
  if (!finite) return without_inverse(kNaN, kNaN, kNaN);
  if (k == 0) return without_inverse(0, 1, 0);
  if (kept != k) return without_inverse(-__builtin_inf(), 0, 0);
  Buffer<double> own(inverse ? 0 : k * k);
  Buffer<int64_t> exchanged(k);
  Buffer<Screening> screenings((k + kBlock - 1) / kBlock);
  double* const M = inverse ? V : own.get();
  for_each_block(k, [&](int64_t b, int64_t begin, int64_t end) { screenings[b] = equilibrate(S, present, C, begin, end, M); });
  Screening seen{k == C ? 0.0 : 1.0, true};  // an absent class is a row of the identity
  for (int64_t b = 0; b * kBlock < k; ++b) {
    seen.finite &= screenings[b].finite;
    seen.norm = screenings[b].norm > seen.norm ? screenings[b].norm : seen.norm;
  }
  if (!seen.finite) return without_inverse(kNaN, kNaN, kNaN);
  Elimination found{plan::singular_threshold(C, seen.norm), 1, {}};
  for (int64_t i = 0; i < k; ++i) found.determinant.multiply(present.weights[i]);
  if (!eliminate(M, k, inverse, exchanged.get(), found, threads)) return without_inverse(-__builtin_inf(), 0, 0);
  if (inverse) {
    // the columns of the inverse are exchanged as the rows of M were, the last exchange first
    for (int64_t i = k - 1; i >= 0; --i) {
      if (exchanged[i] != i) exchange(V + i * k, V + exchanged[i] * k, k);
    }
    for_each_block(k, [&](int64_t, int64_t begin, int64_t end) { transpose(present.weights.get(), k, begin, end, V); });
    if (k != C) spread(present, C, V);
  }
  return {found.determinant.log(), found.sign, kept};
}

}  // namespace ldmi::cpu::LDMI_ISA
