// joint_soft, for soft targets: S = T^T diag(w) P as a product of tiles on the fp64 tensor cores, after row_logsumexp.
#pragma once

#include "../rows.cuh"

namespace ldmi::cuda {

inline constexpr int kSoftTile = 64, kSoftRows = 32, kSoftPitch = 72;

// S = T^T diag(w) P. A block computes a tile of 64 x 64 of S for one split of the rows; each of its 8 warps has 16 x 32 of the tile.
// partial [splits, K * C + K]
template <class E>
LDMI_DEVICE void accumulate_soft(const Batch& batch, const Compute<E>* shift, const Compute<E>* inverse, int64_t splits,
                                 double* partial) {
  using F = Compute<E>;
  Carve carve;
  F* const predictions = carve.take<F>(kSoftRows * kSoftPitch);
  F* const targets = carve.take<F>(kSoftRows * kSoftPitch);
  double* const weights = carve.take<double>(kSoftRows);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns, K = batch.num_labels;
  const int64_t across = (C + kSoftTile - 1) / kSoftTile, down = (K + kSoftTile - 1) / kSoftTile;
  const int my_k = warp() % 4 * 16, my_c = warp() / 4 * 32;
  for (int64_t job = block_idx(); job < across * down * splits; job += grid_dim()) {
    const int64_t split = job / (across * down), k0 = job / across % down * kSoftTile, c0 = job % across * kSoftTile;
    const int64_t begin = cut(rows, splits, split), end = cut(rows, splits, split + 1);
    M8N8K4::C product[2][4];
    double count[2] = {0, 0};
    LDMI_UNROLL
    for (int m = 0; m < 2; ++m) {
      LDMI_UNROLL
      for (int j = 0; j < 4; ++j) product[m][j].value[0] = product[m][j].value[1] = 0;
    }
    for (int64_t base = begin; base < end; base += kSoftRows) {
      sync_block();  // the product before is done
      if (thread_idx() < kSoftRows) {
        const int64_t i = base + thread_idx();
        bool ignored = false;
        weights[thread_idx()] = i < end ? used_weight(batch, i, ignored) : 0.0;
      }
      sync_block();
      for (int at = thread_idx(); at < kSoftRows * kSoftTile; at += kThreads) {
        const int r = at / kSoftTile, j = at % kSoftTile;
        const int64_t i = base + r;
        F p = 0, target = 0;
        if (weights[r] != 0) {
          if (c0 + j < C) {
            p = static_cast<F>(widen(load_const(element<E>(batch.logits, i, c0 + j))));
            if (batch.probs) {
              if (!isfinite(p)) p = not_a_number<F>();
            } else {
              p = exp(p - load(shift + i)) * load(inverse + i);
            }
          }
          if (k0 + j < K) target = value_at<F>(batch.soft, i, k0 + j);
        }
        predictions[r * kSoftPitch + j] = p;
        targets[r * kSoftPitch + j] = target;
      }
      sync_block();
      for (int step = 0; step < kSoftRows / 4; ++step) {
        const int r = step * 4 + lane() % 4;
        double a[2], b[4];
        LDMI_UNROLL
        for (int m = 0; m < 2; ++m) {
          a[m] = static_cast<double>(targets[r * kSoftPitch + my_k + m * 8 + lane() / 4]) * weights[r];
          if (my_c == 0 && c0 == 0) count[m] += a[m];
        }
        LDMI_UNROLL
        for (int j = 0; j < 4; ++j) b[j] = static_cast<double>(predictions[r * kSoftPitch + my_c + j * 8 + lane() / 4]);
        LDMI_UNROLL
        for (int m = 0; m < 2; ++m) {
          LDMI_UNROLL
          for (int j = 0; j < 4; ++j) product[m][j] = mma(a[m], b[j], product[m][j]);
        }
      }
    }
    double* const mine = partial + split * (K * C + K);
    LDMI_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int64_t k = k0 + my_k + m * 8 + lane() / 4;
      LDMI_UNROLL
      for (int j = 0; j < 4; ++j) {
        LDMI_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int64_t c = c0 + my_c + j * 8 + M8N8K4::c_col(lane(), i);
          if (k < K && c < C) store(mine + k * C + c, product[m][j].value[i]);
        }
      }
      const double total = warp_sum<4>(count[m]);
      if (my_c == 0 && c0 == 0 && k < K && lane() % 4 == 0) store(mine + K * C + k, total);
    }
  }
}

template <class E>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2)
    joint_soft(Batch batch, const Compute<E>* shift, const Compute<E>* inverse, int64_t splits, double* partial) {
  accumulate_soft<E>(batch, shift, inverse, splits, partial);
}

template <class F>
size_t soft_smem() {
  Carve carve;
  carve.take<F>(kSoftRows * kSoftPitch);
  carve.take<F>(kSoftRows * kSoftPitch);
  carve.take<double>(kSoftRows);
  return carve.bytes();
}

}  // namespace ldmi::cuda
