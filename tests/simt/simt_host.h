// The names of csrc/cuda/simt.cuh for a compiler that knows no CUDA: kernels run on the CPU, one fiber a thread, in an order drawn
// from a seed, and everything that a GPU leaves undefined is an error or poison. Included by simt.cuh alone, which documents the
// names. simt_host.cpp holds the fibers, the schedule and the memory; README.md says what is emulated, and what is not.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../../csrc/cpu/half.h"

namespace ldmi::simt {

using Stream = void*;  // everything is done at once

namespace host {

// What went wrong in a kernel, where, and with which seed. launch() throws it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;

// The thread that runs now; null in host code.
struct Context {
  int thread = 0, threads = 0;
  int64_t block = 0, blocks = 0;
  int rank = 0, cluster = 1;
};
extern Context* context;

// The seed of everything random from here on: the device, the schedules, the delays. Error messages name it.
void set_seed(uint64_t seed);
// The device to emulate, instead of the one drawn from the seed.
void set_device(const Device& device);

// Global memory: `size` bytes from `begin` in an allocation whose other bytes are a redzone that holds fill_redzone's pattern.
// `shadow` has a byte for each: kUnset, kSet, or kWritten in the launch under way.
enum : uint8_t { kUnset, kSet, kWritten };
struct Region {
  unsigned char* begin = nullptr;
  size_t size = 0;
  uint8_t* shadow = nullptr;
  unsigned char* allocation = nullptr;
  size_t allocated = 0;
  std::string name;
};
void add_region(const Region& region);
void remove_region(const unsigned char* begin);
void fill_redzone(unsigned char* begin, size_t size);

enum class Load { kPlain, kReadOnly };
enum class Atomic { kAdd, kMax, kOr };

// Each of these is one access or wait of the current thread.
void read_global(const void* p, size_t size, void* out, Load kind, Site site);
void write_global(void* p, size_t size, const void* value, Site site);
void atomic_read(void* p, size_t size, void* out, Site site);  // atomic_write to the same place follows
void atomic_write(void* p, size_t size, const void* value);
void shared_access(const void* p, size_t size, Site site);  // checks, and perhaps lets others run
void* take_shared(int carve, int piece, size_t offset, size_t bytes, Site site);
int new_carve();
int barrier_block(const char* what, int vote, Site site);
void barrier_cluster(Site site);
void barrier_grid(Site site);
void* map_to_rank(const void* p, int rank, Site site);
void fence();
void spin(const unsigned* flag, unsigned value, Site site);
void copy(void* shared, const void* global, int bytes, int valid, Site site);
void commit();
void wait(int groups);

// A warp collective: once all lanes of the mask are here, `run` turns the inputs, one a lane, into the outputs.
using Run = void (*)(unsigned mask, const void* const* in, void* const* out);
void collective(const char* what, unsigned mask, const void* in, void* out, Run run, Site site);

int run_grid(const Grid& grid, void (*body)(const void*), const void* arguments);

}  // namespace host

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
inline int cluster_rank() { return host::context->rank; }
inline int cluster_size() { return host::context->cluster; }
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
  int source;  // a lane; may be outside the warp, or outside the mask
};

// The value of lane `source`, as the shuffles return it
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
T shfl_down(T value, int by, unsigned mask = kFull, host::Site site = host::Site::current()) {
  return detail::shuffle("shfl_down", value, lane() + by < kWarp ? lane() + by : lane(), mask, site);
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
T atomic_max(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  return detail::atomic(p, [&](T old) { return old > value ? old : value; }, site);
}
template <class T>
T atomic_or(T* p, std::type_identity_t<T> value, host::Site site = host::Site::current()) {
  return detail::atomic(p, [&](T old) { return static_cast<T>(old | value); }, site);
}

// -------------------------------------------------------------------------------------------- publishing between blocks

inline void publish(unsigned* flag, unsigned value, host::Site site = host::Site::current()) {
  host::fence();
  detail::atomic(flag, [&](unsigned) { return value; }, site);
}
inline unsigned acquire(const unsigned* flag, unsigned value, host::Site site = host::Site::current()) {
  host::spin(flag, value, site);
  unsigned seen;
  host::atomic_read(const_cast<unsigned*>(flag), sizeof(seen), &seen, site);
  return seen;
}
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

// --------------------------------------------------------------------------------------------------------- tensor cores

namespace detail {
// D = A B + C on whole matrices, from the lanes' fragments and back. The products are exact and summed in double: a GPU rounds a
// little more. F: the shape, with the number of values and how to read one.
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
struct InBf16 : M16N8K16 {
  A a;
  B b;
  C c;
  static double value(uint32_t pair, int i) { return std::bit_cast<float>((i & 1) == 0 ? pair << 16 : pair & 0xffff0000u); }
  double a_value(int i) const { return value(a.pair[i / 2], i); }
  double b_value(int i) const { return value(b.pair[i / 2], i); }
};
struct InTf32 : M16N8K8 {
  A a;
  B b;
  C c;
  static double value(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); }  // the rest is not wired
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

inline M16N8K16::C mma(const M16N8K16::A& a, const M16N8K16::B& b, const M16N8K16::C& c, host::Site site = host::Site::current()) {
  const detail::InBf16 in{{}, a, b, c};
  M16N8K16::C out;
  host::collective(
      "mma bf16", kFull, &in, &out,
      [](unsigned, const void* const* ins, void* const* outs) {
        detail::multiply<M16N8K16, 16, 8, 16, 8, 4, 4, detail::InBf16, M16N8K16::C>(ins, outs);
      },
      site);
  return out;
}
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

// ----------------------------------------------------------------------------------------------------------- arithmetic

inline float exp2(float x) { return std::exp2(x); }
inline double exp2(double x) { return std::exp2(x); }
inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline double log(double x) { return std::log(x); }
inline float log1p(float x) { return std::log1p(x); }
inline double log1p(double x) { return std::log1p(x); }
inline float rsqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
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
inline uint32_t pair_bf16(float low, float high) {
  return detail::narrow(low, BFloat16{}).bits | static_cast<uint32_t>(detail::narrow(high, BFloat16{}).bits) << 16;
}

// --------------------------------------------------------------------------------------------------------------- launch

int device(Device* out);
const char* error_text(int error);
int zero(void* p, size_t bytes, Stream stream);

namespace detail {
int blocks_per_sm(int threads, size_t smem);
}
template <class... P>
int blocks_per_sm(void (*)(P...), int threads, size_t smem, int* out) {
  *out = detail::blocks_per_sm(threads, smem);
  return 0;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, Stream, A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(arguments))...)};
  const auto body = [](const void* p) {
    const Call& it = *static_cast<const Call*>(p);
    std::apply(it.kernel, it.arguments);
  };
  return host::run_grid(grid, body, &call);
}

}  // namespace ldmi::simt
