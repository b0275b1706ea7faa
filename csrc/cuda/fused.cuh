// The whole loss and its gradient in one launch of one block, for problems that fit into a multiprocessor. There is little work and a
// long chain of latencies, so the number of barriers and of round trips to memory decides the time.
//
//     1  Load the logits into shared memory. Meanwhile read the labels: which rows count, and for every 32 rows and every label one
//     word
//        of bits, the rows of that label.
//     2  Softmax in place, 4 columns per thread, and the cross entropy if the loss has that term.
//     3  S and n: one thread per entry (or several entries per thread, or several threads per entry). It walks the bits of its label,
//     in
//        the order of the rows: no sort, and no sum in an order that the schedule decides. Sums are in fp64.
//     4  log|det S| and V = S^{-T} (logdet_inverse), and the scalars (loss_of).
//     5  dz = p (alpha (V[y] - <p, V[y]>) + gamma) - gamma e_y in place, alpha = -w scale / n[y], gamma = w ce_scale; then store it.
//
// Without the gradient, steps 1 to 4 are loss_forward of such problems, for logits of any type.
//
// Step 5 uses V in the precision of the softmax, its rows times n: R^{-T}, which has moderate size for sample weights of any size. S
// sums probabilities that are rounded to that precision; the gradient uses the same ones.
#pragma once

#include "../plan/layout.h"
#include "combine.cuh"
#include "logdet_inverse/block.cuh"
#include "rows.cuh"

