// logdet_inverse against an elimination in long double: all kinds of hard matrices, class counts on both sides of every tile's edge,
// in batches; by a grid of any number of blocks and threads, with panels of any width; and on devices with so little shared memory
// that the LU path runs (here with a plain LU).

#include <algorithm>
#include <limits>
#include <string>

#include "../../csrc/cuda/logdet_inverse.cu"
#include "../csrc/reference.h"
#include "case.h"

namespace ldmi::cuda {
namespace {

using test::Random;

constexpr double kEpsilon = 0x1p-52;

struct Input {
  int64_t C;
  bool strict = false, finite = true, singular = false, growth = false;
  bool regular = false;  // though nearly singular
  bool rounded = false;  // singular, but the last pivot is a rounding error, which growth may lift over the threshold
  std::vector<double> S, n;

  double& at(int64_t i, int64_t j) { return S[static_cast<size_t>(i * C + j)]; }
  double at(int64_t i, int64_t j) const { return S[static_cast<size_t>(i * C + j)]; }
  double& weight(int64_t i) { return n[static_cast<size_t>(i)]; }
  double weight(int64_t i) const { return n[static_cast<size_t>(i)]; }
  std::vector<bool> present() const { return test::present_classes(n); }
};

std::vector<int64_t> permutation(Random& random, int64_t C) {
  std::vector<int64_t> out(static_cast<size_t>(C));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<int64_t>(i);
    std::swap(out[i], out[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i)))]);
  }
  return out;
}

// The joint of a typical batch: rows of predictions, with a large entry somewhere in each; absent classes, columns that are never
// predicted, equal rows, NaN and infinities
void draw_joint(Random& random, Input& in) {
  const int64_t C = in.C;
  const double absent = random.one_of({0.0, 0.0, 0.3, 1.0}), signal = random.one_of({0.0, 0.5, 4.0});
  const double size = random.one_of({1.0, 1.0, 1.0, 1.0, 1e-60, 1e60, 1e-305, 1e-310, 1e307});
  in.strict = random.chance(0.3);
  const std::vector<int64_t> place = permutation(random, C);
  for (int64_t i = 0; i < C; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) {
      in.at(i, j) = random.uniform() + (place[static_cast<size_t>(i)] == j ? signal * static_cast<double>(C) : 0);
      sum += in.at(i, j);
    }
    // of nearly no weight is absent, too; the first class has weight, unless none has
    const double rare = absent < 1 && i > 0 ? random.one_of({0.0, 1e-16 * size, 1e-200, 1e-310}) : 0;
    const bool here = !random.chance(absent) || (absent < 1 && i == 0);
    in.weight(i) = here ? random.uniform(0.5, 2) * size : std::min(rare, 1e-16 * size);
    for (int64_t j = 0; j < C; ++j) in.at(i, j) *= in.weight(i) / sum;
  }
  if (random.chance(0.1)) {  // never predicted: a zero pivot, whatever is rounded; of the first, the last or another column
    const int64_t never = random.one_of({int64_t{0}, C - 1, C / 2, random.integer(0, C - 1)});
    for (int64_t i = 0; i < C; ++i) in.at(i, never) = 0;
    in.singular = in.present()[static_cast<size_t>(never)];
  } else if (C > 1 && random.chance(0.1)) {  // the same prediction for every class
    for (int64_t i = 0; i < C; ++i) {
      in.weight(i) = in.weight(0) > 0 ? in.weight(0) * static_cast<double>(1 << (i % 4)) : 0;
      for (int64_t j = 0; j < C; ++j) in.at(i, j) = in.at(0, j) * static_cast<double>(1 << (i % 4));
    }
    in.singular = in.weight(0) > 0;
  }
  if (random.chance(0.1)) {
    double& entry = random.chance(0.5) ? in.S[static_cast<size_t>(random.integer(0, C * C - 1))] : in.weight(random.integer(0, C - 1));
    entry = random.one_of({factor::kNaN, factor::kInfinity, -factor::kInfinity});
    in.finite = false;
  }
}

// x - 2 v (v . x) for each column (or row) x
void reflect(Random& random, Input& in, bool columns) {
  const int64_t C = in.C;
  std::vector<double> v(static_cast<size_t>(C));
  double norm = 0;
  for (double& x : v) {
    x = random.normal();
    norm += x * x;
  }
  for (int64_t a = 0; a < C; ++a) {
    double dot = 0;
    for (int64_t b = 0; b < C; ++b) dot += v[static_cast<size_t>(b)] * (columns ? in.at(b, a) : in.at(a, b));
    for (int64_t b = 0; b < C; ++b) (columns ? in.at(b, a) : in.at(a, b)) -= 2 * dot / norm * v[static_cast<size_t>(b)];
  }
}

