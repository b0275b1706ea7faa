// Each name of simt.cuh against plain host code: on a CPU this checks the emulation, on a GPU that it is an emulation of the GPU.

#include <algorithm>
#include <limits>
#include <numeric>

#include "../csrc/formats.h"
#include "case.h"

namespace ldmi::conformance {
namespace {

using namespace simt;
using test::Buffer;
using test::require;

template <class T>
std::vector<T> random_integers(test::Random& random, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& x : values) x = static_cast<T>(random.bits());
  return values;
}

// A kernel of one warp: f(lane) for each lane
template <class Function, class In, class Out>
LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) one_warp(Function f, const In* in, unsigned mask, Out* out) {
  if ((mask >> lane() & 1) != 0) store(out + lane(), static_cast<Out>(f(load(in + lane()), mask)));
}

// ------------------------------------------------------------------------------------------------------------- shuffles

struct ShflFirst {  // from the lowest lane of the mask
  template <class T>
  LDMI_DEVICE T operator()(T x, unsigned mask) const {
    return shfl(x, lowest(mask), mask);
  }
};
struct ShflXor {
  int bits;
  template <class T>
  LDMI_DEVICE T operator()(T x, unsigned mask) const {
    return shfl_xor(x, bits, mask);
  }
};
struct ShflDown {
  int by;
  template <class T>
  LDMI_DEVICE T operator()(T x, unsigned mask) const {
    return shfl_down(x, by, mask);
  }
};
struct ShflUp {
  int by;
  template <class T>
  LDMI_DEVICE T operator()(T x, unsigned mask) const {
    return shfl_up(x, by, mask);
  }
};
struct Ballot {
  LDMI_DEVICE unsigned operator()(int x, unsigned mask) const { return ballot(x < 0, mask); }
};
struct AnyAll {
  LDMI_DEVICE unsigned operator()(int x, unsigned mask) const {
    const unsigned some = any(x < 0, mask), every = all(x < 0, mask);
    return some | every << 1;
  }
};
struct Match {
  LDMI_DEVICE unsigned operator()(unsigned x, unsigned mask) const { return match_any(x, mask); }
  LDMI_DEVICE unsigned operator()(uint64_t x, unsigned mask) const { return match_any(x, mask); }
};

template <class Out, class Function, class In, class Want>
void check_warp(const char* what, Function f, const std::vector<In>& in, unsigned mask, Want want) {
  const Buffer<In> input(in, "in");
  const Buffer<Out> output(std::vector<Out>(kWarp), "out");
  test::require_success(launch(one_warp<Function, In, Out>, Grid{}, Stream{}, f, input.data(), mask, output.data()), what);
  std::vector<Out> expected(kWarp);
  for (int l = 0; l < kWarp; ++l) {
    if ((mask >> l & 1) != 0) expected[static_cast<size_t>(l)] = static_cast<Out>(want(l));
  }
  test::require_equal(output.download(), expected, what);
}

template <class T>
void check_shuffles(test::Random& random) {
  std::vector<T> in(kWarp);
  for (T& x : in) x = static_cast<T>(static_cast<int64_t>(random.bits() >> 12) - (int64_t{1} << 51));
  const auto at = [&](int l) { return in[static_cast<size_t>(l)]; };
  const auto mask = static_cast<unsigned>(random.bits()) | 1u;
  check_warp<T>("shfl", ShflFirst{}, in, mask, [&](int) { return at(0); });
  const int bits = 1 << random.integer(0, 4), by = static_cast<int>(random.integer(0, kWarp - 1));
  check_warp<T>("shfl_xor", ShflXor{bits}, in, kFull, [&](int l) { return at(l ^ bits); });
  const unsigned pairs = mask | ((mask & 0x55555555u) << 1) | ((mask & 0xaaaaaaaau) >> 1);
  check_warp<T>("shfl_xor of some", ShflXor{1}, in, pairs, [&](int l) { return at(l ^ 1); });
  check_warp<T>("shfl_down", ShflDown{by}, in, kFull, [&](int l) { return at(l + by < kWarp ? l + by : l); });
  check_warp<T>("shfl_up", ShflUp{by}, in, kFull, [&](int l) { return at(l >= by ? l - by : l); });
}

