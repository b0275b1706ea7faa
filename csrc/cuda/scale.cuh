// The backward of a forward that has left the gradient: out = in * *factor, one read and one write.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simt.cuh"

namespace ldmi::cuda {

inline constexpr int kScaleThreads = 256;

// What one thread moves at a time: 16 bytes of the smaller type
template <class In, class Out>
inline constexpr int kScaleValues = sizeof(In) < sizeof(Out) ? simt::Pack<In>::kCount : simt::Pack<Out>::kCount;

// in and out are 16-byte aligned if `aligned`; else one value at a time.
template <class In, class Out, class Factor>
LDMI_KERNEL void LDMI_BOUNDS(kScaleThreads, 2)
    scale_values(const In* in, const Factor* factor_at, int64_t count, Out* out, bool aligned) {
  using namespace simt;
  constexpr bool kDouble = std::is_same_v<In, double> || std::is_same_v<Out, double> || std::is_same_v<Factor, double>;
  using F = std::conditional_t<kDouble, double, float>;
  constexpr int kValues = kScaleValues<In, Out>, kIns = Pack<In>::kCount, kOuts = Pack<Out>::kCount;
  const F factor = static_cast<F>(widen(load_const(factor_at)));
  const int64_t first = block_idx() * block_dim() + thread_idx(), threads = grid_dim() * block_dim();
  const int64_t packs = aligned ? count / kValues : 0;
  for (int64_t p = first; p < packs; p += threads) {
    Pack<In> from[kValues / kIns];
    LDMI_UNROLL
    for (int i = 0; i < kValues / kIns; ++i) from[i] = load16_once(in + p * kValues + i * kIns);
    LDMI_UNROLL
    for (int o = 0; o < kValues / kOuts; ++o) {
      Pack<Out> to;
      LDMI_UNROLL
      for (int i = 0; i < kOuts; ++i) {
        const int at = o * kOuts + i;
        to[i] = narrow<Out>(static_cast<F>(widen(from[at / kIns][at % kIns])) * factor);
      }
      store16(out + p * kValues + o * kOuts, to);
    }
  }
  for (int64_t i = packs * kValues + first; i < count; i += threads) {
    store(out + i, narrow<Out>(static_cast<F>(widen(load_once(in + i))) * factor));
  }
}

template <class In, class Out, class Factor>
int launch_scale(const void* in, const void* factor, int64_t count, void* out, const DeviceLimits& limits, simt::Stream stream) {
  if (count == 0) return 0;
  const bool aligned = (reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const int64_t each = aligned ? kScaleValues<In, Out> : 1;
  const int64_t needed = (count + kScaleThreads * each - 1) / (kScaleThreads * each), most = int64_t{8} * limits.sms;
  simt::Grid grid;
  grid.blocks = needed < most ? needed : most;
  grid.threads = kScaleThreads;
  return simt::launch(scale_values<In, Out, Factor>, grid, stream, static_cast<const In*>(in), static_cast<const Factor*>(factor),
                      count, static_cast<Out*>(out), aligned);
}

}  // namespace ldmi::cuda
