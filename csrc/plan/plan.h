// Takes shapes and limits and returns an algorithm: which regime each kernel of the compiled engines takes, its tiles and its scratch
// memory. The kernels call these functions, and so does ldmi_fast.explain, so that what is explained is what runs. Free of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ldmi::plan {

// Small problems with hard labels: loss and gradient in one call. Dispatching the three ops and the scalar operations between them
// costs about 200 us, more than the ops themselves; the gradient takes one more pass over at most 1 MiB.
inline constexpr int64_t kFusedElements = 262144;  // N * C
// Problems with few rows for their classes also take one call. Their cost is the factorisation, which then reuses the memory of S for
// the factors.
inline constexpr int64_t kFusedRowsPerClass = 2;  // N / C
// Not in half precision: there the upstream gradient (a loss scale of 65536, say) must come in before the gradient is rounded.
inline bool is_fused(int64_t rows, int64_t classes, int64_t value_bytes) {
  return value_bytes >= 4 && (rows * classes <= kFusedElements || rows <= kFusedRowsPerClass * classes);
}

// Up to this many entries (128 KiB) each task has its private sums S; above, rows are visited in the order of their labels.
inline constexpr int64_t kPrivateSums = 16384;

// Up to this many entries the table of V stays in the second-level cache, and the gradient reads its rows in random order; above, in
// the order of the labels.
inline constexpr int64_t kRandomRows = 65536;

enum class Order { kNatural, kByLabel };

struct CpuJoint {
  Order order;
  int64_t tasks;  // a function of the shape alone
  int64_t workspace_bytes;
};
CpuJoint cpu_joint(int64_t rows, int64_t classes, int64_t labels);

struct CpuLogitsGrad {
  Order order;
  int64_t tasks;
  int64_t workspace_bytes;
};
CpuLogitsGrad cpu_logits_grad(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes);

struct CpuLogdetInverse {
  int64_t panel;  // columns that are eliminated together
  bool parallel;
  int64_t workspace_bytes;
};
CpuLogdetInverse cpu_logdet_inverse(int64_t classes);

struct CpuSoft {
  int64_t block_rows;  // rows whose predictions are in memory at a time
  int64_t workspace_bytes;
};
CpuSoft cpu_soft(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes);

// The number of pieces of the counting sort of the labels.
int64_t sort_tasks(int64_t rows, int64_t labels);

// What ldmi_fast.explain shows.
struct Plan {
  std::vector<std::string> kernels;
  std::string regime;
  int64_t workspace_bytes;
  std::string reason;
};
Plan cpu(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs);

}  // namespace ldmi::plan
