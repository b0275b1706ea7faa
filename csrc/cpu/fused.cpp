// The whole loss and its gradient in one call, for small problems.

#include "isa.h"
#include "rows.h"

namespace ldmi::cpu::LDMI_ISA {

double fused(const Batch& batch, const FusedOptions& options, FactorFn factor, void* grad, const Threads& threads) {
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  Buffer<double> workspace(2 * C * C + C + rows);
  double* S = workspace.get();
  double* V = S + C * C;
  double* n = V + C * C;
  double* lse = n + C;  // floats or doubles
  double ce = 0;
  joint(batch, S, n, lse, &ce, threads);
  const Determinant det = factor(S, n, C, options.strict, V);
  double total = 0;
  for (int64_t k = 0; k < C; ++k) total += n[k];
  const bool empty = total == 0;
  if (empty) total = 1;
  // loss = -l, or -logaddexp(l, log eps) whose derivative is sigmoid(l - log eps), of l = log|det S| - k log W
  const double level = det.log_abs_det - (options.normalize ? static_cast<double>(det.kept) * __builtin_log(total) : 0);
  double loss = -level, scale = 1;
  if (options.eps > 0) {
    const double log_eps = __builtin_log(options.eps);
    const double distance = level - log_eps;
    const double tail = __builtin_log1p(__builtin_exp(-__builtin_fabs(distance)));
    loss = -((distance > 0 ? level : log_eps) + tail);
    scale = 1 / (1 + __builtin_exp(-distance));
    if (distance != distance) loss = scale = kNaN;
  }
  if (empty) loss = 0;
  const double ce_scale = options.cross_entropy_weight / total;
  if (options.cross_entropy_weight != 0) loss += ce_scale * ce;
  logits_grad(batch, lse, V, scale, ce_scale, grad, threads);
  return loss;
}

}  // namespace ldmi::cpu::LDMI_ISA