void check_votes(test::Random& random) {
  const auto mask = static_cast<unsigned>(random.bits()) | 1u << random.integer(0, kWarp - 1);
  std::vector<int> in = random_integers<int>(random, kWarp);
  const int64_t kind = random.integer(0, 2);  // all negative, none, some
  for (int& x : in) x = kind == 0 ? x | std::numeric_limits<int>::min() : kind == 1 ? x & std::numeric_limits<int>::max() : x;
  unsigned negative = 0;
  for (int l = 0; l < kWarp; ++l) negative |= in[static_cast<size_t>(l)] < 0 ? 1u << l : 0u;
  check_warp<unsigned>("ballot", Ballot{}, in, mask, [&](int) { return negative & mask; });
  check_warp<unsigned>("any and all", AnyAll{}, in, mask,
                       [&](int) { return ((negative & mask) != 0 ? 1u : 0u) | ((~negative & mask) == 0 ? 2u : 0u); });
}

template <class T>
void check_match(test::Random& random) {
  const auto mask = static_cast<unsigned>(random.bits()) | 1u << random.integer(0, kWarp - 1);
  std::vector<T> in(kWarp);
  for (T& x : in) x = static_cast<T>(random.integer(0, 3)) << (sizeof(T) * 8 - 2);  // the upper half counts
  check_warp<unsigned>("match_any", Match{}, in, mask, [&](int l) {
    unsigned equal = 0;
    for (int m = 0; m < kWarp; ++m) equal |= in[static_cast<size_t>(m)] == in[static_cast<size_t>(l)] ? 1u << m : 0u;
    return equal & mask;
  });
}

template <int width, class T>
LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) reductions(const T* in, T* sum, T* largest, T* smallest) {
  const T x = load(in + lane());
  store(sum + lane(), warp_sum<width>(x));
  store(largest + lane(), warp_max<width>(x));
  store(smallest + lane(), warp_min<width>(x));
}
template <int width, class T>
void check_reductions(test::Random& random) {
  std::vector<T> in(kWarp), want_sum(kWarp), want_largest(kWarp), want_smallest(kWarp);
  const int64_t lowest_of_all = std::is_unsigned_v<T> ? 0 : -1000;
  for (T& x : in) x = static_cast<T>(random.integer(lowest_of_all, 1000));
  for (size_t l = 0; l < kWarp; ++l) {
    const auto first = in.begin() + static_cast<int64_t>(l / width * width);
    want_sum[l] = std::accumulate(first, first + width, T{});
    want_largest[l] = *std::max_element(first, first + width);
    want_smallest[l] = *std::min_element(first, first + width);
  }
  if constexpr (std::numeric_limits<T>::has_quiet_NaN) {  // one in the first part
    in[0] = std::numeric_limits<T>::quiet_NaN();
    std::fill_n(want_sum.begin(), width, in[0]);
    std::fill_n(want_largest.begin(), width, in[0]);
    std::fill_n(want_smallest.begin(), width, in[0]);
  }
  const Buffer<T> input(in, "in"), sum(kWarp, "sum"), largest(kWarp, "largest"), smallest(kWarp, "smallest");
  test::require_success(launch(reductions<width, T>, Grid{}, Stream{}, input.data(), sum.data(), largest.data(), smallest.data()),
                        "reductions");
  test::require_equal(sum.download(), want_sum, "warp_sum");
  test::require_equal(largest.download(), want_largest, "warp_max");
  test::require_equal(smallest.download(), want_smallest, "warp_min");
}

// ---------------------------------------------------------------------------------------------------------------- votes of a block

