// row_logsumexp: the log-sum-exp and the cross entropy of each row alone. For soft targets, and for rows longer than registers.
#pragma once

#include "../rows.cuh"

namespace ldmi::cuda {

// One group of threads per row, in one pass: shift (the maximum), inverse = 1 / sum (0 in rows that do not count) and, if K == C, the
// cross entropy. For soft targets and for rows longer than registers. ce_part and bad_part [blocks]
template <class E, int kGroup>
LDMI_DEVICE void row_logsumexp(const Batch& batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part,
                               uint32_t* bad_part) {
  using F = Compute<E>;
  constexpr int kGroups = kThreads / kGroup, kBatch = 4;
  Carve carve;
  F* const scratch = carve.take<F>(2 * kThreads / kWarp);
  double* const ce_scratch = carve.take<double>(kThreads / kWarp);
  const int64_t rows = batch.logits.rows, C = batch.logits.columns;
  const bool soft = batch.soft.data != nullptr;
  const int t = thread_idx() % kGroup;
  double ce = 0;
  bool bad = false;
  for (int64_t i = block_idx() * kGroups + thread_idx() / kGroup; i < rows; i += grid_dim() * kGroups) {
    double weight;
    int64_t label = 0;
    if (soft) {
      weight = used_weight(batch, i, bad);
    } else {
      label = used_label(batch, i, weight, bad);
    }
    if (weight == 0) {  // the same in the whole group
      if (t == 0) {
        store(lse + i, F{0});
        store(shift + i, F{0});
        store(inverse + i, F{0});
      }
      continue;
    }
    F maximum[1] = {-infinity<F>()}, sum[1] = {0};
    double log_sum = 0;
    if (batch.probs) {
      maximum[0] = 0;
      sum[0] = 1;
    } else {
      F mine = 0;
      for (int64_t c = t; c < C; c += kGroup * kBatch) {
        F x[kBatch], top = maximum[0];
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          const int64_t at = c + j * kGroup;
          x[j] = at < C ? static_cast<F>(widen(load_const(element<E>(batch.logits, i, at)))) : -infinity<F>();
        }
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) top = fmax(top, x[j]);
        if (top != maximum[0]) mine *= exp(maximum[0] - top);
        maximum[0] = top;
        LDMI_UNROLL
        for (int j = 0; j < kBatch; ++j) mine += x[j] == -infinity<F>() ? F{0} : exp(x[j] - top);
      }
      const F own = maximum[0];
      group_reduce<kGroup, true>(maximum, scratch);
      sum[0] = own == maximum[0] ? mine : mine * exp(own - maximum[0]);
      group_reduce<kGroup, false>(sum, scratch + kThreads / kWarp);
      if (!isfinite(maximum[0])) sum[0] = not_a_number<F>();
      log_sum = log(static_cast<double>(sum[0]));
    }
    if (t == 0) {
      store(lse + i, batch.probs ? F{0} : static_cast<F>(maximum[0] + static_cast<F>(log_sum)));
      store(shift + i, maximum[0]);
      store(inverse + i, 1 / sum[0]);
    }
    const auto minus_log = [&](int64_t c) {
      const double x = static_cast<double>(widen(load_const(element<E>(batch.logits, i, c))));
      return batch.probs ? -log(x) : log_sum + (static_cast<double>(maximum[0]) - x);
    };
    if (!soft) {
      if (t == 0) ce += weight * minus_log(column_of(label, C));
    } else if (batch.num_labels == C) {
      for (int64_t c = t; c < C; c += kGroup) {
        const F target = value_at<F>(batch.soft, i, c);
        // a zero in the target contributes nothing, also where the prediction is 0
        if (target != 0) ce += weight * static_cast<double>(target) * minus_log(c);
      }
    }
  }
  bad = sync_block_or(bad);
  ce = block_sum(ce, ce_scratch);
  if (thread_idx() == 0) {
    store(ce_part + block_idx(), ce);
    store(bad_part + block_idx(), bad ? 1u : 0u);
  }
}

template <class E, int kGroup>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 2)
    joint_row_logsumexp(Batch batch, Compute<E>* lse, Compute<E>* shift, Compute<E>* inverse, double* ce_part, uint32_t* bad_part) {
  row_logsumexp<E, kGroup>(batch, lse, shift, inverse, ce_part, bad_part);
}

template <class F>
size_t row_logsumexp_smem() {
  Carve carve;
  carve.take<F>(2 * kThreads / kWarp);
  carve.take<double>(kThreads / kWarp);
  return carve.bytes();
}

}  // namespace ldmi::cuda
