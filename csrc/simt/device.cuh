// The device vocabulary of the CUDA engine: one name for every intrinsic and PTX instruction that the kernels use. nvcc compiles these
// to the GPU's instructions. Any other compiler takes the same names from host/device.h, an emulator that runs the kernels on a CPU
// with one fiber per thread and checks every access. Kernels use nothing else: no intrinsic, no inline PTX, no static __shared__, and
// no direct access to global memory. tests/simt/README.md explains how to write a kernel and its test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <type_traits>

#define LDMI_KERNEL __global__                                               // LDMI_KERNEL void name(...)
#define LDMI_BOUNDS(threads, blocks) __launch_bounds__((threads), (blocks))  // after void: threads per block, blocks per SM
#define LDMI_DEVICE __device__ __forceinline__                               // before a function of device code
#define LDMI_HOST_DEVICE __host__ __device__ __forceinline__                 // before a function of both sides
#define LDMI_UNROLL _Pragma("unroll")                                        // before a loop whose count is a constant
#define LDMI_DETAIL_PRAGMA(text) _Pragma(#text)
#define LDMI_UNROLL_BY(count) LDMI_DETAIL_PRAGMA(unroll(count))  // by a constant; 1 disables unrolling, to save registers
#else
#define LDMI_KERNEL inline
#define LDMI_BOUNDS(threads, blocks)
#define LDMI_DEVICE inline
#define LDMI_HOST_DEVICE inline
#define LDMI_UNROLL
#define LDMI_UNROLL_BY(count)
#endif

#include "../plan/pieces.h"

namespace ldmi::simt {

// ---------------------------------------------------------------------------------------------------------------- types

inline constexpr int kWarp = 32;                // lanes of a warp
inline constexpr unsigned kFull = 0xffffffffu;  // the mask of a whole warp
inline constexpr size_t kSharedAlignment = plan::kSharedAlignment;

// The 16-bit formats as bits, the same on both sides; widen() and narrow<>() convert.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What one 16-byte access moves: 16 / sizeof(T) values.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = static_cast<int>(16 / sizeof(T));
  T value[kCount];
  LDMI_HOST_DEVICE T& operator[](int i) { return value[i]; }
  LDMI_HOST_DEVICE const T& operator[](int i) const { return value[i]; }
};

// ------------------------------------------------------------------------------------------------------------ bit casts

// `from` is passed by value, so that a vector in memory is read by one access; memcpy from memory would read it piece by piece.
template <class To, class From>
LDMI_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace ldmi::simt

#ifndef __CUDACC__
#include "host/device.h"
#else

namespace ldmi::simt {

// ----------------------------------------------------------------------------------------------------------- where am I

LDMI_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
LDMI_DEVICE int block_dim() { return static_cast<int>(blockDim.x); }
LDMI_DEVICE int64_t block_idx() { return blockIdx.x; }  // 64 bits, so that products with it have 64 bits
LDMI_DEVICE int64_t grid_dim() { return gridDim.x; }
LDMI_DEVICE int lane() { return static_cast<int>(threadIdx.x % kWarp); }
LDMI_DEVICE int warp() { return static_cast<int>(threadIdx.x / kWarp); }

// -------------------------------------------------------------------------------------------------------- shared memory

// Takes pieces of the block's dynamic shared memory one after the other. In host code it only counts the bytes, for Grid::smem. Every
// thread of a block takes the same pieces. A second Carve starts at the beginning again: call sync_block() before it.
class Carve {
 public:
  LDMI_HOST_DEVICE Carve() {
#ifdef __CUDA_ARCH__
    extern __shared__ __align__(16) unsigned char ldmi_simt_shared[];
    base_ = ldmi_simt_shared;
#endif
  }
  // Returns `count` values of T, not initialised, 16-byte aligned; null in host code.
  template <class T>
  LDMI_HOST_DEVICE T* take(int64_t count) {
    T* const piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return piece;
  }
  LDMI_HOST_DEVICE size_t bytes() const { return bytes_; }  // taken so far

