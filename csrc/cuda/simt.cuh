// Every intrinsic and PTX instruction of the CUDA engine, under one set of names. Compiled by nvcc these are the GPU's; compiled by
// another compiler they come from simt_host.h (tests/simt, on the include path), which runs the same kernels on a CPU, one fiber a
// thread, and watches over them. Kernels use nothing else: no intrinsic, no inline PTX, no static __shared__, and no direct access
// to global memory. tests/simt/README.md says how a kernel and its test are written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#define LDMI_KERNEL __global__                                               // LDMI_KERNEL void name(...)
#define LDMI_BOUNDS(threads, blocks) __launch_bounds__((threads), (blocks))  // after void: threads a block, blocks an SM
#define LDMI_DEVICE __device__ __forceinline__                               // a function of device code
#define LDMI_HOST_DEVICE __host__ __device__ __forceinline__                 // a function of both
#define LDMI_UNROLL _Pragma("unroll")                                        // before a loop whose count is a constant
#define LDMI_DETAIL_PRAGMA(text) _Pragma(#text)
#define LDMI_UNROLL_BY(count) LDMI_DETAIL_PRAGMA(unroll(count))  // so many turns at a time, a constant; 1: none, for want of registers
#else
#define LDMI_KERNEL inline
#define LDMI_BOUNDS(threads, blocks)
#define LDMI_DEVICE inline
#define LDMI_HOST_DEVICE inline
#define LDMI_UNROLL
#define LDMI_UNROLL_BY(count)
#endif

namespace ldmi::simt {

// ---------------------------------------------------------------------------------------------------------------- types

inline constexpr int kWarp = 32;                // lanes of a warp
inline constexpr unsigned kFull = 0xffffffffu;  // the mask of a whole warp
inline constexpr size_t kSharedAlignment = 16;  // bytes, of every piece of shared memory

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

// What to launch: `blocks` of `threads` (a multiple of 32), in clusters of `cluster` blocks, each with `smem` bytes of dynamic
// shared memory (from Carve::bytes). Only a cooperative grid may call sync_grid() or wait for blocks that have not started.
struct Grid {
  int64_t blocks = 1;
  int threads = kWarp;
  size_t smem = 0;
  int cluster = 1;
  bool cooperative = false;
};

// What a launcher may ask of the current device.
struct Device {
  int sms = 0;              // multiprocessors
  size_t smem_block = 0;    // dynamic shared memory that one block can have, in bytes
  size_t smem_sm = 0;       // shared memory of a multiprocessor, in bytes
  size_t l2 = 0;            // bytes of level 2 cache
  int capability = 0;       // 80, 90, ...
  bool cooperative = true;  // whether it takes cooperative grids
};

// ------------------------------------------------------------------------------------------------------------ bit casts

// By value: of a vector in memory, one access, which a memcpy from there would not be.
template <class To, class From>
LDMI_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------------------------------------- tensor core layouts (PTX)

// Where value i of a lane's fragment lies in its matrix. mma() of each shape computes D = A B + C, called by a whole warp.
struct M16N8K16 {  // bf16 -> fp32: A 16 x 16 (8 values), B 16 x 8 (4), C and D 16 x 8 (4)
  LDMI_HOST_DEVICE static constexpr int a_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
  LDMI_HOST_DEVICE static constexpr int a_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i & 4) * 2; }
  LDMI_HOST_DEVICE static constexpr int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i & 2) * 4; }
  LDMI_HOST_DEVICE static constexpr int b_col(int lane, int) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
  LDMI_HOST_DEVICE static constexpr int c_col(int lane, int i) { return lane % 4 * 2 + (i & 1); }
  struct A {
    uint32_t pair[4];  // value 2j in the low half of pair[j], 2j + 1 in the high one (pair_bf16)
  };
  struct B {
    uint32_t pair[2];
  };
  struct C {
    float value[4];
  };
};
struct M16N8K8 {  // tf32 -> fp32: A 16 x 8 (4 values), B 8 x 8 (2), C and D 16 x 8 (4)
  LDMI_HOST_DEVICE static constexpr int a_row(int lane, int i) { return lane / 4 + (i & 1) * 8; }
  LDMI_HOST_DEVICE static constexpr int a_col(int lane, int i) { return lane % 4 + (i & 2) * 2; }
  LDMI_HOST_DEVICE static constexpr int b_row(int lane, int i) { return lane % 4 + (i & 1) * 4; }
  LDMI_HOST_DEVICE static constexpr int b_col(int lane, int) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_row(int lane, int i) { return M16N8K16::c_row(lane, i); }
  LDMI_HOST_DEVICE static constexpr int c_col(int lane, int i) { return M16N8K16::c_col(lane, i); }
  struct A {
    float value[4];  // rounded by to_tf32
  };
  struct B {
    float value[2];
  };
  using C = M16N8K16::C;
};
struct M8N8K4 {  // fp64: A 8 x 4 (1 value), B 4 x 8 (1), C and D 8 x 8 (2)
  LDMI_HOST_DEVICE static constexpr int a_row(int lane) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int a_col(int lane) { return lane % 4; }
  LDMI_HOST_DEVICE static constexpr int b_row(int lane) { return lane % 4; }
  LDMI_HOST_DEVICE static constexpr int b_col(int lane) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_row(int lane, int) { return lane / 4; }
  LDMI_HOST_DEVICE static constexpr int c_col(int lane, int i) { return lane % 4 * 2 + i; }
  struct C {
    double value[2];
  };
};

}  // namespace ldmi::simt