// Singular values from 1 down to 1 / condition between two orthogonal matrices
void draw_condition(Random& random, Input& in) {
  const double condition = std::pow(10.0, static_cast<double>(random.integer(0, 10)));
  for (int64_t i = 0; i < in.C; ++i) {
    in.at(i, i) = in.C == 1 ? 1 : std::pow(condition, -static_cast<double>(i) / static_cast<double>(in.C - 1));
  }
  for (int k = 0; k < 3; ++k) {
    reflect(random, in, true);
    reflect(random, in, false);
  }
}

// Growth by 2^(C - 1), and entries that are not powers of two
void draw_wilkinson(Random& random, Input& in) {
  in.growth = true;
  for (int64_t i = 0; i < in.C; ++i) {
    for (int64_t j = 0; j < in.C; ++j) in.at(i, j) = i == j || j == in.C - 1 ? 1 : i > j ? -1 + 0x1p-8 * random.uniform() : 0;
  }
}

// A permutation and a little noise: the pivot is off the diagonal at every step, and every other candidate is nearly zero
void draw_permutation(Random& random, Input& in) {
  const std::vector<int64_t> place = permutation(random, in.C);
  const int64_t shift = random.integer(0, in.C - 1);
  const bool cyclic = random.chance(0.5);
  for (double& x : in.S) x = random.uniform(-1e-3, 1e-3);
  for (int64_t i = 0; i < in.C; ++i) {
    in.at(i, cyclic ? (i + shift) % in.C : place[static_cast<size_t>(i)]) = random.chance(0.5) ? 1 : -1;
  }
}

// Rows and columns from 1 down to 1e-5 each
void draw_graded(Random& random, Input& in) {
  const double last = static_cast<double>(std::max<int64_t>(in.C - 1, 1));
  for (int64_t i = 0; i < in.C; ++i) {
    for (int64_t j = 0; j < in.C; ++j) {
      in.at(i, j) = random.uniform(-1, 1) * std::pow(10.0, -5 * static_cast<double>(i + j) / last) +
                    (i == j ? std::pow(10.0, -10 * static_cast<double>(i) / last) : 0);
    }
  }
}

// Two equal columns, or two equal rows
void draw_equal(Random& random, Input& in) {
  for (double& x : in.S) x = random.uniform(-1, 1);
  if (in.C == 1) in.S[0] = 0;
  in.singular = true;
  if (in.C == 1) return;
  in.rounded = true;
  const int64_t a = random.integer(0, in.C - 1), b = (a + 1 + random.integer(0, in.C - 2)) % in.C;
  const bool columns = random.chance(0.5);
  for (int64_t i = 0; i < in.C; ++i) (columns ? in.at(i, b) : in.at(b, i)) = columns ? in.at(i, a) : in.at(a, i);
}

// Triangular, the rows in any order: pivots of 1, and a last one that is the largest which makes it singular, or the next number
void draw_threshold(Random& random, Input& in) {
  const int64_t C = in.C, full = random.integer(0, C - 1);
  const std::vector<int64_t> row = permutation(random, C);
  const auto place = [&](int64_t i, int64_t j) -> double& { return in.at(row[static_cast<size_t>(i)], j); };
  for (int64_t i = 0; i < C; ++i) place(i, i) = 1;
  for (int64_t j = full + 1; j < C; ++j) place(full, j) = 1;
  in.regular = random.chance(0.5);
  if (full == C - 1) {
    in.regular = true;  // a pivot of 1
    return;
  }
  const double threshold = static_cast<double>(C) * kEpsilon * static_cast<double>(C - full);
  place(C - 1, C - 1) = in.regular ? std::nextafter(threshold, 1.0) : threshold;
  in.singular = !in.regular;
}

// A class is mostly predicted as itself, and sometimes as a few others: like noisy labels, in groups of similar classes
void draw_transition(Random& random, Input& in) {
  const int64_t C = in.C, group = random.integer(1, std::min<int64_t>(C, 20));
  const double noise = random.uniform(0, 0.7);
  for (int64_t i = 0; i < C; ++i) {
    const int64_t begin = i / group * group, count = std::min(C - begin, group);
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) {
      const bool alike = j >= begin && j < begin + count;
      in.at(i, j) = (i == j ? 1 - noise : 0) + (alike ? noise * random.uniform() * random.uniform() : 1e-4 * random.uniform());
      sum += in.at(i, j);
    }
    in.weight(i) = random.uniform(0.5, 2);
    for (int64_t j = 0; j < C; ++j) in.at(i, j) *= in.weight(i) / sum;
  }
}

