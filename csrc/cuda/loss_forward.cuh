// The end of a forward whose joint is in memory: log|det S|, V and the scalars, by one block, as far as a block factors; as a launch
// of its own, or as the last step of loss_forward_cooperative.cuh.
#pragma once

#include "combine.cuh"
#include "logdet_inverse/kernels.cuh"
#include "rows.cuh"

namespace ldmi::cuda {

constexpr int end_threads(int most) { return most <= kFactorWarp ? kWarp : factor::factor_threads(most); }

// What loss_end reads and writes; see kernels.h
struct LossEnd {
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

// By the first warp up to kFactorWarp classes, else by the whole block, kMost / kWarp rows of a panel a lane. What other blocks summed
// is read by load().
template <int kMost>
LDMI_DEVICE void end_of_loss(const LossEnd& at, const LossOptions& options, int stride) {
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
LDMI_KERNEL void LDMI_BOUNDS(end_threads(kMost), 1) loss_end(LossEnd at, LossOptions options, int stride) {
  end_of_loss<kMost>(at, options, stride);
}

template <int kMost>
int launch_end(const LossEnd& at, const LossOptions& options, const plan::CudaLogdetInverse& plan, Stream stream) {
  constexpr int kLess = kMost <= kFactorWarp ? kMost - 8 : kMost - kWarp;
  if constexpr (kLess > 0) {
    if (at.C <= kLess) return launch_end<kLess>(at, options, plan, stream);
  }
  Grid grid;
  grid.threads = end_threads(kMost);
  grid.smem = static_cast<size_t>(plan.smem_bytes);
  return launch(loss_end<kMost>, grid, stream, at, options, static_cast<int>(plan.stride));
}

}  // namespace ldmi::cuda
