#include "cuda_plan.h"

#include <algorithm>
#include <string>

namespace ldmi::plan {

// ---------------------------------------------------------------------------------------------------- joint, logits_grad

namespace {

int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::max(low, std::min(value, high)); }
int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
int64_t piece(int64_t bytes) { return up(bytes, 256) * 256; }  // of a workspace

int64_t sort_bytes(const CudaSort& sort, int64_t rows, int64_t labels) {
  const int64_t counters = sort.shared ? 0 : piece(sort.pieces * sort.warps * (labels + 1) * 4);
  return piece(rows * 8) + piece((labels + 2) * 8) + piece(sort.pieces * (labels + 1) * 8) + counters + piece(sort.pieces * 4);
}

}  // namespace

CudaSort cuda_sort(int64_t rows, int64_t labels, const DeviceLimits& limits) {
  CudaSort out{};
  const int64_t room = std::min<int64_t>(limits.smem_block, 96 << 10) - 1024, buckets = labels + 1;
  out.shared = buckets * 12 <= room;  // a counter a warp, and 8 bytes
  out.warps = static_cast<int>(out.shared ? clamp((room / buckets - 8) / 4, 1, 8) : 1);
  // Each piece moves a counter a label a few times: two rows or more for each. 128 pieces are what a block adds up in some 3 us.
  out.pieces = clamp(rows / std::max<int64_t>(2 * labels, 64 * out.warps), 1, out.shared ? 128 : 8);
  return out;
}

CudaJoint cuda_joint(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, const DeviceLimits& limits) {
  CudaJoint out{};
  const int64_t compute_bytes = value_bytes == 8 ? 8 : 4;
  // how many partial sums S fit into 3.5 MiB, and 5 % of the gradient and 16 bytes a row more
  const int64_t room = (int64_t{7} << 19) + rows * classes * value_bytes / 20 + 8 * rows;
  const int64_t sums = std::max<int64_t>(room / ((labels * classes + labels) * 8), 1);
  if (soft) {
    out.order = CudaOrder::kSoft;
    out.blocks = clamp(up(rows, classes <= kWarpSums ? 8 : 1), 1, 4 * limits.sms);
    // splits of the rows: enough to fill the device, 256 rows or more each
    const int64_t tiles = up(classes, 64) * up(labels, 64);
    out.segments = clamp(std::min(up(2 * limits.sms, tiles), rows / 256), 1, std::min<int64_t>(1024, sums));
    out.workspace_bytes = 2 * piece(rows * compute_bytes) + piece(out.blocks * 8) + piece(out.blocks * 4) +
                          piece(out.segments * (labels * classes + labels) * 8);
    return out;
  }
  if (std::max(labels, classes) <= kTileLabels) {
    out.order = CudaOrder::kTile;
    out.width = tile_width(labels, classes);
    const int64_t most = limits.sms * (out.width == 16 ? 4 : 3);
    out.blocks = clamp(up(rows, tile_rows(out.width, value_bytes)), 1, std::min(most, sums));
    out.workspace_bytes = piece(out.blocks * (labels * classes + labels) * 8) + piece(out.blocks * 8) + piece(out.blocks * 4);
    return out;
  }
  out.order = CudaOrder::kByLabel;
  out.sort = cuda_sort(rows, labels, limits);
  // groups of a block, and blocks of a multiprocessor
  const bool warps = classes <= std::min(warp_classes(value_bytes), kLanes * 16);
  const int64_t groups = warps ? walk_threads(classes) / kLanes : 1;
  const int64_t resident = warps ? walk_blocks(classes) : classes <= kBlockClasses / 4 ? 3 : 2;
  out.segments = clamp(rows / 8, 1, limits.sms * resident * groups);
  out.blocks = up(out.segments, groups);
  out.workspace_bytes = sort_bytes(out.sort, rows, labels) + 3 * piece(out.segments * 8) + piece(out.segments * classes * 8);
  if (classes > kBlockClasses) {
    out.workspace_bytes += 2 * piece(rows * compute_bytes) + piece(out.blocks * 8) + piece(out.blocks * 4);
  }
  return out;
}

