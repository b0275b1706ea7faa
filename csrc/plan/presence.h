// Which classes a determinant is of: the same rule in every engine. composite.ABSENT_SHARE and present_classes say it in Python.
#pragma once

#ifdef __CUDACC__
#define LDMI_EVERYWHERE __host__ __device__
#else
#define LDMI_EVERYWHERE
#endif

namespace ldmi::plan {

// A class whose share of the whole weight is smaller is absent. In a moving average the share of a class that left the data decays for
// ever; long before it underflows, its row of S says nothing about the model any more.
inline constexpr double kAbsentShare = 1e-12;

// What a class of weight n adds to the least weight that counts as present; NaN stays. Scaled before they are added, so that the sum
// of the largest weights stays finite.
LDMI_EVERYWHERE inline double least_part(double n) { return n < 0.0 ? 0.0 : kAbsentShare * n; }

// Not `n >= least`: where some weight is NaN, and with it the result, the others count as if there were no rule.
LDMI_EVERYWHERE inline bool is_present(double n, double least) { return n > 0.0 && !(n < least); }

// 1 / n overflows below 2^-1024. Where a weight is nearly as small as that, it is multiplied by this before it is inverted, and what
// is divided by it as well. Of the least weight of a class that is present it serves for all of them: they are at most 2^40 times
// that, or some 2^-1034 where that is subnormal.
LDMI_EVERYWHERE inline bool is_small(double n) { return n < 0x1p-1000; }
LDMI_EVERYWHERE inline double lift_if(bool small) { return small ? 0x1p300 : 1.0; }
LDMI_EVERYWHERE inline double lift_of(double n) { return lift_if(is_small(n)); }

}  // namespace ldmi::plan

#undef LDMI_EVERYWHERE