#ifndef __CUDACC__
#include "simt_host.h"
#else

namespace ldmi::simt {

// ----------------------------------------------------------------------------------------------------------- where am I

LDMI_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
LDMI_DEVICE int block_dim() { return static_cast<int>(blockDim.x); }
LDMI_DEVICE int64_t block_idx() { return blockIdx.x; }  // 64 bits, so that products with it are
LDMI_DEVICE int64_t grid_dim() { return gridDim.x; }
LDMI_DEVICE int lane() { return static_cast<int>(threadIdx.x % kWarp); }
LDMI_DEVICE int warp() { return static_cast<int>(threadIdx.x / kWarp); }

// -------------------------------------------------------------------------------------------------------- shared memory

// Takes pieces of the block's dynamic shared memory one after the other; in host code it only counts, for Grid::smem. Every thread
// of a block takes the same pieces. Another Carve starts at the beginning again: sync_block() before it.
class Carve {
 public:
  LDMI_HOST_DEVICE Carve() {
#ifdef __CUDA_ARCH__
    extern __shared__ __align__(16) unsigned char ldmi_simt_shared[];
    base_ = ldmi_simt_shared;
#endif
  }
  // `count` values of T, not initialised, 16-byte aligned; null in host code
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

// 16 bytes of shared memory in one access; p is 16-byte aligned
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
LDMI_DEVICE bool sync_block_or(bool any) { return __syncthreads_or(any) != 0; }  // sync_block, and whether any was true
LDMI_DEVICE int sync_block_count(bool one) { return __syncthreads_count(one); }  // sync_block, and how many were true
LDMI_DEVICE void sync_warp(unsigned mask = kFull) { __syncwarp(mask); }          // the lanes of mask; orders memory too
LDMI_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }         // all threads of a cooperative grid
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
LDMI_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }  // all threads of the cluster
LDMI_DEVICE int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
LDMI_DEVICE int cluster_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
// The same place in the shared memory of the cluster's block `rank`: valid between the cluster's first sync and its last.
template <class T>
LDMI_DEVICE T* map_shared(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else  // before sm_90 every cluster is one block
LDMI_DEVICE void sync_cluster() { __syncthreads(); }
LDMI_DEVICE int cluster_rank() { return 0; }
LDMI_DEVICE int cluster_size() { return 1; }
template <class T>
LDMI_DEVICE T* map_shared(T* p, int) {
  return p;
}
#endif

// ----------------------------------------------------------------------- warp collectives: all lanes of mask, and no other

template <class T>
LDMI_DEVICE T shfl(T value, int source, unsigned mask = kFull) {  // lane `source`'s value
  return __shfl_sync(mask, value, source);
}
template <class T>
LDMI_DEVICE T shfl_xor(T value, int bits, unsigned mask = kFull) {  // lane (mine ^ bits)'s
  return __shfl_xor_sync(mask, value, bits);
}
template <class T>
LDMI_DEVICE T shfl_down(T value, int by, unsigned mask = kFull) {  // lane (mine + by)'s; mine past the end
  return __shfl_down_sync(mask, value, by);
}
template <class T>
LDMI_DEVICE T shfl_up(T value, int by, unsigned mask = kFull) {  // lane (mine - by)'s; mine before the beginning
  return __shfl_up_sync(mask, value, by);
}
LDMI_DEVICE unsigned ballot(bool one, unsigned mask = kFull) { return __ballot_sync(mask, one); }  // the lanes where it is true
LDMI_DEVICE bool any(bool one, unsigned mask = kFull) { return __any_sync(mask, one) != 0; }
LDMI_DEVICE bool all(bool one, unsigned mask = kFull) { return __all_sync(mask, one) != 0; }
LDMI_DEVICE unsigned match_any(unsigned value, unsigned mask = kFull) { return __match_any_sync(mask, value); }  // lanes equal to mine
LDMI_DEVICE unsigned match_any(uint64_t value, unsigned mask = kFull) {
  return __match_any_sync(mask, static_cast<unsigned long long>(value));
}
LDMI_DEVICE int popcount(unsigned bits) { return __popc(bits); }
LDMI_DEVICE int lowest(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }  // the number of the lowest bit set; -1 if none
LDMI_DEVICE unsigned lanes_below() { return (1u << lane()) - 1u; }                   // the mask of the lanes before mine

// -------------------------------------------------------------------------------------------------------- global memory
// load: what this thread may see now. _const: nobody writes it during the launch, read again soon. _once: the same, read once.
// streaming stores are not read again soon. T is 1, 2, 4, 8 or 16 bytes; the 16-byte forms want p 16-byte aligned.

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

// -------------------------------------------------------------- integer atomics, global or shared: relaxed; return the old

namespace detail {
template <class T>
struct AtomicOf {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  using type = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>, T>;
};
template <class T>
using Atomic = typename AtomicOf<T>::type;
}  // namespace detail

template <class T>
LDMI_DEVICE T atomic_add(T* p, std::type_identity_t<T> value) {
  using U = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;  // there is no signed 64-bit form, nor need of one
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  return static_cast<T>(atomicAdd(reinterpret_cast<U*>(p), static_cast<U>(value)));
}
template <class T>
LDMI_DEVICE T atomic_max(T* p, std::type_identity_t<T> value) {
  using U = detail::Atomic<T>;
  return static_cast<T>(atomicMax(reinterpret_cast<U*>(p), static_cast<U>(value)));
}
template <class T>
LDMI_DEVICE T atomic_or(T* p, std::type_identity_t<T> value) {
  using U = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32-bit and 64-bit integers");
  return static_cast<T>(atomicOr(reinterpret_cast<U*>(p), static_cast<U>(value)));
}

// -------------------------------------------------------------------------------------------- publishing between blocks
// Blocks see each other's stores only through these (and sync_grid). What one thread publishes includes what its block stored
// before the last sync_block(). The flags are global memory, zeroed before the first launch.

// Set the flag, after everything stored so far. One thread calls it.
LDMI_DEVICE void publish(unsigned* flag, unsigned value) {
  __threadfence();
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
// Wait until the flag is at least `value`; what was stored before it was published can then be loaded. Returns the flag. One thread
// calls it, a sync_block() shows the rest of the block. Only for flags of blocks that are sure to run: see Grid.
LDMI_DEVICE unsigned acquire(const unsigned* flag, unsigned value) {
  unsigned seen;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(__cvta_generic_to_global(flag)) : "memory");
    if (seen >= value) break;
    __nanosleep(20);
  }
  __threadfence();
  return seen;
}
// Whether this block is the last of `blocks` to call it: then it sees what the others stored before. All threads of the block
// call it, and get the same answer; it is a sync_block(). The counter, 0 before the first launch, is 0 again after the last call.
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
// A thread's copies land at its wait_copies, its neighbours see them after a sync_block() that follows.