// No pivot at the first, the last or another column, or row: zeros, or twice the one before
void draw_dependent(Random& random, Input& in) {
  const int64_t C = in.C, at = random.one_of({int64_t{0}, C - 1, C / 2, random.integer(0, C - 1)});
  const bool columns = random.chance(0.5), zeros = at == 0 || random.chance(0.5);
  for (double& x : in.S) x = random.normal();
  for (int64_t i = 0; i < C; ++i) {
    (columns ? in.at(i, at) : in.at(at, i)) = zeros ? 0 : 2 * (columns ? in.at(i, at - 1) : in.at(at - 1, i));
  }
  in.singular = true;
  in.rounded = !zeros;
}

// Nearly of rank one, like every block during the elimination: eliminating R itself by panels would leave a residual of 1e-8
void draw_near_rank_one(Random& random, Input& in) {
  const double noise = std::pow(10.0, -static_cast<double>(random.integer(1, 9)));
  std::vector<double> row(static_cast<size_t>(in.C));
  for (double& x : row) x = random.normal();
  for (int64_t i = 0; i < in.C; ++i) {
    const double size = random.normal();
    for (int64_t j = 0; j < in.C; ++j) in.at(i, j) = size * row[static_cast<size_t>(j)] + noise * random.normal();
  }
}

Input draw(Random& random, int64_t C) {
  Input in{.C = C, .S = std::vector<double>(static_cast<size_t>(C * C)), .n = std::vector<double>(static_cast<size_t>(C), 1.0)};
  using Draw = void (*)(Random&, Input&);
  const Draw kinds[] = {draw_joint,  draw_joint, draw_joint,     draw_condition,  draw_condition, draw_permutation,  draw_wilkinson,
                        draw_graded, draw_equal, draw_threshold, draw_transition, draw_dependent, draw_near_rank_one};
  kinds[random.integer(0, 12)](random, in);
  return in;
}

[[noreturn]] void fail(const Input& in, const char* what, double got, double want, double error) {
  char line[300];
  std::snprintf(line, sizeof line, "C = %lld%s%s: %s is %.17g, expected %.17g +- %.3g", static_cast<long long>(in.C),
                in.strict ? ", strict" : "", in.singular ? ", singular" : "", what, got, want, error);
  throw test::Failure(line);
}

// ||R (n V)^T - I|| / (||R|| ||n V||) <= 10 C eps, of the present classes
void require_inverse(const Input& in, const double* V, double growth) {
  const int64_t C = in.C;
  std::vector<int64_t> here;
  const std::vector<bool> present = in.present();
  for (int64_t i = 0; i < C; ++i) {
    if (present[static_cast<size_t>(i)]) here.push_back(i);
  }
  long double most = 0, norm_R = 0, norm_V = 0;
  for (const int64_t i : here) {
    long double sum = 0, R = 0, inverse = 0;
    for (const int64_t k : here) {
      long double entry = i == k ? -1.0L : 0.0L;
      for (const int64_t j : here) entry += static_cast<long double>(in.at(i, j)) / in.weight(i) * V[k * C + j] * in.weight(k);
      sum += std::fabs(entry);
      R += std::fabs(in.at(i, k)) / in.weight(i);
      inverse += std::fabs(static_cast<long double>(V[k * C + i]) * in.weight(k));
    }
    most = std::max(most, sum);
    norm_R = std::max(norm_R, R);
    norm_V = std::max(norm_V, inverse);
  }
  const double error = static_cast<double>(most / (norm_R * norm_V));
  if (!(error <= 10 * static_cast<double>(C) * kEpsilon * growth))
    fail(in, "the residual", error, 0, 10 * static_cast<double>(C) * kEpsilon);
}

