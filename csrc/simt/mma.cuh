// The tensor cores: the layouts of the matrices' fragments, and the products. Part of the device vocabulary; see device.cuh.
#pragma once

#include "device.cuh"

namespace ldmi::simt {

// ---------------------------------------------------------------------------------------------- tensor core layouts (PTX)

// Row and column of value i of a lane's fragment. mma() of each shape computes D = A B + C; a whole warp calls it.
struct M16N8K8 {  // tf32 -> fp32: A 16 x 8 (4 values), B 8 x 8 (2), C and D 16 x 8 (4)
  LDMI_HOST_DEVICE static constexpr int a_row(int lane, int i) { return lane / 4 + (i & 1) * 8; }
  LDMI_HOST_DEVICE static constexpr int a_col(int lane, int i) { return lane % 4 + (i & 2) * 2; }
  LDMI_HOST_DEVICE static constexpr int b_row(int lane, int i) { return lane % 4 + (i & 1) * 4; }
  LDMI_HOST_DEVICE static constexpr int b_col(int lane, int) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
  LDMI_HOST_DEVICE static constexpr int c_col(int lane, int i) { return lane % 4 * 2 + (i & 1); }
  struct A {
    float value[4];  // rounded by to_tf32
  };
  struct B {
    float value[2];
  };
  struct C {
    float value[4];
  };
};
struct M8N8K4 {  // fp64: A 8 x 4 (1 value), B 4 x 8 (1), C and D 8 x 8 (2)
  LDMI_HOST_DEVICE static constexpr int a_row(int lane) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int a_col(int lane) { return lane % 4; }
  LDMI_HOST_DEVICE static constexpr int b_row(int lane) { return lane % 4; }
  LDMI_HOST_DEVICE static constexpr int b_col(int lane) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_row(int lane, int) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_col(int lane, int i) { return lane % 4 * 2 + i; }
  struct C {
    double value[2];
  };
};

}  // namespace ldmi::simt

#ifndef __CUDACC__
#include "host/mma.h"
#else

namespace ldmi::simt {

// --------------------------------------------------------------------------------------------------------- tensor cores

LDMI_DEVICE M16N8K8::C mma(const M16N8K8::A& a, const M16N8K8::B& b, const M16N8K8::C& c) {
  M16N8K8::C d;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d.value[0]), "=f"(d.value[1]), "=f"(d.value[2]), "=f"(d.value[3])
      : "r"(__float_as_uint(a.value[0])), "r"(__float_as_uint(a.value[1])), "r"(__float_as_uint(a.value[2])),
        "r"(__float_as_uint(a.value[3])), "r"(__float_as_uint(b.value[0])), "r"(__float_as_uint(b.value[1])), "f"(c.value[0]),
        "f"(c.value[1]), "f"(c.value[2]), "f"(c.value[3]));
  return d;
}
LDMI_DEVICE M8N8K4::C mma(double a, double b, const M8N8K4::C& c) {
  M8N8K4::C d;
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %5};"
      : "=d"(d.value[0]), "=d"(d.value[1])
      : "d"(a), "d"(b), "d"(c.value[0]), "d"(c.value[1]));
  return d;
}
// Rounds to the nearest tf32 (10 bits of mantissa, ties away from zero), as a float.
LDMI_DEVICE float to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

}  // namespace ldmi::simt
#endif  // __CUDACC__
