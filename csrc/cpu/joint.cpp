// S = sum_i w_i e_{y_i} p_i^T, n, the row logsumexp and the summed cross entropy, in one pass over the logits.
//
// A block of rows goes through three short phases: exponentials and their sums (in a tile that stays in L1), the scalars of each row
// (1 / sum, log sum), and the accumulation of w / sum * tile into row y of S, in double. Consecutive rows of one label share one pass
// over the row of S.

#include "../plan/plan.h"
#include "isa.h"
#include "tile.h"

namespace ldmi::cpu::LDMI_ISA {
namespace {

// The rows of a block that count.
template <class T>
struct Block {
  int count = 0;
  int64_t row[kBlockRows];
  int64_t label[kBlockRows];
  double weight[kBlockRows];
  // of the softmax; vectors are read from them, so their length is a whole number of vectors
  alignas(64) T maximum[kBlockRows];
  alignas(64) T sum[kBlockRows];
  alignas(64) T own[kBlockRows];         // the logit (or probability) of the row's own label
  alignas(64) double scale[kBlockRows];  // weight / sum
};

// Writes the predictions (before the division by their sum) of the rows of a block into `tile`; also lse and the cross entropy.
template <class T>
LDMI_INLINE void predict(const Batch& batch, Block<T>& block, T* tile, T* scratch, T* lse, double& ce) {
  const int64_t classes = batch.logits.columns, width = padded<T>(classes);
  if (batch.probs) {
    for (int r = 0; r < block.count; ++r) {
      const T* x = read_row(batch.logits, block.row[r], scratch);
      const T own = x[column_of(block.label[r], classes)];
      probabilities(x, classes, tile + r * width);
      block.scale[r] = block.weight[r];
      lse[block.row[r]] = 0;
      ce -= block.weight[r] * __builtin_log(static_cast<double>(own));
    }
    return;
  }
  for (int r = 0; r < block.count; ++r) {
    const T* x = read_row(batch.logits, block.row[r], scratch);
    block.own[r] = x[column_of(block.label[r], classes)];
    exponentials(x, classes, tile + r * width, block.maximum[r], block.sum[r]);
  }
  for (int r = block.count; r % kLanes<T> != 0; ++r) block.sum[r] = 1;
  alignas(64) T log_sum[kBlockRows];
  for (int r = 0; r < block.count; r += kLanes<T>) store(log_sum + r, log(load(block.sum + r)));
  for (int r = 0; r < block.count; ++r) block.scale[r] = block.weight[r] / static_cast<double>(block.sum[r]);
  for (int r = 0; r < block.count; ++r) {
    lse[block.row[r]] = block.maximum[r] + log_sum[r];
    // this order loses no precision if all logits are far from 0
    ce += block.weight[r] * static_cast<double>(log_sum[r] + (block.maximum[r] - block.own[r]));
  }
}

// Adds the sum of scale * tile row over the rows first..last to sums[0 .. width).
template <class T>
LDMI_INLINE void accumulate(const Block<T>& block, int first, int last, const T* tile, int64_t width, double* sums) {
  const double* scale = block.scale;
  if (last - first == 1) {
    for (int64_t j = 0; j < width; j += kLanes<T>) add_scaled(sums + j, load(tile + first * width + j), scale[first]);
    return;
  }
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    if constexpr (sizeof(T) == 4) {
      Vec<double> low = load(sums + j), high = load(sums + j + kLanes<double>);
      for (int r = first; r < last; ++r) {
        Vec<double> a, b;
        widen(load(tile + r * width + j), a, b);
        low = fma(a, splat(scale[r]), low);
        high = fma(b, splat(scale[r]), high);
      }
      store(sums + j, low);
      store(sums + j + kLanes<double>, high);
    } else {
      Vec<double> total = load(sums + j);
      for (int r = first; r < last; ++r) total = fma(load(tile + r * width + j), splat(scale[r]), total);
      store(sums + j, total);
    }
  }
}

void poison(int64_t labels, int64_t classes, double* S, double* n, double* ce) {
  for (int64_t i = 0; i < labels * classes; ++i) S[i] = kNaN;
  for (int64_t k = 0; k < labels; ++k) n[k] = kNaN;
  *ce = kNaN;
}

// Adds scale[r] * tile[r] to sums[label[r]] for `count` rows of `width`; small widths have loops with a constant number of vectors.
template <int kVectors>
LDMI_INLINE void add_rows_of(const float* tile, int count, const int64_t* label, const double* scale, int64_t vectors, double* sums) {
  constexpr int lanes = kLanes<float>;
  const int64_t n = kVectors > 0 ? kVectors : vectors;
  for (int r = 0; r < count; ++r, tile += n * lanes) {
    double* to = sums + label[r] * n * lanes;
#pragma GCC unroll 4
    for (int64_t j = 0; j < n * lanes; j += lanes) add_scaled(to + j, load(tile + j), scale[r]);
  }
}

LDMI_INLINE void add_rows(const float* tile, int count, const int64_t* label, const double* scale, int64_t width, double* sums) {
  switch (width / kLanes<float>) {
    case 1:
      return add_rows_of<1>(tile, count, label, scale, 1, sums);
    case 2:
      return add_rows_of<2>(tile, count, label, scale, 2, sums);
    case 3:
      return add_rows_of<3>(tile, count, label, scale, 3, sums);
    case 4:
      return add_rows_of<4>(tile, count, label, scale, 4, sums);
    default:
      return add_rows_of<0>(tile, count, label, scale, width / kLanes<float>, sums);
  }
}

// Sums the rows begin..end of one task into `sums` [K, width], `weights` [K] and `ce`; for few classes, in transposed groups of rows.
// A row that does not count is summed with weight 0.
LDMI_INLINE void sum_transposed(const Batch& batch, int64_t begin, int64_t end, double* sums, double* weights, double& ce, float* lse,
                                bool& wrong) {
  constexpr int lanes = kLanes<float>;
  const int64_t classes = batch.logits.columns, width = padded<float>(classes);
  alignas(64) float transposed[kTileClasses * lanes], scratch[kTileClasses * lanes], tile[kBlockRows * kTileClasses + kSide];
  alignas(64) float maximum[kBlockRows], sum[kBlockRows], own[kBlockRows], row_lse[kBlockRows], minus_log[kBlockRows];
  alignas(64) double weight[kBlockRows], scale[kBlockRows];
  int64_t label[kBlockRows];
  for (int64_t i = begin; i < end; i += kBlockRows) {
    const int count = static_cast<int>(end - i < kBlockRows ? end - i : kBlockRows);
    const bool all_used = used_labels(batch, i, count, label, weight, wrong);
    const bool direct = all_used && classes == batch.num_labels && in_place(batch.logits, i, count);
    for (int first = 0; first < count; first += lanes) {
      const float* x[lanes];
      if (direct && first + lanes <= count) {
        const float* row = static_cast<const float*>(batch.logits.data) + (i + first) * batch.logits.row_stride;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l, row += batch.logits.row_stride) {
          x[l] = row;
          own[first + l] = row[label[first + l]];
        }
      } else {
        rows_of_group(batch.logits, i + first, count - first < lanes ? count - first : lanes, label + first, scratch, x);
        for (int l = 0; l < lanes && first + l < count; ++l) {
          own[first + l] = label[first + l] == kUnused ? 0 : x[l][column_of(label[first + l], classes)];
        }
      }
      gather_tile(x, classes, transposed);
      Vec<float> group_maximum, group_sum;
      exponentials_of_tile(transposed, classes, group_maximum, group_sum);
      store(maximum + first, group_maximum);
      store(sum + first, group_sum);
      for (int64_t c = classes; c < width; ++c) store(transposed + c * lanes, splat(0.0f));
      scatter_tile(transposed, classes, tile + first * width, width);
    }
    if (!all_used) {
      for (int r = 0; r < count; ++r) {
        if (label[r] == kUnused) label[r] = 0, weight[r] = 0;
      }
    }
    for (int r = count; r % lanes != 0; ++r) own[r] = 0, weight[r] = 0;
    Vec<double> block_ce[2] = {splat(0.0), splat(0.0)};
    for (int r = 0; r < count; r += lanes) {
      const Vec<float> log_sum = log(load(sum + r)), m = load(maximum + r);
      store(row_lse + r, m + log_sum);
      Vec<double> low, high;
      // this order loses no precision if all logits are far from 0
      const Vec<float> row_ce = log_sum + (m - load(own + r));
      store(minus_log + r, row_ce);
      widen(row_ce, low, high);
      block_ce[0] = fma(low, load(weight + r), block_ce[0]);
      block_ce[1] = fma(high, load(weight + r + lanes / 2), block_ce[1]);
      widen(load(sum + r), low, high);
      store(scale + r, load(weight + r) / low);
      store(scale + r + lanes / 2, load(weight + r + lanes / 2) / high);
    }
    if (all_used) {
      std::memcpy(lse + i, row_lse, static_cast<std::size_t>(count) * sizeof(float));
      ce += reduce_add(block_ce[0] + block_ce[1]);
    } else {
      for (int r = 0; r < count; ++r) lse[i + r] = weight[r] == 0 ? 0 : row_lse[r];
      for (int r = 0; r < count; ++r) {
        if (weight[r] != 0) ce += weight[r] * static_cast<double>(minus_log[r]);
      }
    }
    for (int r = 0; r < count; ++r) weights[label[r]] += weight[r];
    add_rows(tile, count, label, scale, width, sums);
  }
}

