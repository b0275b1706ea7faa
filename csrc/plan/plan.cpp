#include "plan.h"

#include <algorithm>

namespace ldmi::plan {
namespace {

// A task with about 8k elements (10 us of work) is worth its dispatch.
constexpr int64_t kTaskElements = 8192;

int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::max(low, std::min(value, high)); }

}  // namespace

int64_t sort_tasks(int64_t rows, int64_t labels) {
  // each piece has one counter per label; with more pieces the counters would cost more than the rows
  return clamp(rows / std::max<int64_t>(4 * labels, 4096), 1, 16);
}

CpuJoint cpu_joint(int64_t rows, int64_t classes, int64_t labels) {
  CpuJoint out{};
  if (labels * classes <= kPrivateSums) {
    out.order = Order::kNatural;
    // at most 2 MiB of private sums in all, and at least two rows of the batch for each row of sums, so that the sums pay
    const int64_t most = clamp(std::min((int64_t{1} << 18) / std::max<int64_t>(labels * classes, 1), rows / (2 * labels)), 1, 256);
    out.tasks = clamp(rows * classes / kTaskElements, 1, most);
    out.workspace_bytes = out.tasks * labels * (classes + 16) * 8;
  } else {
    out.order = Order::kByLabel;
    // the sums of a label that begins in an earlier task go to a separate row; those rows take at most 1 MiB in all
    const int64_t most = clamp((int64_t{1} << 17) / classes, 4, 256);
    out.tasks = clamp(rows * classes / (8 * kTaskElements), 1, most);
    out.workspace_bytes = rows * 8 + sort_tasks(rows, labels) * (labels + 2) * 8 + out.tasks * (classes + 16) * 8;
  }
  return out;
}

CpuLogitsGrad cpu_logits_grad(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes) {
  CpuLogitsGrad out{};
  out.tasks = clamp(rows * classes / kTaskElements, 1, 256);
  if (labels * classes <= kRandomRows) {
    out.order = Order::kNatural;
    out.workspace_bytes = labels * (classes + 16) * value_bytes;
  } else {
    out.order = Order::kByLabel;
    out.workspace_bytes = rows * 8 + sort_tasks(rows, labels) * (labels + 2) * 8;
  }
  return out;
}

CpuLogdetInverse cpu_logdet_inverse(int64_t classes) {
  CpuLogdetInverse out{};
  // wide enough for the products to be bound by multiplications, narrow enough for the panels not to delay them
  out.panel = classes <= 256 ? 32 : 64;
  // below this size, waking the threads takes longer than the work
  out.parallel = classes >= 192;
  // two packed panels, and half a panel for its own elimination
  out.workspace_bytes = 5 * (classes + 24) * out.panel / 2 * 8;
  return out;
}

CpuSoft cpu_soft(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes) {
  CpuSoft out{};
  // predictions and targets of a block take at most about 1.5 MiB
  const int64_t row_bytes = (classes + 32) * value_bytes + labels * 8;  // predictions; targets times weights, in double
  out.block_rows = clamp((3 << 19) / row_bytes / 64 * 64, 64, 65536);
  out.block_rows = std::min(out.block_rows, (std::max<int64_t>(rows, 1) + 63) / 64 * 64);
  out.workspace_bytes = out.block_rows * row_bytes;
  return out;
}

Plan cpu(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs) {
  Plan out{};
  const int64_t compute_bytes = value_bytes == 8 ? 8 : 4;
  const CpuLogdetInverse elimination = cpu_logdet_inverse(classes);
  const std::string factor = std::string("logdet_inverse (Gauss-Jordan, ") + (elimination.parallel ? "all threads)" : "one thread)");
  const int64_t factor_bytes = classes * classes * 8 + elimination.workspace_bytes;
  if (soft) {
    const CpuSoft plan = cpu_soft(rows, classes, labels, compute_bytes);
    out.kernels = {"joint (soft targets)", factor, "logits_grad (soft targets)"};
    out.regime = "soft targets, " + std::to_string(plan.block_rows) + " rows at a time";
    out.workspace_bytes = std::max(plan.workspace_bytes, factor_bytes);
    out.reason = "the joint is a matrix product of targets and predictions, of blocks of rows that stay in cache";
    return out;
  }
  const CpuJoint joint = cpu_joint(rows, classes, labels);
  const CpuLogitsGrad grad = cpu_logits_grad(rows, classes, labels, compute_bytes);
  if (is_fused(rows, classes, value_bytes)) {
    out.kernels = {std::string("fused (joint, ") + factor + ", logits_grad)"};
    out.regime = "small: one call computes the loss and its gradient";
    out.workspace_bytes = std::max({joint.workspace_bytes, grad.workspace_bytes, elimination.workspace_bytes}) +
                          2 * classes * classes * 8 + (classes + rows) * 8;
    out.reason = "N * C <= " + std::to_string(kFusedElements) + " or N <= " + std::to_string(kFusedRowsPerClass) +
                 " C: dispatching three ops would cost more than it saves";
    return out;
  }
  const auto name = [](Order order) { return order == Order::kNatural ? "natural order" : "label order"; };
  out.kernels = {std::string("joint (") + name(joint.order) + ")", factor, std::string("logits_grad (") + name(grad.order) + ")"};
  out.regime = std::string("staged, ") + std::to_string(joint.tasks) + " + " + std::to_string(grad.tasks) + " tasks";
  out.workspace_bytes = std::max({joint.workspace_bytes, grad.workspace_bytes, factor_bytes});
  out.reason = joint.order == Order::kNatural
                   ? "S has at most " + std::to_string(kPrivateSums) + " entries: each task sums into its own, in row order"
                   : "S has more than " + std::to_string(kPrivateSums) +
                         " entries: rows are visited by label, so that a row of S stays in the first-level cache";
  if (probs) out.reason += "; probabilities are taken as they are";
  return out;
}

}  // namespace ldmi::plan
