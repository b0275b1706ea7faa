// simd.h and tile.h at one vector width: exp and log against the C library in units in the last place, reductions, transpositions.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../csrc/cpu/tile.h"
#include "random.h"

#define LDMI_STRING_OF(name) #name
#define LDMI_STRING(name) LDMI_STRING_OF(name)

namespace ldmi::cpu::LDMI_ISA {
namespace {

constexpr const char* kIsa = LDMI_STRING(LDMI_ISA);

[[noreturn]] void fail(const char* what, double input, double got, double want) {
  std::printf("%s: %s of %.17g (%a) is %.17g, expected %.17g\n", kIsa, what, input, input, got, want);
  std::exit(1);
}

template <class T>
T from_bits(typename Lane<T>::Int bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
typename Lane<T>::Int to_bits(T value) {
  typename Lane<T>::Int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The reference, in more precision than T.
long double exact_exp(double x) { return std::exp(static_cast<long double>(x)); }
double exact_exp(float x) { return std::exp(static_cast<double>(x)); }
long double exact_log(double x) { return std::log(static_cast<long double>(x)); }
double exact_log(float x) { return std::log(static_cast<double>(x)); }

template <class T>
double ulps(T got, auto exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return static_cast<double>(
      std::fabs(std::ldexp(static_cast<decltype(exact)>(got) - exact, std::numeric_limits<T>::digits - exponent)));
}

// The largest error of f over the values from `first` to `last`, `step` apart in their bit patterns.
template <class T>
double largest_error(T first, T last, typename Lane<T>::Int step, auto&& f, auto&& exact, T& where) {
  double worst = 0;
  typename Lane<T>::Int bits = to_bits(first);
  const typename Lane<T>::Int end = to_bits(last);
  T in[kLanes<T>], out[kLanes<T>];
  while (bits < end) {
    for (int l = 0; l < kLanes<T>; ++l) {
      in[l] = from_bits<T>(bits < end ? bits : end);
      bits = bits < end - step ? bits + step : end;
    }
    store(out, f(load(in)));
    for (int l = 0; l < kLanes<T>; ++l) {
      const double error = ulps(out[l], exact(in[l]));
      if (!(error <= worst)) {  // a NaN stays
        worst = error;
        where = in[l];
      }
    }
  }
  return worst;
}

template <class T>
void check_exp(typename Lane<T>::Int step, double allowed) {
  const auto f = [](Vec<T> x) { return exp(x); };
  const auto exact = [](T x) { return exact_exp(x); };
  constexpr T lowest = sizeof(T) == 4 ? static_cast<T>(-87.33) : static_cast<T>(-708.38);
  constexpr T tiny = std::numeric_limits<T>::min();
  T where = 0;
  // bit patterns of negative numbers grow with their magnitude
  const double below = largest_error<T>(-T{0} - tiny, lowest, step, f, exact, where);
  if (!(below <= allowed)) fail("exp", where, f(splat(where)).v[0], exact(where));
  const double above = largest_error<T>(T{0}, T{1}, step, f, exact, where);
  if (!(above <= allowed)) fail("exp", where, f(splat(where)).v[0], exact(where));
  std::printf("%s: exp of %zu bytes: %.3f units in the last place\n", kIsa, sizeof(T), below > above ? below : above);
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  for (const T x :
       {-infinity, std::numeric_limits<T>::lowest(), T{-1e30f}, T{-1e6}, T{-800}, static_cast<T>(sizeof(T) == 4 ? -87.34 : -708.5)}) {
    const T got = f(splat(x)).v[0];
    if (to_bits(got) != 0) fail("exp", x, got, 0);
  }
  for (const T x : {T{0}, -T{0}}) {
    if (f(splat(x)).v[0] != 1) fail("exp", x, f(splat(x)).v[0], 1);
  }
  for (const T x : {nan, -nan, from_bits<T>(to_bits(infinity) + 1)}) {
    if (f(splat(x)).v[0] == f(splat(x)).v[0]) fail("exp", x, f(splat(x)).v[0], nan);
  }
  // every vector of a group; the compiler may fuse multiplications and additions differently, so the last bits may differ
  T in[4 * kLanes<T>], out[4 * kLanes<T>];
  for (int i = 0; i < 4 * kLanes<T>; ++i) in[i] = static_cast<T>(-0.37) * static_cast<T>(i);
  Vec<T> group[4];
  for (int u = 0; u < 4; ++u) group[u] = load(in + u * kLanes<T>);
  exp_each(group);
  for (int u = 0; u < 4; ++u) store(out + u * kLanes<T>, group[u]);
  for (int i = 0; i < 4 * kLanes<T>; ++i) {
    if (!(ulps(out[i], exact(in[i])) <= allowed)) fail("exp in a group", in[i], out[i], static_cast<double>(exact(in[i])));
  }
}

template <class T>
void check_log(typename Lane<T>::Int step, double allowed) {
  const auto f = [](Vec<T> x) { return log(x); };
  const auto exact = [](T x) { return exact_log(x); };
  T where = 1;
  const T after_one = from_bits<T>(to_bits(T{1}) + 1);
  const double worst = largest_error<T>(after_one, std::numeric_limits<T>::max(), step, f, exact, where);
  const double near = largest_error<T>(after_one, static_cast<T>(1.001), 1 + step / 4096, f, exact, where);
  if (!(worst <= allowed && near <= allowed)) fail("log", where, f(splat(where)).v[0], exact(where));
  std::printf("%s: log of %zu bytes: %.3f units in the last place\n", kIsa, sizeof(T), worst > near ? worst : near);
  if (f(splat(T{1})).v[0] != 0) fail("log", 1, f(splat(T{1})).v[0], 0);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  if (f(splat(nan)).v[0] == f(splat(nan)).v[0]) fail("log", nan, f(splat(nan)).v[0], nan);
}

template <class T>
void check_lanes() {
  T lanes[kLanes<T>];
  for (int where = 0; where < kLanes<T>; ++where) {
    for (int l = 0; l < kLanes<T>; ++l) lanes[l] = l == where ? T{7} : static_cast<T>(-1 - l);
    if (reduce_max(load(lanes)) != 7) fail("reduce_max, lane", where, reduce_max(load(lanes)), 7);
    for (int l = 0; l < kLanes<T>; ++l) lanes[l] = l == where ? T{7} : T{0};
    if (reduce_add(load(lanes)) != 7) fail("reduce_add, lane", where, reduce_add(load(lanes)), 7);
  }
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += lanes[l] = static_cast<T>(1 << l);
  if (reduce_add(load(lanes)) != sum) fail("reduce_add", kLanes<T>, reduce_add(load(lanes)), sum);
  for (int count = 0; count <= kLanes<T>; ++count) {
    const Vec<T> first = first_lanes(load(lanes), count, T{-5});
    for (int l = 0; l < kLanes<T>; ++l) {
      const T want = l < count ? lanes[l] : T{-5};
      if (first.v[l] != want) fail("first_lanes", count, first.v[l], want);
    }
  }
}

void check_widen() {
  float lanes[kLanes<float>];
  double sums[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l) {
    lanes[l] = 1.25f * static_cast<float>(l + 1);
    sums[l] = 100;
  }
  add_scaled(sums, load(lanes), 3.0);
  for (int l = 0; l < kLanes<float>; ++l) {
    if (sums[l] != 100 + 3.75 * (l + 1)) fail("add_scaled, lane", l, sums[l], 100 + 3.75 * (l + 1));
  }
}

// Rows into a tile and back, for every number of classes.
void check_tiles() {
  constexpr int lanes = kLanes<float>;
  for (int64_t classes = 1; classes <= kTileClasses; ++classes) {
    const int64_t width = padded<float>(classes);
    std::vector<float> rows(lanes * width), back(lanes * width, -1);
    alignas(64) float tile[kTileClasses * lanes];
    const float* pointers[lanes];
    for (int r = 0; r < lanes; ++r) {
      pointers[r] = rows.data() + r * width;
      for (int64_t c = 0; c < width; ++c) rows[r * width + c] = static_cast<float>(1000 * r + c);
    }
    gather_tile(pointers, classes, tile);
    for (int r = 0; r < lanes; ++r) {
      for (int64_t c = 0; c < classes; ++c) {
        if (tile[c * lanes + r] != rows[r * width + c]) fail("gather_tile, class", c, tile[c * lanes + r], rows[r * width + c]);
      }
    }
    scatter_tile(tile, classes, back.data(), width);
    for (int r = 0; r < lanes; ++r) {
      for (int64_t c = 0; c < classes; ++c) {
        if (back[r * width + c] != rows[r * width + c]) fail("scatter_tile, class", c, back[r * width + c], rows[r * width + c]);
      }
    }
  }
}

int check() {
#ifdef LDMI_TEST_SPARSE
  constexpr int sparse = 64;
#else
  constexpr int sparse = 1;
#endif
  check_exp<float>(211 * sparse, 1.5);
  check_exp<double>(int64_t{3} << (42 + (sparse > 1 ? 4 : 0)), 1.5);
  check_log<float>(211 * sparse, 1.5);
  check_log<double>(int64_t{3} << (42 + (sparse > 1 ? 4 : 0)), 1.5);
  check_lanes<float>();
  check_lanes<double>();
  check_widen();
  check_tiles();
  return 0;
}

}  // namespace
}  // namespace ldmi::cpu::LDMI_ISA

int main() { return ldmi::cpu::LDMI_ISA::check(); }
