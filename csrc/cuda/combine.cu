// The launch of combine.

#include "combine.cuh"

namespace ldmi::cuda {

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