namespace ldmi::cuda {

// The outputs: the loss; with the gradient grad [N, C] contiguous, otherwise lse [N], V [C, C] (or null) and the factors
template <class F>
struct FusedResult {
  F* loss;
  F* grad;
  F* lse;
  double* V;
  double *scale, *ce_scale;
};

using plan::FusedSpace;
using plan::FusedTiles;

namespace fused_rows {

inline constexpr int kNone = 254, kBad = 255;  // labels of rows that do not count

// Which rows count; returns whether this thread saw a label or a weight that is out of range.
template <class Space>
LDMI_DEVICE bool read_labels(const Batch& batch, const Space& space, int N, int wide) {
  bool bad = false;
  for (int chunk = warp(); chunk * kWarp < N; chunk += Space::kThreads / kWarp) {
    const int i = chunk * kWarp + lane();
    double weight = 0.0;
    int64_t label = kUnused;
    bool wrong = false;
    if (i < N) label = used_label(batch, i, weight, wrong);
    bad |= wrong;
    const int code = wrong ? kBad : label < 0 ? kNone : static_cast<int>(label);
    if (i < N) {
      space.label[i] = static_cast<uint8_t>(code);
      if (batch.weights.data != nullptr) space.weight[i] = weight;
    }
    uint32_t* const rows = space.rows + chunk * wide;
    for (int k = lane(); k < wide; k += kWarp) rows[k] = 0;
    sync_warp();
    const unsigned same = match_any(static_cast<unsigned>(code));
    if (code < kNone && lane() == lowest(same)) rows[code] = same;
  }
  return bad;
}

// Copies the logits into the tile. Copies by copy_async are complete after wait_copies.
template <class E, class F>
LDMI_DEVICE void read_logits(const Matrix& m, F* tile) {
  const int total = static_cast<int>(m.rows * m.columns);
  if constexpr (std::is_same_v<E, F>) {
    if (is_flat(m)) {
      copy_flat(m, 0, static_cast<int>(m.rows), tile);
      commit_copies();
    } else {
      copy_strided(m, 0, static_cast<int>(m.rows), tile);
    }
  } else {
    constexpr int kPack = Pack<E>::kCount;
    const int whole = is_flat(m) ? total / kPack * kPack : 0, columns = static_cast<int>(m.columns);
    for (int at = thread_idx() * kPack; at < whole; at += block_dim() * kPack) {
      const Pack<E> pack = load16_once(static_cast<const E*>(m.data) + at);
      LDMI_UNROLL
      for (int k = 0; k < kPack; ++k) tile[at + k] = widen(pack[k]);
    }
    for (int at = whole + thread_idx(); at < total; at += block_dim()) {
      const int row = at / columns;
      tile[at] = widen(load_once(element<E>(m, row, at - row * columns)));
    }
  }
}

// Calls body(first, rows per pass): kLanes lanes per row and kTogether rows per lane, whose chains of instructions interleave.
template <class Space, int kTogether, class Body>
LDMI_DEVICE void for_rows(int N, const Body& body) {
  constexpr int kStep = kWarp / Space::kLanes, kWarps = Space::kThreads / kWarp;
  for (int first = warp() * kStep * kTogether; first < N; first += kWarps * kStep * kTogether)
    body(first + lane() / Space::kLanes, kStep);
}

}  // namespace fused_rows

template <class E, int kWidth, bool kGradient>
LDMI_KERNEL void LDMI_BOUNDS((FusedSpace<Compute<E>, kWidth>::kThreads), 1)
    fused_block(Batch batch, LossOptions options, FusedResult<Compute<E>> result, FusedTiles tiles) {
  using F = Compute<E>;
  using Space = FusedSpace<F, kWidth>;
  constexpr int kBlock = Space::kThreads, L = Space::kLanes, kColumns = kWidth / L, kTogether = 2;
  constexpr bool kOneWarp = kWidth <= kFactorWarp;  // one warp eliminates, and may use all registers
  constexpr int kLess = kWidth - 8;                 // at most this many classes, or more
  constexpr bool kSplit = kWidth == 16;             // several threads may share an entry of S
  const int N = static_cast<int>(batch.logits.rows), C = static_cast<int>(batch.logits.columns);
  const bool weighted = batch.weights.data != nullptr, with_ce = options.cross_entropy_weight != 0.0;
  const int wide = tiles.wide, splits = tiles.splits;
  Carve carve;
  const Space space(carve, N, C, weighted, tiles);

  fused_rows::read_logits<E>(batch.logits, space.tile);
  bool bad = fused_rows::read_labels(batch, space, N, wide);
  wait_copies<0>();
  bad = sync_block_or(bad);

  double ce = 0.0;
  fused_rows::for_rows<Space, kTogether>(N, [&](int row, int step) {
    F x[kTogether][kColumns], own[kTogether], maximum[kTogether], sum[kTogether];
    int label[kTogether];
    LDMI_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int r = row + u * step;
      label[u] = r < N ? space.label[r] : fused_rows::kNone;
      own[u] = 0;
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int c = lane() % L + L * j;
        x[u][j] = label[u] < fused_rows::kNone && c < C ? space.tile[r * C + c] : -infinity<F>();
        if (c == label[u]) own[u] = x[u][j];
        maximum[u] = j == 0 ? x[u][j] : fmax(maximum[u], x[u][j]);
      }
    }
    if (batch.probs) {
      LDMI_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        LDMI_UNROLL
        for (int j = 0; j < kColumns; ++j) x[u][j] = isfinite(x[u][j]) ? x[u][j] : not_a_number<F>();
      }
    } else {
      group_reduce<L, true>(maximum, static_cast<F*>(nullptr));
      LDMI_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        sum[u] = 0;
        LDMI_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          x[u][j] = lane() % L + L * j < C ? exp(x[u][j] - maximum[u]) : F{0};
          sum[u] += x[u][j];
        }
      }
      group_reduce<L, false>(sum, static_cast<F*>(nullptr));
    }
    LDMI_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int r = row + u * step;
      if (!kGradient && r < N && lane() % L == 0) {
        store(result.lse + r, label[u] < fused_rows::kNone && !batch.probs ? maximum[u] + log(sum[u]) : F{0});
      }
      if (label[u] >= fused_rows::kNone) continue;
      const F inverse = batch.probs ? F{1} : F{1} / sum[u];
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int c = lane() % L + L * j;
        if (c < C) space.tile[r * C + c] = x[u][j] * inverse;
      }
      if (with_ce && label[u] % L == lane() % L) {
        // this order of operations loses no digits when all logits are far from 0
        const F minus_log = batch.probs ? -log(own[u]) : log(sum[u]) + (maximum[u] - own[u]);
        ce += (weighted ? space.weight[r] : 1.0) * static_cast<double>(minus_log);
      }
    }
  });
  if (with_ce) {
    ce = warp_sum(ce);
    if (lane() == 0) space.ce[warp()] = ce;
  }
  sync_block();

  {
    const int pairs = wide * wide, split = pairs < kBlock ? thread_idx() / pairs : 0;  // some threads may have nothing to do
    const int c = thread_idx() % wide, first = thread_idx() / wide % wide, step = pairs < kBlock ? wide : kBlock / wide;
    for (int k = first; k < C && c < C && split < splits; k += step) {
      double sum = 0.0, total = 0.0;
      int count = 0;
      for (int chunk = split; chunk * kWarp < N; chunk += splits) {
        uint32_t rows = space.rows[chunk * wide + k];
        const F* const p = space.tile + chunk * kWarp * C + c;
        const double* const weight = space.weight + chunk * kWarp;
        count += popcount(rows);
        while (rows != 0) {  // two at a time
          const int r = lowest(rows);
          rows &= rows - 1;
          const int r2 = rows != 0 ? lowest(rows) : r;
          const double value = static_cast<double>(p[r * C]);
          const double value2 = rows != 0 ? static_cast<double>(p[r2 * C]) : 0.0;
          if (weighted) {
            const double w = weight[r], w2 = rows != 0 ? weight[r2] : 0.0;
            total = total + w + w2;
            sum = fma(w2, value2, fma(w, value, sum));
          } else {
            sum = sum + value + value2;
          }
          rows &= rows - 1;
        }
      }
      space.part[(split * wide + k) * (wide + 1) + c] = sum;
      if (!weighted) total = static_cast<double>(count);
      if (bad) total = not_a_number<double>();
      if (c == 0) (kSplit ? space.part_n[split * wide + k] : space.n[k]) = total;
    }
  }
  sync_block();

  const auto entry = [&](int i, int j) {
    double sum = 0.0;
    for (int q = 0; q < (kSplit ? splits : 1); ++q) sum += space.part[(q * wide + i) * (wide + 1) + j];
    return bad ? not_a_number<double>() : sum;
  };
  const auto weight = [&](int64_t i) { return space.n[i]; };
  const auto emit = [&](int i, int j, double value) {
    if constexpr (kGradient) {
      space.V[i * Space::kPitch + j] = static_cast<F>(value * space.n[i]);
    } else {
      store(result.V + i * C + j, value);
    }
  };
  const bool inverse = kGradient || result.V != nullptr;
  // the scalars, by warp 0, each lane with the same numbers
  const auto scalars = [&](const Determinant& found) {
    double total_ce = 0.0;
    for (int w = 0; with_ce && w < kBlock / kWarp; ++w) total_ce += space.ce[w];
    const Loss loss = loss_of(found, total_weight(C, weight), total_ce, options);
    if (lane() == 0) store(result.loss, static_cast<F>(loss.loss));
    if constexpr (kGradient) {
      // finite also for the weight of an absent class, whose row of V is zero
      for (int k = lane(); k < C; k += kWarp) space.alpha[k] = fmax(-loss.scale / space.n[k], -0x1.fffffffffffffp1023);
      if (lane() == 0) *space.ce_scale = loss.ce_scale;
    } else if (lane() == 0) {
      store(result.scale, loss.scale);
      store(result.ce_scale, loss.ce_scale);
    }
  };
  if constexpr (kOneWarp) {
    if (warp() == 0) {
      if (kSplit && lane() < C) {
        double sum = 0.0;
        for (int q = 0; q < splits; ++q) sum += space.part_n[q * wide + lane()];
        space.n[lane()] = sum;
      }
      sync_warp();
      if (C <= kLess) {
        scalars(factor::by_warp<kLess>(C, options.strict, inverse, entry, weight, emit));
      } else {
        scalars(factor::by_warp<kWidth>(C, options.strict, inverse, entry, weight, emit));
      }
    }
  } else {
    const Determinant found = factor::by_block<kWidth / kWarp>(space.factor, C, options.strict, inverse, entry, weight, emit);
    if (warp() == 0) scalars(found);
  }
  if constexpr (!kGradient) return;
  sync_block();

  const double ce_scale = *space.ce_scale;
  fused_rows::for_rows<Space, kTogether>(N, [&](int row, int step) {
    F p[kTogether][kColumns], v[kTogether][kColumns], mean[kTogether];
    int label[kTogether];
    LDMI_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int r = row + u * step;
      label[u] = r < N ? space.label[r] : fused_rows::kNone;
      mean[u] = 0;
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int c = lane() % L + L * j;
        const bool inside = label[u] < fused_rows::kNone && c < C;
        p[u][j] = inside ? space.tile[r * C + c] : F{0};
        v[u][j] = inside ? space.V[label[u] * Space::kPitch + c] : F{0};
        mean[u] = fma(p[u][j], v[u][j], mean[u]);
      }
    }
    group_reduce<L, false>(mean, static_cast<F*>(nullptr));
    LDMI_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int r = row + u * step;
      if (r >= N) continue;
      const bool counts = label[u] < fused_rows::kNone;
      F alpha = 0, gamma = 0;
      if (counts) {
        const double w = weighted ? space.weight[r] : 1.0;
        alpha = static_cast<F>(w * space.alpha[label[u]]);
        gamma = static_cast<F>(w * ce_scale);
      }
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int c = lane() % L + L * j;
        F value = batch.probs ? alpha * v[u][j] : p[u][j] * fma(alpha, v[u][j] - mean[u], gamma);
        if (ce_scale != 0.0 && c == label[u]) value -= batch.probs ? gamma / p[u][j] : gamma;
        if (!counts) value = label[u] == fused_rows::kBad ? not_a_number<F>() : F{0};
        if (c < C) space.tile[r * C + c] = value;
      }
    }
  });
  sync_block();

  constexpr int kPack = Pack<F>::kCount;
  const int whole = reinterpret_cast<uintptr_t>(result.grad) % 16 == 0 ? N * C / kPack * kPack : 0;
  for (int at = thread_idx() * kPack; at < whole; at += kBlock * kPack) store16(result.grad + at, shared_load16(space.tile + at));
  for (int at = whole + thread_idx(); at < N * C; at += kBlock) store(result.grad + at, space.tile[at]);
}

