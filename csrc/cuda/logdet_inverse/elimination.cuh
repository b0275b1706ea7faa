// What the eliminations by one warp, by one block and by a grid share: constants, the row scaling, pivots, and the elimination of a
// panel by one warp in registers.
#pragma once

#include <limits>
#include <utility>

#include "../../cpu/kernels.h"
#include "../../plan/layout.h"
#include "../../plan/presence.h"
#include "../../plan/singular.h"
#include "../../simt/simt.cuh"

namespace ldmi::cuda {

using cpu::Determinant;

inline constexpr int kFactorPanel = 8;  // columns that are eliminated together
using plan::kFactorWarp;
inline constexpr int kFactorClasses = 192;  // more than fit into the shared memory of a block

using plan::FactorSpace;
using plan::take_factor_space;

namespace factor {

using namespace simt;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A pivot must have a larger magnitude.
LDMI_HOST_DEVICE double threshold(int64_t C, double norm) { return plan::singular_threshold(C, norm); }

// The least weight of a class that is present. Each warp adds up all C weights in the same order, so all warps get the same bits.
template <class Weight>
LDMI_DEVICE double least_weight(int C, const Weight& weight) {
  double least = 0.0;
  for (int i = lane(); i < C; i += kWarp) least += plan::least_part(weight(i));
  return warp_sum(least);
}

// What is stored for a row of R besides its entries: its norm (NaN if an entry is not finite), and in the sign bit whether its class
// is absent. The sign is set by bit operations, because negation may lose the sign of NaN.
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

// The logarithm of a product of positive numbers that are spread over the lanes, with one call of log: the fractions in [1, 2) are
// multiplied, the exponents added as integers.
class LogProduct {
 public:
  LDMI_DEVICE void multiply(double factor) {
    const bool subnormal = factor < 0x1p-1022;
    split(subnormal ? factor * 0x1p54 : factor);
    exponents_ -= subnormal ? 54 : 0;
  }
  // The logarithm of the product over all lanes; every lane gets it.
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

// The pivots that one warp has used; lane l holds those of the steps l, l + 32, ...
struct Pivots {
  LogProduct product;
  bool odd = false;  // whether the number of negative pivots is odd
  double last = 1.0;

  LDMI_DEVICE void take(int step, double pivot) {
    if (lane() == step % kWarp) last = pivot;
  }
  // The lanes of the steps first..first+count-1 (at most 32) enter their pivots, all at once, outside the chain from step to step.
  LDMI_DEVICE void count(int first, int count) {
    if (((lane() - first) & (kWarp - 1)) >= count) return;
    product.multiply(abs(last));
    odd ^= last < 0.0;
  }
};

// Calls body(0), body(1), ... with constants. In a loop, `if (s == slot)` would make the compiler index registers by `slot`, that is
// in memory.
template <int... s, class Body>
LDMI_DEVICE void for_each_slot(std::integer_sequence<int, s...>, const Body& body) {
  (body(std::integral_constant<int, s>{}), ...);
}

// One warp eliminates `columns` columns alone. Lane l holds the rows l, l + 32, ... (zeros where there is no such row). The matrix
// moves through the registers: each step removes column 0 and appends its result after the last column, so every index is a constant.
// Column j ends up in column kColumns - columns + j. `used`: one bit per row of the lane, set if the row has been a pivot row. All
// lanes call step(j, row, pivot). Returns false if no pivot exceeds the threshold.
template <int kSlots, int kColumns, class Step>
LDMI_DEVICE bool eliminate(double (&a)[kSlots][kColumns], int rows, int columns, double threshold, unsigned& used, const Step& step) {
  for (int j = 0; j < columns; ++j) {
    unsigned key = 0;
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      const int row = lane() + kWarp * s;
      const unsigned high = static_cast<unsigned>(bit_cast<uint64_t>(a[s][0]) >> 32) & 0x7fffff00u;
      const unsigned mine = high | static_cast<unsigned>(255 - row);  // of equal magnitudes the first row
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

inline constexpr double kMultiplier = 2.0;  // the largest multiplier with which the diagonal entry may be the pivot

// The same with diagonal entries as pivots: the pivot of step j is in row `source` + j of the lanes' first rows. Returns false if in
// some step it was too small compared with the entries of the open rows, or with the threshold; then `a` must not be used.
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
      pivot = shfl(a[0][0], source);  // of the next step; the shuffle overlaps with the rest of this step
      inverse = reciprocal(pivot);
    }
    LDMI_UNROLL
    for (int s = 0; s < kSlots; ++s) a[s][kColumns - 1] = minus[s];
  }
  return all(good);
}

// The product of tiles, which applies a panel to other columns: tile += X G, 8 x 8 += (8 x 4 kQuads) (4 kQuads x 8), on the fp64
// tensor cores. A lane has two neighbouring entries of a column of M in a tile.
template <int kQuads>
LDMI_DEVICE void tile_update(M8N8K4::C& tile, const double (&x)[kQuads], const double (&g)[kQuads]) {
  LDMI_UNROLL
  for (int h = 0; h < kQuads; ++h) tile = mma(x[h], g[h], tile);
}
LDMI_DEVICE M8N8K4::C shared_load_tile(const double* at) {
  const Pack<double> two = shared_load16(at);
  M8N8K4::C tile;
  tile.value[0] = two[0];
  tile.value[1] = two[1];
  return tile;
}
LDMI_DEVICE void shared_store_tile(double* at, const M8N8K4::C& tile) {
  shared_store16(at, Pack<double>{{tile.value[0], tile.value[1]}});
}

// What is known of a matrix before the elimination, and the result if no elimination is needed
struct Screening {
  bool finite;  // S and n
  bool strict;
  int present, classes;

  LDMI_HOST_DEVICE int kept() const { return strict && present > 0 ? classes : present; }
  LDMI_HOST_DEVICE bool regular() const { return finite && present > 0 && kept() == present; }
  // The result if not regular
  LDMI_HOST_DEVICE Determinant answer() const {
    if (!finite) return {kNaN, kNaN, kept()};
    if (present == 0) return {0.0, 1.0, 0};
    return singular();
  }
  LDMI_HOST_DEVICE Determinant singular() const { return {-kInfinity, 0.0, kept()}; }
};

}  // namespace factor

}  // namespace ldmi::cuda
