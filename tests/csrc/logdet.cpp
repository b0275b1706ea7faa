// logdet_inverse (Gauss-Jordan), and the pieces round LAPACK (equilibrate, determinant_of, finish_inverse) with a plain LU in the
// place of LAPACK's, against an elimination in long double.
//
//     logdet SEED CASES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "random.h"
#include "reference.h"

namespace ldmi::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Input {
  int64_t C;
  bool strict, finite, singular;
  std::vector<double> S, n;
};

Input draw(Random& random, int64_t most) {
  Input in{random.chance(0.5) ? random.integer(1, 12) : random.integer(1, most), random.chance(0.3), true, false, {}, {}};
  const int64_t C = in.C;
  in.S.resize(C * C);
  in.n.resize(C);
  const double absent = random.one_of({0.0, 0.0, 0.3, 1.0});
  const double signal = random.one_of({0.0, 0.5, 4.0});
  const double size = random.one_of({1.0, 1.0, 1e-60, 1e60});
  std::vector<int64_t> place(C);  // where the large entry of a row stands: pivots are off the diagonal
  for (int64_t i = 0; i < C; ++i) {
    place[i] = i;
    std::swap(place[i], place[random.integer(0, i)]);
  }
  for (int64_t i = 0; i < C; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) sum += in.S[i * C + j] = random.uniform() + (place[i] == j ? signal * static_cast<double>(C) : 0);
    in.n[i] = random.chance(absent) ? 0 : random.uniform(0.5, 2) * size;
    // an absent class has no row in S but a column
    for (int64_t j = 0; j < C; ++j) in.S[i * C + j] *= in.n[i] / sum;
  }
  if (random.chance(0.1)) {  // a class that is never predicted: a zero pivot, whatever is rounded
    const int64_t never = random.integer(0, C - 1);
    for (int64_t i = 0; i < C; ++i) in.S[i * C + never] = 0;
    in.singular = in.n[never] > 0;
  } else if (C > 1 && random.chance(0.1)) {  // the same prediction for every class
    for (int64_t i = 0; i < C; ++i) {
      in.n[i] = in.n[0] > 0 ? in.n[0] * static_cast<double>(1 << (i % 4)) : 0;
      for (int64_t j = 0; j < C; ++j) in.S[i * C + j] = in.S[j] * static_cast<double>(1 << (i % 4));
    }
    in.singular = in.n[0] > 0;
  }
  if (random.chance(0.05)) {
    const double wild = random.one_of({kNaN, kInfinity, -kInfinity});
    (random.chance(0.5) ? in.S[random.integer(0, C * C - 1)] : in.n[random.integer(0, C - 1)]) = wild;
    in.finite = false;
  }
  return in;
}

// R = P L U, column-major, with LAPACK's pivots.
void factor(std::vector<double>& A, std::vector<int32_t>& pivots, int64_t C) {
  const auto at = [&](int64_t i, int64_t j) -> double& { return A[j * C + i]; };
  for (int64_t k = 0; k < C; ++k) {
    int64_t best = k;
    for (int64_t i = k; i < C; ++i) best = std::fabs(at(i, k)) > std::fabs(at(best, k)) ? i : best;
    pivots[k] = static_cast<int32_t>(best + 1);
    if (best != k) {
      for (int64_t j = 0; j < C; ++j) std::swap(at(k, j), at(best, j));
    }
    if (at(k, k) == 0) continue;
    for (int64_t i = k + 1; i < C; ++i) {
      at(i, k) /= at(k, k);
      for (int64_t j = k + 1; j < C; ++j) at(i, j) -= at(i, k) * at(k, j);
    }
  }
}

// R^{-1}, column-major, from the factors.
void invert(const std::vector<double>& A, const std::vector<int32_t>& pivots, int64_t C, std::vector<double>& X) {
  const auto at = [&](int64_t i, int64_t j) { return A[j * C + i]; };
  for (int64_t c = 0; c < C; ++c) {
    double* x = &X[c * C];
    std::fill(x, x + C, 0.0);
    x[c] = 1;
    for (int64_t k = 0; k < C; ++k) std::swap(x[k], x[pivots[k] - 1]);
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t j = 0; j < i; ++j) x[i] -= at(i, j) * x[j];
    }
    for (int64_t i = C - 1; i >= 0; --i) {
      for (int64_t j = i + 1; j < C; ++j) x[i] -= at(i, j) * x[j];
      x[i] /= at(i, i);
    }
  }
}

