// The kernels of one instruction set, under the namespace that its compiler flags belong to.
#pragma once

#include "kernels.h"

namespace ldmi::cpu::LDMI_ISA {

void joint(const Batch&, double* S, double* n, void* lse, double* ce, const Threads&);
void logits_grad(const Batch&, const void* lse, const double* V, double scale, double ce_scale, void* grad, const Threads&);
Determinant logdet_inverse(const double* S, const double* n, int64_t C, bool strict, double* V, const Threads&);
double fused(const Batch&, const LossOptions&, void* grad, const Threads&);

}  // namespace ldmi::cpu::LDMI_ISA
