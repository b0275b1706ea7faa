// The names of ../device.cuh for a compiler without CUDA. Kernels run on the CPU, one fiber per thread, in an order drawn from a seed;
// whatever a GPU leaves undefined is an error or poison here. Only device.cuh includes this file, and it documents the names.
// tests/simt/README.md lists what is emulated and what is not.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../cpu/half.h"
#include "runtime.h"

namespace ldmi::simt {

// ----------------------------------------------------------------------------------------------------------- where am I

inline int thread_idx() { return host::context->thread; }
inline int block_dim() { return host::context->threads; }
inline int64_t block_idx() { return host::context->block; }
inline int64_t grid_dim() { return host::context->blocks; }
inline int lane() { return host::context->thread % kWarp; }
inline int warp() { return host::context->thread / kWarp; }

// -------------------------------------------------------------------------------------------------------- shared memory

class Carve {
 public:
  Carve() : carve_(host::context == nullptr ? -1 : host::new_carve()) {}
  template <class T>
  T* take(int64_t count, host::Site site = host::Site::current()) {
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    T* const piece = carve_ < 0 ? nullptr : static_cast<T*>(host::take_shared(carve_, pieces_, bytes_, size, site));
    pieces_ += 1;
    bytes_ += (size + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  int carve_, pieces_ = 0;
  size_t bytes_ = 0;
};

template <class T>
Pack<T> shared_load16(const T* p, host::Site site = host::Site::current()) {
  host::shared_access(p, 16, site);
  Pack<T> value;
  std::memcpy(&value, p, 16);
  return value;
}
template <class T>
void shared_store16(T* p, const Pack<T>& value, host::Site site = host::Site::current()) {
  host::shared_access(p, 16, site);
  std::memcpy(p, &value, 16);
}

// ------------------------------------------------------------------------------------------------------------- barriers

inline void sync_block(host::Site site = host::Site::current()) { host::barrier_block("sync_block", 0, site); }
inline bool sync_block_or(bool any, host::Site site = host::Site::current()) {
  return host::barrier_block("sync_block_or", any, site) > 0;
}
inline int sync_block_count(bool one, host::Site site = host::Site::current()) {
  return host::barrier_block("sync_block_count", one, site);
}
inline void sync_grid(host::Site site = host::Site::current()) { host::barrier_grid(site); }
inline void sync_cluster(host::Site site = host::Site::current()) { host::barrier_cluster(site); }
template <class T>
T* map_shared(T* p, int rank, host::Site site = host::Site::current()) {
  return static_cast<T*>(host::map_to_rank(p, rank, site));
}

// ----------------------------------------------------------------------------------------------------- warp collectives

namespace detail {
struct Nothing {};
template <class T>
struct Indexed {
  T value;
  int source;  // a lane; may be outside the warp or the mask
};

// The value of lane `source`, as the shuffles return it.
template <class T>
T shuffle(const char* what, T value, int source, unsigned mask, host::Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "shuffles move 32-bit and 64-bit numbers");
  const Indexed<T> in{value, source};
  T out;
  host::collective(
      what, mask, &in, &out,
      [](unsigned lanes, const void* const* ins, void* const* outs) {
        for (int l = 0; l < kWarp; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          const int from = static_cast<const Indexed<T>*>(ins[l])->source;
          if (from >= 0 && from < kWarp && (lanes >> from & 1) != 0) {
            std::memcpy(outs[l], &static_cast<const Indexed<T>*>(ins[from])->value, sizeof(T));
          } else {
            std::memset(outs[l], 0xff, sizeof(T));  // undefined: the source does not take part
          }
        }
      },
      site);
  return out;
}
inline unsigned vote(const char* what, bool one, unsigned mask, host::Site site) {
  unsigned out;
  host::collective(
      what, mask, &one, &out,
      [](unsigned lanes, const void* const* ins, void* const* outs) {
        unsigned votes = 0;
        for (int l = 0; l < kWarp; ++l) {
          if ((lanes >> l & 1) != 0 && *static_cast<const bool*>(ins[l])) votes |= 1u << l;
        }
        for (int l = 0; l < kWarp; ++l) {
          if ((lanes >> l & 1) != 0) *static_cast<unsigned*>(outs[l]) = votes;
        }
      },
      site);
  return out;
}
template <class T>
unsigned match(T value, unsigned mask, host::Site site) {
  unsigned out;
  host::collective(
      "match_any", mask, &value, &out,
      [](unsigned lanes, const void* const* ins, void* const* outs) {
        for (int l = 0; l < kWarp; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          unsigned equal = 0;
          for (int m = 0; m < kWarp; ++m) {
            if ((lanes >> m & 1) != 0 && *static_cast<const T*>(ins[m]) == *static_cast<const T*>(ins[l])) equal |= 1u << m;
          }
          *static_cast<unsigned*>(outs[l]) = equal;
        }
      },
      site);
  return out;
}
}  // namespace detail

inline void sync_warp(unsigned mask = kFull, host::Site site = host::Site::current()) {
  host::collective("sync_warp", mask, nullptr, nullptr, [](unsigned, const void* const*, void* const*) {}, site);
}
template <class T>
T shfl(T value, int source, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::shuffle("shfl", value, source & (kWarp - 1), mask, site);
}
template <class T>
T shfl_xor(T value, int bits, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::shuffle("shfl_xor", value, lane() ^ bits, mask, site);
}
template <class T>
T shfl_up(T value, int by, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::shuffle("shfl_up", value, lane() >= by ? lane() - by : lane(), mask, site);
}
inline unsigned ballot(bool one, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::vote("ballot", one, mask, site);
}
inline bool any(bool one, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::vote("any", one, mask, site) != 0;
}
inline bool all(bool one, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::vote("all", one, mask, site) == mask;
}
inline unsigned match_any(unsigned value, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::match(value, mask, site);
}
inline unsigned match_any(uint64_t value, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::match(value, mask, site);
}
inline int popcount(unsigned bits) { return std::popcount(bits); }
inline int lowest(unsigned bits) { return bits == 0 ? -1 : std::countr_zero(bits); }
inline unsigned lanes_below() { return (1u << lane()) - 1u; }

// -------------------------------------------------------------------------------------------------------- global memory

namespace detail {
template <class T>
T read(const void* p, host::Load kind, host::Site site) {
  static_assert(std::is_trivially_copyable_v<T> && std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  T value;
  host::read_global(p, sizeof(T), &value, kind, site);
  return value;
}
}  // namespace detail

template <class T>
T load(const T* p, host::Site site = host::Site::current()) {
  return detail::read<T>(p, host::Load::kPlain, site);
}
template <class T>
T load_const(const T* p, host::Site site = host::Site::current()) {
  return detail::read<T>(p, host::Load::kReadOnly, site);
}
template <class T>
T load_once(const T* p, host::Site site = host::Site::current()) {
  return detail::read<T>(p, host::Load::kReadOnly, site);
}
template <class T>
Pack<T> load16(const T* p, host::Site site = host::Site::current()) {
  return detail::read<Pack<T>>(p, host::Load::kPlain, site);
}
template <class T>
Pack<T> load16_const(const T* p, host::Site site = host::Site::current()) {
  return detail::read<Pack<T>>(p, host::Load::kReadOnly, site);
}
template <class T>
Pack<T> load16_once(const T* p, host::Site site = host::Site::current()) {
  return detail::read<Pack<T>>(p, host::Load::kReadOnly, site);
}
template <class T>
void store(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  host::write_global(p, sizeof(T), &value, site);
}
template <class T>
void store_streaming(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  store(p, value, site);
}
template <class T>
void store16(T* p, const Pack<T>& value, host::Site site = host::Site::current()) {
  host::write_global(p, 16, &value, site);
}
template <class T>
void store16_streaming(T* p, const Pack<T>& value, host::Site site = host::Site::current()) {
  host::write_global(p, 16, &value, site);
}

// -------------------------------------------------------------------------------------------------------------- atomics

namespace detail {
template <class T, class Next>
T atomic(T* p, Next next, host::Site site) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  T old;
  host::atomic_read(p, sizeof(T), &old, site);
  const T value = next(old);
  host::atomic_write(p, sizeof(T), &value);
  return old;
}
}  // namespace detail

template <class T>
T atomic_add(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  using U = std::make_unsigned_t<T>;  // wraps, as on a GPU
  return detail::atomic(p, [&](T old) { return static_cast<T>(static_cast<U>(old) + static_cast<U>(value)); }, site);
}
template <class T>
T atomic_or(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  return detail::atomic(p, [&](T old) { return static_cast<T>(old | value); }, site);
}

// -------------------------------------------------------------------------------------------- communication between blocks

inline bool last_block(unsigned* counter, int64_t blocks, host::Site site = host::Site::current()) {
  host::barrier_block("last_block", 0, site);
  bool last = false;
  if (thread_idx() == 0) {
    host::fence();
    const unsigned end = static_cast<unsigned>(blocks) - 1u;
    last = detail::atomic(counter, [&](unsigned old) { return old >= end ? 0u : old + 1u; }, site) == end;
  }
  return host::barrier_block("last_block", last, site) > 0;
}

// --------------------------------------------------------------------------------------- asynchronous copies into shared

template <int bytes>
void copy_async(void* shared, const void* global, int valid = bytes, host::Site site = host::Site::current()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  host::copy(shared, global, bytes, valid, site);
}
inline void commit_copies() { host::commit(); }
template <int groups = 0>
void wait_copies() {
  host::wait(groups);
}

// ----------------------------------------------------------------------------------------------------------- arithmetic

inline float exp2(float x) { return std::exp2(x); }
inline double exp2(double x) { return std::exp2(x); }
inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline double log(double x) { return std::log(x); }
inline double reciprocal(double x) { return 1.0 / x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float fmax(float a, float b) { return std::fmax(a, b); }
inline double fmax(double a, double b) { return std::fmax(a, b); }
inline float abs(float x) { return std::fabs(x); }
inline double abs(double x) { return std::fabs(x); }

inline float widen(BFloat16 x) { return cpu::widen(cpu::BFloat16{x.bits}); }
inline float widen(Half x) { return cpu::widen(cpu::Half{x.bits}); }
namespace detail {
inline BFloat16 narrow(float x, BFloat16) { return {x == x ? cpu::narrow(x, cpu::BFloat16{}).bits : uint16_t{0x7fff}}; }
inline Half narrow(float x, Half) { return {x == x ? cpu::narrow(x, cpu::Half{}).bits : uint16_t{0x7fff}}; }
}  // namespace detail

}  // namespace ldmi::simt
