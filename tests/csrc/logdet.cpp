// logdet_inverse against an elimination in long double; the same bits on every schedule of its tasks, and without the inverse.
//
//     logdet SEED CASES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "random.h"
#include "reference.h"
#include "schedule.h"

namespace ldmi::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Input {
  int64_t C;
  bool strict, finite, singular;
  std::vector<double> S, n;
};

// Mostly few classes; sometimes several panels, and rarely enough for threads to share them.
int64_t draw_classes(Random& random) {
  const double kind = random.uniform();
  return kind < 0.5 ? random.integer(1, 12) : kind < 0.95 ? random.integer(1, 80) : random.integer(81, 270);
}

Input draw(Random& random) {
  Input in{draw_classes(random), random.chance(0.3), true, false, {}, {}};
  const int64_t C = in.C;
  in.S.resize(C * C);
  in.n.resize(C);
  const double absent = random.one_of({0.0, 0.0, 0.3, 1.0});
  const double signal = random.one_of({0.0, 0.5, 4.0});
  const double size = random.one_of({1.0, 1.0, 1.0, 1.0, 1e-60, 1e60, 1e-305, 1e-310, 1e307});
  // weight of a class that left a moving average: on either side of the threshold
  const double stale = random.one_of({1.0, 1.0, 1.0, 1e-9, 1e-14, 1e-200, 1e-310});
  std::vector<int64_t> place(C);  // the column of a row's large entry: pivots are off the diagonal
  for (int64_t i = 0; i < C; ++i) {
    place[i] = i;
    std::swap(place[i], place[random.integer(0, i)]);
  }
  for (int64_t i = 0; i < C; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) sum += in.S[i * C + j] = random.uniform() + (place[i] == j ? signal * static_cast<double>(C) : 0);
    in.n[i] = random.chance(absent) ? 0 : random.uniform(0.5, 2) * size * (random.chance(0.3) ? stale : 1);
    // an absent class has no row in S but a column
    for (int64_t j = 0; j < C; ++j) in.S[i * C + j] *= in.n[i] / sum;
  }
  if (random.chance(0.1)) {  // a class that is never predicted: a zero pivot, whatever is rounded
    const int64_t never = random.integer(0, C - 1);
    for (int64_t i = 0; i < C; ++i) in.S[i * C + never] = 0;
    in.singular = present_classes(in.n)[never];
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

[[noreturn]] void fail(int64_t number, const Input& in, const char* what, double got, double want, double error) {
  std::printf("case %lld (C = %lld%s%s): %s is %.17g, expected %.17g +- %.3g\n", static_cast<long long>(number),
              static_cast<long long>(in.C), in.strict ? ", strict" : "", in.singular ? ", singular" : "", what, got, want, error);
  std::exit(1);
}

void compare(int64_t number, const Input& in, const cpu::Determinant& got, const std::vector<double>& V) {
  const auto hold = [&](const char* what, double value, Bounded answer) {
    if (!answer.accepts(value)) fail(number, in, what, value, answer.value, answer.error);
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
  if (want.smallest_pivot < 1e-9) return;  // too near to singular to decide
  const double C = static_cast<double>(in.C);
  const std::vector<bool> here = present_classes(in.n);
  hold("log_abs_det", got.log_abs_det, {want.log_abs_det, 0x1p-52 * (C * want.condition + 8 * C * 720)});
  hold("sign", got.sign, {want.sign, 0});
  for (int64_t i = 0; i < in.C; ++i) {
    for (int64_t j = 0; j < in.C; ++j) {
      const double value = want.V[i * in.C + j];
      const double error = here[i] && here[j] ? 8 * C * 0x1p-53 * want.condition * want.inverse_norm / in.n[i] + 0x1p-1073 : 0;
      hold("V", V[i * in.C + j], {value, error});
    }
  }
}

void check(uint64_t seed, int64_t cases) {
  constexpr double unset = -1.2345e67;
  for (int64_t number = 0; number < cases; ++number) {
    Random random(seed * 1000003 + static_cast<uint64_t>(number));
    const Input in = draw(random);
    const auto run = [&](double* V) { return cpu::kernels().logdet_inverse(in.S.data(), in.n.data(), in.C, in.strict, V, kThreads); };
    schedule = {"in order", 0, 0};
    std::vector<double> V(in.C * in.C, unset);
    const cpu::Determinant found = run(V.data());
    compare(number, in, found, V);
    const cpu::Determinant alone = run(nullptr);
    if (std::memcmp(&alone, &found, sizeof found) != 0) {
      fail(number, in, "the determinant without the inverse", alone.log_abs_det, found.log_abs_det, 0);
    }
    for (const Schedule& other : {Schedule{"any order", 0, random.bits() | 1}, Schedule{"three threads", 3, random.bits() | 1}}) {
      if (in.C < 192) break;  // one task
      schedule = other;
      std::vector<double> again(in.C * in.C, unset);
      const cpu::Determinant same = run(again.data());
      if (std::memcmp(&same, &found, sizeof found) != 0 || std::memcmp(again.data(), V.data(), V.size() * sizeof(double)) != 0) {
        fail(number, in, other.name, same.log_abs_det, found.log_abs_det, 0);
      }
    }
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
  } catch (const std::exception& error) {  // an instruction set that this machine lacks
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