// The same row by row: for more classes, probabilities and fp64.
template <class T>
void sum_rows(const Batch& batch, int64_t begin, int64_t end, double* sums, double* weights, double& ce, T* lse, bool& wrong) {
  const int64_t width = padded<T>(batch.logits.columns);
  const int most = block_rows(width);
  Buffer<T> tile(most * width), scratch(width);
  Block<T> block;
  for (int64_t i = begin; i < end;) {
    double weight;
    for (block.count = 0; i < end && block.count < most; ++i) {
      const int64_t label = used_label(batch, i, weight, wrong);
      if (label == kUnused) {
        lse[i] = 0;
        continue;
      }
      weights[label] += weight;
      block.row[block.count] = i;
      block.label[block.count] = label;
      block.weight[block.count++] = weight;
    }
    predict(batch, block, tile.get(), scratch.get(), lse, ce);
    for (int r = 0; r < block.count;) {
      int last = r + 1;
      while (last < block.count && block.label[last] == block.label[r]) ++last;
      accumulate(block, r, last, tile.get(), width, sums + block.label[r] * width);
      r = last;
    }
  }
}

// Every task sums the rows of its range, in their order, into its own sums.
template <class T>
void joint_natural(const Batch& batch, const plan::CpuJoint& plan, double* S, double* n, T* lse, double* ce, const Threads& threads) {
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, labels = batch.num_labels;
  const int64_t width = padded<T>(classes), tasks = plan.tasks;
  const int64_t size = labels * width + labels + 1;
  Buffer<double> partial(tasks * size);
  Buffer<uint8_t> bad(tasks);
  for_each_task(threads, tasks, [&](int64_t task) {
    double* sums = partial.get() + task * size;
    double* weights = sums + labels * width;
    double my_ce = 0;
    bool wrong = false;
    std::memset(sums, 0, static_cast<std::size_t>(size) * sizeof(double));
    const int64_t begin = cut(rows, tasks, task), end = cut(rows, tasks, task + 1);
    if constexpr (sizeof(T) == 4) {
      if (classes <= kTileClasses && !batch.probs) {
        sum_transposed(batch, begin, end, sums, weights, my_ce, lse, wrong);
      } else {
        sum_rows(batch, begin, end, sums, weights, my_ce, lse, wrong);
      }
    } else {
      sum_rows(batch, begin, end, sums, weights, my_ce, lse, wrong);
    }
    weights[labels] = my_ce;
    bad[task] = wrong;
  });
  bool wrong = false;
  for (int64_t k = 0; k < labels; ++k) {
    double* to = S + k * classes;
    for (int64_t task = 0; task < tasks; ++task) {
      const double* from = partial.get() + task * size + k * width;
      for (int64_t c = 0; c < classes; ++c) to[c] = task == 0 ? from[c] : to[c] + from[c];
    }
  }
  double total_ce = 0;
  for (int64_t k = 0; k < labels; ++k) n[k] = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    const double* weights = partial.get() + task * size + labels * width;
    for (int64_t k = 0; k < labels; ++k) n[k] += weights[k];
    total_ce += weights[labels];
    wrong |= bad[task] != 0;
  }
  *ce = total_ce;
  if (wrong) poison(labels, classes, S, n, ce);
}