// 4, 8 or 16 bytes, both sides aligned to that; the first `valid` of them are read and the rest becomes 0
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
LDMI_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // the copies since the last commit: a group
template <int groups = 0>
LDMI_DEVICE void wait_copies() {  // until at most `groups` of this thread's latest groups are still under way
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// --------------------------------------------------------------------------------------------------------- tensor cores

LDMI_DEVICE M16N8K16::C mma(const M16N8K16::A& a, const M16N8K16::B& b, const M16N8K16::C& c) {
  M16N8K16::C d;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d.value[0]), "=f"(d.value[1]), "=f"(d.value[2]), "=f"(d.value[3])
      : "r"(a.pair[0]), "r"(a.pair[1]), "r"(a.pair[2]), "r"(a.pair[3]), "r"(b.pair[0]), "r"(b.pair[1]), "f"(c.value[0]),
        "f"(c.value[1]), "f"(c.value[2]), "f"(c.value[3]));
  return d;
}
LDMI_DEVICE M16N8K8::C mma(const M16N8K8::A& a, const M16N8K8::B& b, const M16N8K8::C& c) {
  M16N8K8::C d;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d.value[0]), "=f"(d.value[1]), "=f"(d.value[2]), "=f"(d.value[3])
      : "r"(__float_as_uint(a.value[0])), "r"(__float_as_uint(a.value[1])), "r"(__float_as_uint(a.value[2])),
        "r"(__float_as_uint(a.value[3])), "r"(__float_as_uint(b.value[0])), "r"(__float_as_uint(b.value[1])), "f"(c.value[0]),
        "f"(c.value[1]), "f"(c.value[2]), "f"(c.value[3]));
  return d;
}
LDMI_DEVICE M8N8K4::C mma(double a, double b, const M8N8K4::C& c) {
  M8N8K4::C d;
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %5};"
      : "=d"(d.value[0]), "=d"(d.value[1])
      : "d"(a), "d"(b), "d"(c.value[0]), "d"(c.value[1]));
  return d;
}
// The nearest tf32 (10 bits of mantissa, ties away from zero), as a float
LDMI_DEVICE float to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// ----------------------------------------------------------------------------------------------------------- arithmetic
// Within 2 units in the last place (exp, exp2, log, log1p, rsqrt; fp32 and fp64), subnormals and specials included.

