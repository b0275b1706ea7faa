// Shapes and limits in, an algorithm out: which regime each kernel of the compiled engines takes, its tiles and its scratch memory.
// The kernels ask these functions, and so does ldmi_fast.explain, so that what is explained is what runs. Free of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ldmi::plan {

// Small problems with hard labels: loss and gradient in one call. The dispatch of the three ops and of the scalars between them costs
// some 200 us, more than they do; the gradient takes one more pass over at most 1 MiB.
inline constexpr int64_t kFusedElements = 262144;  // N * C
// So do problems with few rows for their classes, whose cost is the factorisation: the memory of S is then used again for its factors.
inline constexpr int64_t kFusedRowsPerClass = 2;  // N / C
// Not in half precision: there the upstream gradient (a loss scale of 65536, say) must come in before the gradient is rounded.
inline bool is_fused(int64_t rows, int64_t classes, int64_t value_bytes) {
  return value_bytes >= 4 && (rows * classes <= kFusedElements || rows <= kFusedRowsPerClass * classes);
}

// The sums S of one task are private up to this many entries (128 KiB); above, rows are visited in the order of their labels.
inline constexpr int64_t kPrivateSums = 16384;

// The gradient reads V by random rows as long as its table stays in the second-level cache; above, in the order of the labels.
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
  int64_t block_rows;  // rows whose predictions are held at a time
  int64_t workspace_bytes;
};
CpuSoft cpu_soft(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes);

// How many pieces the counting sort of the labels is cut into.
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