LDMI_KERNEL void block_votes(const int* in, int* count, int* some) {
  const int mine = load(in + thread_idx());
  store(count + thread_idx(), sync_block_count(mine != 0));
  store(some + thread_idx(), sync_block_or(mine > 1) ? 1 : 0);
}
void check_block_votes(test::Random& random) {
  const int threads = static_cast<int>(kWarp * random.integer(1, 4));
  std::vector<int> in(static_cast<size_t>(threads));
  for (int& x : in) x = static_cast<int>(random.integer(0, 1));
  const bool some = random.integer(0, 1) != 0;
  if (some) in[static_cast<size_t>(random.integer(0, threads - 1))] = 2;
  const int count = static_cast<int>(std::count_if(in.begin(), in.end(), [](int x) { return x != 0; }));
  const Buffer<int> input(in, "in"), counts(threads, "counts"), somes(threads, "somes");
  test::require_success(launch(block_votes, Grid{.threads = threads}, Stream{}, input.data(), counts.data(), somes.data()),
                        "block_votes");
  test::require_equal(counts.download(), std::vector<int>(in.size(), count), "sync_block_count");
  test::require_equal(somes.download(), std::vector<int>(in.size(), some ? 1 : 0), "sync_block_or");
}

// --------------------------------------------------------------------------------------------------------- tensor cores

LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) multiply_bf16(const float* a, const float* b, const float* c, float* d) {
  M16N8K16::A fa;
  M16N8K16::B fb;
  M16N8K16::C fc;
  const auto at_a = [&](int i) { return load(a + M16N8K16::a_row(lane(), i) * 16 + M16N8K16::a_col(lane(), i)); };
  const auto at_b = [&](int i) { return load(b + M16N8K16::b_row(lane(), i) * 8 + M16N8K16::b_col(lane(), i)); };
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) fa.pair[i] = pair_bf16(at_a(2 * i), at_a(2 * i + 1));
  LDMI_UNROLL
  for (int i = 0; i < 2; ++i) fb.pair[i] = pair_bf16(at_b(2 * i), at_b(2 * i + 1));
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) fc.value[i] = load(c + M16N8K16::c_row(lane(), i) * 8 + M16N8K16::c_col(lane(), i));
  fc = mma(fa, fb, fc);
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) store(d + M16N8K16::c_row(lane(), i) * 8 + M16N8K16::c_col(lane(), i), fc.value[i]);
}
LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) multiply_tf32(const float* a, const float* b, const float* c, float* d) {
  M16N8K8::A fa;
  M16N8K8::B fb;
  M16N8K8::C fc;
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) fa.value[i] = to_tf32(load(a + M16N8K8::a_row(lane(), i) * 8 + M16N8K8::a_col(lane(), i)));
  LDMI_UNROLL
  for (int i = 0; i < 2; ++i) fb.value[i] = to_tf32(load(b + M16N8K8::b_row(lane(), i) * 8 + M16N8K8::b_col(lane(), i)));
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) fc.value[i] = load(c + M16N8K8::c_row(lane(), i) * 8 + M16N8K8::c_col(lane(), i));
  fc = mma(fa, fb, fc);
  LDMI_UNROLL
  for (int i = 0; i < 4; ++i) store(d + M16N8K8::c_row(lane(), i) * 8 + M16N8K8::c_col(lane(), i), fc.value[i]);
}
LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) multiply_fp64(const double* a, const double* b, const double* c, double* d) {
  M8N8K4::C fc;
  LDMI_UNROLL
  for (int i = 0; i < 2; ++i) fc.value[i] = load(c + M8N8K4::c_row(lane(), i) * 8 + M8N8K4::c_col(lane(), i));
  const double fa = load(a + M8N8K4::a_row(lane()) * 4 + M8N8K4::a_col(lane()));
  const double fb = load(b + M8N8K4::b_row(lane()) * 8 + M8N8K4::b_col(lane()));
  fc = mma(fa, fb, fc);
  LDMI_UNROLL
  for (int i = 0; i < 2; ++i) store(d + M8N8K4::c_row(lane(), i) * 8 + M8N8K4::c_col(lane(), i), fc.value[i]);
}

