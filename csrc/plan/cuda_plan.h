// What the CUDA engine does for a shape on a device: regimes, tiles and workspace, by arithmetic alone. One section a kernel. Free of
// torch and of CUDA's headers.
#pragma once

#include <cstdint>

#include "device_limits.h"
#include "plan.h"

namespace ldmi::plan {

// ---------------------------------------------------------------------------------------------------- joint, logits_grad

// A tile of rows in shared memory whose softmax, and whose gradient, are one block's: up to kTileClasses. For its share of S up to
// kTileLabels labels and classes: at N = 65536, C = 64 the products of a tile took 76 us, rows in label order 55 (H100).
inline constexpr int64_t kTileClasses = 64, kTileLabels = 32;
// Labels and classes are padded to 16, 32 or 64.
constexpr int64_t tile_width(int64_t labels, int64_t classes) {
  const int64_t most = labels > classes ? labels : classes;
  return most <= 16 ? 16 : most <= 32 ? 32 : 64;
}
// Rows of a tile: enough for the latency of memory, few enough for several blocks a multiprocessor.
constexpr int64_t tile_rows(int64_t width, int64_t value_bytes) {
  return width == 16 ? 128 : width == 64 && value_bytes == 8 ? 32 : 64;
}

// Rows that one group of threads holds in registers: a warp up to warp_classes (for the joint half as many), 4, 8, 16 or 32 columns a
// lane, a block up to kBlockClasses. Longer rows are read twice: once for their sums of exponentials, once by runs of kBlockClasses.
// For the rows' sums of soft targets a warp is enough up to kWarpSums.
inline constexpr int64_t kLanes = 32, kBlockClasses = 4096, kWarpSums = 256;
constexpr int64_t warp_classes(int64_t value_bytes) { return kLanes * (value_bytes == 8 ? 8 : 32); }
// Threads of a block that walks the rows by labels, a warp a row, and how many such blocks share a multiprocessor: with 16 columns a
// lane or more the sums take many registers.
constexpr int64_t walk_threads(int64_t classes) { return classes <= kLanes * 8 ? 256 : 128; }
constexpr int64_t walk_blocks(int64_t classes) { return classes <= kLanes * 8 ? 2 : 3; }

enum class CudaOrder {
  kTile,     // rows as they come, S in the registers of each block
  kByLabel,  // rows in the order of their labels, a row of S in the registers of each group
  kSoft,     // a matrix product of targets and predictions
  kByRow,    // logits_grad: rows as they come, V through the cache
};

// The counting sort of the labels.
struct CudaSort {
  int64_t pieces;  // blocks
  int warps;       // of a block
  bool shared;     // whether the counters, and where the buckets begin, are in shared memory
};
CudaSort cuda_sort(int64_t rows, int64_t labels, const DeviceLimits& limits);

struct CudaJoint {
  CudaOrder order;
  int64_t width;     // kTile: padded labels and classes
  int64_t blocks;    // kTile: blocks, each with sums of its own; kByLabel: of the walk; kSoft: of the pass for the rows' sums
  int64_t segments;  // kByLabel: runs of rows, one a group of threads; kSoft: splits of the rows
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
  kWarp,     // a warp a matrix, in registers
  kBlock,    // a block a matrix, in shared memory
  kGrid,     // all blocks of a cooperative grid, one matrix after the other
  kLibrary,  // a library's LU, and the kernels around it
};

// Shared memory of the elimination by one block (or one warp, which shares only the result), in bytes; see FactorSpace.
int64_t factor_smem(int64_t classes, int64_t stride);
// From column to column, in `smem_bytes`: 4 more than a multiple of 8, so that tiles are read without bank conflicts, or else even,
// so that they are read 16 bytes at a time; 0: the matrix does not fit.
int64_t factor_stride(int64_t classes, int64_t smem_bytes);
// The most classes that one block factors: 170 with 227 KB of shared memory, 144 with 163, 112 with 99.
int64_t factor_classes(const DeviceLimits& limits);

// The grid's elimination: the threads of a block hold a strip's rows in registers for so many classes. Above half of it, and up to
// kClusterClasses, a cluster shares the rows, where there are clusters. Above, a panel costs more passes over the matrix than a
// library's LU makes: where each ends is a prediction, see docs/performance.md.
inline constexpr int64_t kGridClasses = 2048, kClusterClasses = 4096;
// Rows of a panel that one of so many blocks has
constexpr int64_t slice_rows(int64_t classes, int64_t blocks) {
  return blocks == 1 ? classes : ((classes + blocks - 1) / blocks + 7) / 8 * 8;
}
// The most columns that are eliminated by themselves: a quarter of that many multipliers, for each of two or three rows, are on their
// way to a thread at a time.
constexpr int64_t grid_most_panel(int64_t classes, int64_t blocks) { return blocks > 1 || classes <= kGridClasses / 2 ? 32 : 24; }
// Shared memory of one block, in bytes.
int64_t grid_smem(int64_t classes, int64_t panel, int64_t blocks);
// The largest panel width that fits, a multiple of 8. Returns 0 if fewer than 8 columns fit, or, with clusters, fewer than 16: the
// update blocks process 16 columns at a time.
int64_t grid_panel(int64_t classes, int64_t smem_bytes, int64_t blocks);

struct CudaLogdetInverse {
  CudaFactor factor;
  int64_t stride;           // kBlock
  int64_t team;             // kGrid: blocks that eliminate the panels together, in a cluster if there are several
  int64_t panel;            // kGrid
  int64_t smem_bytes;       // kBlock, kGrid
  int64_t workspace_bytes;  // kGrid, kLibrary
};
// Without the inverse a grid's matrix is in the workspace, else in the memory of V.
CudaLogdetInverse cuda_logdet_inverse(int64_t count, int64_t classes, const DeviceLimits& limits, bool inverse = true);

// The sum of the weights of soft targets, where it is not that of the labels: one block for each of so many rows.
inline constexpr int64_t kWeightRows = 16384;
struct CudaCombine {
  int64_t blocks;
  int64_t workspace_bytes;
};
CudaCombine cuda_combine(int64_t rows, bool weighted_soft, const DeviceLimits& limits);

// ------------------------------------------------------------------------------------------------------------------- fused

// The loss and its gradient in one launch of one block. It does its work on one multiprocessor, the staged kernels on all of them, at
// the price of partial sums through memory and another pass over the logits: some 2.5 us. An element costs the block some 45
// instructions, of which a multiprocessor issues 128 a cycle (a warp for each of 4 schedulers), and latencies that 16 warps do not
// hide: about 0.25 ns. 2.5 us are 10,000 elements.
inline constexpr int64_t kCudaFusedElements = 8192;  // N * C
inline constexpr int64_t kCudaFusedClasses = 64;

// Threads of the block for classes padded to `width`: as many as leave the registers for the factorisation (a row of doubles a lane).
constexpr int64_t fused_threads(int64_t width) { return width == 16 ? 384 : width == 32 ? 256 : 512; }
// From row to row of V in shared memory, in values: 8 rows at random start at 8 places among the banks.
constexpr int64_t fused_pitch(int64_t width) { return width + 4; }

struct CudaFused {
  bool runs;       // whether this regime is the one to take, and fits; with the gradient not in half precision, see is_fused
  int64_t width;   // padded classes
  int64_t wide;    // the same for S alone, a power of two
  int64_t splits;  // threads that share an entry of S
  int64_t stride;  // of the factorisation, see factor_stride
  int64_t smem_bytes;
};
CudaFused cuda_fused(int64_t rows, int64_t classes, int64_t value_bytes, bool weighted, const DeviceLimits& limits);

// ------------------------------------------------------------------------------------------------------------ loss_forward

// Up to so many classes, without soft targets, the whole forward is one launch of a cooperative grid, which costs the device as much
// as the steps by themselves (22.6 us and 20.8 at N = 65536, C = 14 on an H100) and the host 2 launches less.
inline constexpr int64_t kWholeClasses = 16;
enum class CudaLoss {
  kOneBlock,  // fused without the gradient: one launch
  kWhole,     // joint, logdet_inverse and the scalars by a cooperative grid: one launch
  kEnd,       // joint, and one launch of one block for the factorisation and the scalars
  kScalars,   // joint, logdet_inverse, combine: more classes than one block factors, or weights of soft targets to be summed
  kLibrary,   // joint, the library's LU, combine: the caller's
};

struct CudaLossForward {
  CudaLoss how;
  CudaFused block;  // kOneBlock
  int64_t workspace_bytes;
};
CudaLossForward cuda_loss_forward(int64_t rows, int64_t classes, bool soft, int64_t value_bytes, bool weighted,
                                  const DeviceLimits& limits, bool gradient = true);

// ----------------------------------------------------------------------------------------------------------------- explain

// What ldmi_fast.explain shows of a forward and backward.
Plan cuda(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, const DeviceLimits& limits);

}  // namespace ldmi::plan
