// What the CUDA engine does for a shape on a device: regimes, tiles and workspace, by arithmetic alone. There is one section per op.
// Free of torch and of CUDA's headers.
#pragma once

#include <cstdint>

#include "device_limits.h"
#include "plan.h"

namespace ldmi::plan {

// ---------------------------------------------------------------------------------------------------- joint, logits_grad

// Up to kGradTileClasses classes one block computes the softmax and the gradient of a tile of rows in shared memory. It also adds up
// the tile's part of S up to kOnehotClasses labels and classes: at N = 65536, C = 64 tiles took 76 us, rows in label order 55 (H100).
inline constexpr int64_t kGradTileClasses = 64, kOnehotClasses = 32;
// Labels and classes are padded to 16, 32 or 64.
constexpr int64_t tile_width(int64_t labels, int64_t classes) {
  const int64_t most = labels > classes ? labels : classes;
  return most <= 16 ? 16 : most <= 32 ? 32 : 64;
}
// Rows of a tile: enough to hide the latency of memory, few enough for several blocks per multiprocessor.
constexpr int64_t tile_rows(int64_t width, int64_t value_bytes) {
  return width == 16 ? 128 : width == 64 && value_bytes == 8 ? 32 : 64;
}

// Row lengths that one group of threads holds in registers: one warp up to warp_classes (in the joint half of it), 4, 8, 16 or 32
// columns per lane; one block up to kBlockClasses. Longer rows are read twice: once for their log-sum-exp, once in runs of
// kBlockClasses columns. For the log-sum-exp of rows with soft targets one warp per row is enough up to kWarpSums.
inline constexpr int64_t kLanes = 32, kBlockClasses = 4096, kWarpSums = 256;
constexpr int64_t warp_classes(int64_t value_bytes) { return kLanes * (value_bytes == 8 ? 8 : 32); }
// Threads of a block that visits the rows by label, one warp per row, and the number of such blocks per multiprocessor: with 16
// columns per lane or more the sums take many registers.
constexpr int64_t walk_threads(int64_t classes) { return classes <= kLanes * 8 ? 256 : 128; }
constexpr int64_t walk_blocks(int64_t classes) { return classes <= kLanes * 8 ? 2 : 3; }

enum class CudaOrder {
  kTile,     // rows in their order, S in the registers of each block
  kByLabel,  // rows in the order of their labels, one row of S in the registers of each group of threads
  kSoft,     // a matrix product of targets and predictions
  kByRow,    // logits_grad: rows in their order, V through the cache
};

// The counting sort of the labels.
struct CudaSort {
  int64_t pieces;  // blocks
  int warps;       // per block
  bool shared;     // whether the counters and the starts of the buckets are in shared memory
};
CudaSort cuda_sort(int64_t rows, int64_t labels, const DeviceLimits& limits);

struct CudaJoint {
  CudaOrder order;
  int64_t width;     // kTile: padded labels and classes
  int64_t blocks;    // kTile: blocks, each with its own sums; kByLabel: of the visit by label; kSoft: of the pass for log-sum-exp
  int64_t segments;  // kByLabel: runs of rows, one per group of threads; kSoft: splits of the rows
  CudaSort sort;     // kByLabel
  int64_t workspace_bytes;
};
CudaJoint cuda_joint(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, const DeviceLimits& limits);

struct CudaLogitsGrad {
  CudaOrder order;
  int64_t width;   // kTile
  int64_t blocks;  // of the pass over the rows
  CudaSort sort;   // kByLabel
  int64_t workspace_bytes;
};
CudaLogitsGrad cuda_logits_grad(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes,
                                const DeviceLimits& limits);

// ---------------------------------------------------------------------------------------------------------- logdet_inverse

enum class CudaFactor {
  kWarp,   // one warp per matrix, in registers
  kBlock,  // one block per matrix, in shared memory
  kGrid,   // all blocks of a cooperative grid, one matrix after another
  kLu,     // torch's LU, and kernels around it
};

// Shared memory of the elimination by one block (or one warp, which shares only the result), in bytes; see FactorSpace.
int64_t factor_smem(int64_t classes, int64_t stride);
// The distance between columns, for `smem_bytes` of shared memory: 4 more than a multiple of 8, so that tiles are read without bank
// conflicts, or if that does not fit an even number, so that they are read 16 bytes at a time. Returns 0 if the matrix does not fit.
int64_t factor_stride(int64_t classes, int64_t smem_bytes);
// The largest number of classes that one block factors: 170 with 227 KB of shared memory, 144 with 163, 112 with 99.
int64_t factor_classes(const DeviceLimits& limits);

// Limits of the grid's elimination. Up to kGridClasses the threads of one block hold the rows of a strip in registers. Above half of
// it, and up to kClusterClasses, a cluster shares the rows, if the device has clusters. For more classes a panel costs more passes
// over the matrix than the LU path makes. Both limits are predictions, see docs/performance.md.
inline constexpr int64_t kGridClasses = 2048, kClusterClasses = 4096;
// The rows of a panel that each of `blocks` panel blocks has.
constexpr int64_t slice_rows(int64_t classes, int64_t blocks) {
  return blocks == 1 ? classes : ((classes + blocks - 1) / blocks + 7) / 8 * 8;
}
// The largest panel width: a quarter of that many multipliers, for each of two or three rows, are on their way to a thread at a time.
constexpr int64_t grid_most_panel(int64_t classes, int64_t blocks) { return blocks > 1 || classes <= kGridClasses / 2 ? 32 : 24; }
// Shared memory of one block, in bytes.
int64_t grid_smem(int64_t classes, int64_t panel, int64_t blocks);
// The largest panel width that fits, a multiple of 8. Returns 0 if fewer than 8 columns fit, or, with clusters, fewer than 16: the
// update blocks process 16 columns at a time.
int64_t grid_panel(int64_t classes, int64_t smem_bytes, int64_t blocks);

struct CudaLogdetInverse {
  CudaFactor factor;
  int64_t stride;           // kBlock
  int64_t panel_blocks;     // kGrid: number of panel blocks, which eliminate the panels together; a cluster if there are several
  int64_t panel;            // kGrid
  int64_t smem_bytes;       // kBlock, kGrid
  int64_t workspace_bytes;  // kGrid, kLu
};
// Without the inverse the grid's matrix is in the workspace, else in the memory of V.
CudaLogdetInverse cuda_logdet_inverse(int64_t count, int64_t classes, const DeviceLimits& limits, bool inverse = true);

// The total weight of soft targets, if it differs from the sum of n, takes one block per kWeightRows rows.
inline constexpr int64_t kWeightRows = 16384;
struct CudaCombine {
  int64_t blocks;
  int64_t workspace_bytes;
};
CudaCombine cuda_combine(int64_t rows, bool weighted_soft, const DeviceLimits& limits);

// ------------------------------------------------------------------------------------------------------------------- fused

// The loss and its gradient in one launch of one block. It works on one multiprocessor. The staged kernels work on all of them, at the
// price of partial sums through memory and another pass over the logits: about 2.5 us. One element costs the block about 45
// instructions, of which a multiprocessor issues 128 per cycle (one warp for each of 4 schedulers), and latencies that 16 warps do not
// hide: about 0.25 ns. 2.5 us are 10,000 elements.
inline constexpr int64_t kCudaFusedElements = 8192;  // N * C
inline constexpr int64_t kCudaFusedClasses = 64;

// Threads of the block for classes padded to `width`: the largest number that leaves enough registers for the factorisation (one row
// of doubles per lane).
constexpr int64_t fused_threads(int64_t width) { return width == 16 ? 384 : width == 32 ? 256 : 512; }
// The distance between rows of V in shared memory, in values: 8 random rows start in 8 different banks.
constexpr int64_t fused_pitch(int64_t width) { return width + 4; }

struct CudaFused {
  bool runs;       // whether to take this regime: the shape is small and fits; with the gradient not in half precision, see is_fused
  int64_t width;   // padded classes
  int64_t wide;    // padded classes of S alone, a power of two
  int64_t splits;  // threads per entry of S
  int64_t stride;  // of the factorisation, see factor_stride
  int64_t smem_bytes;
};
CudaFused cuda_fused(int64_t rows, int64_t classes, int64_t value_bytes, bool weighted, const DeviceLimits& limits);

// ------------------------------------------------------------------------------------------------------------ loss_forward

// Up to this number of classes, without soft targets, the whole forward is one launch of a cooperative grid. It costs the device about
// as much as the separate steps (22.6 us and 20.8 at N = 65536, C = 14 on an H100) and saves the host 2 launches.
inline constexpr int64_t kCooperativeClasses = 16;
enum class CudaLoss {
  kSingleBlock,      // fused without the gradient: one launch
  kCooperative,      // joint, logdet_inverse and the scalars by a cooperative grid: one launch
  kFusedTail,        // joint, and one launch of one block for the factorisation and the scalars
  kSeparateKernels,  // joint, logdet_inverse, combine: more classes than one block factors, or weights of soft targets to be summed
  kLu,               // joint, torch's LU, combine: the caller's
};

struct CudaLossForward {
  CudaLoss path;
  CudaFused block;  // kSingleBlock
  int64_t workspace_bytes;
};
CudaLossForward cuda_loss_forward(int64_t rows, int64_t classes, bool soft, int64_t value_bytes, bool weighted,
                                  const DeviceLimits& limits, bool gradient = true);

// ----------------------------------------------------------------------------------------------------------------- explain

// What ldmi_fast.explain shows for a forward and backward.
Plan cuda(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, const DeviceLimits& limits);

}  // namespace ldmi::plan
