// A seeded generator (splitmix64) and draws from it: the same numbers on every machine, unlike the distributions of <random>.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace ldmi::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // In low..high, both included.
  int64_t integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % (static_cast<uint64_t>(high - low) + 1)); }
  bool chance(double probability) { return uniform() < probability; }
  // In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  uint64_t state_;
};

}  // namespace ldmi::test
