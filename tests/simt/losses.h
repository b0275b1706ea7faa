// The whole loss and its gradient by plain loops over doubles, with bounds on their errors, for the kernels that compute both.
#pragma once

#include <algorithm>

#include "batches.h"

namespace ldmi::test {

struct LossAnswer {
  Bounded loss, scale, ce_scale;
  std::vector<double> V;  // [C, C]
  double V_error = 0;     // of its entries, absolute
  // Whether the joint is far enough from singular for the results to have correct digits to compare. If not, the numbers above do not
  // apply, but no gradient may be NaN.
  bool clear = false;
  bool nan = false;           // everything is NaN
  bool representable = true;  // V, and so the gradient: not if all weights are nearly zero
};

// K == C. As a batch's joint rounds, log|det| moves by the trace of R^{-1} times that.
inline LossAnswer loss_of(const Problem& problem, const cpu::LossOptions& options) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
  const int64_t C = problem.classes;
  const JointAnswer sums = joint(problem);
  LossAnswer out{};
  std::vector<double> S, n;
  for (const Bounded& value : sums.S) S.push_back(value.value);
  for (const Bounded& value : sums.n) n.push_back(value.value);
  const auto finite = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
  };
  if (!finite(S) || !finite(n)) {
    out.loss = {kNaN, 0};
    out.nan = true;
    return out;
  }
  const Inverse inverse = logdet_inverse(S, n, C, options.strict);
  const std::vector<bool> here = present_classes(n);
  double perturbation = 0, total = 0, lightest = kInfinity;
  for (int64_t i = 0; i < C; ++i) {
    const double weight = n[static_cast<size_t>(i)];
    total += weight;
    if (!here[static_cast<size_t>(i)]) continue;
    double row = 0;
    for (int64_t j = 0; j < C; ++j) row += sums.S[static_cast<size_t>(i * C + j)].error / weight;
    perturbation = std::max(perturbation, row);
    lightest = std::min(lightest, weight);
  }
  if (problem.soft) {
    total = 0;
    for (const double w : problem.w) total += w;
  }
  out.representable = lightest >= 0x1p-1000;
  const bool empty = total == 0;
  const double loss_error = 2 * inverse.inverse_norm * perturbation + 1e-12 * (1 + std::fabs(inverse.log_abs_det));
  const bool surely_singular = !empty && options.strict && std::find(here.begin(), here.end(), false) != here.end();
  out.clear = empty || surely_singular || (loss_error < 0.01 && inverse.smallest_pivot > 1e-9);
  if (empty) total = 1;
  const double level = inverse.log_abs_det - (options.normalize ? static_cast<double>(inverse.kept) * std::log(total) : 0);
  double loss = -level, scale = 1;
  if (options.eps > 0) {
    const double floor = std::log(options.eps);
    loss = -(std::max(level, floor) + std::log1p(std::exp(-std::fabs(level - floor))));
    scale = 1 / (1 + std::exp(floor - level));
  }
  if (empty) loss = 0;
  const double ce_scale = options.cross_entropy_weight / total;
  double error = surely_singular ? 1e-12 * std::fabs(loss) : loss_error;
  if (ce_scale != 0) {
    loss += ce_scale * sums.ce.value;
    error += ce_scale * sums.ce.error + 1e-14 * std::fabs(loss);
  }
  if (std::isinf(loss) && !std::isnan(error)) error = 0;
  double largest = 0;
  for (const double v : inverse.V) largest = std::max(largest, std::fabs(v));
  out.loss = {loss, error + problem.unit * std::fabs(loss)};  // in the precision of the logits
  if (std::isinf(loss)) out.loss.error = error;
  out.scale = {scale, scale * loss_error + 1e-14 * scale};
  out.ce_scale = {ce_scale, 1e-13 * std::fabs(ce_scale)};
  out.V = inverse.V;
  out.V_error = empty || surely_singular
                    ? 0
                    : 2 * inverse.inverse_norm * inverse.inverse_norm * (perturbation + 1e-14 * static_cast<double>(C)) / lightest +
                          largest * loss_error;
  return out;
}

// Options of every kind.
inline cpu::LossOptions draw_options(Random& random) {
  return {random.chance(0.3), random.one_of({0.0, 0.0, 1e-3, 1e-30}), random.chance(0.7), random.one_of({0.0, 0.0, 0.7})};
}

// Fails unless loss and gradient are right.
template <class F, class E>
void require_loss(const Problem& problem, cpu::Type type, const LossAnswer& want, F loss, const std::vector<E>& grad,
                  const std::string& context) {
  const auto refuse = [&](const std::string& what) { throw Failure(what + "\n  " + context); };
  std::vector<double> values(grad.size());
  for (size_t i = 0; i < grad.size(); ++i)
    values[i] = read(reinterpret_cast<const std::byte*>(grad.data()), static_cast<int64_t>(i), type);
  for (int64_t i = 0; i < problem.rows; ++i) {
    for (int64_t c = 0; c < problem.classes; ++c) {
      const double value = values[static_cast<size_t>(i * problem.classes + c)];
      // a row that does not count: zeros, not merely small
      if (!problem.counts(i) && value != 0) refuse("gradient of a row that does not count");
      if (!want.representable) continue;
      if (problem.counts(i) && want.nan && !problem.probs && !std::isnan(value)) refuse("gradient of a loss that is NaN");
      if (!want.clear && !want.nan && std::isnan(value)) refuse("the gradient is NaN");
    }
  }
  if (want.nan) {
    if (!std::isnan(static_cast<double>(loss))) refuse("the loss is not NaN");
    return;
  }
  if (!want.clear) return;
  if (!want.loss.accepts(static_cast<double>(loss))) {
    char line[200];
    std::snprintf(line, sizeof(line), "loss is %.17g, expected %.17g within %.3g", static_cast<double>(loss), want.loss.value,
                  want.loss.error);
    refuse(line);
  }
  if (!want.representable) return;
  std::vector<Bounded> bounds = logits_grad(problem, want.V, want.V_error, want.scale.value, want.ce_scale.value,
                                            (static_cast<double>(problem.rows) + 8) * 0x1p-53);
  for (Bounded& bound : bounds) bound = stored(bound, type);
  require_bounded(values, bounds, "gradient", context);
}

}  // namespace ldmi::test
