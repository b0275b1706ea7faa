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
    const double log_eps = simt::log(options.eps), distance = level - log_eps;
    // to 2^-53 of 1, which is what the loss may be compared with; NaN if the distance is
    out.loss = -((distance > 0.0 ? level : log_eps) + simt::log(1.0 + simt::exp(-simt::abs(distance))));
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

// ------------------------------------------------------------------------------------------------------ a kernel of its own

// Where combine reads and writes; see kernels.h
struct Scalars {
  const double* log_abs_det;
  const int64_t* kept;
  const double* n;  // [num_labels]
  const double* ce;
  void* loss;
  Type loss_type;
  double* scale;
  double* ce_scale;
  double* sums;       // [blocks]: of the weights, one a block
  unsigned* counter;  // 0
};

inline constexpr int kCombineThreads = 256;

// One block; more where the weights of soft targets have to be summed, of which the last one goes on
LDMI_KERNEL void LDMI_BOUNDS(kCombineThreads, 1) combine_scalars(Batch batch, LossOptions options, Scalars at) {
  Carve carve;
  double* const parts = carve.take<double>(kCombineThreads / kWarp);
  double total = static_cast<double>(batch.logits.rows);
  if (batch.soft.data == nullptr) {
    total = total_weight(batch.num_labels, [&](int64_t i) { return load_const(at.n + i); });
  } else if (batch.weights.data != nullptr) {
    const int64_t rows = (batch.logits.rows + grid_dim() - 1) / grid_dim(), begin = block_idx() * rows;
    const int64_t end = begin + rows < batch.logits.rows ? begin + rows : batch.logits.rows;
    total = 0.0;
    for (int64_t i = begin + thread_idx(); i < end; i += block_dim()) total += weight_of(batch.weights, i);
    total = warp_sum(total);
    if (lane() == 0) parts[warp()] = total;
    sync_block();
    total = 0.0;
    for (int w = 0; w < block_dim() / kWarp; ++w) total += parts[w];
    if (grid_dim() > 1) {
      if (thread_idx() == 0) store(at.sums + block_idx(), total);
      if (!last_block(at.counter, grid_dim())) return;
      total = 0.0;
      for (int64_t b = 0; b < grid_dim(); ++b) total += load(at.sums + b);
    }
  }
  if (thread_idx() != 0) return;
  const Determinant det{load_const(at.log_abs_det), 0.0, load_const(at.kept)};
  const Loss out = loss_of(det, total, load_const(at.ce), options);
  if (at.loss_type == Type::kFloat64) {
    store(static_cast<double*>(at.loss), out.loss);
  } else {
    store(static_cast<float*>(at.loss), static_cast<float>(out.loss));
  }
  store(at.scale, out.scale);
  store(at.ce_scale, out.ce_scale);
}

}  // namespace ldmi::cuda
