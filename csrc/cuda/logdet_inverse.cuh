// log|det S| and V = S^{-T} by Gauss-Jordan elimination in place, in fp64: by one warp in registers (C <= 32), or by one block in
// shared memory (as far as that reaches). As functions of a warp and of a block, for the kernels that end with a factorisation, and as
// kernels of their own.
//
// R = diag(1/n) S of the classes that have weight, with identity rows and columns for the others. Step k divides the pivot's row by
// the pivot and takes it out of every other row; the column that it clears holds column k of the inverse from then on: 2 C^3
// operations for both. The product of the pivots is the determinant. Without the inverse, the columns before the panel are left alone:
// an LU factorisation, whose determinant has the same bits.
//
// Rows never move. First the pivot of step k is the entry of row k, without a search: its row is on its way to the others at once, and
// one reciprocal is all that a step waits for. If in any step of the panel that was less than half of the column's largest open entry
// (a multiplier above 2), the panel starts again, and the pivot of step k is the largest entry of column k among the rows that have
// not been a pivot's; that it stood in row p_k is noted, and with G what elimination leaves in the place of R, R^{-1}[k, p_l] =
// G[p_k, l]. With a class signal the diagonal does nearly always. Three times the
// entries is what a step with a multiplier of 2 may grow to, twice with the search; in practice neither comes near. Magnitudes are
// compared by their exponent and the first 12 bits of their fraction, beside which the row fits into 32 bits, so that one maximum of
// integers finds the pivot and its row.
//
// The block takes its steps in panels J of 8 columns, whose effect on the rest is one matrix product. Eliminating the panel by itself
// leaves G[:, J] in its place; then
//
//     M[:, c] <- (M[:, c] with zeros in the rows p_J) + G[:, J] M[p_J, c]          for every column c outside the panel
//
// in 8 x 8 tiles on the tensor cores. The tiles of the next panel are everybody's; then warp 0 eliminates that panel while the others
// take the remaining stripes of 8 columns, a warp a stripe: three barriers a panel. Whoever takes a tile, its operations are the same,
// so the bits do not depend on the number of threads.
//
// M is the transpose of R. With panels that matters: M[p_J, c] is multiplied by the explicit inverse of a block, whose condition may
// be that of the whole matrix. Where the rows of R are nearly alike, as a classifier's are that has hardly learned, M M^{-1} - I bears
// that (1e5 C eps of the norms, measured), M^{-1} M - I does not. What is promised is S V^T - I = (M^{-1} M - I)^T, up to the scales.
// Column by column, as the warp does it, both stay below C eps / 5, and M is R.
#pragma once

#include <limits>
#include <utility>

#include "../cpu/kernels.h"
#include "../plan/layout.h"
#include "../plan/presence.h"
#include "../plan/singular.h"
#include "../simt/simt.cuh"

namespace ldmi::cuda {

using cpu::Determinant;

inline constexpr int kFactorPanel = 8;  // columns that are eliminated together
using plan::kFactorWarp;
inline constexpr int kFactorClasses = 192;  // more than the shared memory of a block holds

using plan::FactorSpace;
using plan::take_factor_space;

// One matrix, C <= kMost. The result is in all threads that call it:
//
//     logdet_inverse_warp<kMost>   all lanes of a warp, C <= kFactorWarp
//     logdet_inverse<kMost>        all threads of a block, C <= kFactorClasses, with take_factor_space(carve, C, stride)
//
// entry(i, j) is S[i, j] and weight(i) is n[i], from memory that the whole warp (block) may read when it calls. With `inverse`,
// emit(i, j, value) is called once for every entry of V, by any thread, a warp for whole sectors of V's rows; zeros and NaN where
// that is the answer. It may overwrite S, which has been read by then, but not n. On return the warp (block) sees what was emitted.
// Between two calls of a block: sync_block().
template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                            const Emit& emit);
template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry,
                                       const Weight& weight, const Emit& emit);

