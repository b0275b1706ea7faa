// accumulate_by_label, for more than 32 classes: rows in the order of their labels, so that one row of S stays in registers.
//
// The order comes from sort.cuh. A run of rows may begin or end inside a label; what belongs to a label that began in an earlier run
// goes to BoundarySums, which a second kernel adds.
#pragma once

#include "../rows.cuh"
#include "../sort.cuh"

namespace ldmi::cuda {

using plan::BoundarySums;
using plan::take_boundary_sums;

// A group of kGroup threads (a warp or a block) visits a run of rows in the order of labels, kColumns columns per thread, in accesses
// of kAccess values. It stores the row of S and n of each label that begins in the run; sort.start says which labels have no rows.
// With kGiven, shift and inverse are known: this is for rows longer than the registers of a group, one run of columns after the other.
template <class E, int kAccess, int kGroup, int kColumns, int kRows, bool kGiven>
LDMI_DEVICE void accumulate_by_label(const Batch& batch, const LabelOrder& sort, int64_t segments, const Compute<E>* shift,
                                     const Compute<E>* inverse, Compute<E>* lse, double* S, double* n, const BoundarySums& boundary) {
  using F = Compute<E>;
  static_assert(kColumns % kAccess == 0);
  constexpr int kWarps = kGroup / kWarp;
  Carve carve;
  F* const scratch = carve.take<F>(2 * kRows * kWarps);
  const int64_t C = batch.logits.columns, used = load(sort.start + batch.num_labels);
  const int groups = block_dim() / kGroup, t = thread_idx() % kGroup;
  const Columns<kAccess, kGroup> column{t};
  const int64_t segment = block_idx() * groups + thread_idx() / kGroup;
  double ce = 0;
  if (segment < segments) {
    const int64_t begin = cut(used, segments, segment), end = cut(used, segments, segment + 1);
    int64_t side = kUnused;
    bool ignored = false;
    double unused_weight;
    // the label that the run before this one ends with
    const int64_t before =
        begin > 0 && begin < end ? used_label(batch, load(sort.order + begin - 1), unused_weight, ignored) : kUnused;
    for (int64_t first_column = 0; first_column < C; first_column += kGroup * kColumns) {
      const int left = static_cast<int>(C - first_column < kGroup * kColumns ? C - first_column : kGroup * kColumns);
      double sums[kColumns], run_weight = 0;
      LDMI_UNROLL
      for (int j = 0; j < kColumns; ++j) sums[j] = 0;
      int64_t current = kUnused;
      const auto finish_run = [&] {
        if (current == kUnused) return;
        double* const to = (current == before ? boundary.sums + segment * C : S + current * C) + first_column;
        LDMI_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          if (column(j) < left) store(to + column(j), sums[j]);
          sums[j] = 0;
        }
        if (t == 0 && first_column == 0) store(current == before ? boundary.weight + segment : n + current, run_weight);
        if (current == before) side = current;
        run_weight = 0;
      };
      const auto row_at = [&](int64_t at) { return lane() < kRows && at + lane() < end ? load(sort.order + at + lane()) : kUnused; };
      int64_t following = row_at(begin);
      for (int64_t at = begin; at < end; at += kRows) {
        F x[kRows][kColumns], maximum[kRows], sum[kRows];
        // lane u of each warp holds what belongs to row u
        const int64_t mine = following;
        following = row_at(at + kRows);
        int64_t row[kRows];
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          row[u] = shfl(mine, u);
          load_columns(element<E>(batch.logits, row[u] < 0 ? 0 : row[u], first_column), batch.logits.column_stride, column,
                       row[u] < 0 ? 0 : left, -infinity<F>(), x[u]);
        }
        double my_weight = 0;
        const int64_t my_label = mine < 0 ? kUnused : used_label(batch, mine, my_weight, ignored);
        if (batch.probs) {
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            LDMI_UNROLL
            for (int j = 0; j < kColumns; ++j) {
              x[u][j] = column(j) >= left ? F{0} : isfinite(x[u][j]) ? x[u][j] : not_a_number<F>();
            }
            maximum[u] = 0;
            sum[u] = 1;
          }
        } else {
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            maximum[u] = x[u][0];
            LDMI_UNROLL
            for (int j = 1; j < kColumns; ++j) maximum[u] = fmax(maximum[u], x[u][j]);
            if constexpr (kGiven) maximum[u] = row[u] >= 0 ? load(shift + row[u]) : F{0};
          }
          if constexpr (!kGiven) group_reduce<kGroup, true>(maximum, scratch);
          LDMI_UNROLL
          for (int u = 0; u < kRows; ++u) {
            sum[u] = 0;
            LDMI_UNROLL
            for (int j = 0; j < kColumns; ++j) {
              x[u][j] = column(j) < left ? exp(x[u][j] - maximum[u]) : F{0};
              sum[u] += x[u][j];
            }
          }
          if constexpr (!kGiven) group_reduce<kGroup, false>(sum, scratch + kRows * kWarps);
        }
        F my_inverse = 0;
        if (mine >= 0) {
          if constexpr (kGiven) {
            my_inverse = load(inverse + mine);
          } else {
            F my_maximum = maximum[0], my_sum = sum[0];
            LDMI_UNROLL
            for (int u = 1; u < kRows; ++u) {
              my_maximum = lane() == u ? maximum[u] : my_maximum;
              my_sum = lane() == u ? sum[u] : my_sum;
            }
            my_inverse = 1 / my_sum;
            if (t < kWarp) {
              const F own = static_cast<F>(widen(load_const(element<E>(batch.logits, mine, column_of(my_label, C)))));
              if (batch.probs) {
                ce -= my_weight * log(static_cast<double>(own));
                store(lse + mine, F{0});
              } else {
                const F log_sum = log(my_sum);
                // this order of operations loses no digits when all logits are far from 0
                ce += my_weight * static_cast<double>(log_sum + (my_maximum - own));
                store(lse + mine, my_maximum + log_sum);
              }
            }
          }
        }
        LDMI_UNROLL
        for (int u = 0; u < kRows; ++u) {
          if (row[u] < 0) continue;  // the same in the whole group, like all of these conditions
          const int64_t label = shfl(my_label, u);
          if (label != current) {
            finish_run();
            current = label;
          }
          const double weight = shfl(my_weight, u);
          const F factor = shfl(my_inverse, u);
          run_weight += weight;
          LDMI_UNROLL
          for (int j = 0; j < kColumns; ++j) sums[j] = fma(static_cast<double>(x[u][j] * factor), weight, sums[j]);
        }
      }
      finish_run();
    }
    ce = warp_sum(ce);  // of the lanes of a group's first warp
    if (t == 0) {
      store(boundary.label + segment, side);
      store(boundary.ce + segment, ce);
    }
  }
  if constexpr (!kGiven) {
    const int64_t threads = grid_dim() * block_dim(), all = batch.logits.rows;
    for (int64_t at = used + block_idx() * block_dim() + thread_idx(); at < all; at += threads) {
      store(lse + load(sort.order + at), F{0});
    }
  }
}

