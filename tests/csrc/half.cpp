// half.h against the definitions of the formats: every pattern of 16 bits, and narrowing of floats at and near all ties.

#include "../../csrc/cpu/half.h"

#include <cstdio>
#include <cstdlib>

#include "formats.h"
#include "random.h"

namespace {

using ldmi::cpu::BFloat16;
using ldmi::cpu::Half;
using ldmi::test::decode;
using ldmi::test::encode;
using ldmi::test::Format;

[[noreturn]] void fail(const char* what, double input, unsigned got, unsigned want) {
  std::printf("%s of %.9g (%a) is 0x%04x, expected 0x%04x\n", what, input, input, got, want);
  std::exit(1);
}

template <class T>
void check_narrow(float x, Format format, const char* name) {
  const uint16_t got = ldmi::cpu::narrow(x, T{}).bits, want = encode(x, format);
  if (std::isnan(x)) {
    // any NaN will do
    if (!std::isnan(decode(got, format))) fail(name, x, got, want);
  } else if (got != want) {
    fail(name, x, got, want);
  }
}

template <class T>
void check(Format format, const char* name) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    const double want = decode(pattern, format);
    const float got = ldmi::cpu::widen(T{pattern});
    const bool same = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
    if (!same) fail("widening", want, ldmi::cpu::float_to_bits(got), pattern);
    if (encode(want, format) != pattern && !std::isnan(want))
      fail("the reference's own round trip", want, encode(want, format), pattern);
    check_narrow<T>(got, format, name);
    if (std::isnan(want) || std::isinf(want)) continue;
    // the tie between this number and the next one, and its neighbours
    const double next = decode(static_cast<uint16_t>(pattern + 1), format);
    const float tie = static_cast<float>(std::isinf(next) ? want + (want - decode(static_cast<uint16_t>(pattern - 1), format)) / 2
                                                          : (want + next) / 2);
    for (const float x :
         {tie, std::nextafter(tie, 2 * tie), std::nextafter(tie, 0.0f), std::nextafter(got, 2 * got), std::nextafter(got, 0.0f)}) {
      check_narrow<T>(x, format, name);
    }
  }
  ldmi::test::Random random(17);
  for (int i = 0; i < 3000000; ++i) {
    // all patterns of 32 bits are equally likely: all exponents, subnormals, infinities and NaN
    check_narrow<T>(ldmi::cpu::bits_to_float(static_cast<uint32_t>(random.bits())), format, name);
  }
  for (uint32_t bits = 0; bits < 4000; ++bits) {
    check_narrow<T>(ldmi::cpu::bits_to_float(bits), format, name);                // the smallest subnormal floats
    check_narrow<T>(ldmi::cpu::bits_to_float(0x7f7fffffu - bits), format, name);  // the largest floats
  }
}

}  // namespace

int main() {
  check<Half>(ldmi::test::kHalf, "narrowing to fp16");
  check<BFloat16>(ldmi::test::kBFloat16, "narrowing to bf16");
  std::printf("half: all patterns agree\n");
  return 0;
}