namespace factor {

using namespace simt;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The largest magnitude that is no pivot
LDMI_HOST_DEVICE double threshold(int64_t C, double norm) { return plan::singular_threshold(C, norm); }

// The least weight of a class that is present. Each warp adds up all C by itself, in the same order: all have the same bits.
template <class Weight>
LDMI_DEVICE double least_weight(int C, const Weight& weight) {
  double least = 0.0;
  for (int i = lane(); i < C; i += kWarp) least += plan::least_part(weight(i));
  return warp_sum(least);
}

// What is kept of a row of R besides its entries: its norm (NaN: something there is not finite), and in the sign whether its class is
// absent. Bit by bit, since negating may lose the sign of NaN.
struct RowNote {
  double value;

  LDMI_HOST_DEVICE static RowNote of(double norm, bool finite, bool here) {
    const uint64_t bits = simt::bit_cast<uint64_t>(finite ? norm : kNaN) & ~kSign;
    return {simt::bit_cast<double>(here ? bits : bits | kSign)};
  }
  LDMI_HOST_DEVICE bool here() const { return (simt::bit_cast<uint64_t>(value) & kSign) == 0; }
  LDMI_HOST_DEVICE double norm() const { return simt::bit_cast<double>(simt::bit_cast<uint64_t>(value) & ~kSign); }

 private:
  static constexpr uint64_t kSign = uint64_t{1} << 63;
};

// The logarithm of a product of positive numbers, some in each lane, by one logarithm: their fractions in [1, 2) are multiplied, their
// exponents added as integers.
class LogProduct {
 public:
  LDMI_DEVICE void multiply(double factor) {
    const bool subnormal = factor < 0x1p-1022;
    split(subnormal ? factor * 0x1p54 : factor);
    exponents_ -= subnormal ? 54 : 0;
  }
  // Of all lanes together, in all of them
  LDMI_DEVICE double log() const {
    double product = fraction_;  // of 32: below 2^32
    LDMI_UNROLL
    for (int bits = kWarp / 2; bits > 0; bits /= 2) product *= shfl_xor(product, bits);
    // ln 2 in two parts: the first has so few bits that its product with the exponents is exact
    const double e = warp_sum(exponents_);
    return fma(e, 6.93147180369123816490e-01, fma(e, 1.90821492927058770002e-10, simt::log(product)));
  }

 private:
  LDMI_DEVICE void split(double factor) {
    const double product = fraction_ * unit(factor);
    fraction_ = unit(product);
    exponents_ += exponent(factor) + exponent(product);
  }
  LDMI_DEVICE static int exponent(double x) { return static_cast<int>(bit_cast<uint64_t>(x) >> 52) - 1023; }
  LDMI_DEVICE static double unit(double x) {
    return bit_cast<double>((bit_cast<uint64_t>(x) & 0xfffffffffffffu) | 0x3ff0000000000000u);
  }

  double fraction_ = 1.0;
  int exponents_ = 0;
};

// What one warp knows of the pivots that it has taken, in parts: lane l of steps l, l + 32, ...
struct Pivots {
  LogProduct product;
  bool odd = false;  // the number of negative ones
  double last = 1.0;