LDMI_DEVICE float exp2(float x) { return ::exp2f(x); }
LDMI_DEVICE double exp2(double x) { return ::exp2(x); }
LDMI_DEVICE float exp(float x) { return ::expf(x); }
LDMI_DEVICE double exp(double x) { return ::exp(x); }
LDMI_DEVICE float log(float x) { return ::logf(x); }
LDMI_DEVICE double log(double x) { return ::log(x); }
LDMI_DEVICE float log1p(float x) { return ::log1pf(x); }
LDMI_DEVICE double log1p(double x) { return ::log1p(x); }
LDMI_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
LDMI_DEVICE double rsqrt(double x) { return ::rsqrt(x); }
// 1 / x within 2 units in the last place, if both are normal numbers; without the branch that a division has for all others
LDMI_DEVICE double reciprocal(double x) {
  double y;  // to 20 bits
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = ::fma(-x, y, 1.0);
  return ::fma(y, ::fma(error, error, error), y);
}
LDMI_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
LDMI_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }
LDMI_DEVICE float fmax(float a, float b) { return ::fmaxf(a, b); }  // the number where the other is NaN
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
// Two bf16 in one register, for the fragments of M16N8K16: `low` in the low half
LDMI_DEVICE uint32_t pair_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace ldmi::simt
#endif  // __CUDACC__