// Small integers, where every order of summation is exact, and random values of `bits` of mantissa, where an output is off by at
// most `unit` times the sum of the products' sizes.
template <class T, class Kernel>
void check_mma(test::Random& random, const char* what, Kernel kernel, int m, int n, int k, int bits, double unit) {
  for (const bool integers : {true, false}) {
    const auto draw = [&](int count, int keep) {
      std::vector<T> values(static_cast<size_t>(count));
      for (T& x : values)
        x = static_cast<T>(integers ? static_cast<double>(random.integer(-99, 99))
                                    : std::round(std::ldexp(random.uniform(-1.0, 1.0), keep)) * std::ldexp(1.0, -keep));
      return values;
    };
    const std::vector<T> a = draw(m * k, bits), b = draw(k * n, bits), c = draw(m * n, sizeof(T) == 8 ? 52 : 23);
    const Buffer<T> da(a, "a"), db(b, "b"), dc(c, "c"), dd(m * n, "d");
    test::require_success(launch(kernel, Grid{}, Stream{}, da.data(), db.data(), dc.data(), dd.data()), what);
    const std::vector<T> d = dd.download();
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        const auto at = static_cast<size_t>(i * n + j);
        long double sum = c[at], size = std::fabs(c[at]);
        for (int l = 0; l < k; ++l) {
          const long double product = static_cast<long double>(a[static_cast<size_t>(i * k + l)]) * b[static_cast<size_t>(l * n + j)];
          sum += product;
          size += std::fabs(product);
        }
        const double budget = integers ? 0.0 : unit * static_cast<double>(size);
        test::require_close<T, double>({d[at]}, {static_cast<double>(sum)}, budget, 0.0, what);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- asynchronous copies

template <int bytes>
LDMI_KERNEL void LDMI_BOUNDS(64, 1) copy_through(const unsigned char* in, int last, unsigned char* out) {
  Carve carve;
  unsigned char* const stage = carve.take<unsigned char>(64 * bytes);
  const int at = thread_idx() * bytes;
  copy_async<bytes>(stage + at, in + at, thread_idx() == 63 ? last : bytes);
  commit_copies();
  wait_copies();
  sync_block();
  const int other = (thread_idx() ^ 37) * bytes;
  for (int i = 0; i < bytes; ++i) store(out + other + i, stage[other + i]);
}
template <int bytes>
void check_copies(test::Random& random) {
  const int last = static_cast<int>(random.integer(0, bytes));
  const std::vector<unsigned char> in = random_integers<unsigned char>(random, 63 * bytes + std::max(last, 1));
  std::vector<unsigned char> want(64 * bytes);
  std::copy_n(in.begin(), 63 * bytes + last, want.begin());
  const Buffer<unsigned char> input(in, "in"), output(64 * bytes, "out");
  const Grid grid{.threads = 64, .smem = 64 * bytes};
  test::require_success(launch(copy_through<bytes>, grid, Stream{}, input.data(), last, output.data()), "copy_async");
  test::require_equal(output.download(), want, "copy_async");
}

// -------------------------------------------------------------------------------------------------------------- atomics

template <class T>
LDMI_KERNEL void LDMI_BOUNDS(64, 1) atomics(const T* in, T* results, T* tickets) {
  Carve carve;
  T* const shared = carve.take<T>(3);
  if (thread_idx() < 3) shared[thread_idx()] = load(results + thread_idx());
  sync_block();
  const int64_t at = block_idx() * block_dim() + thread_idx();
  const T x = load(in + at);
  atomic_add(results, x);
  atomic_max(results + 1, x);
  atomic_or(results + 2, x);
  atomic_add(shared, x);
  atomic_max(shared + 1, x);
  atomic_or(shared + 2, x);
  store(tickets + at, atomic_add(results + 3, T{1}));
  sync_block();
  if (thread_idx() < 3) store(results + 4 + block_idx() * 3 + thread_idx(), shared[thread_idx()]);
}
template <class T>
void check_atomics(test::Random& random) {
  using U = std::make_unsigned_t<T>;
  const int64_t blocks = random.integer(1, 4), count = blocks * 64;
  const std::vector<T> in = random_integers<T>(random, count);
  const T start[3] = {0, std::numeric_limits<T>::lowest(), 0};
  std::vector<T> before(static_cast<size_t>(4 + 3 * blocks));
  std::copy_n(start, 3, before.begin());
  const auto fold = [&](int64_t first, int64_t last) {
    std::vector<T> r(start, start + 3);
    for (int64_t i = first; i < last; ++i) {
      const T x = in[static_cast<size_t>(i)];
      r[0] = static_cast<T>(static_cast<U>(r[0]) + static_cast<U>(x));
      r[1] = std::max(r[1], x);
      r[2] = static_cast<T>(r[2] | x);
    }
    return r;
  };
  std::vector<T> want = fold(0, count);
  want.push_back(static_cast<T>(count));
  const Buffer<T> input(in, "in"), results(before, "results"), tickets(count, "tickets");
  const Grid grid{.blocks = 1, .threads = 64, .smem = 3 * sizeof(T)};
  for (int64_t b = 0; b < blocks; ++b) {  // one block alone: its shared results start from global ones that no other changes
    const Buffer<T> part(std::vector<T>(in.begin() + b * 64, in.begin() + (b + 1) * 64), "part"),
        alone(std::vector<T>(before.begin(), before.begin() + 7), "alone");
    const Buffer<T> order(64, "order");
    test::require_success(launch(atomics<T>, grid, Stream{}, part.data(), alone.data(), order.data()), "atomics");
    const std::vector<T> got = alone.download(), part_want = fold(b * 64, (b + 1) * 64);
    require(std::equal(part_want.begin(), part_want.end(), got.begin()), "atomics on global memory");
    require(std::equal(part_want.begin(), part_want.end(), got.begin() + 4), "atomics on shared memory");
  }
  Grid all = grid;
  all.blocks = blocks;
  test::require_success(launch(atomics<T>, all, Stream{}, input.data(), results.data(), tickets.data()), "atomics");
  const std::vector<T> got = results.download();
  require(std::equal(want.begin(), want.end(), got.begin()), "atomics of several blocks");
  std::vector<T> order = tickets.download();
  std::sort(order.begin(), order.end());
  for (size_t i = 0; i < order.size(); ++i) require(order[i] == static_cast<T>(i), "atomic_add must return the old value");
}

// ------------------------------------------------------------------------------------------ shared memory of a cluster

LDMI_KERNEL void LDMI_BOUNDS(kWarp, 1) gather_cluster(const int* in, int* out) {
  Carve carve;
  int* const mine = carve.take<int>(kWarp);
  int* const given = carve.take<int>(kWarp);
  mine[lane()] = load(in + block_idx() * kWarp + lane());
  sync_cluster();
  int sum = 0;
  for (int rank = 0; rank < cluster_size(); ++rank) sum += map_shared(mine, rank)[lane()] * (rank + 1);
  map_shared(given, cluster_size() - 1 - cluster_rank())[lane()] = sum + cluster_rank();
  sync_cluster();
  store(out + block_idx() * kWarp + lane(), given[lane()]);
}
void check_cluster(test::Random& random) {
  Device limits;
  test::require_success(device(&limits), "device");
  const int cluster = limits.capability < 90 ? 1 : 1 << random.integer(0, 3),
            blocks = cluster * static_cast<int>(random.integer(1, 3));
  std::vector<int> in(static_cast<size_t>(blocks * kWarp)), want(in.size());
  for (int& x : in) x = static_cast<int>(random.integer(0, 999));
  for (int i = 0; i < blocks * kWarp; ++i) {
    const int block = i / kWarp, first = block / cluster * cluster, giver = cluster - 1 - block % cluster;
    int sum = giver;
    for (int rank = 0; rank < cluster; ++rank) sum += in[static_cast<size_t>((first + rank) * kWarp + i % kWarp)] * (rank + 1);
    want[static_cast<size_t>(i)] = sum;
  }
  const Buffer<int> input(in, "in"), output(blocks * kWarp, "out");
  const Grid grid{.blocks = blocks, .threads = kWarp, .smem = 2 * kWarp * sizeof(int), .cluster = cluster};
  test::require_success(launch(gather_cluster, grid, Stream{}, input.data(), output.data()), "gather_cluster");
  test::require_equal(output.download(), want, "gather_cluster");
}

// ------------------------------------------------------------------------------------------------------ loads and stores

template <class T>
LDMI_KERNEL void LDMI_BOUNDS(64, 1) move(const T* in, int64_t count, T* out) {
  constexpr int n = Pack<T>::kCount;
  Carve carve;
  T* const shared = carve.take<T>(n);
  if (thread_idx() == 0) shared_store16(shared, load16(in));
  sync_block();
  if (thread_idx() == 0) store16(out, shared_load16(shared));
  const int64_t step = grid_dim() * block_dim(), id = block_idx() * block_dim() + thread_idx(), packs = count / n;
  for (int64_t p = 1 + id; p < packs; p += step) {
    switch (p % 3) {
      case 0:
        store16(out + p * n, load16_once(in + p * n));
        break;
      case 1:
        store16_streaming(out + p * n, load16_const(in + p * n));
        break;
      default:
        store16(out + p * n, load16(in + p * n));
    }
  }
  for (int64_t i = packs * n + id; i < count; i += step) {
    switch (i % 3) {
      case 0:
        store(out + i, load_once(in + i));
        break;
      case 1:
        store_streaming(out + i, load_const(in + i));
        break;
      default:
        store(out + i, load(in + i));
    }
  }
}
template <class T>
void check_moves(test::Random& random) {
  const int64_t n = Pack<T>::kCount, count = n * random.integer(1, 200) + random.integer(0, n - 1);
  const auto bytes = random_integers<unsigned char>(random, count * static_cast<int64_t>(sizeof(T)));
  std::vector<T> in(static_cast<size_t>(count));
  std::memcpy(static_cast<void*>(in.data()), bytes.data(), bytes.size());
  const Buffer<T> input(in, "in", n * random.integer(0, 2)), output(count, "out", n * random.integer(0, 2));
  const Grid grid{.blocks = random.integer(1, 5), .threads = 64, .smem = 16};
  test::require_success(launch(move<T>, grid, Stream{}, input.data(), count, output.data()), "move");
  const std::vector<T> got = output.download();
  require(std::memcmp(got.data(), bytes.data(), bytes.size()) == 0, "loads and stores");
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

template <class T>
LDMI_KERNEL void LDMI_BOUNDS(128, 1) arithmetic(const T* in, int64_t count, double* out, unsigned* flags) {
  for (int64_t i = block_idx() * block_dim() + thread_idx(); i < count; i += grid_dim() * block_dim()) {
    const T x = load(in + i);
    store(out + 7 * i, static_cast<double>(exp(x)));
    store(out + 7 * i + 1, static_cast<double>(exp2(x)));
    store(out + 7 * i + 2, static_cast<double>(log(x)));
    store(out + 7 * i + 3, static_cast<double>(rsqrt(x)));
    store(out + 7 * i + 4, static_cast<double>(log1p(x)));
    store(out + 7 * i + 5, static_cast<double>(fma(x, x, fmax(-x * x, T{-3}))));
    store(out + 7 * i + 6, reciprocal(static_cast<double>(x)));
    store(flags + i, (isnan(x) ? 1u : 0u) | (isfinite(x) ? 2u : 0u) | (abs(x) == x ? 4u : 0u));
  }
}

// The distance of two neighbours of T at x
template <class T>
double ulp(long double x) {
  constexpr int digits = std::numeric_limits<T>::digits, lowest = std::numeric_limits<T>::min_exponent - digits;
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - digits, lowest));
}

template <class T>
void check_arithmetic(test::Random& random) {
  using Limits = std::numeric_limits<T>;
  const double range = sizeof(T) == 4 ? 130.0 : 1080.0;
  std::vector<T> in{T(0),
                    T(-0.0),
                    T(1),
                    T(-1),
                    Limits::infinity(),
                    -Limits::infinity(),
                    Limits::quiet_NaN(),
                    Limits::denorm_min(),
                    Limits::min(),
                    Limits::max(),
                    Limits::lowest(),
                    Limits::epsilon()};
  while (in.size() < 400) {
    in.push_back(static_cast<T>(random.uniform(-range, range)));
    in.push_back(static_cast<T>(std::exp2(random.uniform(-range, range))));
    in.push_back(static_cast<T>(random.uniform(-1.0, 1.0)));
  }
  const auto count = static_cast<int64_t>(in.size());
  const Buffer<T> input(in, "in");
  const Buffer<double> output(7 * count, "out");
  const Buffer<unsigned> flag_output(count, "flags");
  test::require_success(
      launch(arithmetic<T>, Grid{.blocks = 2, .threads = 128}, Stream{}, input.data(), count, output.data(), flag_output.data()),
      "arithmetic");
  const std::vector<double> out = output.download();
  const std::vector<unsigned> flags = flag_output.download();
  const char* const names[] = {"exp", "exp2", "log", "rsqrt", "log1p", "fma"};
  for (size_t i = 0; i < in.size(); ++i) {
    const T x = in[i];
    const long double wide = x;
    const T least = std::max(-x * x, T{-3});  // fmax: the number where the other is NaN
    const long double want[] = {std::exp(wide),   std::exp2(wide),
                                std::log(wide),   1.0L / std::sqrt(wide),
                                std::log1p(wide), static_cast<long double>(std::fma(x, x, std::isnan(x) ? T{-3} : least))};
    for (size_t f = 0; f < 6; ++f) {
      const double got = out[7 * i + f];
      const T rounded = static_cast<T>(want[f]);
      if ((std::isnan(got) && std::isnan(rounded)) || static_cast<T>(got) == rounded) continue;
      const double budget = (f == 5 ? 0.0 : 2.0) * ulp<T>(want[f]);
      require(std::fabs(got - want[f]) <= budget, std::string(names[f]) + " of " + std::to_string(static_cast<double>(x)) + " is " +
                                                      std::to_string(got) + ", expected " +
                                                      std::to_string(static_cast<double>(want[f])));
    }
    const double inverse = out[7 * i + 6], magnitude = std::fabs(static_cast<double>(x));
    const bool normal = magnitude >= 0x1p-1021 && magnitude <= 0x1p1021;
    require(!normal || std::fabs(inverse - 1.0L / wide) <= 2.0 * ulp<double>(1.0L / wide),
            "reciprocal of " + std::to_string(static_cast<double>(x)) + " is " + std::to_string(inverse));
    const unsigned want_flags = (std::isnan(x) ? 1u : 0u) | (std::isfinite(x) ? 2u : 0u) | (std::fabs(x) == x ? 4u : 0u);
    require(flags[i] == want_flags, "isnan, isfinite or abs of " + std::to_string(static_cast<double>(x)));
  }
}

LDMI_KERNEL void LDMI_BOUNDS(256, 1) widen_all(float* halves, float* bf16s) {
  for (int64_t i = block_idx() * block_dim() + thread_idx(); i < 0x10000; i += grid_dim() * block_dim()) {
    const auto bits = static_cast<uint16_t>(i);
    store(halves + i, widen(Half{bits}));
    store(bf16s + i, widen(BFloat16{bits}));
  }
}
LDMI_KERNEL void LDMI_BOUNDS(256, 1)
    narrow_all(const float* in, int64_t count, Half* halves, BFloat16* bf16s, uint32_t* pairs, float* tf32s) {
  for (int64_t i = block_idx() * block_dim() + thread_idx(); i < count; i += grid_dim() * block_dim()) {
    const float x = load(in + i);
    store(halves + i, narrow<Half>(x));
    store(bf16s + i, narrow<BFloat16>(x));
    store(pairs + i, pair_bf16(x, load(in + (count - 1 - i))));
    store(tf32s + i, to_tf32(x));
  }
}
void check_formats(test::Random& random) {
  const Grid grid{.blocks = 4, .threads = 256};
  const Buffer<float> halves(0x10000, "halves"), bf16s(0x10000, "bf16s");
  if (random.integer(0, 9) == 0) {  // always the same
    test::require_success(launch(widen_all, grid, Stream{}, halves.data(), bf16s.data()), "widen_all");
    const std::vector<float> half = halves.download(), bf16 = bf16s.download();
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
      const auto pattern = static_cast<uint16_t>(bits);
      test::require_close<float, double>(
          {half[bits], bf16[bits]}, {test::decode(pattern, test::kHalf), test::decode(pattern, test::kBFloat16)}, 0.0, 0.0, "widen");
    }
  }
  std::vector<float> in(1000);
  for (float& x : in) {
    x = bit_cast<float>(static_cast<uint32_t>(random.bits()));  // any bits
    if (random.integer(0, 1) != 0)
      x = std::ldexp(static_cast<float>(random.integer(-8191, 8191)), static_cast<int>(random.integer(-40, 5)));  // ties
  }
  const auto count = static_cast<int64_t>(in.size());
  const Buffer<float> input(in, "in"), tf32(count, "tf32");
  const Buffer<Half> half(count, "half");
  const Buffer<BFloat16> bf16(count, "bf16");
  const Buffer<uint32_t> pair(count, "pair");
  test::require_success(launch(narrow_all, grid, Stream{}, input.data(), count, half.data(), bf16.data(), pair.data(), tf32.data()),
                        "narrow_all");
  const std::vector<Half> got_half = half.download();
  const std::vector<BFloat16> got_bf16 = bf16.download();
  const std::vector<uint32_t> got_pair = pair.download();
  const std::vector<float> got_tf32 = tf32.download();
  for (size_t i = 0; i < in.size(); ++i) {
    const float x = in[i];
    if (std::isnan(x)) {
      require(std::isnan(test::decode(got_half[i].bits, test::kHalf)) && std::isnan(test::decode(got_bf16[i].bits, test::kBFloat16)) &&
                  std::isnan(got_tf32[i]),
              "a NaN must stay one");
      continue;
    }
    require(got_half[i].bits == test::encode(x, test::kHalf), "narrow to fp16 of " + std::to_string(x));
    require(got_bf16[i].bits == test::encode(x, test::kBFloat16), "narrow to bf16 of " + std::to_string(x));
    const uint32_t low = got_bf16[i].bits, high = got_bf16[in.size() - 1 - i].bits;
    if (!std::isnan(in[in.size() - 1 - i])) require(got_pair[i] == (low | high << 16), "pair_bf16");
    // tf32: 11 digits, ties away from zero
    int exponent = 0;
    std::frexp(x, &exponent);
    const int scale = 11 - std::max(exponent, -125);
    const double want =
        std::isinf(x) ? static_cast<double>(x) : std::ldexp(std::round(std::ldexp(static_cast<double>(x), scale)), -scale);
    require(static_cast<float>(want) == got_tf32[i], "to_tf32 of " + std::to_string(x));
  }
}