void compare(const Input& in, const Determinant& got, const double* V) {
  const int64_t C = in.C;
  const auto hold = [&](const char* what, double value, test::Bounded answer) {
    if (!answer.accepts(value)) fail(in, what, value, answer.value, answer.error);
  };
  const auto everywhere = [&](double value) {
    for (int64_t i = 0; i < C * C; ++i) hold("V", V[i], {value, 0});
  };
  if (!in.finite) {
    hold("log_abs_det", got.log_abs_det, {factor::kNaN, 0});
    hold("sign", got.sign, {factor::kNaN, 0});
    return everywhere(factor::kNaN);
  }
  const test::Inverse want = test::logdet_inverse(in.S, in.n, C, in.strict);
  hold("kept", static_cast<double>(got.kept), {static_cast<double>(want.kept), 0});
  if (in.rounded && got.sign != 0) {
    double bound = std::log(64 * static_cast<double>(C) * kEpsilon);
    for (int64_t i = 0; i < C; ++i) {
      double square = 0;
      for (int64_t j = 0; j < C; ++j) square += in.at(i, j) * in.at(i, j);
      bound += std::log(square) / 2;
    }
    if (!(got.log_abs_det <= bound)) fail(in, "log_abs_det", got.log_abs_det, -factor::kInfinity, bound);
    return;
  }
  if (in.singular || want.sign == 0) {
    hold("log_abs_det", got.log_abs_det, {-factor::kInfinity, 0});
    hold("sign", got.sign, {0, 0});
    return everywhere(0);
  }
  if (in.regular && !(got.sign != 0 && std::isfinite(got.log_abs_det))) fail(in, "sign", got.sign, want.sign, 0);
  if (want.smallest_pivot < 1e-12) return;  // too near to singular to decide
  const double c = static_cast<double>(C), growth = in.growth ? std::pow(2.0, c - 1) : 1;
  if (growth > 1e12) return;  // growth leaves no correct digit
  hold("log_abs_det", got.log_abs_det, {want.log_abs_det, growth * kEpsilon * (c * want.condition + 8 * c * 720)});
  hold("sign", got.sign, {want.sign, 0});
  double largest = 0, error = 0;
  const std::vector<bool> present = in.present();
  for (int64_t i = 0; i < C; ++i) {
    for (int64_t j = 0; j < C; ++j) {
      const double value = want.V[static_cast<size_t>(i * C + j)];
      const bool both = present[static_cast<size_t>(i)] && present[static_cast<size_t>(j)];
      const double rounding = growth * 4 * c * kEpsilon * want.condition * want.inverse_norm / in.weight(i) + 0x1p-1073;
      hold("V", V[i * C + j], {value, both ? rounding : 0});
      largest = std::max(largest, std::fabs(value));
      error = std::max(error, std::fabs(V[i * C + j] - value));
    }
  }
  if (!in.growth && want.condition <= 1e6 && error > 1e-11 * largest) fail(in, "V's error", error / largest, 0, 1e-11);
  if (want.kept > 0 && std::isfinite(largest)) require_inverse(in, V, growth);
}

// The class counts at which the algorithm changes, and any other
int64_t draw_classes(Random& random, int64_t most) {
  const int64_t edges[] = {1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 34, 39, 40, 41, 47, 48, 49, 56, 63, 64, 65};
  const int64_t large[] = {71, 72, 73, 95, 96, 97, 127, 128, 129, 143, 144, 145, 159, 160, 161, 168, 169, 170};
  const double kind = random.uniform();
  const int64_t C = kind < 0.5 ? edges[random.integer(0, 24)] : kind < 0.9 ? random.integer(1, 72) : large[random.integer(0, 17)];
  return std::min(C, most);
}

struct Batch {
  std::vector<Input> inputs;
  std::vector<double> S, n;
};

struct Results {
  std::vector<double> log_abs_det, sign, V;
  std::vector<int64_t> kept;
};

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

Results launch_own(const test::Buffer<double>& S, const test::Buffer<double>& n, int64_t count, int64_t C, bool strict, bool inverse,
                   const DeviceLimits& limits) {
  const test::Buffer<double> log_abs_det(count, "log_abs_det"), sign(count, "sign"), V(inverse ? count * C * C : 0, "V");
  const test::Buffer<int64_t> kept(count, "kept");
  const test::Buffer<unsigned char> workspace(plan::cuda_logdet_inverse(count, C, limits, inverse).workspace_bytes, "workspace");
  test::require_success(logdet_inverse(S.data(), n.data(), count, C, strict, log_abs_det.data(), sign.data(), kept.data(),
                                       inverse ? V.data() : nullptr, workspace.data(), limits, simt::Stream{}),
                        "logdet_inverse");
  return {log_abs_det.download(), sign.download(), V.download(), kept.download()};
}

#ifndef __CUDACC__
// A device that other processes use too: fewer blocks run at once than its limits say, and the launch returns an error.
void require_refusal(const test::Buffer<double>& S, const test::Buffer<double>& n, int64_t count, int64_t C, DeviceLimits limits) {
  limits.sms *= 2048;
  const test::Buffer<double> log_abs_det(count, "log_abs_det"), sign(count, "sign"), V(count * C * C, "V");
  const test::Buffer<int64_t> kept(count, "kept");
  const test::Buffer<unsigned char> workspace(plan::cuda_logdet_inverse(count, C, limits).workspace_bytes, "workspace");
  const int code = logdet_inverse(S.data(), n.data(), count, C, false, log_abs_det.data(), sign.data(), kept.data(), V.data(),
                                  workspace.data(), limits, simt::Stream{});
  test::require(simt::error_text(code) == std::string("too many blocks in cooperative launch"), "a grid that cannot run was launched");
}
#endif

// A grid of any number of blocks and threads, with any number of panel blocks and any panel width: few classes reach all edges
struct GridShape {
  int64_t blocks;
  int threads, slots, panel, panel_blocks;
};

