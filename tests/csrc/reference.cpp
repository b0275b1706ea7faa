#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ldmi::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row of the softmax: predictions and a bound on their relative errors.
struct Row {
  bool nan;
  double maximum, log_sum;
  double sum_error;  // relative, of the sum of exponentials
  std::vector<double> p;
  std::vector<double> error;  // absolute
};

Row softmax(const Problem& problem, int64_t i) {
  const int64_t C = problem.classes;
  const double* x = &problem.x[i * C];
  Row row{false, -kInfinity, 0, 0, std::vector<double>(C), std::vector<double>(C)};
  for (int64_t c = 0; c < C; ++c) {
    row.nan |= std::isnan(x[c]) || x[c] == kInfinity;
    row.maximum = std::max(row.maximum, x[c]);
  }
  row.nan |= row.maximum == -kInfinity;
  if (row.nan) return row;
  double sum = 0, mean_distance = 0;
  for (int64_t c = 0; c < C; ++c) sum += row.p[c] = std::exp(x[c] - row.maximum);
  for (int64_t c = 0; c < C; ++c) {
    row.p[c] /= sum;
    if (row.p[c] > 0) mean_distance += row.p[c] * (row.maximum - x[c]);
  }
  row.log_sum = std::log(sum);
  // The rounding of x - maximum counts absolutely in the exponent; exponentials are good to about 2 units; a sum of C terms in at
  // least 4 lanes rounds C / 4 times.
  row.sum_error = problem.unit * (mean_distance + 2 + static_cast<double>(C) / 4 + 6);
  for (int64_t c = 0; c < C; ++c) {
    const double distance = row.p[c] > 0 ? row.maximum - x[c] : 0;
    row.error[c] = row.p[c] * (problem.unit * (distance + row.log_sum + 6) + row.sum_error) + 2 * problem.smallest;
  }
  return row;
}

}  // namespace

bool Problem::counts(int64_t i) const { return w[i] != 0 && (soft || !ignored[i]); }

bool Problem::bad(int64_t i) const {
  return counts(i) && (!(w[i] >= 0) || std::isinf(w[i]) || (!soft && (y[i] < 0 || y[i] >= labels)));
}

bool Bounded::accepts(double got) const {
  if (std::isnan(error)) return true;
  if (std::isnan(value) || std::isnan(got)) return std::isnan(value) && std::isnan(got);
  return got == value || std::fabs(got - value) <= error;
}

JointAnswer joint(const Problem& problem) {
  const int64_t N = problem.rows, C = problem.classes, K = problem.labels;
  JointAnswer out{std::vector<Bounded>(K * C), std::vector<Bounded>(K), std::vector<Bounded>(N), {}};
  bool poisoned = false;
  // Sums of N terms in double; soft targets are summed in the precision of the softmax for 64 rows at a time.
  const double summing = (static_cast<double>(N) + 8) * 0x1p-53 + (problem.soft ? 72 * problem.unit : 0);
  const double summing_ce = static_cast<double>(N * (problem.soft ? K : 1) + 8) * 0x1p-53;
  for (int64_t i = 0; i < N; ++i) {
    if (!problem.counts(i)) continue;
    if (problem.bad(i)) {
      poisoned = true;
      out.lse[i] = {0, kNaN};
      continue;
    }
    const double w = problem.w[i];
    const double* x = &problem.x[i * C];
    Row row;
    if (problem.probs) {
      row = {false, 0, 0, 0, std::vector<double>(x, x + C), std::vector<double>(C)};
      for (double& p : row.p) p = std::isfinite(p) ? p : kNaN;
    } else {
      row = softmax(problem, i);
      if (row.nan) std::fill(row.p.begin(), row.p.end(), kNaN);
      const double lse = row.nan ? kNaN : row.maximum + row.log_sum;
      out.lse[i] = {lse, row.nan ? kNaN : problem.unit * (2 * std::fabs(lse) + 2 * row.log_sum + 2) + row.sum_error};
    }
    const auto add = [&](int64_t k, double t) {
      for (int64_t c = 0; c < C; ++c) {
        Bounded& S = out.S[k * C + c];
        S.value += w * t * row.p[c];
        S.error += std::fabs(w * t) * (row.error[c] + std::fabs(row.p[c]) * summing) + 4 * problem.smallest;
      }
      out.n[k].value += w * t;
      out.n[k].error += std::fabs(w * t) * summing + (problem.soft ? problem.smallest : 0);
    };
    const auto add_cross_entropy = [&](int64_t c, double t) {
      if (row.nan) {
        out.ce.value = kNaN;
        return;
      }
      const double term = problem.probs ? -std::log(x[c]) : row.log_sum + (row.maximum - x[c]);
      out.ce.value += w * t * term;
      if (!std::isfinite(term)) return;
      out.ce.error += std::fabs(w * t) *
                      (problem.unit * (4 * std::fabs(term) + 2 * row.log_sum + 2) + row.sum_error + 4 * summing_ce * std::fabs(term));
    };
    if (problem.soft) {
      for (int64_t k = 0; k < K; ++k) {
        const double t = problem.t[i * K + k];
        add(k, t);
        if (t != 0) add_cross_entropy(k, t);
      }
    } else {
      add(problem.y[i], 1);
      add_cross_entropy(problem.y[i] % C, 1);
    }
    // a probability that is not finite makes S NaN; the cross entropy may then be anything
    for (int64_t c = 0; c < C; ++c) {
      if (problem.probs && !std::isfinite(x[c])) out.ce.error = kNaN;
    }
  }
  if (poisoned) {
    for (Bounded& S : out.S) S = {kNaN, 0};
    for (Bounded& n : out.n) n = {kNaN, 0};
    out.ce = {kNaN, 0};
  }
  return out;
}

