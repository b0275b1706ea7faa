// Which instruction set this machine runs, decided once; and what needs no vectors: the scalars between the kernels, and the parts of
// logdet_inverse around LAPACK.

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
  Determinant logdet_inverse(const double*, const double*, int64_t, bool, double*);                  \
  double fused(const Batch&, const LossOptions&, FactorFn, void*, const Threads&);                   \
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
    const double log_eps = std::log(options.eps);
    const double distance = level - log_eps;
    out.loss = -((distance > 0 ? level : log_eps) + std::log1p(std::exp(-std::fabs(distance))));
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

Screening equilibrate(double* S, const double* n, int64_t C, bool strict) {
  Screening out{0, true, false, 0};
  std::vector<double> row_sums(static_cast<std::size_t>(C), 0.0);
  const auto entry = [&](int64_t i, int64_t j) {
    const double value = S[i * C + j];
    out.finite &= std::isfinite(value);
    const double scaled = n[i] > 0 && n[j] > 0 ? value / n[i] : (i == j ? 1.0 : 0.0);
    row_sums[static_cast<std::size_t>(i)] += std::fabs(scaled);
    return scaled;
  };
  // entries (i, j) and (j, i) change places, in pairs of tiles that stay in L1
  constexpr int64_t kTile = 32;
  for (int64_t i0 = 0; i0 < C; i0 += kTile) {
    for (int64_t j0 = i0; j0 < C; j0 += kTile) {
      for (int64_t i = i0; i < std::min(C, i0 + kTile); ++i) {
        for (int64_t j = std::max(j0, i); j < std::min(C, j0 + kTile); ++j) {
          const double upper = entry(i, j);
          if (i != j) S[i * C + j] = entry(j, i);
          S[j * C + i] = upper;
        }
      }
    }
  }
  for (int64_t i = 0; i < C; ++i) {
    out.norm = std::max(out.norm, row_sums[static_cast<std::size_t>(i)]);
    out.finite &= std::isfinite(n[i]);
    out.present += n[i] > 0;
  }
  out.dead = strict && out.present > 0 && out.present < C;
  return out;
}

Determinant determinant_of(const Screening& screening, const double* LU, const int32_t* pivots, const double* n, int64_t C,
                           bool strict) {
  const int64_t kept = strict && screening.present > 0 ? C : screening.present;
  if (!screening.finite) return {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN(), kept};
  const Determinant singular{-std::numeric_limits<double>::infinity(), 0, kept};
  if (screening.dead) return singular;
  Determinant out{0, 1, kept};
  const double threshold = static_cast<double>(C) * 0x1p-52 * screening.norm;
  for (int64_t i = 0; i < C; ++i) {
    const double pivot = LU[i * C + i];
    if (!(std::fabs(pivot) > threshold)) return singular;
    out.log_abs_det += std::log(std::fabs(pivot)) + (n[i] > 0 ? std::log(n[i]) : 0);
    if ((pivot < 0) != (pivots[i] != i + 1)) out.sign = -out.sign;
  }
  return out;
}

void finish_inverse(const Screening& screening, const Determinant& found, const double* n, int64_t C, double* X) {
  const bool regular = screening.finite && found.sign != 0;
  const double otherwise = screening.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (int64_t i = 0; i < C; ++i) {
    const double scale = 1 / n[i];
    for (int64_t j = 0; j < C; ++j) {
      double& entry = X[i * C + j];
      entry = !regular ? otherwise : n[i] > 0 && n[j] > 0 ? entry * scale : 0;
    }
  }
}

}  // namespace ldmi::cpu
