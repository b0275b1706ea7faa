// forward_tail: the end of a forward whose joint is in memory. One block computes log|det S|, V and the scalars, for sizes that a
// block can factor. It is a launch of its own, or the last step of loss_forward_cooperative.cuh.
#pragma once

#include "combine.cuh"
#include "logdet_inverse/kernels.cuh"
#include "rows.cuh"

namespace ldmi::cuda {

constexpr int tail_threads(int most) { return most <= kFactorWarp ? kWarp : factor::factor_threads(most); }

// What loss_forward_tail reads and writes; see kernels.h
struct ForwardTail {
  const double* S;   // [C, C]
  const double* n;   // [C]
  const double* ce;  // [1]
  int C;
  bool sum_n;    // whether the total weight is the sum of n: hard labels
  double total;  // or else this, if there are no
  void* loss;
  Type loss_type;
  double* V;  // [C, C], or null
  double *scale, *ce_scale;
};

// The first warp works for at most kFactorWarp classes, otherwise the whole block, with kMost / kWarp rows of a panel per lane. Sums
// of other blocks are read by load().
template <int kMost>
LDMI_DEVICE void forward_tail(const ForwardTail& at, const LossOptions& options, int stride) {
  const int C = at.C;
  const auto entry = [&](int i, int j) { return load(at.S + i * C + j); };
  const auto weight = [&](int64_t i) { return load(at.n + i); };
  const auto emit = [&](int i, int j, double value) { store(at.V + i * C + j, value); };
  const bool inverse = at.V != nullptr;
  const auto scalars = [&](const Determinant& found) {
    double total = at.total;
    if (at.sum_n) {
      total = total_weight(C, weight);
    }
    const Loss loss = loss_of(found, total, load(at.ce), options);
    if (lane() != 0) return;
    if (at.loss_type == Type::kFloat64) {
      store(static_cast<double*>(at.loss), loss.loss);
    } else {
      store(static_cast<float*>(at.loss), static_cast<float>(loss.loss));
    }
    store(at.scale, loss.scale);
    store(at.ce_scale, loss.ce_scale);
  };
  if constexpr (kMost <= kFactorWarp) {
    if (warp() == 0) scalars(factor::by_warp<kMost>(C, options.strict, inverse, entry, weight, emit));
  } else {
    Carve carve;
    const FactorSpace space = take_factor_space(carve, C, stride);
    const Determinant found = factor::by_block<kMost / kWarp>(space, C, options.strict, inverse, entry, weight, emit);
    if (warp() == 0) scalars(found);
  }
}

template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(tail_threads(kMost), 1) loss_forward_tail(ForwardTail at, LossOptions options, int stride) {
  forward_tail<kMost>(at, options, stride);
}

template <int kMost>
int launch_tail(const ForwardTail& at, const LossOptions& options, const plan::CudaLogdetInverse& plan, Stream stream) {
  constexpr int kLess = kMost <= kFactorWarp ? kMost - 8 : kMost - kWarp;
  if constexpr (kLess > 0) {
    if (at.C <= kLess) return launch_tail<kLess>(at, options, plan, stream);
  }
  Grid grid;
  grid.threads = tail_threads(kMost);
  grid.smem = static_cast<size_t>(plan.smem_bytes);
  return launch(loss_forward_tail<kMost>, grid, stream, at, options, static_cast<int>(plan.stride));
}

}  // namespace ldmi::cuda