// -------------------------------------------------------------------------------------------------------------------- host

inline FusedTiles fused_tiles(const plan::CudaFused& plan) {
  return {static_cast<int>(plan.wide), static_cast<int>(plan.splits), static_cast<int>(plan.stride)};
}

template <class E, int kWidth, bool kGradient>
int launch_fused_width(const Batch& batch, const LossOptions& options, const FusedResult<Compute<E>>& result,
                       const plan::CudaFused& plan, Stream stream) {
  using Space = FusedSpace<Compute<E>, kWidth>;
  const FusedTiles tiles = fused_tiles(plan);
  Carve carve;
  const Space space(carve, static_cast<int>(batch.logits.rows), static_cast<int>(batch.logits.columns), batch.weights.data != nullptr,
                    tiles);
  static_cast<void>(space);
  Grid grid;
  grid.threads = Space::kThreads;
  grid.smem = carve.bytes();
  return launch(fused_block<E, kWidth, kGradient>, grid, stream, batch, options, result, tiles);
}

template <class E, bool kGradient>
int launch_fused(const Batch& batch, const LossOptions& options, const FusedResult<Compute<E>>& result, const plan::CudaFused& plan,
                 Stream stream) {
  switch (plan.width) {
    case 16:
      return launch_fused_width<E, 16, kGradient>(batch, options, result, plan, stream);
    case 32:
      return launch_fused_width<E, 32, kGradient>(batch, options, result, plan, stream);
    default:
      return launch_fused_width<E, 64, kGradient>(batch, options, result, plan, stream);
  }
}

}  // namespace ldmi::cuda