Results launch_on_grid(const test::Buffer<double>& S, const test::Buffer<double>& n, int64_t count, int64_t C, bool strict,
                       bool inverse, int64_t lead, const GridShape& shape) {
  const test::Buffer<double> log_abs_det(count, "log_abs_det"), sign(count, "sign"), V(inverse ? count * C * C : 0, "V", lead);
  const test::Buffer<int64_t> kept(count, "kept");
  const int sms = static_cast<int>(shape.blocks);
  Workspace size;
  plan::take_grid_space(size, C, sms, inverse);
  const test::Buffer<unsigned char> workspace(size.bytes(), "workspace");
  Workspace work(workspace.data());
  const GridSpace space = plan::take_grid_space(work, C, sms, inverse);
  const Matrices matrices{
      S.data(),           n.data(),    count,       static_cast<int>(C),          strict,
      log_abs_det.data(), sign.data(), kept.data(), inverse ? V.data() : nullptr,
  };
  simt::Carve carve;
  // as the launcher does, which uses clusters only for more classes than a test can afford
  if (shape.panel_blocks == plan::kClusterBlocks && shape.threads == kGridThreads) {
    DeviceLimits limits;
    limits.sms = sms;
    limits.clusters = sms / plan::kClusterBlocks;
    plan::CudaLogdetInverse plan{};
    plan.panel = shape.panel;
    plan.smem_bytes = plan::grid_smem(C, shape.panel, shape.panel_blocks);
    constexpr int kMost = plan::kClusterClasses / plan::kClusterBlocks / kGridThreads;
    test::require_success(launch_grid<kMost, plan::kClusterBlocks>(matrices, plan, workspace.data(), limits, simt::Stream{}),
                          "logdet_inverse_grid");
    return {log_abs_det.download(), sign.download(), V.download(), kept.download()};
  }
  const auto start = [&](auto kernel, auto panel_blocks) {
    constexpr int kBlocks = decltype(panel_blocks)::value;
    test::require(slice_rows<kBlocks>(static_cast<int>(C)) == plan::slice_rows(C, kBlocks), "the plan's rows are not the kernel's");
    take_grid_shared<kBlocks>(carve, static_cast<int>(C), shape.panel);
    const simt::Grid grid{shape.blocks, shape.threads, carve.bytes(), kBlocks, true};
    return simt::launch(kernel, grid, simt::Stream{}, matrices, space, shape.panel);
  };
  const auto with_slots = [&](auto threads, auto panel_blocks) {
    constexpr int kThreads = decltype(threads)::value, kBlocks = decltype(panel_blocks)::value;
    if (shape.slots == 1) return start(factor::logdet_inverse_grid<1, kThreads, kBlocks>, panel_blocks);
    if (shape.slots == 2) return start(factor::logdet_inverse_grid<2, kThreads, kBlocks>, panel_blocks);
    if constexpr (kBlocks == 1) {
      return shape.slots == 4 ? start(factor::logdet_inverse_grid<4, kThreads, 1>, panel_blocks)
                              : start(factor::logdet_inverse_grid<8, kThreads, 1>, panel_blocks);
    }
    throw test::Failure("no such kernel");
  };
  const auto with_threads = [&](auto panel_blocks) {
    return shape.threads == 32   ? with_slots(std::integral_constant<int, 32>{}, panel_blocks)
           : shape.threads == 96 ? with_slots(std::integral_constant<int, 96>{}, panel_blocks)
                                 : with_slots(std::integral_constant<int, 256>{}, panel_blocks);
  };
  test::require_success(shape.panel_blocks == 1   ? with_threads(std::integral_constant<int, 1>{})
                        : shape.panel_blocks == 2 ? with_threads(std::integral_constant<int, 2>{})
                                                  : with_threads(std::integral_constant<int, plan::kClusterBlocks>{}),
                        "logdet_inverse_grid");
  return {log_abs_det.download(), sign.download(), V.download(), kept.download()};
}

// P M = L U, of M column-major, in place; and U^T X = X, L^T X = X, of X column-major: as cuSOLVER does
void factor_plainly(double* a, int32_t* p, int64_t C) {
  for (int64_t k = 0; k < C; ++k) {
    int64_t best = k;
    for (int64_t i = k; i < C; ++i) best = std::fabs(a[k * C + i]) > std::fabs(a[k * C + best]) ? i : best;
    p[k] = static_cast<int32_t>(best + 1);
    for (int64_t j = 0; j < C; ++j) std::swap(a[j * C + k], a[j * C + best]);
    for (int64_t i = k + 1; i < C; ++i) {
      const double factor = a[k * C + i] /= a[k * C + k];
      for (int64_t j = k + 1; j < C; ++j) a[j * C + i] -= factor * a[j * C + k];
    }
  }
}
void solve_plainly(const double* a, double* x, int64_t C) {
  for (int64_t c = 0; c < C; ++c, x += C) {
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t j = 0; j < i; ++j) x[i] -= a[i * C + j] * x[j];
      x[i] /= a[i * C + i];
    }
    for (int64_t i = C; i-- > 0;) {
      for (int64_t j = i + 1; j < C; ++j) x[i] -= a[i * C + j] * x[j];
    }
  }
}