cpu::Determinant by_pieces(const Input& in, std::vector<double>& V) {
  const int64_t C = in.C;
  std::vector<double> R = in.S;
  std::vector<int32_t> pivots(C);
  const cpu::Screening screening = cpu::equilibrate(R.data(), in.n.data(), C, in.strict);
  const bool wanted = screening.finite && !screening.dead;
  if (wanted) factor(R, pivots, C);
  const cpu::Determinant found =
      cpu::determinant_of(screening, wanted ? R.data() : nullptr, wanted ? pivots.data() : nullptr, in.n.data(), C, in.strict);
  if (wanted && found.sign != 0) invert(R, pivots, C, V);
  cpu::finish_inverse(screening, found, in.n.data(), C, V.data());
  return found;
}

[[noreturn]] void fail(const char* way, int64_t number, const Input& in, const char* what, double got, double want, double error) {
  std::printf("%s: case %lld (C = %lld%s%s): %s is %.17g, expected %.17g +- %.3g\n", way, static_cast<long long>(number),
              static_cast<long long>(in.C), in.strict ? ", strict" : "", in.singular ? ", singular" : "", what, got, want, error);
  std::exit(1);
}

void compare(const char* way, int64_t number, const Input& in, const cpu::Determinant& got, const std::vector<double>& V) {
  const auto hold = [&](const char* what, double value, Bounded answer) {
    if (!answer.accepts(value)) fail(way, number, in, what, value, answer.value, answer.error);
  };
  if (!in.finite) {
    hold("log_abs_det", got.log_abs_det, {kNaN, 0});
    hold("sign", got.sign, {kNaN, 0});
    for (const double v : V) hold("V", v, {kNaN, 0});
    return;
  }
  const Inverse want = logdet_inverse(in.S, in.n, in.C, in.strict);
  hold("kept", static_cast<double>(got.kept), {static_cast<double>(want.kept), 0});
  if (in.singular || want.sign == 0) {
    hold("log_abs_det", got.log_abs_det, {-kInfinity, 0});
    hold("sign", got.sign, {0, 0});
    for (const double v : V) hold("V", v, {0, 0});
    return;
  }
  if (want.smallest_pivot < 1e-9) return;  // too near to singular to say
  const double C = static_cast<double>(in.C);
  hold("log_abs_det", got.log_abs_det, {want.log_abs_det, 0x1p-52 * (C * want.condition + 8 * C * 150)});
  hold("sign", got.sign, {want.sign, 0});
  for (int64_t i = 0; i < in.C; ++i) {
    for (int64_t j = 0; j < in.C; ++j) {
      const double value = want.V[i * in.C + j];
      const double error = in.n[i] > 0 && in.n[j] > 0 ? 8 * C * 0x1p-53 * want.condition * want.inverse_norm / in.n[i] : 0;
      hold("V", V[i * in.C + j], {value, error});
    }
  }
}

void check(uint64_t seed, int64_t cases) {
  for (int64_t number = 0; number < cases; ++number) {
    Random random(seed * 1000003 + static_cast<uint64_t>(number));
    const Input in = draw(random, 66);
    std::vector<double> V(in.C * in.C, -1.2345e67);
    if (in.C <= 64) {
      const cpu::Determinant found = cpu::kernels().logdet_inverse(in.S.data(), in.n.data(), in.C, in.strict, V.data());
      compare("Gauss-Jordan", number, in, found, V);
    }
    std::fill(V.begin(), V.end(), -1.2345e67);
    const cpu::Determinant found = by_pieces(in, V);
    compare("LU", number, in, found, V);
  }
  std::printf("%s: %lld matrices agree\n", cpu::kernels().isa, static_cast<long long>(cases));
}

}  // namespace
}  // namespace ldmi::test

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: %s SEED CASES\n", arguments[0]);
    return 2;
  }
  try {
    ldmi::test::check(std::strtoull(arguments[1], nullptr, 10), std::strtoll(arguments[2], nullptr, 10));
  } catch (const std::exception& error) {  // an instruction set that is not there
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