namespace ldmi::simt {

// ------------------------------------------------------------------------------------------- the same code on both sides

LDMI_DEVICE float widen(float x) { return x; }
LDMI_DEVICE double widen(double x) { return x; }
namespace detail {
LDMI_DEVICE float narrow(float x, float) { return x; }
LDMI_DEVICE double narrow(double x, double) { return x; }
LDMI_DEVICE float narrow(double x, float) { return static_cast<float>(x); }
}  // namespace detail
// x in the format T: fp16 and bf16 to nearest even
template <class T, class F>
LDMI_DEVICE T narrow(F x) {
  return detail::narrow(x, T{});
}

LDMI_DEVICE bool isnan(float x) { return x != x; }
LDMI_DEVICE bool isnan(double x) { return x != x; }
LDMI_DEVICE bool isfinite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
LDMI_DEVICE bool isfinite(double x) { return (bit_cast<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

namespace detail {
// The trees of the reductions; `op` is commutative
template <int width, class T, class Op>
LDMI_DEVICE T warp_tree(T value, unsigned mask, Op op) {
  LDMI_UNROLL
  for (int bits = width / 2; bits > 0; bits /= 2) value = op(value, shfl_xor(value, bits, mask));
  return value;
}
// Whether one instruction reduces a whole warp
template <int width, class T>
inline constexpr bool kReduces =
#ifdef __CUDACC__
    width == kWarp && (std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
#else
    false;
#endif
}  // namespace detail

// The sum over each `width` lanes (a power of 2), in all of them, by a tree: the same bits every time. float, double, integers.
template <int width = kWarp, class T>
LDMI_DEVICE T warp_sum(T value, unsigned mask = kFull) {
#ifdef __CUDACC__
  if constexpr (detail::kReduces<width, T>) return __reduce_add_sync(mask, value);
#endif
  if constexpr (!detail::kReduces<width, T>) return detail::warp_tree<width>(value, mask, [](T a, T b) { return a + b; });
}
// The largest over each `width` lanes, in all of them; a NaN is larger than a number
template <int width = kWarp, class T>
LDMI_DEVICE T warp_max(T value, unsigned mask = kFull) {
#ifdef __CUDACC__
  if constexpr (detail::kReduces<width, T>) return __reduce_max_sync(mask, value);
#endif
  if constexpr (!detail::kReduces<width, T>) {
    return detail::warp_tree<width>(value, mask, [](T a, T b) { return b > a || b != b ? b : a; });
  }
}
// The smallest over each `width` lanes, in all of them; a NaN is smaller than a number
template <int width = kWarp, class T>
LDMI_DEVICE T warp_min(T value, unsigned mask = kFull) {
#ifdef __CUDACC__
  if constexpr (detail::kReduces<width, T>) return __reduce_min_sync(mask, value);
#endif
  if constexpr (!detail::kReduces<width, T>) {
    return detail::warp_tree<width>(value, mask, [](T a, T b) { return b < a || b != b ? b : a; });
  }
}

// ---------------------------------------------------------------------------------------------------------- host: launch
// Error codes are cudaError_t's: 0 is success.

#ifdef __CUDACC__
using Stream = cudaStream_t;

// The current device
inline int device(Device* out) {
  int id = 0, sms = 0, block = 0, sm = 0, l2 = 0, major = 0, minor = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, id);
  };
  get(&sms, cudaDevAttrMultiProcessorCount);
  get(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&l2, cudaDevAttrL2CacheSize);
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&cooperative, cudaDevAttrCooperativeLaunch);
  *out = {sms, static_cast<size_t>(block), static_cast<size_t>(sm), static_cast<size_t>(l2), major * 10 + minor, cooperative != 0};
  return static_cast<int>(error);
}

namespace detail {
// More than the default 48 KB of shared memory, or more than 8 blocks a cluster, must be allowed kernel by kernel and device by
// device.
inline cudaError_t allow(const void* kernel, size_t smem, int cluster) {
  if (smem <= 48 * 1024 && cluster <= 8) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, std::pair<size_t, int>> allowed;
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  auto& [bytes, blocks] = allowed[{id, kernel}];
  if (smem > bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (error != cudaSuccess) return error;
    bytes = smem;
  }
  if (cluster > 8 && cluster > blocks) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    blocks = cluster;
  }
  return cudaSuccess;
}
}  // namespace detail

namespace detail {
// Asked once for each kernel, device and size: the runtime takes microseconds to answer, and a launcher asks at every call.
inline cudaError_t resident_blocks(const void* kernel, int threads, size_t smem, int* out) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const auto [place, unknown] = known.try_emplace({id, kernel, threads, smem}, 0);
  if (unknown) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second, kernel, threads, smem);
    if (error != cudaSuccess) {
      known.erase(place);
      return error;
    }
  }
  *out = place->second;
  return cudaSuccess;
}
}  // namespace detail

// How many blocks of the kernel an SM holds at once: a cooperative grid has at most that many times Device::sms.
template <class... P>
int blocks_per_sm(void (*kernel)(P...), int threads, size_t smem, int* out) {
  cudaError_t error = detail::allow(reinterpret_cast<const void*>(kernel), smem, 1);
  if (error == cudaSuccess) error = detail::resident_blocks(reinterpret_cast<const void*>(kernel), threads, smem, out);
  return static_cast<int>(error);
}

// Launch the kernel on the stream; the arguments convert to its parameters.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, Stream stream, A&&... arguments) {
  if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads % kWarp != 0 ||
      grid.blocks % grid.cluster != 0) {
    return static_cast<int>(cudaErrorInvalidConfiguration);
  }
  cudaError_t error = detail::allow(reinterpret_cast<const void*>(kernel), grid.smem, grid.cluster);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.smem;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(arguments))...));
}

// Zero global memory, in the order of the stream
inline int zero(void* p, size_t bytes, Stream stream) { return static_cast<int>(cudaMemsetAsync(p, 0, bytes, stream)); }
inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

}  // namespace ldmi::simt
