// The loss and its gradient in one call, for small problems.

#include "isa.h"
#include "rows.h"

namespace ldmi::cpu::LDMI_ISA {

double fused(const Batch& batch, const LossOptions& options, void* grad, const Threads& threads) {
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  Buffer<double> workspace(2 * C * C + C + rows);
  double* S = workspace.get();
  double* V = S + C * C;
  double* n = V + C * C;
  double* lse = n + C;  // floats or doubles
  double ce = 0;
  joint(batch, S, n, lse, &ce, threads);
  const Determinant det = logdet_inverse(S, n, C, options.strict, V, threads);
  const Loss loss = combine(det, total_weight(batch, n), ce, options);
  logits_grad(batch, lse, V, loss.scale, loss.ce_scale, grad, threads);
  return loss.loss;
}

}  // namespace ldmi::cpu::LDMI_ISA