template <class E, int kAccess, int kGroup, int kColumns, int kRows, bool kGiven>
LDMI_KERNEL void LDMI_BOUNDS((kGroup == kWarp ? static_cast<int>(plan::walk_threads(kWarp * kColumns)) : kGroup),
                             (kGroup == kThreads ? 1
                              : kGroup == kWarp  ? static_cast<int>(plan::walk_blocks(kWarp * kColumns))
                                                 : 3))
    joint_by_label(Batch batch, LabelOrder sort, int64_t segments, const Compute<E>* shift, const Compute<E>* inverse, Compute<E>* lse,
                   double* S, double* n, BoundarySums boundary) {
  accumulate_by_label<E, kAccess, kGroup, kColumns, kRows, kGiven>(batch, sort, segments, shift, inverse, lse, S, n, boundary);
}

// Adds the boundary sums of later runs to their labels, in the order of the runs, one block per label. Writes zeros for labels without
// rows, and NaN everywhere when a label or weight is out of range. Adds up the cross entropy from `ce_part`.
LDMI_DEVICE void add_boundary_sums(int64_t labels, int64_t C, const LabelOrder& sort, int64_t segments, const BoundarySums& boundary,
                                   const double* ce_part, int64_t ce_parts, double* S, double* n, double* ce) {
  Carve carve;
  double* const scratch = carve.take<double>(kThreads / kWarp);
  bool bad = false;
  for (int64_t p = thread_idx(); p < sort.pieces; p += kThreads) bad |= load(sort.bad + p) != 0;
  bad = sync_block_or(bad);
  const int64_t used = load(sort.start + labels);
  for (int64_t k = block_idx(); k < labels; k += grid_dim()) {
    const int64_t begin = load(sort.start + k), end = load(sort.start + k + 1);
    // the runs first .. last begin within the label, not with it
    int64_t low = 0, high = segments;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cut(used, segments, middle) > begin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t first = low;
    int64_t last = first;
    while (last < segments && cut(used, segments, last) < end) ++last;
    if (begin == end || bad || first < last) {
      for (int64_t c = thread_idx(); c < C; c += kThreads) {
        double total = begin == end ? 0.0 : load(S + k * C + c);
        for (int64_t s = first; s < last && !bad; ++s) {
          if (load(boundary.label + s) == k) total += load(boundary.sums + s * C + c);
        }
        store(S + k * C + c, bad ? not_a_number<double>() : total);
      }
      if (thread_idx() == 0) {
        double total = begin == end ? 0.0 : load(n + k);
        for (int64_t s = first; s < last && !bad; ++s) {
          if (load(boundary.label + s) == k) total += load(boundary.weight + s);
        }
        store(n + k, bad ? not_a_number<double>() : total);
      }
    }
  }
  if (block_idx() == 0) {
    double total = 0;
    for (int64_t p = thread_idx(); p < ce_parts; p += kThreads) total += load(ce_part + p);
    total = block_sum(total, scratch);
    if (thread_idx() == 0) store(ce, bad ? not_a_number<double>() : total);
  }
}

template <int kBlock>
LDMI_KERNEL void LDMI_BOUNDS(kBlock, 1)
    joint_add_boundary_sums(int64_t labels, int64_t C, LabelOrder sort, int64_t segments, BoundarySums boundary, const double* ce_part,
                            int64_t ce_parts, double* S, double* n, double* ce) {
  add_boundary_sums(labels, C, sort, segments, boundary, ce_part, ce_parts, S, n, ce);
}

}  // namespace ldmi::cuda
