#include "cuda_plan.h"

#include <algorithm>
#include <string>

#include "layout.h"
#include "pieces.h"

namespace ldmi::plan {

// ---------------------------------------------------------------------------------------------------- joint, logits_grad

namespace {

int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::max(low, std::min(value, high)); }
int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Counts the shift and the inverse of each row, in the precision of the softmax.
void take_row_softmax_of(Workspace& size, int64_t rows, int64_t compute_bytes) {
  if (compute_bytes == 8) {
    take_row_softmax<double>(size, rows);
  } else {
    take_row_softmax<float>(size, rows);
  }
}

}  // namespace

CudaSort cuda_sort(int64_t rows, int64_t labels, const DeviceLimits& limits) {
  CudaSort out{};
  const int64_t smem = std::min<int64_t>(limits.smem_block, 96 << 10) - 1024, buckets = labels + 1;
  out.shared = buckets * 12 <= smem;  // per bucket 8 bytes, and one counter per warp
  out.warps = static_cast<int>(out.shared ? clamp((smem / buckets - 8) / 4, 1, 8) : 1);
  // Each piece moves one counter per label a few times, so it has at least two rows per label. A block sums 128 pieces in about 3 us.
  out.pieces = clamp(rows / std::max<int64_t>(2 * labels, 64 * out.warps), 1, out.shared ? 128 : 8);
  return out;
}

CudaJoint cuda_joint(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, const DeviceLimits& limits) {
  CudaJoint out{};
  Workspace size;
  const int64_t compute_bytes = value_bytes == 8 ? 8 : 4;
  // the number of partial sums S that fit into 3.5 MiB plus 5 % of the gradient plus 8 bytes per row
  const int64_t budget = (int64_t{7} << 19) + rows * classes * value_bytes / 20 + 8 * rows;
  const int64_t sums = std::max<int64_t>(budget / ((labels * classes + labels) * 8), 1);
  if (soft) {
    out.order = CudaOrder::kSoft;
    out.blocks = clamp(up(rows, classes <= kWarpSums ? 8 : 1), 1, 4 * limits.sms);
    // splits of the rows: enough to fill the device, with at least 256 rows each
    const int64_t tiles = up(classes, 64) * up(labels, 64);
    out.segments = clamp(std::min(up(2 * limits.sms, tiles), rows / 256), 1, std::min<int64_t>(1024, sums));
    take_row_softmax_of(size, rows, compute_bytes);
    take_partial(size, out.segments, out.blocks, labels * classes + labels);
    out.workspace_bytes = size.bytes();
    return out;
  }
  if (std::max(labels, classes) <= kOnehotClasses) {
    out.order = CudaOrder::kTile;
    out.width = tile_width(labels, classes);
    const int64_t most = limits.sms * (out.width == 16 ? 4 : 3);
    out.blocks = clamp(up(rows, tile_rows(out.width, value_bytes)), 1, std::min(most, sums));
    take_partial(size, out.blocks, out.blocks, labels * classes + labels);
    out.workspace_bytes = size.bytes();
    return out;
  }
  out.order = CudaOrder::kByLabel;
  out.sort = cuda_sort(rows, labels, limits);
  // groups per block, and blocks per multiprocessor
  const bool warps = classes <= std::min(warp_classes(value_bytes), kLanes * 16);
  const int64_t groups = warps ? walk_threads(classes) / kLanes : 1;
  const int64_t resident = warps ? walk_blocks(classes) : classes <= kBlockClasses / 4 ? 3 : 2;
  out.segments = clamp(rows / 8, 1, limits.sms * resident * groups);
  out.blocks = up(out.segments, groups);
  take_order(size, out.sort, rows, labels);
  take_boundary_sums(size, out.segments, classes);
  if (classes > kBlockClasses) {
    take_row_softmax_of(size, rows, compute_bytes);
    take_row_parts(size, out.blocks);
  }
  out.workspace_bytes = size.bytes();
  return out;
}

