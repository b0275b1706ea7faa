// When a matrix counts as singular: the same rule in every compiled engine. ldmi_fast/precision.py states it in Python.
#pragma once

#include <cstdint>

#include "everywhere.h"

namespace ldmi::plan {

inline constexpr double kEpsilon = 0x1p-52;  // machine epsilon of double

// The largest magnitude that is no pivot, of the matrix R = diag(1/n) S with C classes and norm ||R||_inf. The order of the products
// is part of the rule: it decides the last bit.
LDMI_EVERYWHERE double singular_threshold(int64_t classes, double norm) { return static_cast<double>(classes) * kEpsilon * norm; }

}  // namespace ldmi::plan
