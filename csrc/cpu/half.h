// fp16 and bf16 as bit patterns: exact widening, and narrowing that rounds to nearest even. It uses only integer and fp32 arithmetic,
// so that it is the same on every machine; loops over these functions vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace ldmi::cpu {

[[gnu::always_inline]] static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
[[gnu::always_inline]] static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

[[gnu::always_inline]] static inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

[[gnu::always_inline]] static inline float widen(Half x) {
  // Place exponent and mantissa, then correct the bias by an exact multiplication, which also normalises subnormals.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  bits |= magnitude >= (31u << 23) ? 0x7f800000u : 0u;  // infinities and NaN
  return bits_to_float(bits | sign);
}

[[gnu::always_inline]] static inline BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u | (bits >> 31 << 15))};
}

[[gnu::always_inline]] static inline Half narrow(float x, Half) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  // Normal: rebias and round to nearest even in integers. Subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t out = magnitude < (113u << 23) ? subnormal : normal;
  out = magnitude >= (143u << 23) ? 0x7c00u : out;  // overflow to infinity
  out = magnitude > 0x7f800000u ? 0x7e00u : out;    // NaN
  return {static_cast<uint16_t>(out | (sign >> 16))};
}

}  // namespace ldmi::cpu