 private:
  unsigned char* base_ = nullptr;
  size_t bytes_ = 0;
};

// Access 16 bytes of shared memory at once; p is 16-byte aligned.
template <class T>
LDMI_DEVICE Pack<T> shared_load16(const T* p) {
  return bit_cast<Pack<T>>(*reinterpret_cast<const uint4*>(p));
}
template <class T>
LDMI_DEVICE void shared_store16(T* p, const Pack<T>& value) {
  *reinterpret_cast<uint4*>(p) = bit_cast<uint4>(value);
}

// ------------------------------------------------------------------------------------------------------------- barriers

LDMI_DEVICE void sync_block() { __syncthreads(); }                               // all threads of the block
LDMI_DEVICE bool sync_block_or(bool any) { return __syncthreads_or(any) != 0; }  // sync_block; whether any was true
LDMI_DEVICE int sync_block_count(bool one) { return __syncthreads_count(one); }  // sync_block; how many were true
LDMI_DEVICE void sync_warp(unsigned mask = kFull) { __syncwarp(mask); }          // the lanes of mask; orders memory too
LDMI_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }         // all threads of a cooperative grid
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
LDMI_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }  // all threads of the cluster
// Returns the same address in the shared memory of block `rank` of the cluster: valid between the cluster's first sync and its last.
template <class T>
LDMI_DEVICE T* map_shared(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else  // below sm_90 every cluster is one block
LDMI_DEVICE void sync_cluster() { __syncthreads(); }
template <class T>
LDMI_DEVICE T* map_shared(T* p, int) {
  return p;
}
#endif

// ------------------------------------------------------------------- warp collectives: called by the lanes of mask only

template <class T>
LDMI_DEVICE T shfl(T value, int source, unsigned mask = kFull) {  // the value of lane `source`
  return __shfl_sync(mask, value, source);
}
template <class T>
LDMI_DEVICE T shfl_xor(T value, int bits, unsigned mask = kFull) {  // of lane (mine ^ bits)
  return __shfl_xor_sync(mask, value, bits);
}
template <class T>
LDMI_DEVICE T shfl_up(T value, int by, unsigned mask = kFull) {  // of lane (mine - by); my own if there is none
  return __shfl_up_sync(mask, value, by);
}
LDMI_DEVICE unsigned ballot(bool one, unsigned mask = kFull) {
  return __ballot_sync(mask, one);
}  // mask of the lanes where it is true
LDMI_DEVICE bool any(bool one, unsigned mask = kFull) { return __any_sync(mask, one) != 0; }
LDMI_DEVICE bool all(bool one, unsigned mask = kFull) { return __all_sync(mask, one) != 0; }
LDMI_DEVICE unsigned match_any(unsigned value, unsigned mask = kFull) {
  return __match_any_sync(mask, value);
}  // mask of the lanes whose value equals mine
LDMI_DEVICE unsigned match_any(uint64_t value, unsigned mask = kFull) {
  return __match_any_sync(mask, static_cast<unsigned long long>(value));
}
LDMI_DEVICE int popcount(unsigned bits) { return __popc(bits); }
LDMI_DEVICE int lowest(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}  // index of the lowest set bit; -1 if there is none
LDMI_DEVICE unsigned lanes_below() { return (1u << lane()) - 1u; }  // mask of the lanes below mine

// -------------------------------------------------------------------------------------------------------- global memory
// load: what this thread may see now. _const: memory that no thread writes during the launch, read again soon. _once: the same, read
// once. store_streaming: memory that is not read again soon. T has 1, 2, 4, 8 or 16 bytes; the 16-byte forms need p 16-byte aligned.

namespace detail {
template <class T, class Raw>
LDMI_DEVICE T from_raw(Raw raw) {
  return bit_cast<T>(raw);
}
template <size_t bytes>
struct RawOf;
template <>
struct RawOf<1> {
  using type = unsigned char;
};
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned;
};
template <>
struct RawOf<8> {
  using type = unsigned long long;
};
template <>
struct RawOf<16> {
  using type = uint4;
};
template <class T>
using Raw = typename RawOf<sizeof(T)>::type;

LDMI_DEVICE unsigned char ld_once(const unsigned char* p) { return __ldcs(p); }
LDMI_DEVICE unsigned short ld_once(const unsigned short* p) {
  unsigned short value;
  asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(value) : "l"(__cvta_generic_to_global(p)));
  return value;
}
LDMI_DEVICE unsigned ld_once(const unsigned* p) {
  unsigned value;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)));
  return value;
}
LDMI_DEVICE unsigned long long ld_once(const unsigned long long* p) {
  unsigned long long value;
  asm("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(p)));
  return value;
}
LDMI_DEVICE uint4 ld_once(const uint4* p) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(__cvta_generic_to_global(p)));
  return value;
}
}  // namespace detail