// With `in_place`, the factors and V have only the memory of S
Results launch_library(const Batch& batch, const test::Buffer<double>& n, int64_t count, int64_t C, bool strict, bool in_place,
                       const plan::CudaLogdetInverse& plan, const DeviceLimits& limits) {
  const test::Buffer<double> S(batch.S, "S"), own(in_place ? 0 : count * C * C, "A"), X(count * C * C, "X"),
      log_abs_det(count, "log_abs_det"), sign(count, "sign");
  const test::Buffer<double>& A = in_place ? S : own;
  const test::Buffer<int64_t> kept(count, "kept");
  const test::Buffer<unsigned char> workspace(plan.workspace_bytes, "workspace");
  test::require_success(
      logdet_inverse_equilibrate(S.data(), n.data(), count, C, A.data(), X.data(), workspace.data(), limits, simt::Stream{}),
      "equilibrate");
  std::vector<double> right = X.download(), LU = A.download();
  for (int64_t e = 0; e < count * C * C; ++e) {
    test::require(right[static_cast<size_t>(e)] == (e / C % C == e % C ? 1 : 0), "X is not the identity");
  }
  std::vector<int32_t> pivots(static_cast<size_t>(count * C));
  for (int64_t m = 0; m < count; ++m) {
    factor_plainly(LU.data() + m * C * C, pivots.data() + m * C, C);
    solve_plainly(LU.data() + m * C * C, right.data() + m * C * C, C);
  }
  const test::Buffer<double> factors(LU, "LU"), solved(right, "X");
  const test::Buffer<int32_t> exchanges(pivots, "pivots");
  test::require_success(logdet_inverse_determinant(factors.data(), exchanges.data(), n.data(), count, C, strict, log_abs_det.data(),
                                                   sign.data(), kept.data(), workspace.data(), limits, simt::Stream{}),
                        "determinant");
  test::require_success(
      logdet_inverse_finish(solved.data(), exchanges.data(), n.data(), count, C, A.data(), workspace.data(), limits, simt::Stream{}),
      "finish");
  return {log_abs_det.download(), sign.download(), A.download(), kept.download()};
}

// The product that the lanes compute together
LDMI_KERNEL void LDMI_BOUNDS(32, 1) log_product(const double* values, int64_t count, double* out) {
  factor::LogProduct product;
  for (int64_t i = simt::lane(); i < count; i += simt::kWarp) product.multiply(simt::load(values + i));
  const double log = product.log();
  if (simt::lane() == 0) simt::store(out, log);
}

// Numbers from the least subnormal to the largest
void check_log_product(Random& random) {
  std::vector<double> values(static_cast<size_t>(random.integer(1, 3000)));
  long double want = 0, size = 0;
  const double spread = random.one_of({1.0, 700.0});
  for (double& x : values) {
    x = std::fmin(std::fmax(std::exp(random.uniform(-spread, spread) * 1.06), 0x1p-1074), std::numeric_limits<double>::max());
    want += std::log(static_cast<long double>(x));
    size += std::fabs(std::log(static_cast<long double>(x)));
  }
  const test::Buffer<double> in(values, "values"), out(1, "out");
  const simt::Grid grid{1, 32};
  test::require_success(simt::launch(log_product, grid, simt::Stream{}, in.data(), static_cast<int64_t>(values.size()), out.data()),
                        "log_product");
  const double error = 0x1p-53 * (static_cast<double>(values.size()) + 4 * std::fabs(static_cast<double>(want)) + 16);
  test::require_close(out.download(), std::vector<double>{static_cast<double>(want)}, error, 0, "log_product");
}

// As within a larger kernel: S in shared memory, overwritten by V
template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(256, 1) in_place(Matrices matrices, int stride) {
  using namespace simt;
  const int C = matrices.C;
  Carve carve;
  const FactorSpace space = take_factor_space(carve, C, stride);
  double* const S = carve.take<double>(C * C);
  double* const n = carve.take<double>(C);
  for (int64_t m = block_idx(); m < matrices.count; m += grid_dim()) {
    for (int i = thread_idx(); i < C * C; i += block_dim()) S[i] = load(matrices.S + m * C * C + i);
    for (int i = thread_idx(); i < C; i += block_dim()) n[i] = load(matrices.n + m * C + i);
    sync_block();
    const Determinant found = cuda::logdet_inverse<kMost>(
        space, C, matrices.strict, true, [&](int i, int j) { return S[i * C + j]; }, [&](int i) { return n[i]; },
        [&](int i, int j, double value) { S[i * C + j] = value; });
    for (int i = thread_idx(); i < C * C; i += block_dim()) store(matrices.V + m * C * C + i, S[i]);
    if (thread_idx() == block_dim() - 1) {
      store(matrices.log_abs_det + m, found.log_abs_det);
      store(matrices.sign + m, found.sign);
      store(matrices.kept + m, found.kept);
    }
    sync_block();
  }
}