CudaLogitsGrad cuda_logits_grad(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes,
                                const DeviceLimits& limits) {
  CudaLogitsGrad out{};
  const int64_t compute_bytes = value_bytes == 8 ? 8 : 4;
  const int64_t table = labels * table_pitch(classes, compute_bytes) * compute_bytes;
  Workspace size;
  if (compute_bytes == 8) {
    take_grad_table<double>(size, labels, classes);
  } else {
    take_grad_table<float>(size, labels, classes);
  }
  out.workspace_bytes = size.bytes();
  if (soft) {
    out.order = CudaOrder::kSoft;
    out.blocks = clamp(up(rows, 32), 1, 2 * limits.sms);
    return out;
  }
  const int64_t width = tile_width(classes, classes);
  // two stages of rows (with about 48 bytes per row besides the values), the table, and 2 KB to spare
  const int64_t tile =
      tile_rows(width, value_bytes) * (2 * classes * value_bytes + 64) + labels * (classes * compute_bytes + 8) + 2048;
  if (classes <= kGradTileClasses && tile <= std::min<int64_t>(limits.smem_block, 100 << 10)) {
    out.order = CudaOrder::kTile;
    out.width = width;
    out.blocks = clamp(up(rows, tile_rows(width, value_bytes)), 1, limits.sms * clamp(limits.smem_sm / (tile + 1024), 1, 4));
    return out;
  }
  // The rows of the table are read at random as long as it takes at most half of the L2 cache, else in the order of the labels.
  out.order = table <= limits.l2 / 2 ? CudaOrder::kByRow : CudaOrder::kByLabel;
  const bool warps = classes <= warp_classes(value_bytes);
  const int64_t groups = warps ? 8 : 1, resident = 2;
  out.blocks = clamp(up(rows, 2 * groups), 1, limits.sms * resident);
  if (out.order == CudaOrder::kByLabel) {
    out.sort = cuda_sort(rows, labels, limits);
    take_order(size, out.sort, rows, labels);
    out.workspace_bytes = size.bytes();
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------- logdet_inverse

int64_t factor_smem(int64_t classes, int64_t stride) {
  SharedSize size;
  take_factor_space(size, static_cast<int>(classes), static_cast<int>(stride));
  return size.bytes();
}

int64_t factor_stride(int64_t classes, int64_t smem_bytes) {
  const int64_t best = (classes + 3) / 8 * 8 + 4, even = (classes + 1) / 2 * 2;
  for (const int64_t stride : {best, even}) {
    if (factor_smem(classes, stride) <= smem_bytes) return stride;
  }
  return 0;
}

int64_t factor_classes(const DeviceLimits& limits) {
  int64_t classes = 32;
  while (factor_stride(classes + 1, limits.smem_block) > 0) ++classes;
  return classes;
}

int64_t grid_smem(int64_t classes, int64_t panel, int64_t blocks) {
  const int C = static_cast<int>(classes), columns = static_cast<int>(panel);
  SharedSize size;
  if (blocks == 1) {
    take_grid_shared<1>(size, C, columns);
  } else {
    take_grid_shared<static_cast<int>(kClusterBlocks)>(size, C, columns);
  }
  return size.bytes();
}

int64_t grid_panel(int64_t classes, int64_t smem_bytes, int64_t blocks) {
  int64_t panel = grid_most_panel(classes, blocks);
  while (panel > 0 && grid_smem(classes, panel, blocks) > smem_bytes) panel -= 8;
  return blocks > 1 && panel < 16 ? 0 : panel;
}

// The number of panel blocks of the grid's elimination; 0: the grid cannot do it.
static int64_t grid_panel_blocks(int64_t classes, const DeviceLimits& limits) {
  if (!limits.cooperative) return 0;
  // a device (or a part of one) with only one cluster would have no update blocks
  const bool shared = classes > kGridClasses / 2 && classes <= kClusterClasses && limits.clusters > 1;
  if (shared && grid_panel(classes, limits.smem_block, kClusterBlocks) > 0) return kClusterBlocks;
  return classes <= kGridClasses && grid_panel(classes, limits.smem_block, 1) > 0 ? 1 : 0;
}

CudaLogdetInverse cuda_logdet_inverse(int64_t count, int64_t classes, const DeviceLimits& limits, bool inverse) {
  CudaLogdetInverse out{};
  Workspace size;
  if (classes <= 32) {
    out.factor = CudaFactor::kWarp;
  } else if (out.stride = factor_stride(classes, limits.smem_block); out.stride > 0) {
    out.factor = CudaFactor::kBlock;
    out.smem_bytes = factor_smem(classes, out.stride);
  } else if (out.panel_blocks = grid_panel_blocks(classes, limits); out.panel_blocks > 0) {
    out.factor = CudaFactor::kGrid;
    out.panel = grid_panel(classes, limits.smem_block, out.panel_blocks);
    out.smem_bytes = grid_smem(classes, out.panel, out.panel_blocks);
    take_grid_space(size, classes, limits.sms, inverse);
    out.workspace_bytes = size.bytes();
  } else {
    out.factor = CudaFactor::kLu;
    take_lu_space(size, count, classes);
    out.workspace_bytes = size.bytes();
  }
  return out;
}

CudaCombine cuda_combine(int64_t rows, bool weighted_soft, const DeviceLimits& limits) {
  CudaCombine out{1, 0};
  if (weighted_soft) out.blocks = std::clamp<int64_t>((rows + kWeightRows - 1) / kWeightRows, 1, limits.sms);
  // one sum per block, and the counter of finished blocks
  if (out.blocks > 1) out.workspace_bytes = (out.blocks + 1) * 8;
  return out;
}

// ------------------------------------------------------------------------------------------------------------------- fused

namespace {

template <class F>
int64_t fused_smem(int64_t width, int64_t rows, int64_t classes, bool weighted, const FusedTiles& tiles) {
  const int N = static_cast<int>(rows), C = static_cast<int>(classes);
  SharedSize size;
  if (width == 16) {
    FusedSpace<F, 16>(size, N, C, weighted, tiles);
  } else if (width == 32) {
    FusedSpace<F, 32>(size, N, C, weighted, tiles);
  } else {
    FusedSpace<F, 64>(size, N, C, weighted, tiles);
  }
  return size.bytes();
}

}  // namespace

CudaFused cuda_fused(int64_t rows, int64_t classes, int64_t value_bytes, bool weighted, const DeviceLimits& limits) {
  CudaFused out{};
  if (classes > kCudaFusedClasses || rows * classes > kCudaFusedElements) return out;
  out.width = tile_width(classes, classes);
  out.wide = classes <= 8 ? 8 : out.width;
  out.splits = std::max<int64_t>(fused_threads(out.width) / (out.wide * out.wide), 1);
  const FusedTiles tiles{static_cast<int>(out.wide), static_cast<int>(out.splits), 0};
  // the tile is in the precision of the softmax
  const int64_t all = value_bytes == 8 ? fused_smem<double>(out.width, rows, classes, weighted, tiles)
                                       : fused_smem<float>(out.width, rows, classes, weighted, tiles);
  const int64_t without_factor = all - factor_smem(classes, 0);
  if (classes > kFactorWarp) out.stride = factor_stride(classes, limits.smem_block - without_factor);
  out.smem_bytes = without_factor + factor_smem(classes, out.stride);
  out.runs = (classes <= kFactorWarp || out.stride > 0) && out.smem_bytes <= limits.smem_block;
  return out;
}

// ------------------------------------------------------------------------------------------------------------ loss_forward

CudaLossForward cuda_loss_forward(int64_t rows, int64_t classes, bool soft, int64_t value_bytes, bool weighted,
                                  const DeviceLimits& limits, bool gradient) {
  CudaLossForward out{};
  if (!soft) {
    out.block = cuda_fused(rows, classes, value_bytes, weighted, limits);
    out.path = CudaLoss::kSingleBlock;
    if (out.block.runs) return out;
  }
  const CudaLogdetInverse elimination = cuda_logdet_inverse(1, classes, limits, gradient);
  if (elimination.factor == CudaFactor::kLu) {
    out.path = CudaLoss::kLu;
    return out;
  }
  const bool grid = elimination.factor == CudaFactor::kGrid;
  out.path = grid || (soft && weighted) ? CudaLoss::kSeparateKernels : CudaLoss::kFusedTail;
  const int64_t joint = cuda_joint(rows, classes, classes, soft, value_bytes, limits).workspace_bytes;
  Workspace size;
  take_loss_sums(size, classes);
  const int64_t with_joint = size.bytes() + joint;
  if (limits.cooperative && !soft && classes <= kCooperativeClasses) {
    out.path = CudaLoss::kCooperative;
    out.workspace_bytes = with_joint;
    return out;
  }
  take_loss_determinant(size);
  const int64_t combine = cuda_combine(rows, soft && weighted, limits).workspace_bytes;
  out.workspace_bytes = std::max(with_joint, size.bytes() + std::max(elimination.workspace_bytes, combine));
  return out;
}

// ----------------------------------------------------------------------------------------------------------------- explain

namespace {

const char* name_of(CudaOrder order) {
  switch (order) {
    case CudaOrder::kTile:
      return "tiles of rows";
    case CudaOrder::kByLabel:
      return "label order";
    case CudaOrder::kSoft:
      return "soft targets";
    case CudaOrder::kByRow:
      return "natural order";
  }
  return "";
}

const char* name_of(CudaFactor factor) {
  switch (factor) {
    case CudaFactor::kWarp:
      return "one warp, in registers";
    case CudaFactor::kBlock:
      return "one block, in shared memory";
    case CudaFactor::kGrid:
      return "all multiprocessors, in one launch";
    case CudaFactor::kLu:
      return "LU of torch";
  }
  return "";
}

}  // namespace

Plan cuda(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, const DeviceLimits& limits) {
  Plan out{};
  if (!soft && labels == classes && value_bytes >= 4 && cuda_fused(rows, classes, value_bytes, false, limits).runs) {
    out.kernels = {"fused (joint, logdet_inverse, logits_grad: one launch)"};
    out.regime = "small: one block computes the loss and its gradient";
    out.workspace_bytes = 0;
    out.reason = "N * C <= " + std::to_string(kCudaFusedElements) + " and C <= " + std::to_string(kCudaFusedClasses) +
                 ": more launches would cost more time than the other multiprocessors save";
    return out;
  }
  const CudaJoint joint = cuda_joint(rows, classes, labels, soft, value_bytes, limits);
  const CudaLogitsGrad grad = cuda_logits_grad(rows, classes, labels, soft, value_bytes, limits);
  const CudaLogdetInverse elimination = cuda_logdet_inverse(1, classes, limits);
  out.kernels = {std::string("joint (") + name_of(joint.order) + ")",
                 std::string("logdet_inverse (") + name_of(elimination.factor) + ")",
                 std::string("logits_grad (") + name_of(grad.order) + ")"};
  const CudaLossForward forward = cuda_loss_forward(rows, classes, soft, value_bytes, false, limits);
  // with K != C the joint alone is the op that runs
  const bool whole = labels == classes && (forward.path == CudaLoss::kCooperative || forward.path == CudaLoss::kSingleBlock);
  out.regime = std::string(whole ? "forward in one launch, " : "staged, ") + std::to_string(joint.blocks) + " + " +
               std::to_string(grad.blocks) + " blocks on " + std::to_string(limits.sms) + " multiprocessors";
  // the LU path: the factors and then V are in the memory of S, and the solutions need another matrix
  const int64_t lu_bytes = elimination.factor == CudaFactor::kLu ? classes * classes * 8 : 0;
  out.workspace_bytes = std::max({joint.workspace_bytes, lu_bytes + elimination.workspace_bytes, grad.workspace_bytes,
                                  cuda_loss_forward(rows, classes, soft, value_bytes, soft, limits).workspace_bytes});
  out.reason =
      joint.order == CudaOrder::kTile ? "at most " + std::to_string(kOnehotClasses) + " classes: each block sums a tile of S on chip"
      : joint.order == CudaOrder::kSoft
          ? "the joint is a matrix product of targets and predictions"
          : "more than " + std::to_string(kOnehotClasses) + " classes: rows are visited by label, so that a row of S stays on chip";
  if (elimination.factor == CudaFactor::kGrid || elimination.factor == CudaFactor::kLu) {
    out.reason += "; a block's shared memory holds a matrix of at most " + std::to_string(factor_classes(limits)) + " classes";
  }
  if (elimination.factor == CudaFactor::kGrid) {
    const std::string who =
        elimination.panel_blocks > 1 ? "a cluster of " + std::to_string(elimination.panel_blocks) + " blocks" : "one block";
    out.reason +=
        ", so " + who + " eliminates panels of " + std::to_string(elimination.panel) + " columns and the others update the rest";
  }
  if (elimination.factor == CudaFactor::kLu && limits.cooperative) {
    const bool clusters = limits.clusters > 1;
    const int64_t most = clusters ? kClusterClasses : kGridClasses;
    const char* const least = clusters && classes > kGridClasses ? "16" : "8";
    out.reason += classes > most ? ", a cooperative grid takes at most " + std::to_string(most) + " classes"
                                 : std::string(", and not even a panel of ") + least + " columns fits";
  }
  if (!limits.cooperative) out.reason += "; no cooperative launch: this device has none, or LDMI_FAST_CUDA_STAGED is set";
  if (probs) out.reason += "; probabilities are taken as they are";
  return out;
}

}  // namespace ldmi::plan
