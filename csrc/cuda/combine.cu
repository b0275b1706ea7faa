// combine as a separate kernel.

#include "combine.cuh"

namespace ldmi::cuda {
namespace {

// The inputs and outputs of combine; see kernels.h
struct Scalars {
  const double* log_abs_det;
  const int64_t* kept;
  const double* n;  // [num_labels]
  const double* ce;
  void* loss;
  Type loss_type;
  double* scale;
  double* ce_scale;
  double* sums;       // [blocks]: of the weights, one per block
  unsigned* counter;  // 0
};

inline constexpr int kCombineThreads = 256;

// One block; more where the weights of soft targets have to be summed, and then the last block to finish computes the scalars
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

}  // namespace

int combine(const Batch& batch, const double* log_abs_det, const int64_t* kept, const double* n, const double* ce,
            const LossOptions& options, void* loss, Type loss_type, double* scale, double* ce_scale, void* workspace,
            const DeviceLimits& limits, simt::Stream stream) {
  const bool weighted_soft = batch.soft.data != nullptr && batch.weights.data != nullptr;
  const int64_t blocks = plan::cuda_combine(batch.logits.rows, weighted_soft, limits).blocks;
  double* const sums = static_cast<double*>(workspace);
  unsigned* const counter = reinterpret_cast<unsigned*>(sums + (blocks > 1 ? blocks : 0));
  if (blocks > 1) {
    if (const int error = simt::zero(counter, sizeof(unsigned), stream); error != 0) return error;
  }
  simt::Carve carve;
  carve.take<double>(kCombineThreads / simt::kWarp);
  const simt::Grid grid{blocks, kCombineThreads, carve.bytes()};
  return simt::launch(combine_scalars, grid, stream, batch, options,
                      Scalars{log_abs_det, kept, n, ce, loss, loss_type, scale, ce_scale, sums, counter});
}

}  // namespace ldmi::cuda
