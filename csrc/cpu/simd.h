// Vectors of one width per instruction set, in the compiler's own vector extension: one source for SSE2, NEON, AVX2 and AVX-512.
//
// Every file that includes this header is compiled once per instruction set, with LDMI_ISA (a namespace) and LDMI_VECTOR_BYTES given
// on the command line. Everything here has internal linkage, so that two instruction sets cannot share a function by accident. For the
// same reason the kernels use nothing from the C++ library that would be instantiated with the wrong flags.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef LDMI_ISA
#define LDMI_ISA baseline
#define LDMI_VECTOR_BYTES 16
#endif

#define LDMI_INLINE [[gnu::always_inline]] static inline

namespace ldmi::cpu::LDMI_ISA {
namespace {

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
};
template <>
struct Lane<double> {
  using Int = int64_t;
  using UInt = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
};

template <class T>
constexpr int kLanes = LDMI_VECTOR_BYTES / sizeof(T);

// A vector of kLanes<T> values, in a struct, so that GCC's ABI notes about bare vector arguments do not apply.
template <class T>
struct Vec {
  typedef T Raw __attribute__((vector_size(LDMI_VECTOR_BYTES)));
  using Int = typename Lane<T>::Int;
  using UInt = typename Lane<T>::UInt;
  typedef Int RawInt __attribute__((vector_size(LDMI_VECTOR_BYTES)));
  typedef UInt RawUInt __attribute__((vector_size(LDMI_VECTOR_BYTES)));
  typedef T InMemory __attribute__((vector_size(LDMI_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  Raw v;
};

template <class T>
LDMI_INLINE Vec<T> load(const T* from) {
  return {*reinterpret_cast<const typename Vec<T>::InMemory*>(from)};
}

template <class T>
LDMI_INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename Vec<T>::InMemory*>(to) = value.v;
}

template <class T>
LDMI_INLINE Vec<T> splat(T value) {
  return {value - typename Vec<T>::Raw{}};  // x - 0 is x, even -0: one broadcast
}

template <class T>
LDMI_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
LDMI_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
LDMI_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <class T>
LDMI_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}

// a * b + c, with one rounding if the machine has a fused multiply-add (-ffp-contract=fast).
template <class T>
LDMI_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}

template <class T>
LDMI_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}

// The first `count` lanes of `value`, and `other` in the rest.
template <class T>
LDMI_INLINE Vec<T> first_lanes(Vec<T> value, int count, T other) {
  typename Vec<T>::RawInt index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
  typename Vec<T>::RawInt limit = typename Vec<T>::RawInt{} + static_cast<typename Vec<T>::Int>(count);
  return {index < limit ? value.v : splat<T>(other).v};
}

template <class T>
LDMI_INLINE T reduce_max(Vec<T> value) {
  T lanes[kLanes<T>];
  if constexpr (kLanes<T> == 2) {
    return value.v[0] > value.v[1] ? value.v[0] : value.v[1];
  } else if constexpr (kLanes<T> == 4) {
    Vec<T> a{__builtin_shufflevector(value.v, value.v, 2, 3, 0, 1)};
    a = max(a, value);
    return a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  } else if constexpr (kLanes<T> == 8) {
    Vec<T> a = max(value, Vec<T>{__builtin_shufflevector(value.v, value.v, 4, 5, 6, 7, 0, 1, 2, 3)});
    a = max(a, Vec<T>{__builtin_shufflevector(a.v, a.v, 2, 3, 0, 1, 6, 7, 4, 5)});
    return a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  }
  store(lanes, value);
  T out = lanes[0];
  for (int i = 1; i < kLanes<T>; ++i) out = lanes[i] > out ? lanes[i] : out;
  return out;
}

template <class T>
LDMI_INLINE T reduce_add(Vec<T> value) {
  T lanes[kLanes<T>];
  if constexpr (kLanes<T> == 2) {
    return value.v[0] + value.v[1];
  } else if constexpr (kLanes<T> == 4) {
    Vec<T> a{__builtin_shufflevector(value.v, value.v, 2, 3, 0, 1)};
    a = a + value;
    return a.v[0] + a.v[1];
  } else if constexpr (kLanes<T> == 8) {
    Vec<T> a = value + Vec<T>{__builtin_shufflevector(value.v, value.v, 4, 5, 6, 7, 0, 1, 2, 3)};
    a = a + Vec<T>{__builtin_shufflevector(a.v, a.v, 2, 3, 0, 1, 6, 7, 4, 5)};
    return a.v[0] + a.v[1];
  }
  store(lanes, value);
  T out = 0;
  for (int i = 0; i < kLanes<T>; ++i) out += lanes[i];
  return out;
}

