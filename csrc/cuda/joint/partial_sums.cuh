// Partial sums of several blocks: where they are, and the kernel that adds them.
#pragma once

#include "../rows.cuh"

namespace ldmi::cuda {

using plan::Partial;
using plan::take_partial;

// S, n and ce from the parts; NaN everywhere when a part is bad. A warp takes 1, 2, 4 ... neighbouring entries, few enough to keep all
// warps of the grid busy, and spreads the parts over its other lanes. Each lane has kReduceAhead loads in flight. The order of the sum
// depends on the shape of the grid alone.
inline constexpr int kReduceAhead = 4;
LDMI_DEVICE void reduce_partials(const Partial& partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce) {
  Carve carve;
  double* const scratch = carve.take<double>(kThreads / kWarp);
  bool bad = false;
  for (int64_t p = thread_idx(); p < partial.ce_parts; p += block_dim()) bad |= load(partial.bad + p) != 0;
  bad = sync_block_or(bad);
  const int64_t entries = S_entries + n_entries, warps = grid_dim() * (block_dim() / kWarp);
  int across = 1;
  while (across < kWarp && warps * across < entries) across *= 2;
  const int down = kWarp / across;
  for (int64_t base = (block_idx() * (block_dim() / kWarp) + warp()) * across; base < entries; base += warps * across) {
    const int64_t entry = base + lane() % across;
    double total = 0;
    if (entry < entries && !bad) {
      for (int64_t first = lane() / across; first < partial.parts; first += down * kReduceAhead) {
        double part[kReduceAhead];
        LDMI_UNROLL
        for (int j = 0; j < kReduceAhead; ++j) {
          const int64_t p = first + j * down;
          part[j] = p < partial.parts ? load(partial.sums + p * entries + entry) : 0.0;
        }
        LDMI_UNROLL
        for (int j = 0; j < kReduceAhead; ++j) total += part[j];
      }
    }
    for (int by = across; by < kWarp; by *= 2) total += shfl_xor(total, by);
    if (bad) total = not_a_number<double>();
    if (lane() < across && entry < entries) store(entry < S_entries ? S + entry : n + (entry - S_entries), total);
  }
  if (block_idx() == 0) {
    double total = 0;
    for (int64_t p = thread_idx(); p < partial.ce_parts; p += block_dim()) total += load(partial.ce + p);
    total = block_sum(total, scratch);
    if (thread_idx() == 0) store(ce, bad ? not_a_number<double>() : total);
  }
}

// (A kernel in a header has to be a template: it is in several objects.)
template <int kBlock>
LDMI_KERNEL void LDMI_BOUNDS(kBlock, 1)
    joint_reduce_partials(Partial partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce) {
  reduce_partials(partial, S_entries, n_entries, S, n, ce);
}

inline int launch_reduce_partials(const Partial& partial, int64_t S_entries, int64_t n_entries, double* S, double* n, double* ce,
                                  const DeviceLimits& limits, Stream stream) {
  Grid grid;
  constexpr int64_t kWarps = kThreads / kWarp;
  const int64_t wanted = (S_entries + n_entries + kWarps - 1) / kWarps;
  grid.blocks = wanted < 1 ? 1 : wanted < 4 * limits.sms ? wanted : 4 * limits.sms;
  grid.threads = kThreads;
  Carve carve;
  carve.take<double>(kThreads / kWarp);
  grid.smem = carve.bytes();
  return launch(joint_reduce_partials<kThreads>, grid, stream, partial, S_entries, n_entries, S, n, ce);
}

}  // namespace ldmi::cuda
