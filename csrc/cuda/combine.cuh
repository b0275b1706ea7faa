// From log|det S| to the loss: the scalars between logdet_inverse and logits_grad, as csrc/cpu's combine computes them.
#pragma once

#include "rows.cuh"

namespace ldmi::cuda {

using cpu::Determinant;
using cpu::Loss;

// The loss and the two factors of its gradient; one thread. `total` is the weight of the batch, `ce` its summed cross entropy.
LDMI_DEVICE Loss loss_of(const Determinant& det, double total, double ce, const LossOptions& options) {
  const bool empty = total == 0.0;
  if (empty) total = 1.0;
  const double level = det.log_abs_det - (options.normalize ? static_cast<double>(det.kept) * simt::log(total) : 0.0);
  Loss out{-level, 1.0, options.cross_entropy_weight / total};
  if (options.eps > 0.0) {
    const double distance = level - options.log_eps;
    // to 2^-53 of 1, which is what the loss may be compared with; NaN if the distance is
    out.loss = -((distance > 0.0 ? level : options.log_eps) + simt::log(1.0 + simt::exp(-simt::abs(distance))));
    out.scale = 1.0 / (1.0 + simt::exp(-distance));
  }
  if (empty) out.loss = 0.0;
  if (options.cross_entropy_weight != 0.0) out.loss += out.ce_scale * ce;
  return out;
}

// W of hard labels, the sum of n: weight(0) + ... + weight(C - 1), by a warp, in all of its lanes
template <class Weight>
LDMI_DEVICE double total_weight(int64_t C, const Weight& weight) {
  double total = 0.0;
  for (int64_t i = simt::lane(); i < C; i += simt::kWarp) total += weight(i);
  return simt::warp_sum(total);
}

}  // namespace ldmi::cuda