std::vector<Bounded> logits_grad(const Problem& problem, const std::vector<double>& V, double V_error, double scale, double ce_scale,
                                 double ce_scale_error) {
  const int64_t N = problem.rows, C = problem.classes, K = problem.labels;
  const double u = problem.unit;
  std::vector<Bounded> out(N * C);
  double largest_of_all = 0;
  for (const double v : V) largest_of_all = std::max(largest_of_all, std::fabs(v));
  std::vector<double> g(C);
  for (int64_t i = 0; i < N; ++i) {
    if (!problem.counts(i)) continue;
    Bounded* row_out = &out[i * C];
    const double w = problem.w[i];
    const double* x = &problem.x[i * C];
    // g = V[y] or T V; its entries carry errors of the size of `spread` * u
    double mass = 1, spread = 0, absolute_mass = 1;
    if (problem.bad(i)) {
      for (int64_t c = 0; c < C; ++c) row_out[c] = {0, kNaN};
      continue;
    }
    if (problem.soft) {
      mass = absolute_mass = 0;
      std::fill(g.begin(), g.end(), 0.0);
      for (int64_t k = 0; k < K; ++k) {
        const double t = problem.t[i * K + k];
        mass += t;
        absolute_mass += std::fabs(t);
        for (int64_t c = 0; c < C; ++c) g[c] += t * V[k * C + c];
      }
      spread = largest_of_all * absolute_mass * static_cast<double>(K + 8);
    } else {
      for (int64_t c = 0; c < C; ++c) {
        g[c] = V[problem.y[i] * C + c];
        spread = std::max(spread, 4 * std::fabs(g[c]));
      }
    }
    const double alpha = -w * scale, gamma = w * ce_scale;
    const double rough = std::fabs(alpha) * (spread * u + V_error * absolute_mass);
    const auto own = [&](int64_t c) { return problem.soft ? problem.t[i * K + c] : c == problem.y[i] % C ? 1.0 : 0.0; };
    if (problem.probs) {
      bool finite = true;
      for (int64_t c = 0; c < C; ++c) finite &= std::isfinite(x[c]);
      for (int64_t c = 0; c < C; ++c) {
        const double t = gamma != 0 ? own(c) : 0;
        const double pull = t != 0 ? gamma * t / x[c] : 0;
        row_out[c] = {
            alpha * g[c] - pull,
            finite ? rough + (6 * u + ce_scale_error) * (std::isfinite(pull) ? std::fabs(pull) : 0) + problem.smallest : kNaN};
      }
      continue;
    }
    const Row row = softmax(problem, i);
    if (row.nan) {
      for (int64_t c = 0; c < C; ++c) row_out[c] = {kNaN, 0};
      continue;
    }
    double mean = 0, mean_error = 0;
    for (int64_t c = 0; c < C; ++c) {
      mean += row.p[c] * g[c];
      mean_error += row.error[c] * std::fabs(g[c]);
    }
    mean_error += spread * row.sum_error;
    for (int64_t c = 0; c < C; ++c) {
      const double inner = alpha * (g[c] - mean) + gamma * mass;
      const double inner_error = 2 * rough + std::fabs(alpha) * (mean_error + 4 * u * (std::fabs(g[c]) + std::fabs(mean))) +
                                 (4 * u + ce_scale_error) * std::fabs(gamma) * absolute_mass;
      const double pull = gamma != 0 ? gamma * own(c) : 0;
      row_out[c] = {row.p[c] * inner - pull, row.p[c] * inner_error +
                                                 (row.error[c] + 4 * u * row.p[c]) * (std::fabs(inner) + inner_error) +
                                                 (4 * u + ce_scale_error) * std::fabs(pull) + problem.smallest};
    }
  }
  return out;
}