// exp(x) of each of U vectors, for x <= about 1, to about one unit in the last place; 0 below the smallest normal number; NaN is kept.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n exp(r). Adding 1.5 * 2^mantissa rounds x / ln 2 to the integer n and leaves n in
// the low bits of the sum. Shifted to the position of the exponent they make 2^n.
//
// A single vector is one long chain of dependent instructions, longer than a scheduler looks ahead; so U vectors go in lockstep.
template <class T, int U>
LDMI_INLINE void exp_each(Vec<T> (&x)[U]) {
  using Int = typename Vec<T>::Int;
  using UInt = typename Vec<T>::UInt;
  using RawUInt = typename Vec<T>::RawUInt;
  constexpr int mantissa = Lane<T>::mantissa;
  constexpr T magic = static_cast<T>(1.5) * static_cast<T>(Int{1} << mantissa);
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? static_cast<T>(-87.3365) : static_cast<T>(-708.39);
  // ln 2 in two parts; the first is so short that its product with n is exact
  constexpr T ln2_high = static_cast<T>(single ? 0.693359375 : 6.93145751953125e-1);
  constexpr T ln2_low = static_cast<T>(single ? -2.12194440e-4 : 1.42860682030941723212e-6);
  // (exp(r) - 1 - r) / r^2: minimax (S. Moshier's Cephes) in single precision; Taylor, whose remainder is below 2^-57, in double
  [[maybe_unused]] constexpr double coefficients[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                                      1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                                      1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
  [[maybe_unused]] constexpr float short_coefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  constexpr int terms = single ? 6 : 12;
  const auto coefficient = [&](int i) {
    if constexpr (single) {
      return splat<T>(short_coefficients[i]);
    } else {
      return splat<T>(coefficients[i]);
    }
  };
  Vec<T> shifted[U], n[U], r[U], square[U], value[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) shifted[u] = fma(x[u], splat<T>(static_cast<T>(1.44269504088896340736)), splat<T>(magic));
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) n[u] = shifted[u] - splat<T>(magic);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) r[u] = fma(n[u], splat<T>(-ln2_high), x[u]);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) r[u] = fma(n[u], splat<T>(-ln2_low), r[u]);
  // Horner's rule in r^2 on pairs of terms: the same number of operations as in r, and a chain half as long
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) square[u] = r[u] * r[u];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) value[u] = fma(coefficient(0), r[u], coefficient(1));
#pragma GCC unroll 8
  for (int i = 2; i < terms; i += 2) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) value[u] = fma(value[u], square[u], fma(coefficient(i), r[u], coefficient(i + 1)));
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) value[u] = fma(value[u], square[u], r[u]);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    // a cast between vector types keeps the bits; unsigned, because the bits that are shifted out do not matter
    const RawUInt bits = (reinterpret_cast<RawUInt>(shifted[u].v) << mantissa) + (static_cast<UInt>(Lane<T>::bias) << mantissa);
    const Vec<T> power{reinterpret_cast<typename Vec<T>::Raw>(bits)};
    const Vec<T> out = fma(value[u], power, power);
    x[u].v = x[u].v < splat<T>(lowest).v ? splat<T>(0).v : out.v;
  }
}

template <class T>
LDMI_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> one[1] = {x};
  exp_each(one);
  return one[0];
}

// log(x) for finite x >= 1 (a sum of exponentials whose largest is 1), to about one unit in the last place; NaN stays NaN.
LDMI_INLINE Vec<float> log(Vec<float> x) {
  using RawInt = Vec<float>::RawInt;
  RawInt bits = reinterpret_cast<RawInt>(x.v);
  // x = 2^e m with sqrt(1/2) <= m < sqrt(2)
  const RawInt e = (bits - 0x3f3504f3) >> 23;
  bits -= e << 23;
  const Vec<float> m{reinterpret_cast<Vec<float>::Raw>(bits)};
  const Vec<float> r = m - splat(1.0f), n{__builtin_convertvector(e, Vec<float>::Raw)};
  // S. Moshier's Cephes
  Vec<float> poly = splat(7.0376836292e-2f);
  poly = fma(poly, r, splat(-1.1514610310e-1f));
  poly = fma(poly, r, splat(1.1676998740e-1f));
  poly = fma(poly, r, splat(-1.2420140846e-1f));
  poly = fma(poly, r, splat(1.4249322787e-1f));
  poly = fma(poly, r, splat(-1.6668057665e-1f));
  poly = fma(poly, r, splat(2.0000714765e-1f));
  poly = fma(poly, r, splat(-2.4999993993e-1f));
  poly = fma(poly, r, splat(3.3333331174e-1f));
  const Vec<float> r2 = r * r;
  Vec<float> y = poly * r * r2;
  y = fma(n, splat(-2.12194440e-4f), y);
  y = fma(r2, splat(-0.5f), y);
  y = fma(n, splat(0.693359375f), r + y);
  return {x.v == x.v ? y.v : x.v};
}

LDMI_INLINE Vec<double> log(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x.v[i] = __builtin_log(x.v[i]);
  return x;
}

// The halves of a vector of floats, as doubles.
LDMI_INLINE void widen(Vec<float> value, Vec<double>& low, Vec<double>& high) {
#if LDMI_VECTOR_BYTES == 16
  low.v = Vec<double>::Raw{value.v[0], value.v[1]};
  high.v = Vec<double>::Raw{value.v[2], value.v[3]};
#elif LDMI_VECTOR_BYTES == 32
  low.v = __builtin_convertvector(__builtin_shufflevector(value.v, value.v, 0, 1, 2, 3), Vec<double>::Raw);
  high.v = __builtin_convertvector(__builtin_shufflevector(value.v, value.v, 4, 5, 6, 7), Vec<double>::Raw);
#else
  low.v = __builtin_convertvector(__builtin_shufflevector(value.v, value.v, 0, 1, 2, 3, 4, 5, 6, 7), Vec<double>::Raw);
  high.v = __builtin_convertvector(__builtin_shufflevector(value.v, value.v, 8, 9, 10, 11, 12, 13, 14, 15), Vec<double>::Raw);
#endif
}

// Adds scale * value to to[0 .. lanes of T), in double.
LDMI_INLINE void add_scaled(double* to, Vec<float> value, double scale) {
  Vec<double> low, high;
  widen(value, low, high);
  store(to, fma(low, splat(scale), load(to)));
  store(to + kLanes<double>, fma(high, splat(scale), load(to + kLanes<double>)));
}
LDMI_INLINE void add_scaled(double* to, Vec<double> value, double scale) { store(to, fma(value, splat(scale), load(to))); }

template <class T>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

}  // namespace
}  // namespace ldmi::cpu::LDMI_ISA