// Rows in the order of their labels: the row of S that is being summed stays in L1. A task whose first label began in an earlier task
// writes that part to a separate row; these rows are added afterwards, in the order of the tasks.
template <class T>
void joint_by_label(const Batch& batch, const plan::CpuJoint& plan, double* S, double* n, T* lse, double* ce, const Threads& threads) {
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, labels = batch.num_labels;
  const int64_t width = padded<T>(classes), tasks = plan.tasks;
  LabelOrder order(batch, plan::sort_tasks(rows, labels), threads);
  const int64_t used = order.used();
  Buffer<double> side(tasks * width), side_weight(tasks), side_ce(tasks);
  Buffer<int64_t> side_label(tasks);
  std::memset(S, 0, static_cast<std::size_t>(labels * classes) * sizeof(double));
  std::memset(n, 0, static_cast<std::size_t>(labels) * sizeof(double));
  for_each_task(threads, tasks, [&](int64_t task) {
    const int64_t begin = cut(used, tasks, task), end = cut(used, tasks, task + 1);
    side_label[task] = kUnused;
    side_ce[task] = 0;
    if (begin == end) return;
    const int most = block_rows(width);
    Buffer<T> tile(most * width), scratch(width);
    Buffer<double> sums(width);
    Block<T> block;
    bool ignored = false;
    double weight, run_weight = 0;
    int64_t current = kUnused;
    int64_t before = kUnused;  // the last label of the task before this one
    if (begin > 0) before = used_label(batch, order.rows()[begin - 1], weight, ignored);
    const auto finish_run = [&] {
      if (current == kUnused) return;
      if (current == before) {
        side_label[task] = current;
        side_weight[task] = run_weight;
        std::memcpy(side.get() + task * width, sums.get(), static_cast<std::size_t>(width) * sizeof(double));
        before = kUnused;
      } else {
        n[current] = run_weight;
        std::memcpy(S + current * classes, sums.get(), static_cast<std::size_t>(classes) * sizeof(double));
      }
    };
    const auto flush = [&] {
      predict(batch, block, tile.get(), scratch.get(), lse, side_ce[task]);
      for (int r = 0; r < block.count;) {
        if (block.label[r] != current) {
          finish_run();
          current = block.label[r];
          run_weight = 0;
          std::memset(sums.get(), 0, static_cast<std::size_t>(width) * sizeof(double));
        }
        int last = r;
        while (last < block.count && block.label[last] == current) run_weight += block.weight[last++];
        accumulate(block, r, last, tile.get(), width, sums.get());
        r = last;
      }
      block.count = 0;
    };
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = order.rows()[at];
      if (at + kAhead < end) prefetch_row(batch.logits, order.rows()[at + kAhead]);
      block.row[block.count] = i;
      block.label[block.count] = used_label(batch, i, weight, ignored);
      block.weight[block.count] = weight;
      if (++block.count == most) flush();
    }
    if (block.count > 0) flush();
    finish_run();
  });
  *ce = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    *ce += side_ce[task];
    const int64_t label = side_label[task];
    if (label == kUnused) continue;
    n[label] += side_weight[task];
    for (int64_t c = 0; c < classes; ++c) S[label * classes + c] += side[task * width + c];
  }
  for (int64_t at = used; at < rows; ++at) lse[order.rows()[at]] = 0;
  if (order.bad()) poison(labels, classes, S, n, ce);
}

