// The kernels that factor many matrices: one warp per matrix, or one block per matrix.
#pragma once

#include "block.cuh"

namespace ldmi::cuda {

// The inputs and outputs of `count` matrices
struct Matrices {
  const double* S;  // [count, C, C]
  const double* n;  // [count, C]
  int64_t count;
  int C;
  bool strict;
  double* log_abs_det;  // [count]
  double* sign;         // [count]
  int64_t* kept;        // [count]
  double* V;            // [count, C, C], or null: the determinants alone
};

namespace factor {

inline constexpr int kWarpThreads = 128, kBlockThreads = 256;
// Threads of a block that eliminates. More warps hide the latency of the tiles, as far as the registers allow.
constexpr int factor_threads(int most) { return most <= 64 ? 512 : most <= 128 ? 384 : 256; }

// Calls solve(entry, weight, emit); one thread stores the result.
template <class Solve>
LDMI_DEVICE void one_of(const Matrices& matrices, int64_t at, bool writes, const Solve& solve) {
  const int C = matrices.C;
  const double* const S = matrices.S + at * C * C;
  const double* const n = matrices.n + at * C;
  double* const V = matrices.V + at * C * C;
  const Determinant found = solve([&](int i, int j) { return load_const(S + i * C + j); }, [&](int i) { return load_const(n + i); },
                                  [&](int i, int j, double value) { store(V + i * C + j, value); });
  if (!writes) return;
  store(matrices.log_abs_det + at, found.log_abs_det);
  store(matrices.sign + at, found.sign);
  store(matrices.kept + at, found.kept);
}

// One warp per matrix
template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(kWarpThreads, 1) logdet_inverse_warps(Matrices matrices) {
  const int warps = block_dim() / kWarp;
  for (int64_t at = block_idx() * warps + warp(); at < matrices.count; at += grid_dim() * warps) {
    one_of(matrices, at, lane() == 0, [&](const auto& entry, const auto& weight, const auto& emit) {
      return by_warp<kMost>(matrices.C, matrices.strict, matrices.V != nullptr, entry, weight, emit);
    });
  }
}

// One block per matrix
template <int kMost>
LDMI_KERNEL void LDMI_BOUNDS(factor_threads(kMost), 1) logdet_inverse_blocks(Matrices matrices, int stride) {
  Carve carve;
  const FactorSpace space = take_factor_space(carve, matrices.C, stride);
  for (int64_t at = block_idx(); at < matrices.count; at += grid_dim()) {
    one_of(matrices, at, thread_idx() == 0, [&](const auto& entry, const auto& weight, const auto& emit) {
      return by_block<kMost / kWarp>(space, matrices.C, matrices.strict, matrices.V != nullptr, entry, weight, emit);
    });
    sync_block();
  }
}

}  // namespace factor

}  // namespace ldmi::cuda
