// Shapes and limits in, an algorithm out: which regime each kernel of the compiled engines takes, its tiles and its scratch memory.
// The kernels ask these functions, and so does ldmi_fast.explain, so that what is explained is what runs. Free of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ldmi::plan {

// Small problems with hard labels: loss and gradient in one call. The dispatch of three ops costs more than they do; all the memory
// fits in the second-level cache, and the factorisation is our own.
inline constexpr int64_t kFusedClasses = 64;
inline constexpr int64_t kFusedElements = 65536;  // N * C

// Gauss-Jordan in registers and L1 up to here; LAPACK's blocked LU above.
inline constexpr int64_t kGaussJordanClasses = 64;

// The sums S of one task are private up to this many entries (128 KiB); above, rows are visited in the order of their labels.
inline constexpr int64_t kPrivateSums = 16384;

// The gradient reads V by random rows as long as its table stays in the second-level cache; above, in the order of the labels.
inline constexpr int64_t kRandomRows = 65536;

enum class Order { kNatural, kByLabel };

struct CpuJoint {
  Order order;
  int64_t tasks;            // a function of the shape alone
  int64_t workspace_bytes;
};
CpuJoint cpu_joint(int64_t rows, int64_t classes, int64_t labels);

struct CpuLogitsGrad {
  Order order;
  int64_t tasks;
  int64_t workspace_bytes;
};
CpuLogitsGrad cpu_logits_grad(int64_t rows, int64_t classes, int64_t labels, int64_t value_bytes);

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
