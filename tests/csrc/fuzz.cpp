// Random batches through the kernels, against plain loops, and under several schedules of their tasks.
//
//     fuzz SEED CASES [NUMBER]      all cases, or the one that a message named
//     fuzz --wide ...               the 64-byte vectors, lowered to the available ones, instead of this machine's kernels
//
// The program ends at the first difference, with a description of the batch.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "case.h"
#include "schedule.h"

#ifdef LDMI_TEST_WIDE
namespace ldmi::cpu::wide {
void joint(const Batch&, double*, double*, void*, double*, const Threads&);
void logits_grad(const Batch&, const void*, const double*, double, double, void*, const Threads&);
Determinant logdet_inverse(const double*, const double*, int64_t, bool, double*, const Threads&);
double fused(const Batch&, const LossOptions&, void*, const Threads&);
}  // namespace ldmi::cpu::wide
#endif

namespace ldmi::test {
namespace {

// Above, the reference's elimination in long double takes too long.
constexpr int64_t kFactoredClasses = 130;

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

bool use_wide = false;

const cpu::Kernels& kernels() {
#ifdef LDMI_TEST_WIDE
  static const cpu::Kernels wide{"wide", cpu::wide::joint, cpu::wide::logits_grad, cpu::wide::logdet_inverse, cpu::wide::fused};
  if (use_wide) {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2")) throw std::runtime_error("--wide is compiled for AVX2, which this processor does not have");
#endif
    return wide;
  }
#endif
  return cpu::kernels();
}

// --- comparison -----------------------------------------------------------------------------------------------------------------

[[noreturn]] void fail(const Case& batch, int64_t number, const std::string& what) {
  std::printf("%s: case %lld differs: %s\n  %s\n", kernels().isa, static_cast<long long>(number), what.c_str(), batch.text.c_str());
  std::exit(1);
}

std::string text(double value) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return buffer;
}

// The error that rounding to the stored type may add to an answer.
Bounded stored(Bounded answer, cpu::Type type) {
  if (type == cpu::Type::kFloat16) {
    answer.error += std::fabs(answer.value) * 0x1p-11 + 0x1p-25;
    // 65520 and above become infinite
    if (std::fabs(answer.value) + answer.error >= 65504) answer.error = std::numeric_limits<double>::quiet_NaN();
  } else if (type == cpu::Type::kBFloat16) {
    answer.error += std::fabs(answer.value) * 0x1p-8 + 0x1p-134;
  }
  return answer;
}

struct Results {
  std::vector<double> S, n;
  std::vector<std::byte> lse, grad;
  double ce;
  double loss;
  std::vector<std::byte> loss_grad;

  bool operator==(const Results& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
    };
    return same(S, other.S) && same(n, other.n) && same(lse, other.lse) && same(grad, other.grad) &&
           same(loss_grad, other.loss_grad) && std::memcmp(&ce, &other.ce, 8) == 0 && std::memcmp(&loss, &other.loss, 8) == 0;
  }
};

// The inputs of a gradient.
struct Upstream {
  std::vector<double> V;
  double scale, ce_scale;
  cpu::LossOptions options{};
};

// A whole loss: by fused for hard labels, by the separate ops for soft targets.
bool has_loss(const Problem& problem) { return problem.labels == problem.classes && problem.classes <= kFactoredClasses; }

double loss_in_pieces(const Case& batch, const cpu::LossOptions& options, std::vector<std::byte>& grad) {
  const int64_t C = batch.problem.classes;
  std::vector<double> S(C * C), n(C), V(C * C);
  std::vector<std::byte> lse(batch.problem.rows * (batch.batch.logits.type == cpu::Type::kFloat64 ? 8 : 4));
  double ce;
  kernels().joint(batch.batch, S.data(), n.data(), lse.data(), &ce, kThreads);
  const cpu::Determinant found = kernels().logdet_inverse(S.data(), n.data(), C, options.strict, V.data(), kThreads);
  const cpu::Loss loss = cpu::combine(found, cpu::total_weight(batch.batch, n.data()), ce, options);
  kernels().logits_grad(batch.batch, lse.data(), V.data(), loss.scale, loss.ce_scale, grad.data(), kThreads);
  return loss.loss;
}

Results run(const Case& batch, const Upstream& upstream) {
  const Problem& problem = batch.problem;
  const cpu::Type type = batch.batch.logits.type;
  const int64_t elements = problem.rows * problem.classes;
  // filled with values that are never right, and exactly as large as the contract says
  constexpr double unset = -1.2345e67;
  const std::byte unset_byte{0x5a};
  Results out;
  out.S.assign(problem.labels * problem.classes, unset);
  out.n.assign(problem.labels, unset);
  out.lse.assign(problem.rows * (type == cpu::Type::kFloat64 ? 8 : 4), unset_byte);
  out.grad.assign(elements * size_of(type), unset_byte);
  out.ce = out.loss = unset;
  kernels().joint(batch.batch, out.S.data(), out.n.data(), out.lse.data(), &out.ce, kThreads);
  kernels().logits_grad(batch.batch, out.lse.data(), upstream.V.data(), upstream.scale, upstream.ce_scale, out.grad.data(), kThreads);
  if (has_loss(problem)) {
    out.loss_grad.assign(elements * size_of(type), unset_byte);
    out.loss = problem.soft ? loss_in_pieces(batch, upstream.options, out.loss_grad)
                            : kernels().fused(batch.batch, upstream.options, out.loss_grad.data(), kThreads);
  }
  return out;
}