template <class T>
LDMI_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
LDMI_DEVICE T load_const(const T* p) {
  return bit_cast<T>(__ldg(reinterpret_cast<const detail::Raw<T>*>(p)));
}
template <class T>
LDMI_DEVICE T load_once(const T* p) {
  return bit_cast<T>(detail::ld_once(reinterpret_cast<const detail::Raw<T>*>(p)));
}
template <class T>
LDMI_DEVICE void store(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
LDMI_DEVICE void store_streaming(T* p, std::type_identity_t<T> value) {
  __stcs(reinterpret_cast<detail::Raw<T>*>(p), bit_cast<detail::Raw<T>>(value));
}
template <class T>
LDMI_DEVICE Pack<T> load16(const T* p) {
  return bit_cast<Pack<T>>(*reinterpret_cast<const uint4*>(p));
}
template <class T>
LDMI_DEVICE Pack<T> load16_const(const T* p) {
  return bit_cast<Pack<T>>(__ldg(reinterpret_cast<const uint4*>(p)));
}
template <class T>
LDMI_DEVICE Pack<T> load16_once(const T* p) {
  return bit_cast<Pack<T>>(detail::ld_once(reinterpret_cast<const uint4*>(p)));
}
template <class T>
LDMI_DEVICE void store16(T* p, const Pack<T>& value) {
  *reinterpret_cast<uint4*>(p) = bit_cast<uint4>(value);
}
template <class T>
LDMI_DEVICE void store16_streaming(T* p, const Pack<T>& value) {
  __stcs(reinterpret_cast<uint4*>(p), bit_cast<uint4>(value));
}

// -------------------------------------------------------------- integer atomics, global or shared: relaxed; return the old value

template <class T>
LDMI_DEVICE T atomic_add(T* p, std::type_identity_t<T> value) {
  using U = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;  // there is no signed 64-bit form; the bits are the same
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  return static_cast<T>(atomicAdd(reinterpret_cast<U*>(p), static_cast<U>(value)));
}
template <class T>
LDMI_DEVICE T atomic_or(T* p, std::type_identity_t<T> value) {
  using U = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  return static_cast<T>(atomicOr(reinterpret_cast<U*>(p), static_cast<U>(value)));
}

// -------------------------------------------------------------------------------------------- communication between blocks
// Blocks see each other's stores only through last_block and sync_grid.

// Returns whether this block is the last of `blocks` to call it; the last one sees what the others stored before their calls. All
// threads of the block call it and get the same answer; it is also a sync_block(). The counter is 0 before the first launch, and 0
// again after the last call.
LDMI_DEVICE bool last_block(unsigned* counter, int64_t blocks) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, static_cast<unsigned>(blocks) - 1u) == static_cast<unsigned>(blocks) - 1u;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

// --------------------------------------------------------------------------------------- asynchronous copies into shared
// A thread sees its own copies after wait_copies(); the other threads of the block see them after a following sync_block().