LDMI_INLINE void load_pair(const float* from, Vec<double>& low, Vec<double>& high) { widen(load(from), low, high); }
LDMI_INLINE void load_pair(const double* from, Vec<double>& low, Vec<double>& high) {
  low = load(from);
  high = load(from + kLanes<double>);
}

// S = T^T diag(w) P in two phases per block of rows: predictions and weighted targets, by rows; then their product, by labels.
template <class T>
void joint_soft(const Batch& batch, double* S, double* n, T* lse, double* ce, const Threads& threads) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t kStep = 64;                     // rows of one register tile
  constexpr int64_t kLabels = 4;                    // labels of one register tile: 4 x 2 vectors of doubles
  constexpr int64_t kClasses = 2 * kLanes<double>;  // its classes
  const int64_t rows = batch.logits.rows, classes = batch.logits.columns, labels = batch.num_labels;
  const int64_t width = (classes + kClasses - 1) / kClasses * kClasses, label_width = (labels + kLabels - 1) / kLabels * kLabels;
  const int64_t target_width = label_width > padded<T>(labels) ? label_width : padded<T>(labels);
  const plan::CpuSoft plan = plan::cpu_soft(rows, classes, labels, sizeof(T));
  Buffer<T> predictions(plan.block_rows * width);
  // Weights times targets are in double: rounded to fp32, a singular joint of weighted targets would no longer be singular.
  Buffer<double> targets(plan.block_rows * target_width);
  const int64_t steps = plan.block_rows / kStep;
  Buffer<double> step_ce(steps);
  Buffer<uint8_t> step_bad(steps);
  std::memset(S, 0, static_cast<std::size_t>(labels * classes) * sizeof(double));
  std::memset(n, 0, static_cast<std::size_t>(labels) * sizeof(double));
  *ce = 0;
  bool wrong = false;
  for (int64_t base = 0; base < rows; base += plan.block_rows) {
    const int64_t count = rows - base < plan.block_rows ? rows - base : plan.block_rows;
    const int64_t here = (count + kStep - 1) / kStep;
    for_each_task(threads, here, [&](int64_t step) {
      Buffer<T> scratch(width), target_scratch(target_width);
      double my_ce = 0;
      bool bad = false;
      for (int64_t r = step * kStep; r < (step + 1) * kStep; ++r) {
        T* p = predictions.get() + r * width;
        double* t = targets.get() + r * target_width;
        const int64_t i = base + r;
        const double weight = r < count ? weight_of(batch.weights, i) : 0;
        std::memset(t, 0, static_cast<std::size_t>(target_width) * sizeof(double));
        if (weight == 0 || !good_weight(weight)) {
          bad |= weight != 0;
          std::memset(p, 0, static_cast<std::size_t>(width) * sizeof(T));
          if (r < count) lse[i] = 0;
          continue;
        }
        const T* x = read_row(batch.logits, i, scratch.get());
        const T* target = read_row(batch.soft, i, target_scratch.get());
        T maximum = 0, sum = 1;
        double log_sum = 0;
        if (batch.probs) {
          probabilities(x, classes, p);
          lse[i] = 0;
        } else {
          exponentials(x, classes, p, maximum, sum);
          log_sum = __builtin_log(static_cast<double>(sum));
          lse[i] = maximum + static_cast<T>(log_sum);
          const Vec<T> inverse = splat(T{1} / sum);
          for (int64_t j = 0; j < classes; j += lanes) store(p + j, load(p + j) * inverse);
        }
        for (int64_t c = padded<T>(classes); c < width; ++c) p[c] = 0;
        for (int64_t k = 0; k < labels; ++k) {
          t[k] = weight * static_cast<double>(target[k]);
          // a zero in the target contributes nothing, even if the prediction is 0
          if (target[k] == 0 || labels != classes) continue;
          const double minus_log = batch.probs ? -__builtin_log(static_cast<double>(x[k]))
                                               : log_sum + (static_cast<double>(maximum) - static_cast<double>(x[k]));
          my_ce += weight * static_cast<double>(target[k]) * minus_log;
        }
      }
      step_ce[step] = my_ce;
      step_bad[step] = bad;
    });
    for_each_task(threads, label_width / kLabels, [&](int64_t group) {
      const int64_t k0 = group * kLabels;
      const int64_t k_end = k0 + kLabels < labels ? k0 + kLabels : labels;
      for (int64_t k = k0; k < k_end; ++k) {
        double total = 0;
        for (int64_t r = 0; r < here * kStep; ++r) total += targets[r * target_width + k];
        n[k] += total;
      }
      // Products and sums in double: a singular joint stays singular to 2^-52, which fp32 sums would hide.
      for (int64_t j = 0; j < width; j += kClasses) {
        for (int64_t step = 0; step < here; ++step) {
          Vec<double> sum[kLabels][2];
          for (auto& pair : sum) pair[0] = pair[1] = splat(0.0);
          const T* p = predictions.get() + step * kStep * width + j;
          const double* t = targets.get() + step * kStep * target_width + k0;
          for (int64_t r = 0; r < kStep; ++r, p += width, t += target_width) {
            Vec<double> low, high;
            load_pair(p, low, high);
#pragma GCC unroll 4
            for (int64_t k = 0; k < kLabels; ++k) {
              const Vec<double> factor = splat(t[k]);
              sum[k][0] = fma(low, factor, sum[k][0]);
              sum[k][1] = fma(high, factor, sum[k][1]);
            }
          }
          const int64_t last = j + kClasses < classes ? j + kClasses : classes;
          for (int64_t k = k0; k < k_end; ++k) {
            double flat[kClasses];
            store(flat, sum[k - k0][0]);
            store(flat + kLanes<double>, sum[k - k0][1]);
            for (int64_t c = j; c < last; ++c) S[k * classes + c] += flat[c - j];
          }
        }
      }
    });
    for (int64_t step = 0; step < here; ++step) {
      *ce += step_ce[step];
      wrong |= step_bad[step] != 0;
    }
  }
  if (wrong) poison(labels, classes, S, n, ce);
}

template <class T>
void joint_of(const Batch& batch, double* S, double* n, T* lse, double* ce, const Threads& threads) {
  if (batch.soft.data != nullptr) {
    joint_soft(batch, S, n, lse, ce, threads);
    return;
  }
  const plan::CpuJoint plan = plan::cpu_joint(batch.logits.rows, batch.logits.columns, batch.num_labels);
  if (plan.order == plan::Order::kNatural) {
    joint_natural(batch, plan, S, n, lse, ce, threads);
  } else {
    joint_by_label(batch, plan, S, n, lse, ce, threads);
  }
}

}  // namespace

void joint(const Batch& batch, double* S, double* n, void* lse, double* ce, const Threads& threads) {
  if (batch.logits.type == Type::kFloat64) {
    joint_of(batch, S, n, static_cast<double*>(lse), ce, threads);
  } else {
    joint_of(batch, S, n, static_cast<float*>(lse), ce, threads);
  }
}

}  // namespace ldmi::cpu::LDMI_ISA