  LDMI_DEVICE void take(int step, double pivot) {
    if (lane() == step % kWarp) last = pivot;
  }
  // The lanes of the steps first..first+count-1 (32 at most) count theirs: all at once, outside the chain from step to step
  LDMI_DEVICE void count(int first, int count) {
    if (((lane() - first) & (kWarp - 1)) >= count) return;
    product.multiply(abs(last));
    odd ^= last < 0.0;
  }
};

// body(0), body(1), ... as constants. In a loop, `if (s == slot)` makes the compiler index registers by `slot`, in memory then.
template <int... s, class Body>
LDMI_DEVICE void for_each_slot(std::integer_sequence<int, s...>, const Body& body) {
  (body(std::integral_constant<int, s>{}), ...);
}

// A warp eliminates `columns` columns by themselves, of which lane l holds the rows l, l + 32, ... (zeros where there is no such row).
// The matrix moves through the registers: each step takes column 0 off and puts what it leaves behind the last, so that every
// index is a constant. Column j ends up in column kColumns - columns + j. `used`: a bit for each of the lane's rows that have been a
// pivot's. step(j, row, pivot) is called by all lanes. False: no pivot exceeds the threshold.
template <int kSlots, int kColumns, class Step>
LDMI_DEVICE bool eliminate(double (&a)[kSlots][kColumns], int rows, int columns, double threshold, unsigned& used, const Step& step) {
  for (int j = 0; j < columns; ++j) {
    unsigned key = 0;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int row = lane() + kWarp * s;
      const unsigned high = static_cast<unsigned>(bit_cast<uint64_t>(a[s][0]) >> 32) & 0x7fffff00u;
      const unsigned mine = high | static_cast<unsigned>(255 - row);  // of equals the first
      if (row < rows && (used >> s & 1u) == 0 && mine > key) key = mine;
    }
    const int row = 255 - static_cast<int>(warp_max(key) & 255u), source = row % kWarp;
    double pivot_row[kColumns];
    for_each_slot(std::make_integer_sequence<int, kSlots>{}, [&](auto slot) {
      constexpr int s = decltype(slot)::value;
      if (row / kWarp != s) return;  // one slot for the whole warp
      LDMI_UNROLL
      for (int c = 0; c < kColumns; ++c) pivot_row[c] = shfl(a[s][c], source);
      if (lane() == source) {  // becomes (the row with 1 instead of the pivot) / pivot below
        used |= 1u << s;
        a[s][0] = -1.0;
        LDMI_UNROLL
        for (int c = 1; c < kColumns; ++c) a[s][c] = 0.0;
      }
    });
    const double pivot = pivot_row[0];
    if (!(abs(pivot) > threshold)) return false;
    step(j, row, pivot);
    const double reciprocal = 1.0 / pivot;
    LDMI_UNROLL
    for (int c = 1; c < kColumns; ++c) pivot_row[c] *= reciprocal;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const double factor = -a[s][0];
      LDMI_UNROLL
      for (int c = 1; c < kColumns; ++c) a[s][c - 1] = fma(factor, pivot_row[c], a[s][c]);
      a[s][kColumns - 1] = factor * reciprocal;
    }
  }
  return true;
}

inline constexpr double kMultiplier = 2.0;  // at most, for the diagonal's entry to be the pivot

// The same with the diagonal's entries as pivots: of step j that in row `source` + j of the lanes' first rows. False: in some step it
// was too small beside the open rows' entries or the threshold, and what is in `a` is of no use.
template <int kSlots, int kColumns, class Step>
LDMI_DEVICE bool eliminate_diagonal(double (&a)[kSlots][kColumns], int source, int columns, double threshold, unsigned used,
                                    const Step& step) {
  bool good = true;
  double pivot = shfl(a[0][0], source), inverse = reciprocal(pivot);
  for (int j = 0; j < columns; ++j) {
    double pivot_row[kColumns], minus[kSlots];  // the multipliers
    LDMI_UNROLL
    for (int c = 1; c < kColumns; ++c) pivot_row[c] = shfl(a[0][c], source);
    const bool own = lane() == source;
    good &= abs(pivot) > threshold && !(own && (used & 1u) != 0);
    step(j, pivot);
    source = (source + 1) % kWarp;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      minus[s] = -a[s][0] * inverse;
      good &= (used >> s & 1u) != 0 || abs(minus[s]) <= kMultiplier;
      if (s == 0) minus[s] = own ? inverse : minus[s];  // the row becomes (itself with 1 instead of the pivot) / pivot
    }
    used |= own ? 1u : 0u;
    LDMI_UNROLL
    for (int c = 1; c < kColumns; ++c) {
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) a[s][c - 1] = fma(minus[s], pivot_row[c], s == 0 && own ? 0.0 : a[s][c]);
      if (c > 1) continue;
      pivot = shfl(a[0][0], source);  // of the next step, on its way while this one goes on
      inverse = reciprocal(pivot);
    }
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) a[s][kColumns - 1] = minus[s];
  }
  return all(good);
}