CudaLogitsGrad cuda_logits_grad(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes,
                                const DeviceLimits& limits) {
  CudaLogitsGrad out{};
  const int64_t compute_bytes = value_bytes == 8 ? 8 : 4;
  const int64_t table = labels * up(classes * compute_bytes, 16) * 16;
  out.workspace_bytes = piece(table) + piece(labels * 8);
  if (soft) {
    out.order = CudaOrder::kSoft;
    out.blocks = clamp(up(rows, 32), 1, 2 * limits.sms);
    return out;
  }
  const int64_t width = tile_width(classes, classes);
  // two tiles, the table, and some 48 bytes a row
  const int64_t tile =
      tile_rows(width, value_bytes) * (2 * classes * value_bytes + 64) + labels * (classes * compute_bytes + 8) + 2048;
  if (classes <= kTileClasses && tile <= std::min<int64_t>(limits.smem_block, 100 << 10)) {
    out.order = CudaOrder::kTile;
    out.width = width;
    out.blocks = clamp(up(rows, tile_rows(width, value_bytes)), 1, limits.sms * clamp(limits.smem_sm / (tile + 1024), 1, 4));
    return out;
  }
  // The table is read row by row at random: from level 2 as long as it takes at most half of it, else in the order of the labels.
  out.order = table <= limits.l2 / 2 ? CudaOrder::kByRow : CudaOrder::kByLabel;
  const bool warps = classes <= warp_classes(value_bytes);
  const int64_t groups = warps ? 8 : 1, resident = 2;
  out.blocks = clamp(up(rows, 2 * groups), 1, limits.sms * resident);
  if (out.order == CudaOrder::kByLabel) {
    out.sort = cuda_sort(rows, labels, limits);
    out.workspace_bytes += sort_bytes(out.sort, rows, labels);
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------- logdet_inverse

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

// Blocks that eliminate a grid's panels; 0: no grid does it.
static int64_t grid_team(int64_t classes, const DeviceLimits& limits) {
  if (!limits.cooperative) return 0;
  // with one cluster alone, of a part of a device, nobody would be left to take panels in meanwhile
  const bool shared = classes > kGridClasses / 2 && classes <= kClusterClasses && limits.clusters > 1;
  if (shared && grid_panel(classes, limits.smem_block, kClusterBlocks) > 0) return kClusterBlocks;
  return classes <= kGridClasses && grid_panel(classes, limits.smem_block, 1) > 0 ? 1 : 0;
}

CudaLogdetInverse cuda_logdet_inverse(int64_t count, int64_t classes, const DeviceLimits& limits, bool inverse) {
  CudaLogdetInverse out{};
  if (classes <= 32) {
    out.factor = CudaFactor::kWarp;
  } else if (out.stride = factor_stride(classes, limits.smem_block); out.stride > 0) {
    out.factor = CudaFactor::kBlock;
    out.smem_bytes = factor_smem(classes, out.stride);
  } else if (out.team = grid_team(classes, limits); out.team > 0) {
    out.factor = CudaFactor::kGrid;
    out.panel = grid_panel(classes, limits.smem_block, out.team);
    out.smem_bytes = grid_smem(classes, out.panel, out.team);
    // norms, pivots, their rows, a count a block, a flag, and the matrix
    out.workspace_bytes =
        2 * piece(classes * 8) + piece(classes * 4) + piece(limits.sms * 4) + piece(4) + (inverse ? 0 : piece(classes * classes * 8));
  } else {
    out.factor = CudaFactor::kLibrary;
    // norms, what to select, and the order of the rows
    out.workspace_bytes = piece(count * classes * 8) + piece(count * 4) + piece(count * classes * 4);
  }
  return out;
}

CudaCombine cuda_combine(int64_t rows, bool weighted_soft, const DeviceLimits& limits) {
  CudaCombine out{1, 0};
  if (weighted_soft) out.blocks = std::clamp<int64_t>((rows + kWeightRows - 1) / kWeightRows, 1, limits.sms);
  // a sum a block, and the counter of the blocks that are done
  if (out.blocks > 1) out.workspace_bytes = (out.blocks + 1) * 8;
  return out;
}

// ------------------------------------------------------------------------------------------------------------------- fused

CudaFused cuda_fused(int64_t rows, int64_t classes, int64_t value_bytes, bool weighted, const DeviceLimits& limits) {
  CudaFused out{};
  if (classes > kCudaFusedClasses || rows * classes > kCudaFusedElements) return out;
  value_bytes = std::max<int64_t>(value_bytes, 4);  // the tile is in the precision of the softmax
  out.width = tile_width(classes, classes);
  const int64_t wide = classes <= 8 ? 8 : out.width, splits = std::max<int64_t>(fused_threads(out.width) / (wide * wide), 1);
  out.wide = wide;
  out.splits = splits;
  const auto taken = [](int64_t bytes) { return up(bytes, 16) * 16; };
  out.smem_bytes = taken(rows * classes * value_bytes) + (weighted ? taken(rows * 8) : 0) + taken(rows) +
                   taken(up(rows, 32) * wide * 4) + 2 * taken(wide * 8) + taken(splits * wide * 8) +
                   taken(std::max(splits * wide * (wide + 1), classes * fused_pitch(out.width) * value_bytes / 8) * 8) +
                   taken(fused_threads(out.width) / 32 * 8) + 16;
  if (classes <= 32) {
    out.smem_bytes += factor_smem(classes, 0);
  } else {
    out.stride = factor_stride(classes, limits.smem_block - out.smem_bytes);
    out.smem_bytes += factor_smem(classes, out.stride);
  }
  out.runs = (classes <= 32 || out.stride > 0) && out.smem_bytes <= limits.smem_block;
  return out;
}

// ------------------------------------------------------------------------------------------------------------ loss_forward

CudaLossForward cuda_loss_forward(int64_t rows, int64_t classes, bool soft, int64_t value_bytes, bool weighted,
                                  const DeviceLimits& limits, bool gradient) {
  CudaLossForward out{};
  if (!soft) {
    out.block = cuda_fused(rows, classes, value_bytes, weighted, limits);
    out.how = CudaLoss::kOneBlock;
    if (out.block.runs) return out;
  }
  const CudaLogdetInverse elimination = cuda_logdet_inverse(1, classes, limits, gradient);
  if (elimination.factor == CudaFactor::kLibrary) {
    out.how = CudaLoss::kLibrary;
    return out;
  }
  const bool grid = elimination.factor == CudaFactor::kGrid;
  out.how = grid || (soft && weighted) ? CudaLoss::kScalars : CudaLoss::kEnd;
  const int64_t joint = cuda_joint(rows, classes, classes, soft, value_bytes, limits).workspace_bytes;
  if (limits.cooperative && !soft && classes <= kWholeClasses) {
    out.how = CudaLoss::kWhole;
    out.workspace_bytes = piece(classes * classes * 8) + piece(classes * 8) + piece(8) + joint;
    return out;
  }
  out.workspace_bytes = piece(classes * classes * 8) + piece(classes * 8) + piece(8) +
                        std::max(joint, 3 * piece(8) + std::max(elimination.workspace_bytes,
                                                                cuda_combine(rows, soft && weighted, limits).workspace_bytes));
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
    case CudaFactor::kLibrary:
      return "LU of torch's libraries";
  }
  return "";
}

}  // namespace

