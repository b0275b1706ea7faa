// Chooses the instruction set for this machine, once. Also the scalar operations between the kernels, which need no vectors.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"

#define LDMI_DECLARE(ISA)                                                                            \
  namespace ISA {                                                                                    \
  void joint(const Batch&, double*, double*, void*, double*, const Threads&);                        \
  void logits_grad(const Batch&, const void*, const double*, double, double, void*, const Threads&); \
  Determinant logdet_inverse(const double*, const double*, int64_t, bool, double*, const Threads&);  \
  double fused(const Batch&, const LossOptions&, void*, const Threads&);                             \
  }
#define LDMI_KERNELS(ISA) \
  Kernels { #ISA, ISA::joint, ISA::logits_grad, ISA::logdet_inverse, ISA::fused }

namespace ldmi::cpu {

LDMI_DECLARE(baseline)
#ifdef LDMI_X86
LDMI_DECLARE(avx2)
LDMI_DECLARE(avx512)
#endif

namespace {

struct Candidate {
  Kernels kernels;
  bool runs;
};

Kernels choose() {
  const Candidate candidates[] = {
#ifdef LDMI_X86
      {LDMI_KERNELS(avx512), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")},
      {LDMI_KERNELS(avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {LDMI_KERNELS(baseline), true},
  };
  const char* forced = std::getenv("LDMI_FAST_ISA");
  if (forced == nullptr || *forced == 0) {
    for (const Candidate& candidate : candidates) {
      if (candidate.runs) return candidate.kernels;
    }
  }
  std::string names;
  for (const Candidate& candidate : candidates) {
    if (std::string(forced) != candidate.kernels.isa) {
      names += std::string(names.empty() ? "" : ", ") + candidate.kernels.isa;
      continue;
    }
    if (candidate.runs) return candidate.kernels;
    throw std::runtime_error(std::string("LDMI_FAST_ISA=") + forced + ": this processor does not have these instructions");
  }
  throw std::runtime_error(std::string("LDMI_FAST_ISA=") + forced + ": expected one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

Loss combine(const Determinant& det, double total, double ce, const LossOptions& options) {
  const bool empty = total == 0;
  if (empty) total = 1;
  const double level = det.log_abs_det - (options.normalize ? static_cast<double>(det.kept) * std::log(total) : 0);
  Loss out{-level, 1, options.cross_entropy_weight / total};
  if (options.eps > 0) {
    const double distance = level - options.log_eps;
    out.loss = -((distance > 0 ? level : options.log_eps) + std::log1p(std::exp(-std::fabs(distance))));
    out.scale = 1 / (1 + std::exp(-distance));
    if (std::isnan(distance)) out.loss = out.scale = distance;
  }
  if (empty) out.loss = 0;
  if (options.cross_entropy_weight != 0) out.loss += out.ce_scale * ce;
  return out;
}

double total_weight(const Batch& batch, const double* n) {
  double total = 0;
  if (batch.soft.data == nullptr) {
    for (int64_t k = 0; k < batch.num_labels; ++k) total += n[k];
    return total;
  }
  const Weights& w = batch.weights;
  if (w.data == nullptr) return static_cast<double>(batch.logits.rows);
  for (int64_t i = 0; i < batch.logits.rows; ++i) {
    const int64_t at = i * w.stride;
    switch (w.type) {
      case Type::kFloat16:
        total += static_cast<double>(widen(static_cast<const Half*>(w.data)[at]));
        break;
      case Type::kBFloat16:
        total += static_cast<double>(widen(static_cast<const BFloat16*>(w.data)[at]));
        break;
      case Type::kFloat32:
        total += static_cast<double>(static_cast<const float*>(w.data)[at]);
        break;
      case Type::kFloat64:
        total += static_cast<const double*>(w.data)[at];
        break;
    }
  }
  return total;
}

}  // namespace ldmi::cpu