std::vector<bool> present_classes(const std::vector<double>& n) {
  long double sum = 0;
  for (const double weight : n) sum += weight > 0 ? static_cast<long double>(weight) : 0;
  std::vector<bool> out;
  for (const double weight : n) out.push_back(weight > 0 && weight / sum >= 1e-12L);
  return out;
}

Inverse logdet_inverse(const std::vector<double>& S, const std::vector<double>& n, int64_t C, bool strict) {
  Inverse out{0, 1, 0, std::vector<double>(C * C, 0.0), 1, 1, 1};
  std::vector<int64_t> present;
  const std::vector<bool> there = present_classes(n);
  for (int64_t i = 0; i < C; ++i) {
    if (there[i]) present.push_back(i);
  }
  const int64_t k = static_cast<int64_t>(present.size());
  out.kept = strict && k > 0 ? C : k;
  if (k == 0) return out;
  // [R, identity], of the present classes alone
  std::vector<long double> A(k * 2 * k, 0);
  const int64_t width = 2 * k;
  long double norm = 0;
  for (int64_t i = 0; i < k; ++i) {
    long double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      A[i * width + j] = static_cast<long double>(S[present[i] * C + present[j]]) / n[present[i]];
      sum += std::fabs(A[i * width + j]);
    }
    A[i * width + k + i] = 1;
    norm = std::max(norm, sum);
    out.log_abs_det += std::log(n[present[i]]);
  }
  const auto singular = [&] {
    out.log_abs_det = -kInfinity;
    out.sign = 0;
    out.smallest_pivot = 0;
    std::fill(out.V.begin(), out.V.end(), 0.0);
    return out;
  };
  if (out.kept != k) return singular();
  for (int64_t c = 0; c < k; ++c) {
    int64_t best = c;
    for (int64_t i = c; i < k; ++i) {
      if (std::fabs(A[i * width + c]) > std::fabs(A[best * width + c])) best = i;
    }
    if (best != c) {
      std::swap_ranges(&A[c * width], &A[c * width] + width, &A[best * width]);
      out.sign = -out.sign;
    }
    const long double pivot = A[c * width + c];
    out.smallest_pivot = std::min(out.smallest_pivot, static_cast<double>(std::fabs(pivot) / norm));
    if (pivot == 0) return singular();
    out.log_abs_det += static_cast<double>(std::log(std::fabs(pivot)));
    if (pivot < 0) out.sign = -out.sign;
    for (int64_t j = 0; j < width; ++j) A[c * width + j] /= pivot;
    for (int64_t i = 0; i < k; ++i) {
      const long double factor = A[i * width + c];
      if (i == c || factor == 0) continue;
      for (int64_t j = 0; j < width; ++j) A[i * width + j] -= factor * A[c * width + j];
    }
  }
  long double inverse_norm = 0, largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    long double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      sum += std::fabs(A[i * width + k + j]);
      largest = std::max(largest, std::fabs(A[i * width + k + j]));
      // V = diag(1/n) R^{-T}
      out.V[present[i] * C + present[j]] = static_cast<double>(A[j * width + k + i] / n[present[i]]);
    }
    inverse_norm = std::max(inverse_norm, sum);
  }
  out.condition = static_cast<double>(norm * inverse_norm);
  out.inverse_norm = static_cast<double>(largest) * static_cast<double>(k);
  return out;
}

}  // namespace ldmi::test