Plan cuda(int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, const DeviceLimits& limits) {
  Plan out{};
  if (!soft && labels == classes && value_bytes >= 4 && cuda_fused(rows, classes, value_bytes, false, limits).runs) {
    out.kernels = {"fused (joint, logdet_inverse, logits_grad: one launch)"};
    out.regime = "small: one block leaves the loss and its gradient";
    out.workspace_bytes = 0;
    out.reason = "N * C <= " + std::to_string(kCudaFusedElements) + " and C <= " + std::to_string(kCudaFusedClasses) +
                 ": launches would cost more than the other multiprocessors gain";
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
  const bool whole = labels == classes && (forward.how == CudaLoss::kWhole || forward.how == CudaLoss::kOneBlock);
  out.regime = std::string(whole ? "forward in one launch, " : "staged, ") + std::to_string(joint.blocks) + " + " +
               std::to_string(grad.blocks) + " blocks on " + std::to_string(limits.sms) + " multiprocessors";
  // a library's factors and then V stand where S was, the solutions beside
  const int64_t library = elimination.factor == CudaFactor::kLibrary ? classes * classes * 8 : 0;
  out.workspace_bytes = std::max({joint.workspace_bytes, library + elimination.workspace_bytes, grad.workspace_bytes,
                                  cuda_loss_forward(rows, classes, soft, value_bytes, soft, limits).workspace_bytes});
  out.reason =
      joint.order == CudaOrder::kTile ? "at most " + std::to_string(kTileLabels) + " classes: each block sums a tile of S on chip"
      : joint.order == CudaOrder::kSoft
          ? "the joint is a matrix product of targets and predictions"
          : "more than " + std::to_string(kTileLabels) + " classes: rows are visited by label, so that a row of S stays on chip";
  if (elimination.factor == CudaFactor::kGrid || elimination.factor == CudaFactor::kLibrary) {
    out.reason += "; a block's shared memory holds a matrix of " + std::to_string(factor_classes(limits)) + " classes at most";
  }
  if (elimination.factor == CudaFactor::kGrid) {
    const std::string who = elimination.team > 1 ? "a cluster of " + std::to_string(elimination.team) + " blocks " : std::string();
    out.reason += ", " + who + std::to_string(elimination.panel) + " columns of this one, eliminated before the others take them in";
  }
  if (elimination.factor == CudaFactor::kLibrary && limits.cooperative) {
    const bool clusters = limits.clusters > 1;
    const int64_t most = clusters ? kClusterClasses : kGridClasses;
    const char* const least = clusters && classes > kGridClasses ? "16" : "8";
    out.reason += classes > most ? ", a grid takes up to " + std::to_string(most) + " classes"
                                 : std::string(", and not even ") + least + " columns of this one";
  }
  if (!limits.cooperative) out.reason += "; step by step: no cooperative grids on this device, or LDMI_FAST_CUDA_STAGED is set";
  if (probs) out.reason += "; probabilities are taken as they are";
  return out;
}

}  // namespace ldmi::plan
