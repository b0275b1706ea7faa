// The CUDA engine as the host calls it: joint -> logdet_inverse -> logits_grad, and fused. Free of torch: device pointers, strides in
// elements, a stream, and workspace whose size csrc/plan/cuda_plan.h says.
//
// Every function launches on the stream and returns at once, with cudaSuccess (0) or the error's code. It allocates nothing and waits
// for nothing, so that it can be captured. The workspace is 256-byte aligned and holds anything before and after. One device and
// shape: bitwise the same results.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"
#include "../plan/cuda_plan.h"
#include "stream.h"

namespace ldmi::cuda {

// The same batches as on a CPU, with pointers to the device's memory
using cpu::Batch;
using cpu::Labels;
using cpu::Matrix;
using cpu::Type;
using cpu::Weights;
using plan::DeviceLimits;

// ------------------------------------------------------------------------------------------------------------------- joint

// S [K, C], n [K] and ce [1] in double; lse [N] in float (double for fp64 logits). All contiguous, all overwritten. Rows that do
// not count (ignored, weight 0) are not read; their lse is 0. A label or weight out of range makes S, n and ce NaN.
int joint(const Batch& batch, double* S, double* n, void* lse, double* ce, void* workspace, const DeviceLimits& limits,
          simt::Stream stream);

// ------------------------------------------------------------------------------------------------------------- logits_grad

// `grad` [N, C] contiguous, of the type of the logits:
// scale * d(-log|det S|)/dlogits + ce_scale * d(summed cross entropy)/dlogits, with V [K, C] contiguous; scale and ce_scale are one
// double each on the device. Rows that do not count are zeros, those whose label or weight is out of range too.
// `lse` is the output of joint.
int logits_grad(const Batch& batch, const void* lse, const double* V, const double* scale, const double* ce_scale, void* grad,
                void* workspace, const DeviceLimits& limits, simt::Stream stream);

// ---------------------------------------------------------------------------------------------------------- logdet_inverse

// log|det S|, its sign, the number of classes kept and V = S^{-T} of `count` matrices S [count, C, C] with n [count, C], as on a CPU,
// not where plan::cuda_logdet_inverse says kLu: an error. V may be null: the determinants alone, with the same bits; the
// workspace is that of the plan with or without the inverse.
int logdet_inverse(const double* S, const double* n, int64_t count, int64_t C, bool strict, double* log_abs_det, double* sign,
                   int64_t* kept, double* V, void* workspace, const DeviceLimits& limits, simt::Stream stream);

// Where it says kLu, these kernels run before and after torch's LU. They share one workspace, which carries results from one to the
// next. A [count, C, C] = diag(1/n) S, whose memory may be that of S, and X [count, C, C], unless null, the identity:
int logdet_inverse_equilibrate(const double* S, const double* n, int64_t count, int64_t C, double* A, double* X, void* workspace,
                               const DeviceLimits& limits, simt::Stream stream);
// the scalars from P A^T = L U as LAPACK leaves it: the factors column-major in A, and pivots [count, C], 1-based:
int logdet_inverse_determinant(const double* LU, const int32_t* pivots, const double* n, int64_t count, int64_t C, bool strict,
                               double* log_abs_det, double* sign, int64_t* kept, void* workspace, const DeviceLimits& limits,
                               simt::Stream stream);
// and V from X, column-major, in which U^T and then L^T have been solved with, the scalars known. V may be the memory of A:
int logdet_inverse_finish(const double* X, const int32_t* pivots, const double* n, int64_t count, int64_t C, double* V,
                          void* workspace, const DeviceLimits& limits, simt::Stream stream);

// ----------------------------------------------------------------------------------------------------------------- combine

using cpu::LossOptions;

// The loss (one float, or double), and the two factors of its gradient (a double each), as cpu::combine; log_abs_det, kept and ce are
// one number each, n [K]. The total weight is the sum of n; with soft targets that of the batch's weights.
int combine(const Batch& batch, const double* log_abs_det, const int64_t* kept, const double* n, const double* ce,
            const LossOptions& options, void* loss, Type loss_type, double* scale, double* ce_scale, void* workspace,
            const DeviceLimits& limits, simt::Stream stream);

// ------------------------------------------------------------------------------------------------------------------- fused

// The loss (one float, or double for fp64 logits) and its gradient [N, C], contiguous, of the type of the logits, for hard labels with
// num_labels == C: where plan::cuda_fused says that it runs, else an error. One launch, no workspace.
int fused(const Batch& batch, const LossOptions& options, void* loss, void* grad, const DeviceLimits& limits, simt::Stream stream);

// ------------------------------------------------------------------------------------------------------------ loss_forward

// What the op loss_forward returns, K == C: the loss (one float, or double for fp64 logits), lse [N] as joint's, V [C, C] (null where
// no gradient is asked for), scale and ce_scale (a double each). Not where plan::cuda_loss_forward says kLu: an error. The
// workspace is that of the plan with or without the gradient.
int loss_forward(const Batch& batch, const LossOptions& options, void* loss, void* lse, double* V, double* scale, double* ce_scale,
                 void* workspace, const DeviceLimits& limits, simt::Stream stream);

}  // namespace ldmi::cuda