Results launch_in_place(Random& random, const test::Buffer<double>& S, const test::Buffer<double>& n, int64_t count, int C,
                        bool strict, const DeviceLimits& limits) {
  const test::Buffer<double> log_abs_det(count, "log_abs_det"), sign(count, "sign"), V(count * C * C, "V");
  const test::Buffer<int64_t> kept(count, "kept");
  const int stride = static_cast<int>(plan::factor_stride(C, limits.smem_block));
  simt::Carve carve;
  take_factor_space(carve, C, stride);
  test::require(static_cast<int64_t>(carve.bytes()) == plan::factor_smem(C, stride), "the plan's shared memory is not the kernel's");
  carve.take<double>(C * C);
  carve.take<double>(C);
  const simt::Grid grid{random.integer(1, count), 32 * static_cast<int>(random.integer(1, 8)), carve.bytes()};
  const Matrices matrices{S.data(), n.data(), count, C, strict, log_abs_det.data(), sign.data(), kept.data(), V.data()};
  test::require_success(C <= 16 ? simt::launch(in_place<16>, grid, simt::Stream{}, matrices, stride)
                                : simt::launch(in_place<64>, grid, simt::Stream{}, matrices, stride),
                        "in_place");
  return {log_abs_det.download(), sign.download(), V.download(), kept.download()};
}

Batch draw_batch(Random& random, int64_t count, int64_t C, bool strict) {
  Batch batch;
  for (int64_t m = 0; m < count; ++m) {
    Input& in = batch.inputs.emplace_back(draw(random, C));
    in.strict = strict;
    batch.S.insert(batch.S.end(), in.S.begin(), in.S.end());
    batch.n.insert(batch.n.end(), in.n.begin(), in.n.end());
  }
  return batch;
}

void compare_all(const Batch& batch, const Results& results) {
  for (size_t m = 0; m < batch.inputs.size(); ++m) {
    const Input& in = batch.inputs[m];
    compare(in, {results.log_abs_det[m], results.sign[m], results.kept[m]}, results.V.data() + static_cast<int64_t>(m) * in.C * in.C);
  }
}

void require_same_determinants(const Results& a, const Results& b, const char* message) {
  test::require(same_bits(a.log_abs_det, b.log_abs_det) && same_bits(a.sign, b.sign) && a.kept == b.kept, message);
}

// The grid's elimination in every shape; its bits do not depend on the number of blocks, nor the determinants' on the inverse
void check_grid(Random& random, const DeviceLimits& device) {
  GridShape shape{};
  shape.panel_blocks = device.capability < 90 || device.sms < 2 ? 1 : random.one_of({1, device.sms < plan::kClusterBlocks ? 2 : 8, 2});
  shape.blocks = random.integer(1, device.sms / shape.panel_blocks) * shape.panel_blocks;
  shape.slots = 1 << random.integer(0, shape.panel_blocks == 1 ? 3 : 1);
  shape.threads = random.one_of({32, 32, 96, 256});
  const int64_t rows = shape.slots * shape.threads / 8 * 8;  // of a slice
  const int64_t C = draw_classes(random, std::min<int64_t>(rows * shape.panel_blocks, 100));
  const int64_t most = std::min<int64_t>(plan::grid_panel(C, device.smem_block, shape.panel_blocks),
                                         plan::grid_most_panel(shape.slots * kGridThreads, shape.panel_blocks));
  shape.panel = static_cast<int>(8 * random.integer(shape.panel_blocks == 1 ? 1 : 2, most / 8));
  const int64_t count = C <= 24 && random.chance(0.5) ? random.integer(1, 4) : 1;
  const bool strict = random.chance(0.3);
  const Batch batch = draw_batch(random, count, C, strict);
  const test::Buffer<double> S(batch.S, "S", random.integer(0, 1)), n(batch.n, "n", random.integer(0, 1));
  const int64_t lead = random.integer(0, 1);
  const Results results = launch_on_grid(S, n, count, C, strict, true, lead, shape);
  compare_all(batch, results);
  GridShape other = shape;
  other.blocks = random.integer(1, device.sms / shape.panel_blocks) * shape.panel_blocks;
  require_same_determinants(launch_on_grid(S, n, count, C, strict, false, lead, other), results,
                            "without the inverse the determinant differs");
  if (random.chance(0.5)) return;
  const Results again = launch_on_grid(S, n, count, C, strict, true, 1 - lead, other);
  require_same_determinants(again, results, "with another number of blocks the determinant differs");
  test::require(same_bits(again.V, results.V), "with another number of blocks V differs");
}

