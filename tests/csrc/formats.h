// fp16 and bf16 by arithmetic on doubles, as their definitions say: slow, obvious, and sharing no code with csrc/cpu/half.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ldmi::test {

struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int lowest() const { return 1 - bias(); }  // the exponent of the smallest normal number
  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits); }
};
inline constexpr Format kHalf{5, 10};
inline constexpr Format kBFloat16{8, 7};

inline double decode(uint16_t bits, Format f) {
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const int exponent = (bits >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << f.exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, f.lowest() - f.mantissa_bits);
  return sign * std::ldexp((1 << f.mantissa_bits) + mantissa, exponent - f.bias() - f.mantissa_bits);
}

// To nearest, ties to even. A NaN becomes the quiet one of its sign.
inline uint16_t encode(double value, Format f) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | f.infinity() | (1 << (f.mantissa_bits - 1)));
  double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (std::isinf(magnitude)) return sign | f.infinity();
  const int place = std::max(std::ilogb(magnitude), f.lowest()) - f.mantissa_bits;
  const double units = std::nearbyint(std::ldexp(magnitude, -place));  // the default rounding mode: ties to even
  magnitude = std::ldexp(units, place);
  if (magnitude >= std::ldexp(1, f.bias() + 1)) return sign | f.infinity();
  if (magnitude < std::ldexp(1, f.lowest())) {
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, f.mantissa_bits - f.lowest())));
  }
  const int exponent = std::ilogb(magnitude);
  const int mantissa = static_cast<int>(std::ldexp(magnitude, f.mantissa_bits - exponent)) - (1 << f.mantissa_bits);
  return static_cast<uint16_t>(sign | ((exponent + f.bias()) << f.mantissa_bits) | mantissa);
}

}  // namespace ldmi::test