void check(test::Random& random) {
  check_shuffles<int>(random);
  check_shuffles<unsigned>(random);
  check_shuffles<float>(random);
  check_shuffles<double>(random);
  check_shuffles<int64_t>(random);
  check_votes(random);
  check_match<unsigned>(random);
  check_match<uint64_t>(random);
  check_reductions<32, float>(random);
  check_reductions<16, double>(random);
  check_reductions<8, int>(random);
  check_reductions<32, int>(random);
  check_reductions<32, unsigned>(random);
  check_reductions<1, int64_t>(random);
  check_block_votes(random);
  check_mma<float>(random, "mma of bf16", multiply_bf16, 16, 8, 16, 7, 0x1p-21);
  check_mma<float>(random, "mma of tf32", multiply_tf32, 16, 8, 8, 10, 0x1p-21);
  check_mma<double>(random, "mma of fp64", multiply_fp64, 8, 8, 4, 52, 0x1p-51);
  check_copies<4>(random);
  check_copies<8>(random);
  check_copies<16>(random);
  check_atomics<int>(random);
  check_atomics<unsigned>(random);
  check_atomics<int64_t>(random);
  check_atomics<uint64_t>(random);
  check_cluster(random);
  check_moves<unsigned char>(random);
  check_moves<Half>(random);
  check_moves<float>(random);
  check_moves<double>(random);
  check_arithmetic<float>(random);
  check_arithmetic<double>(random);
  check_formats(random);
}

}  // namespace
}  // namespace ldmi::conformance

int main(int count, char** words) {
  return ldmi::test::run("conformance", ldmi::test::Options(count, words), ldmi::conformance::check);
}
