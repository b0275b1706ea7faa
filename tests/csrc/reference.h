// The results that the kernels must compute, in plain loops over doubles, straight from the formulas; and for every number a bound on
// the rounding of an implementation that works in precision `unit`. Shares no code with csrc/.
#pragma once

#include <cstdint>
#include <vector>

namespace ldmi::test {

// A batch as mathematics: all numbers exact in double.
struct Problem {
  int64_t rows, classes, labels;
  bool soft, probs;
  std::vector<double> x;  // [rows, classes]
  std::vector<double> w;  // [rows]
  std::vector<double> t;  // [rows, labels], soft targets
  // hard ones: the label, and whether it is ignored
  std::vector<int64_t> y;
  std::vector<bool> ignored;
  double unit;      // roundoff of the softmax
  double smallest;  // the smallest normal number of its precision

  bool counts(int64_t i) const;  // false: ignored or of weight 0
  bool bad(int64_t i) const;     // counts, but its label or weight is out of range
};

// A number and the largest error of a right answer. NaN and infinities must be matched exactly; a NaN bound accepts anything.
struct Bounded {
  double value;
  double error;
  bool accepts(double got) const;
};

struct JointAnswer {
  std::vector<Bounded> S, n, lse;
  Bounded ce;
};
JointAnswer joint(const Problem&);

// The gradient [rows, classes], before it is rounded to the type that it is stored in. V_error: absolute error of the entries of V;
// ce_scale_error: relative, of ce_scale, which a whole loss divides by a sum of weights.
std::vector<Bounded> logits_grad(const Problem&, const std::vector<double>& V, double V_error, double scale, double ce_scale,
                                 double ce_scale_error = 0);

struct Inverse {
  double log_abs_det, sign;
  int64_t kept;
  std::vector<double> V;  // S^{-T}, rows and columns of absent classes zero
  double condition;       // of R, in the infinity norm
  double smallest_pivot;  // of R, relative to its norm
  double inverse_norm;    // largest |R^{-1}| times C, which bounds its norms
};
Inverse logdet_inverse(const std::vector<double>& S, const std::vector<double>& n, int64_t C, bool strict);

// Whether each class has at least 1e-12 of the weight
std::vector<bool> present_classes(const std::vector<double>& n);

}  // namespace ldmi::test