Upstream draw_upstream(Random& random, const Problem& problem) {
  double heaviest = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    if (std::isfinite(problem.w[i])) heaviest = std::max(heaviest, std::fabs(problem.w[i]));
  }
  const double unweighted = heaviest > 0 ? 1 / heaviest : 1;
  Upstream out;
  out.V.resize(problem.labels * problem.classes);
  // V grows as the weights shrink; it may have any size as long as its product with the scale is moderate
  const double size = (random.chance(0.5) ? unweighted : 1) * random.one_of({1e-3, 1.0, 1e3, 1e60});
  out.scale = random.uniform(0.5, 2) * unweighted / size;
  out.ce_scale = random.chance(0.5) ? 0 : random.uniform(0.5, 2) * unweighted;
  for (int64_t k = 0; k < problem.labels; ++k) {
    const bool absent = random.chance(0.1);
    for (int64_t c = 0; c < problem.classes; ++c) out.V[k * problem.classes + c] = absent ? 0 : size * random.normal();
  }
  out.options = {random.chance(0.3), random.one_of({0.0, 0.0, 1e-3, 1e-30}), random.chance(0.7), random.one_of({0.0, 0.0, 0.7})};
  return out;
}

void compare_joint(const Case& batch, int64_t number, const Results& got, const JointAnswer& want) {
  const int64_t C = batch.problem.classes;
  const cpu::Type lse_type = batch.batch.logits.type == cpu::Type::kFloat64 ? cpu::Type::kFloat64 : cpu::Type::kFloat32;
  const auto hold = [&](const char* name, int64_t i, int64_t j, double value, const Bounded& answer) {
    if (answer.accepts(value)) return;
    fail(batch, number,
         std::string(name) + "[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + text(value) + ", expected " +
             text(answer.value) + " +- " + text(answer.error));
  };
  for (std::size_t i = 0; i < got.S.size(); ++i) hold("S", i / C, i % C, got.S[i], want.S[i]);
  for (std::size_t k = 0; k < got.n.size(); ++k) hold("n", k, 0, got.n[k], want.n[k]);
  for (int64_t i = 0; i < batch.problem.rows; ++i) hold("lse", i, 0, read(got.lse.data(), i, lse_type), want.lse[i]);
  hold("ce", 0, 0, got.ce, want.ce);
}

void compare_grad(const Case& batch, int64_t number, const char* name, const std::vector<std::byte>& got,
                  const std::vector<Bounded>& want) {
  const int64_t C = batch.problem.classes;
  const cpu::Type type = batch.batch.logits.type;
  for (int64_t i = 0; i < batch.problem.rows; ++i) {
    // a row that does not count: zeros, not merely small
    const bool zeros = !batch.problem.counts(i);
    for (int64_t c = 0; c < C; ++c) {
      const double value = read(got.data(), i * C + c, type);
      const Bounded answer = zeros ? Bounded{0, 0} : stored(want[i * C + c], type);
      if (answer.accepts(value)) continue;
      fail(batch, number,
           std::string(name) + "[" + std::to_string(i) + ", " + std::to_string(c) + "] is " + text(value) + ", expected " +
               text(answer.value) + " +- " + text(answer.error));
    }
  }
}

