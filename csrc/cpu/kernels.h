// The CPU engine: joint -> logdet_inverse -> logits_grad, and fused. Free of torch: raw pointers, strides in elements, and a callback
// that runs tasks on the caller's threads.
//
// The work of a call is cut into tasks by its shape alone, and partial sums are added in the order of the tasks, so results are
// bitwise the same for every number of threads.
#pragma once

#include <cmath>
#include <cstdint>

namespace ldmi::cpu {

enum class Type : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A read-only matrix of floating point numbers, element (i, j) at data[i * row_stride + j * column_stride].
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

// Class indices; element i at data[i * stride].
struct Labels {
  const void* data;
  int bytes;  // 1, 2, 4 or 8
  bool is_signed;
  int64_t stride;
};

// Weights of samples, or null data for 1 each.
struct Weights {
  const void* data;
  Type type;
  int64_t stride;
};

// One batch. Soft targets have soft.data, hard ones labels.data.
struct Batch {
  Matrix logits;  // [N, C]
  Labels labels;  // [N]
  Matrix soft;    // [N, K]
  Weights weights;
  int64_t num_labels;  // K
  int64_t ignore_index;
  bool probs;  // the matrix holds probabilities
};

// Runs body(context, task) for every task in 0..tasks-1, in any order, on any threads.
struct Threads {
  void (*run)(int64_t tasks, void* context, void (*body)(void* context, int64_t task));
};

template <class Body>
void for_each_task(const Threads& threads, int64_t tasks, const Body& body) {
  if (tasks == 1) {
    body(int64_t{0});
    return;
  }
  threads.run(tasks, const_cast<Body*>(&body), [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); });
}

// S [K, C], n [K] and ce [1] in double; lse [N] in float (double for fp64 logits). All are contiguous and overwritten. Rows that do
// not count (ignored, or of weight 0) are not read. A label or weight out of range makes S, n and ce NaN.
using JointFn = void (*)(const Batch&, double* S, double* n, void* lse, double* ce, const Threads&);

// `grad` [N, C] contiguous, of the type of the logits:
// scale * d(-log|det S|)/dlogits + ce_scale * d(summed cross entropy)/dlogits, with V [K, C] contiguous.
using LogitsGradFn = void (*)(const Batch&, const void* lse, const double* V, double scale, double ce_scale, void* grad,
                              const Threads&);

// What is known of one [C, C] matrix besides its inverse.
struct Determinant {
  double log_abs_det;  // -inf when singular
  double sign;         // 0 when singular
  int64_t kept;        // number of classes that the determinant includes
};

// log|det S| and V = S^{-T} (row-major, contiguous) of one matrix by Gauss-Jordan elimination with partial pivoting. With V = null
// only the determinant is computed, with the same bits.
using LogdetInverseFn = Determinant (*)(const double* S, const double* n, int64_t C, bool strict, double* V, const Threads&);

struct LossOptions {
  bool strict;
  double eps;
  bool normalize;
  double cross_entropy_weight;
  double log_eps = std::log(eps);  // -inf without eps
};

// The loss (returned) and its gradient `grad` [N, C], for hard labels.
using FusedFn = double (*)(const Batch&, const LossOptions&, void* grad, const Threads&);

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  JointFn joint;
  LogitsGradFn logits_grad;
  LogdetInverseFn logdet_inverse;
  FusedFn fused;
};

// Returns the kernels for this machine: of the widest instruction set that it has, or of the one in the environment variable
// LDMI_FAST_ISA (baseline, avx2, avx512). Throws std::runtime_error if that one is unknown or cannot run here.
const Kernels& kernels();

// Computes the loss and the two factors of its gradient from l = log|det S| - k log W (without k log W when not normalised): -l, or
// with eps -logaddexp(l, log eps), whose derivative is sigmoid(l - log eps), plus the mean cross entropy. If the total weight is 0,
// the loss is 0.
struct Loss {
  double loss, scale, ce_scale;
};
Loss combine(const Determinant&, double total_weight, double ce, const LossOptions&);

// W: the sum of the weights of the rows that count.
double total_weight(const Batch&, const double* n);

}  // namespace ldmi::cpu