// Which answer a matrix has before anything is eliminated
struct Screening {
  bool finite;  // S and n
  bool strict;
  int present, classes;

  LDMI_HOST_DEVICE int kept() const { return strict && present > 0 ? classes : present; }
  LDMI_HOST_DEVICE bool regular() const { return finite && present > 0 && kept() == present; }
  // If not regular
  LDMI_HOST_DEVICE Determinant answer() const {
    if (!finite) return {kNaN, kNaN, kept()};
    if (present == 0) return {0.0, 1.0, 0};
    return singular();
  }
  LDMI_HOST_DEVICE Determinant singular() const { return {-kInfinity, 0.0, kept()}; }
};

template <int kColumns, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant by_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight, const Emit& emit) {
  const int i = lane();
  const double n = i < C ? weight(i) : 0.0;
  const double least_n = warp_sum(plan::least_part(n));
  const bool here = plan::is_present(n, least_n), small = plan::is_small(least_n);
  const unsigned present = ballot(here);
  const auto everywhere = [&](double value) {
    if (!inverse) return;
    sync_warp();  // emit may overwrite what other lanes have read
    for (int at = lane(); at < C * C; at += kWarp) emit(at / C, at % C, value);
    sync_warp();
  };
  double a[1][kColumns];
  // A branch for the whole warp, and a bit that is kept instead of a factor: the registers are the matrix's
  const auto lift = [&] {
    if (!small) return;
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) a[0][j] *= plan::lift_if(small);
  };
  Screening seen{};
  Pivots pivots;
  int p = i;         // of step `lane`
  int variable = i;  // the step whose pivot was in row `lane`
  bool regular = false;
  LDMI_UNROLL_BY(1)
  for (int attempt = 0; attempt < 2 && !regular; ++attempt) {
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) a[0][j] = i < C && j < C ? entry(i, j) : 0.0;
    lift();
    bool finite = isfinite(n);
    double sum = 0.0;
    const double scale = here ? 1.0 / (n * plan::lift_if(small)) : 0.0;
    LDMI_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      finite &= isfinite(a[0][j]);
      a[0][j] = here && (present >> j & 1u) != 0 ? a[0][j] * scale : (i == j && i < C ? 1.0 : 0.0);
      sum += abs(a[0][j]);
    }
    seen = {all(finite), strict, popcount(present), C};
    if (!seen.regular()) {
      everywhere(seen.finite ? 0.0 : kNaN);
      return seen.answer();
    }
    const double least = threshold(C, warp_max(sum));
    unsigned used = 0;
    if (attempt == 0) {
      regular = eliminate_diagonal(a, 0, C, least, used, [&](int step, double pivot) { pivots.take(step, pivot); });
    } else {
      regular = eliminate<1>(a, C, C, least, used, [&](int step, int row, double pivot) {
        pivots.take(step, pivot);
        if (lane() == step) p = row;
        if (lane() == row) variable = step;
      });
    }
  }
  if (!regular) {
    everywhere(0.0);
    return seen.singular();
  }
  pivots.count(0, C);
  if (here) pivots.product.multiply(n);
  bool odd = pivots.odd;
  for (int l = 0; l < C; ++l) {
    const int before = shfl(p, l);
    odd ^= l < i && i < C && before > p;
  }
  if (inverse) {
    sync_warp();  // emit may overwrite what other lanes have read
    lift();
    const double scale = here ? 1.0 / (n * plan::lift_if(small)) : 0.0;
    LDMI_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int l = c - (kColumns - C);
      if (l < 0) continue;
      const int row = shfl(p, l);
      const double row_scale = shfl(scale, row);
      const bool both = (present >> row & 1u) != 0 && (present >> variable & 1u) != 0;
      if (i < C) emit(row, variable, both ? a[0][c] * row_scale : 0.0);
    }
    sync_warp();
  }
  return {pivots.product.log(), popcount(ballot(odd)) % 2 == 0 ? 1.0 : -1.0, seen.kept()};
}