void check(Random& random) {
#ifndef __CUDACC__
  if (random.chance(0.4)) {  // a toy, with room for few classes
    const int64_t smem = random.integer(10, 48) * 1024;
    simt::host::set_device({static_cast<int>(random.integer(1, 4)), smem, smem + 1024, int64_t{1} << 20, 80});
  } else if (random.chance(0.3)) {  // room for the clusters that the launcher takes
    const int64_t smem = int64_t{227} << 10;
    simt::host::set_device({static_cast<int>(random.integer(8, 20)), smem, smem + 1024, int64_t{1} << 20, 90});
  }
#endif
  DeviceLimits device;
  test::require_success(simt::device(&device), "device");
  DeviceLimits limits = device;
  limits.cooperative = random.chance(0.7);            // a grid where one block ends, or a library
  const int64_t little = plan::grid_smem(100, 8, 1);  // for a grid's elimination, and a block's of some 50 classes
  if (device.smem_block >= little) {
    if (random.chance(0.5)) return check_grid(random, device);
    if (random.chance(0.3)) limits.smem_block = little;
  }
  if (random.chance(0.2)) check_log_product(random);
  // more rows than threads
  const int64_t wide = plan::grid_smem(kGridThreads + 3, 8 * random.integer(1, 2), 1);
  const bool huge = limits.cooperative && limits.smem_block == little && random.chance(0.1) && device.smem_block >= wide;
  if (huge) limits.smem_block = wide;
  const int64_t C = huge ? random.integer(kGridThreads - 1, kGridThreads + 3) : draw_classes(random, 170);
  const int64_t count = random.chance(C <= 40 ? 0.5 : 0.2) ? random.integer(1, C <= 40 ? 9 : 3) : 1;
  const bool strict = random.chance(0.3);
  const Batch batch = draw_batch(random, count, C, strict);
  const test::Buffer<double> S(batch.S, "S", random.integer(0, 1)), n(batch.n, "n", random.integer(0, 1));
  const plan::CudaLogdetInverse plan = plan::cuda_logdet_inverse(count, C, limits);
  for (const auto& [kilobytes, classes] : {std::pair{227, 170}, {163, 144}, {99, 112}}) {
    test::require(plan::factor_classes({.smem_block = kilobytes * 1024}) == classes, "the most classes of one block");
  }
  const bool large = plan.factor == plan::CudaFactor::kLu || plan.factor == plan::CudaFactor::kGrid;
  test::require(large == (C > plan::factor_classes(limits)), "where one block ends");
  const bool library = plan.factor == plan::CudaFactor::kLu;
  const Results results = library ? launch_library(batch, n, count, C, strict, random.chance(0.5), plan, limits)
                                  : launch_own(S, n, count, C, strict, true, limits);
  compare_all(batch, results);
  if (library) return;
  require_same_determinants(launch_own(S, n, count, C, strict, false, limits), results, "without the inverse the determinant differs");
#ifndef __CUDACC__
  if (large) require_refusal(S, n, count, C, limits);
#endif
  if (large) return;
  const int64_t stride = plan::factor_stride(C, limits.smem_block), own = (C * C + 1) / 2 * 16 + (C + 1) / 2 * 16;
  if (C > 64 || plan::factor_smem(C, stride) + own > limits.smem_block) return;
  const Results again = launch_in_place(random, S, n, count, static_cast<int>(C), strict, limits);
  require_same_determinants(again, results, "with another number of threads, and in place, the determinant differs");
  test::require(same_bits(again.V, results.V), "with another number of threads, and in place, V differs");
}

// One matrix of C classes, by the launcher: --classes C
void check_size(Random& random, int64_t C) {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  limits.cooperative = true;
  limits.clusters = limits.capability < 90 ? 0 : limits.sms / plan::kClusterBlocks;
  const Batch batch = draw_batch(random, 1, C, false);
  const test::Buffer<double> S(batch.S, "S"), n(batch.n, "n");
  compare_all(batch, launch_own(S, n, 1, C, false, true, limits));
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) {
  const ldmi::test::Options options(count, words);
  const int64_t classes = std::strtoll(options.value("classes", "0").c_str(), nullptr, 0);
  return ldmi::test::run("logdet_inverse", options, [&](ldmi::test::Random& random) {
    if (classes > 0) {
      ldmi::cuda::check_size(random, classes);
    } else {
      ldmi::cuda::check(random);
    }
  });
}
