// log|det| and inverse of a small matrix in one sweep: Gauss-Jordan elimination in place, with partial pivoting.
//
// Step k divides row k by its pivot and takes it out of every other row; the column that it clears holds column k of the inverse
// from then on. Row exchanges of the matrix are undone as column exchanges of the inverse, in the reverse order. The product of the
// pivots is the determinant.

#include "isa.h"
#include "rows.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

// The logarithm of a product of positive numbers, by one logarithm: the factors are multiplied in the range of one exponent, and the
// exponents added as integers.
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

}  // namespace

Determinant logdet_inverse(const double* S, const double* n, int64_t C, bool strict, double* V) {
  constexpr int lanes = kLanes<double>;
  const int64_t width = padded<double>(C);
  Buffer<double> matrix(C * width);
  Buffer<int64_t> exchanged(C);
  double* R = matrix.get();
  double norm = 0, sign = 1;
  LogProduct determinant;
  int64_t present = 0;
  bool finite = true;
  for (int64_t i = 0; i < C; ++i) {
    double* row = R + i * width;
    double sum = 0, all = n[i] * 0;
    const bool here = n[i] > 0;
    const double scale = 1 / n[i];
    for (int64_t j = 0; j < C; ++j) {
      const double entry = S[i * C + j];
      all += entry * 0;  // NaN if any entry is NaN or infinite
      row[j] = here && n[j] > 0 ? entry * scale : (i == j ? 1.0 : 0.0);
      sum += row[j] < 0 ? -row[j] : row[j];
    }
    for (int64_t j = C; j < width; ++j) row[j] = 0;
    finite &= all == 0;
    norm = sum > norm ? sum : norm;
    present += here;
    if (here && finite) determinant.multiply(n[i]);
  }
  const auto fill = [&](double value) {
    for (int64_t i = 0; i < C * C; ++i) V[i] = value;
  };
  const int64_t kept = strict && present > 0 ? C : present;
  if (!finite) {
    fill(kNaN);
    return {kNaN, kNaN, kept};
  }
  const auto singular = [&] {
    fill(0);
    return Determinant{-__builtin_inf(), 0, kept};
  };
  if (present == 0) {
    fill(0);
    return {0, 1, 0};
  }
  if (kept != present) return singular();
  const double threshold = static_cast<double>(C) * 0x1p-52 * norm;
  for (int64_t k = 0; k < C; ++k) {
    int64_t pivot_row = k;
    double largest = -1;
    for (int64_t i = k; i < C; ++i) {
      const double magnitude = __builtin_fabs(R[i * width + k]);
      if (magnitude > largest) {
        largest = magnitude;
        pivot_row = i;
      }
    }
    if (!(largest > threshold)) return singular();
    exchanged[k] = pivot_row;
    double* row = R + k * width;
    if (pivot_row != k) {
      double* other = R + pivot_row * width;
      for (int64_t j = 0; j < width; j += lanes) {
        const Vec<double> a = load(row + j);
        store(row + j, load(other + j));
        store(other + j, a);
      }
      sign = -sign;
    }
    const double pivot = row[k];
    sign = pivot < 0 ? -sign : sign;
    determinant.multiply(largest);
    row[k] = 1;
    const Vec<double> inverse = splat(1 / pivot);
    for (int64_t j = 0; j < width; j += lanes) store(row + j, load(row + j) * inverse);
    for (int64_t i = 0; i < C; ++i) {
      if (i == k) continue;
      double* other = R + i * width;
      const Vec<double> factor = splat(-other[k]);
      other[k] = 0;
      for (int64_t j = 0; j < width; j += lanes) store(other + j, fma(factor, load(row + j), load(other + j)));
    }
  }
  for (int64_t k = C - 1; k >= 0; --k) {
    if (exchanged[k] == k) continue;
    for (int64_t i = 0; i < C; ++i) {
      const double a = R[i * width + k];
      R[i * width + k] = R[i * width + exchanged[k]];
      R[i * width + exchanged[k]] = a;
    }
  }
  for (int64_t i = 0; i < C; ++i) {
    const double scale = 1 / n[i];
    for (int64_t j = 0; j < C; ++j) V[i * C + j] = n[i] > 0 && n[j] > 0 ? R[j * width + i] * scale : 0.0;
  }
  return {determinant.log(), sign, kept};
}

}  // namespace ldmi::cpu::LDMI_ISA