// The columns c0..c0+7 (those below C) after panel k has been eliminated: of their tiles of 8 rows a warp's, those from `from` on,
// each `by`-th. read() is called when the warp has read what tiles of others overwrite.
template <int kTiles, class Read>
LDMI_DEVICE void update_stripe(const FactorSpace& space, int C, int k, int c0, int from, int by, const Read& read) {
  // Row m of the tile is column c0 + order(m): rows 2 columns apart come together, whose places in memory are 64 bytes apart in 128
  const int m = lane() / 4, q = lane() % 4;
  const int c = c0 + (m & 1) * 2 + (m >> 1 & 1) + (m & 4);
  double* const column = space.columns + c * space.stride;
  constexpr int kHalves = kFactorPanel / 4;
  double x[kHalves];
  int g[kHalves], row[kHalves];
  LDMI_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    const int step = k + 4 * h + q;
    const bool there = c < C && step < C;
    row[h] = there ? space.pivot_row[step] : -1;
    x[h] = there ? column[row[h]] : 0.0;
    g[h] = (step < C ? step : C - 1) * space.stride;  // times 0 if there is no such step
  }
  read();
  LDMI_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    if (row[h] >= 0 && row[h] / 8 % by == from) column[row[h]] = 0.0;
  }
  sync_warp();
  for (int first = from; 8 * first < C; first += kTiles * by) {  // kTiles under way together
    M8N8K4::C tile[kTiles];
    double b[kTiles][kHalves];
    LDMI_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int i = 8 * (first + t * by) + 2 * q, own = 8 * (first + t * by) + m;
      LDMI_UNROLL
      for (int h = 0; h < kHalves; ++h) b[t][h] = space.columns[g[h] + (own < C ? own : C - 1)];
      tile[t] = {};
      if (c < C && i < C) {
        const Pack<double> two = shared_load16(column + i);
        tile[t].value[0] = two[0];
        tile[t].value[1] = two[1];
      }
    }
    LDMI_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      LDMI_UNROLL
      for (int t = 0; t < kTiles; ++t) tile[t] = mma(x[h], b[t][h], tile[t]);
    }
    LDMI_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int i = 8 * (first + t * by) + 2 * q;
      if (c < C && i < C) shared_store16(column + i, Pack<double>{{tile[t].value[0], tile[t].value[1]}});
    }
  }
  sync_warp();
}

// Eliminates the columns k..k+7 (those below C) by themselves; a warp.
template <int kSlots>
LDMI_DEVICE bool eliminate_panel(const FactorSpace& space, int C, int k, double threshold, unsigned& used, Pivots& pivots) {
  const int columns = C - k < kFactorPanel ? C - k : kFactorPanel;
  double a[kSlots][kFactorPanel];
  double* const panel = space.columns + k * space.stride + lane();
  double* const first = panel + (columns - kFactorPanel) * space.stride;
  int turn = 0;
  bool regular = false;
  LDMI_UNROLL_BY(1)
  for (int attempt = 0; attempt < 2 && !regular; ++attempt) {
    // With the diagonal's pivots the rows k, k + 1, ... are the lanes' first: slot s has the rows of s + turn
    turn = attempt == 0 ? k / kWarp : 0;
    const auto rows = [&](int s) { return s + turn < kSlots ? s + turn : s + turn - kSlots; };
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      LDMI_UNROLL
      for (int j = 0; j < kFactorPanel; ++j) {
        a[s][j] = j < columns && lane() + kWarp * rows(s) < C ? panel[j * space.stride + kWarp * rows(s)] : 0.0;
      }
    }
    if (attempt == 0) {
      const unsigned turned = used >> turn | used << (kSlots - turn);
      regular = eliminate_diagonal(a, k % kWarp, columns, threshold, turned, [&](int step, double pivot) {
        pivots.take(k + step, pivot);
        if (lane() == 0) space.pivot_row[k + step] = static_cast<uint8_t>(k + step);
      });
      if (regular && lane() - k % kWarp >= 0 && lane() - k % kWarp < columns) used |= 1u << turn;
    } else {
      regular = eliminate(a, C, columns, threshold, used, [&](int step, int row, double pivot) {
        pivots.take(k + step, pivot);
        if (lane() == 0) space.pivot_row[k + step] = static_cast<uint8_t>(row);
      });
    }
  }
  if (!regular) return false;
  pivots.count(k, columns);
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    const int at = kWarp * (s + turn < kSlots ? s + turn : s + turn - kSlots);
    LDMI_UNROLL
    for (int j = 0; j < kFactorPanel; ++j) {
      if (j >= kFactorPanel - columns && lane() + at < C) first[j * space.stride + at] = a[s][j];
    }
  }
  return true;
}

