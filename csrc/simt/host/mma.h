// The names of ../mma.cuh for a compiler without CUDA. Only mma.cuh includes this file.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "runtime.h"

namespace ldmi::simt {

namespace detail {
// Computes D = A B + C on whole matrices, which it gathers from the lanes' fragments. The products are exact and summed in double: a
// GPU rounds a little more. `In` has the layout of A and B and reads one value of a fragment.
template <class Shape, int m, int n, int k, int count_a, int count_b, int count_c, class In, class Out>
void multiply(const void* const* ins, void* const* outs) {
  double a[m][k], b[k][n];
  for (int l = 0; l < kWarp; ++l) {
    const In& in = *static_cast<const In*>(ins[l]);
    for (int i = 0; i < count_a; ++i) a[in.a_row(l, i)][in.a_col(l, i)] = in.a_value(i);
    for (int i = 0; i < count_b; ++i) b[in.b_row(l, i)][in.b_col(l, i)] = in.b_value(i);
  }
  for (int l = 0; l < kWarp; ++l) {
    const In& in = *static_cast<const In*>(ins[l]);
    for (int i = 0; i < count_c; ++i) {
      double sum = in.c.value[i];
      for (int j = 0; j < k; ++j) sum += a[Shape::c_row(l, i)][j] * b[j][Shape::c_col(l, i)];
      static_cast<Out*>(outs[l])->value[i] = static_cast<std::remove_reference_t<decltype(Out::value[0])>>(sum);
    }
  }
}
struct InTf32 : M16N8K8 {
  A a;
  B b;
  C c;
  static double value(float x) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u);
  }  // the hardware ignores the other bits
  double a_value(int i) const { return value(a.value[i]); }
  double b_value(int i) const { return value(b.value[i]); }
};
struct InF64 {
  double a, b;
  M8N8K4::C c;
  static int a_row(int lane, int) { return M8N8K4::a_row(lane); }
  static int a_col(int lane, int) { return M8N8K4::a_col(lane); }
  static int b_row(int lane, int) { return M8N8K4::b_row(lane); }
  static int b_col(int lane, int) { return M8N8K4::b_col(lane); }
  double a_value(int) const { return a; }
  double b_value(int) const { return b; }
};
}  // namespace detail

inline M16N8K8::C mma(const M16N8K8::A& a, const M16N8K8::B& b, const M16N8K8::C& c, host::Site site = host::Site::current()) {
  const detail::InTf32 in{{}, a, b, c};
  M16N8K8::C out;
  host::collective(
      "mma tf32", kFull, &in, &out,
      [](unsigned, const void* const* ins, void* const* outs) {
        detail::multiply<M16N8K8, 16, 8, 8, 4, 2, 4, detail::InTf32, M16N8K8::C>(ins, outs);
      },
      site);
  return out;
}
inline M8N8K4::C mma(double a, double b, const M8N8K4::C& c, host::Site site = host::Site::current()) {
  const detail::InF64 in{a, b, c};
  M8N8K4::C out;
  host::collective(
      "mma fp64", kFull, &in, &out,
      [](unsigned, const void* const* ins, void* const* outs) {
        detail::multiply<M8N8K4, 8, 8, 4, 1, 1, 2, detail::InF64, M8N8K4::C>(ins, outs);
      },
      site);
  return out;
}
inline float to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? std::bit_cast<float>(bits | 0x7fffffffu) : x;
  return std::bit_cast<float>((bits + 0x1000u) & 0xffffe000u);
}

}  // namespace ldmi::simt