// Whether the joint was far enough from singular for the results to have correct digits to compare.
bool compare_loss(const Case& batch, int64_t number, const Results& got, const JointAnswer& sums, const cpu::LossOptions& options) {
  const Problem& problem = batch.problem;
  const int64_t C = problem.classes;
  std::vector<double> S(C * C), n(C);
  bool finite = true;
  for (int64_t i = 0; i < C * C; ++i) finite &= std::isfinite(S[i] = sums.S[i].value);
  for (int64_t k = 0; k < C; ++k) finite &= std::isfinite(n[k] = sums.n[k].value);
  if (!finite) {
    if (!std::isnan(got.loss)) fail(batch, number, "loss is " + text(got.loss) + ", expected NaN");
    return false;
  }
  const Inverse inverse = logdet_inverse(S, n, C, options.strict);
  const std::vector<bool> here = present_classes(n);
  double perturbation = 0, total = 0, lightest = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < C; ++i) {
    total += n[i];
    if (!here[i]) continue;
    double row = 0;
    for (int64_t j = 0; j < C; ++j) row += sums.S[i * C + j].error / n[i];
    perturbation = std::max(perturbation, row);
    lightest = std::min(lightest, n[i]);
  }
  if (problem.soft) {
    total = 0;
    for (int64_t i = 0; i < problem.rows; ++i) total += problem.w[i];
  }
  const bool representable = lightest >= 0x1p-1000;  // V, and so the gradient: not if all weights are nearly zero
  const bool empty = total == 0;
  const double loss_error = 2 * inverse.inverse_norm * perturbation + 1e-12 * (1 + std::fabs(inverse.log_abs_det));
  const bool surely_singular = inverse.sign == 0 && inverse.kept == C && inverse.smallest_pivot == 0 && options.strict &&
                               std::find(here.begin(), here.end(), false) != here.end();
  if (!empty && !surely_singular && !(loss_error < 0.01 && inverse.smallest_pivot > 1e-9)) {
    for (int64_t i = 0; i < problem.rows * C; ++i) {
      if (representable && std::isnan(read(got.loss_grad.data(), i, batch.batch.logits.type)))
        fail(batch, number, "gradient of the loss is NaN");
    }
    return false;
  }
  if (empty) total = 1;
  double level = inverse.log_abs_det - (options.normalize ? static_cast<double>(inverse.kept) * std::log(total) : 0);
  double loss = -level, scale = 1;
  if (options.eps > 0) {
    const double floor = std::log(options.eps);
    loss = -(std::max(level, floor) + std::log1p(std::exp(-std::fabs(level - floor))));
    scale = 1 / (1 + std::exp(floor - level));
  }
  if (empty) loss = 0;
  const double ce_scale = options.cross_entropy_weight / total;
  double error = loss_error;
  if (ce_scale != 0) {
    loss += ce_scale * sums.ce.value;
    error += ce_scale * sums.ce.error + 1e-14 * std::fabs(loss);
  }
  if (surely_singular) error = 1e-12 * std::fabs(loss) + (ce_scale != 0 ? ce_scale * sums.ce.error : 0);
  if (!Bounded{loss, error}.accepts(got.loss)) {
    fail(batch, number, "loss is " + text(got.loss) + ", expected " + text(loss) + " +- " + text(error));
  }
  double largest = 0;
  for (const double v : inverse.V) largest = std::max(largest, std::fabs(v));
  const double V_error =
      empty || surely_singular
          ? 0
          : 2 * inverse.inverse_norm * inverse.inverse_norm * (perturbation + 1e-14 * C) / lightest + largest * loss_error;
  if (!representable) return true;
  compare_grad(batch, number, "gradient of the loss", got.loss_grad,
               logits_grad(problem, inverse.V, V_error, scale, ce_scale, (static_cast<double>(problem.rows) + 8) * 0x1p-53));
  return true;
}

int fuzz(uint64_t seed, int64_t first, int64_t last) {
  int64_t seen[static_cast<int>(Regime::kCount)] = {}, losses = 0;
  for (int64_t number = first; number < last; ++number) {
    const Case batch = make_case(seed, number);
    Random random(seed ^ (static_cast<uint64_t>(number) << 20));
    const Upstream upstream = draw_upstream(random, batch.problem);
    schedule = {"in order", 0, 0};
    const Results got = run(batch, upstream);
    const JointAnswer sums = joint(batch.problem);
    compare_joint(batch, number, got, sums);
    compare_grad(batch, number, "gradient", got.grad, logits_grad(batch.problem, upstream.V, 0, upstream.scale, upstream.ce_scale));
    if (has_loss(batch.problem)) losses += compare_loss(batch, number, got, sums, upstream.options);
    for (const Schedule& other : {Schedule{"3 threads, shuffled", 3, random.bits() | 1}, Schedule{"2 threads", 2, 0},
                                  Schedule{"shuffled", 0, random.bits() | 1}}) {
      schedule = other;
      if (!(run(batch, upstream) == got)) fail(batch, number, std::string("other bits when tasks run ") + other.name);
      // a problem of one task has one schedule; under the slow sanitizers more schedules would find nothing more
      if (kSanitized || batch.problem.rows * batch.problem.classes < 4096) break;
    }
    ++seen[static_cast<int>(batch.regime)];
  }
  std::printf("%s: %lld cases agree; losses %lld", kernels().isa, static_cast<long long>(last - first),
              static_cast<long long>(losses));
  for (int r = 0; r < static_cast<int>(Regime::kCount); ++r) {
    std::printf("; %s %lld", name_of(static_cast<Regime>(r)), static_cast<long long>(seen[r]));
  }
  std::printf("\n");
  return 0;
}

}  // namespace
}  // namespace ldmi::test

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--wide") == 0) {
    ldmi::test::use_wide = true;
    --count;
    ++arguments;
  }
  if (count < 3) {
    std::fprintf(stderr, "usage: fuzz [--wide] SEED CASES [NUMBER]\n");
    return 2;
  }
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
  const int64_t first = count > 3 ? std::strtoll(arguments[3], nullptr, 10) : 0;
  const int64_t last = count > 3 ? first + 1 : std::strtoll(arguments[2], nullptr, 10);
  try {
    return ldmi::test::fuzz(seed, first, last);
  } catch (const std::exception& error) {  // an instruction set that this machine lacks
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