// M from S, a warp a row of R, which is a column of M; and what is seen on the way. norm: ||R||_inf
template <int kSlots, class Entry, class Weight>
LDMI_DEVICE Screening equilibrate(const FactorSpace& space, int C, bool strict, const Entry& entry, const Weight& weight,
                                  double* norm) {
  const int warps = block_dim() / kWarp;
  const double least = least_weight(C, weight), lift = plan::lift_of(least);
  bool finite = true;
  for (int word = warp(); word * kWarp < C; word += warps) {
    const int i = word * kWarp + lane();
    const double n = i < C ? weight(i) : 0.0;
    finite &= isfinite(n);
    const unsigned bits = ballot(plan::is_present(n, least));
    if (lane() == 0) space.present[word] = bits;
  }
  if (thread_idx() < 2) space.tickets[thread_idx()] = 0;
  if (thread_idx() == 0) space.found[1] = lift;
  sync_block();
  unsigned here = 0;  // a bit for each of the lane's columns of R
  LDMI_UNROLL
  for (int s = 0; s < kSlots; ++s) {
    if (kWarp * s < C) here |= (space.present[s] >> lane() & 1u) << s;
  }
  double largest = 0.0;
  constexpr int kRows = kSlots <= 2 ? 4 : 2;  // of a warp at a time: loads on their way together
  for (int i0 = warp(); i0 < C; i0 += kRows * warps) {
    double scale[kRows], values[kRows][kSlots];
    LDMI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = i0 + r * warps;
      const double n = i < C ? weight(i) : 0.0;
      scale[r] = n > 0.0 ? 1.0 / (n * lift) : 0.0;
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        const int j = lane() + kWarp * s;
        values[r][s] = i < C && j < C ? entry(i, j) : 0.0;
      }
    }
    LDMI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = i0 + r * warps;
      const bool row_here = i < C && (space.present[i / kWarp] >> (i % kWarp) & 1u) != 0;
      double sum = 0.0;
      LDMI_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        const int j = lane() + kWarp * s;
        if (i >= C || j >= C) continue;
        finite &= isfinite(values[r][s]);
        const double value = row_here && (here >> s & 1u) != 0 ? values[r][s] * lift * scale[r] : (i == j ? 1.0 : 0.0);
        space.columns[i * space.stride + j] = value;
        sum += abs(value);
      }
      largest = fmax(largest, warp_sum(sum));
    }
  }
  if (lane() == 0) space.parts[warp()] = largest;
  finite = !sync_block_or(!finite);
  for (int w = 0; w < warps; ++w) largest = fmax(largest, space.parts[w]);
  *norm = largest;
  int present = 0;
  for (int word = 0; word * kWarp < C; ++word) present += popcount(space.present[word]);
  return {finite, strict, present, C};
}