// Copies 4, 8 or 16 bytes, both sides aligned to that size. Only the first `valid` bytes are read; the rest is set to 0.
template <int bytes>
LDMI_DEVICE void copy_async(void* shared, const void* global, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else if constexpr (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  }
}
LDMI_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}  // makes the copies since the last commit one group
template <int groups = 0>
LDMI_DEVICE void wait_copies() {  // until at most `groups` of this thread's latest groups are incomplete
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ----------------------------------------------------------------------------------------------------------- arithmetic
// exp, exp2 and log are within 2 units in the last place, fp32 and fp64, including subnormal and special values.

LDMI_DEVICE float exp2(float x) { return ::exp2f(x); }
LDMI_DEVICE double exp2(double x) { return ::exp2(x); }
LDMI_DEVICE float exp(float x) { return ::expf(x); }
LDMI_DEVICE double exp(double x) { return ::exp(x); }
LDMI_DEVICE float log(float x) { return ::logf(x); }
LDMI_DEVICE double log(double x) { return ::log(x); }
// 1 / x within 2 units in the last place if both are normal numbers. A division has a branch for all other numbers; this has none.
LDMI_DEVICE double reciprocal(double x) {
  double y;  // accurate to 20 bits
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = ::fma(-x, y, 1.0);
  return ::fma(y, ::fma(error, error, error), y);
}
LDMI_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
LDMI_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }
LDMI_DEVICE float fmax(float a, float b) { return ::fmaxf(a, b); }  // the number if the other is NaN
LDMI_DEVICE double fmax(double a, double b) { return ::fmax(a, b); }
LDMI_DEVICE float abs(float x) { return ::fabsf(x); }
LDMI_DEVICE double abs(double x) { return ::fabs(x); }

LDMI_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
LDMI_DEVICE float widen(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
namespace detail {
LDMI_DEVICE BFloat16 narrow(float x, BFloat16) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
}
LDMI_DEVICE Half narrow(float x, Half) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
}
}  // namespace detail
}  // namespace ldmi::simt
#endif  // __CUDACC__

namespace ldmi::simt {

// ------------------------------------------------------------------------------------------- code that is the same on both sides

LDMI_DEVICE float widen(float x) { return x; }
LDMI_DEVICE double widen(double x) { return x; }
namespace detail {
LDMI_DEVICE float narrow(float x, float) { return x; }
LDMI_DEVICE double narrow(double x, double) { return x; }
LDMI_DEVICE float narrow(double x, float) { return static_cast<float>(x); }
}  // namespace detail
// Converts x to the format T; fp16 and bf16 round to nearest even.
template <class T, class F>
LDMI_DEVICE T narrow(F x) {
  return detail::narrow(x, T{});
}

LDMI_DEVICE bool isnan(float x) { return x != x; }
LDMI_DEVICE bool isnan(double x) { return x != x; }
LDMI_DEVICE bool isfinite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
LDMI_DEVICE bool isfinite(double x) { return (bit_cast<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

namespace detail {
// The tree of a reduction; `op` is commutative.
template <int width, class T, class Op>
LDMI_DEVICE T warp_tree(T value, unsigned mask, Op op) {
  LDMI_UNROLL
  for (int bits = width / 2; bits > 0; bits /= 2) value = op(value, shfl_xor(value, bits, mask));
  return value;
}
// Whether one instruction reduces a whole warp.
template <int width, class T>
inline constexpr bool kReduces =
#ifdef __CUDACC__
    width == kWarp && (std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
#else
    false;
#endif
}  // namespace detail

// Returns to every lane the sum over its group of `width` lanes (a power of 2), by a tree: the same bits every time. T is float,
// double or an integer.
template <int width = kWarp, class T>
LDMI_DEVICE T warp_sum(T value, unsigned mask = kFull) {
#ifdef __CUDACC__
  if constexpr (detail::kReduces<width, T>) return __reduce_add_sync(mask, value);
#endif
  if constexpr (!detail::kReduces<width, T>) return detail::warp_tree<width>(value, mask, [](T a, T b) { return a + b; });
}
// Returns to every lane the largest value of its group of `width` lanes; a NaN counts as larger than any number.
template <int width = kWarp, class T>
LDMI_DEVICE T warp_max(T value, unsigned mask = kFull) {
#ifdef __CUDACC__
  if constexpr (detail::kReduces<width, T>) return __reduce_max_sync(mask, value);
#endif
  if constexpr (!detail::kReduces<width, T>) {
    return detail::warp_tree<width>(value, mask, [](T a, T b) { return b > a || b != b ? b : a; });
  }
}
}  // namespace ldmi::simt
