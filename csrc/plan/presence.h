// Which classes the determinant includes: the same rule in every engine. ldmi_fast/presence.py states it in Python.
#pragma once

#include "everywhere.h"

namespace ldmi::plan {

// A class with a smaller share of the whole weight is absent. In a moving average the share of a class that left the data decays for
// ever; long before it underflows, its row of S contains no more information about the model.
inline constexpr double kAbsentShare = 1e-12;

// The least weight of a present class is the sum of least_part(n) over all classes; NaN stays. The weights are scaled before they are
// added, so that the sum of the largest weights stays finite.
LDMI_EVERYWHERE double least_part(double n) { return n < 0.0 ? 0.0 : kAbsentShare * n; }

// Not `n >= least`: if some weight is NaN, so is the result, and the other classes count as if there were no rule.
LDMI_EVERYWHERE bool is_present(double n, double least) { return n > 0.0 && !(n < least); }

// 1 / n overflows if n is below 2^-1024. If a weight is nearly that small, it is multiplied by lift_of before it is inverted, and so
// is what is divided by it. The lift of the least weight of a present class serves for all of them: they are at most 2^40 times
// larger, and about 2^-1034 at most if that one is subnormal.
LDMI_EVERYWHERE bool is_small(double n) { return n < 0x1p-1000; }
LDMI_EVERYWHERE double lift_if(bool small) { return small ? 0x1p300 : 1.0; }
LDMI_EVERYWHERE double lift_of(double n) { return lift_if(is_small(n)); }

}  // namespace ldmi::plan