template <int kSlots, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant by_block(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                 const Emit& emit) {
  const int warps = block_dim() / kWarp;
  double norm = 0.0;
  const Screening seen = equilibrate<kSlots>(space, C, strict, entry, weight, &norm);
  const auto everywhere = [&](double value) {
    for (int at = thread_idx(); inverse && at < C * C; at += block_dim()) emit(at / C, at % C, value);
    sync_block();
  };
  if (!seen.regular()) {
    everywhere(seen.finite ? 0.0 : kNaN);
    return seen.answer();
  }
  Pivots pivots;
  unsigned used = 0;
  const int stripes = (C + kFactorPanel - 1) / kFactorPanel;
  bool regular = true;
  // Round `done` applies that panel, to the next one first; round -1 has none. Then warp 0 eliminates the next one.
  for (int done = -1; done < stripes && regular; ++done) {
    const int next = done + 1;
    if (done >= 0 && next < stripes) {
      update_stripe<2>(space, C, done * kFactorPanel, next * kFactorPanel, warp(), warps, [] { sync_block(); });
      sync_block();
    }
    int* const tickets = space.tickets + (next & 1);
    // the stripes after the next panel, then those before this one
    const int rest = done < 0 ? 0 : inverse ? stripes - (next < stripes ? 2 : 1) : stripes - next - 1;
    const auto draw = [&] {
      int ticket = 0;
      if (lane() == 0) ticket = atomic_add(tickets, 1);
      ticket = shfl(ticket, 0);
      if (ticket >= rest) return -1;
      const int stripe = next + 1 + ticket;
      return stripe < stripes ? stripe : stripe - (next < stripes ? stripes : stripes + 1);
    };
    if (thread_idx() == 0) space.tickets[done & 1] = 0;
    if (warp() == 0 && next < stripes) {
      regular = eliminate_panel<kSlots>(space, C, next * kFactorPanel, threshold(C, norm), used, pivots);
    }
    for (int stripe = draw(); stripe >= 0; stripe = draw()) {
      update_stripe<4>(space, C, done * kFactorPanel, stripe * kFactorPanel, 0, 1, [] { sync_warp(); });
    }
    regular = !sync_block_or(!regular);
  }
  if (!regular) {
    everywhere(0.0);
    return seen.singular();
  }
  const auto here = [&](int i) { return (space.present[i / kWarp] >> (i % kWarp) & 1u) != 0; };
  if (warp() == 0) {
    for (int i = lane(); i < C; i += kWarp) {
      if (here(i)) pivots.product.multiply(weight(i));
    }
    const double log_abs_det = pivots.product.log();
    if (lane() == 0) space.found[0] = log_abs_det;
  }
  // the sign of p, by its inversions
  bool odd = pivots.odd;
  for (int l = warp(); l < C; l += warps) {
    for (int m = lane(); m < l; m += kWarp) odd ^= space.pivot_row[m] > space.pivot_row[l];
  }
  if (inverse) {
    // V[k, p_l] = G[p_k, l] / n[k]. A warp takes 4 rows of V by 8 columns: whole sectors of memory, and no bank conflicts between
    // columns that are 4 places apart among the banks. An absent class needs a scale of 0 and no more: its row and column of M are the
    // identity's, where elimination leaves zeros, and the pivot is its own.
    constexpr int kDown = 4, kAcross = kWarp / kDown, kAhead = 4;
    const double lift = space.found[1];
    for (int k0 = kDown * warp(); k0 < C; k0 += kDown * warps) {
      const int k = k0 + lane() % kDown;
      if (k >= C) continue;
      const double scale = here(k) ? 1.0 / (weight(k) * lift) : 0.0;
      const double* const from = space.columns + space.pivot_row[k];
      for (int l0 = lane() / kDown; l0 < C; l0 += kAhead * kAcross) {
        double value[kAhead];
        int column[kAhead];
        LDMI_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          const int l = l0 + u * kAcross < C ? l0 + u * kAcross : C - 1;
          value[u] = from[l * space.stride];
          column[u] = space.pivot_row[l];
        }
        LDMI_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          if (l0 + u * kAcross < C) emit(k, column[u], value[u] * lift * scale);
        }
      }
    }
  }
  const bool negative = sync_block_count(odd) % 2 != 0;
  return {space.found[0], negative ? -1.0 : 1.0, seen.kept()};
}

}  // namespace factor

template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse_warp(int C, bool strict, bool inverse, const Entry& entry, const Weight& weight,
                                            const Emit& emit) {
  static_assert(kMost <= kFactorWarp);
  if constexpr (kMost > 8) {
    if (C <= kMost - 8) return logdet_inverse_warp<kMost - 8>(C, strict, inverse, entry, weight, emit);
  }
  return factor::by_warp<(kMost + 7) / 8 * 8>(C, strict, inverse, entry, weight, emit);
}

template <int kMost, class Entry, class Weight, class Emit>
LDMI_DEVICE Determinant logdet_inverse(const FactorSpace& space, int C, bool strict, bool inverse, const Entry& entry,
                                       const Weight& weight, const Emit& emit) {
  static_assert(kMost <= kFactorClasses);
  if constexpr (kMost > kFactorWarp) {
    if (C > kFactorWarp) {
      return factor::by_block<(kMost + simt::kWarp - 1) / simt::kWarp>(space, C, strict, inverse, entry, weight, emit);
    }
  }
  if (simt::warp() == 0) {
    constexpr int kColumns = kMost < kFactorWarp ? kMost : kFactorWarp;
    const Determinant found = logdet_inverse_warp<kColumns>(C, strict, inverse, entry, weight, emit);
    if (simt::lane() == 0) {
      space.found[0] = found.log_abs_det;
      space.found[1] = found.sign;
      space.found[2] = static_cast<double>(found.kept);
    }
  }
  simt::sync_block();
  return {space.found[0], space.found[1], static_cast<int64_t>(space.found[2])};
}

// ---------------------------------------------------------------------------------------------------- kernels of their own

// Many matrices: what they read and write, one after the other
struct Matrices {
  const double* S;  // [count, C, C]
  const double* n;  // [count, C]
  int64_t count;
  int C;
  bool strict;
  double* log_abs_det;  // [count]
  double* sign;         // [count]
  int64_t* kept;        // [count]
  double* V;            // [count, C, C], or null: the determinants alone
};

namespace factor {

inline constexpr int kWarpThreads = 128, kBlockThreads = 256;
// Of a block that eliminates: what the tiles wait for is hidden by more warps, as far as their registers go
constexpr int factor_threads(int most) { return most <= 64 ? 512 : most <= 128 ? 384 : 256; }

// calls solve(entry, weight, emit) and has one thread write the result down
template <class Solve>
LDMI_DEVICE void one_of(const Matrices& matrices, int64_t at, bool writes, const Solve& solve) {
  const int C = matrices.C;
  const double* const S = matrices.S + at * C * C;
  const double* const n = matrices.n + at * C;
  double* const V = matrices.V + at * C * C;
  const Determinant found = solve([&](int i, int j) { return load_const(S + i * C + j); }, [&](int i) { return load_const(n + i); },
                                  [&](int i, int j, double value) { store(V + i * C + j, value); });
  if (!writes) return;
  store(matrices.log_abs_det + at, found.log_abs_det);
  store(matrices.sign + at, found.sign);
  store(matrices.kept + at, found.kept);
}

// a warp a matrix
template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(kWarpThreads, 1) logdet_inverse_warps(Matrices matrices) {
  const int warps = block_dim() / kWarp;
  for (int64_t at = block_idx() * warps + warp(); at < matrices.count; at += grid_dim() * warps) {
    one_of(matrices, at, lane() == 0, [&](const auto& entry, const auto& weight, const auto& emit) {
      return by_warp<kMost>(matrices.C, matrices.strict, matrices.V != nullptr, entry, weight, emit);
    });
  }
}

// a block a matrix
template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(factor_threads(kMost), 1) logdet_inverse_blocks(Matrices matrices, int stride) {
  Carve carve;
  const FactorSpace space = take_factor_space(carve, matrices.C, stride);
  for (int64_t at = block_idx(); at < matrices.count; at += grid_dim()) {
    one_of(matrices, at, thread_idx() == 0, [&](const auto& entry, const auto& weight, const auto& emit) {
      return by_block<kMost / kWarp>(space, matrices.C, matrices.strict, matrices.V != nullptr, entry, weight, emit);
    });
    sync_block();
  }
}

}  // namespace factor

}  // namespace ldmi::cuda
