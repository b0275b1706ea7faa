// The rows in the order of their labels, stable, those that do not count last: a counting sort in two launches.
//
// The rows are cut into pieces, one per block, and each piece into parts, one per warp. A warp has a counter for every bucket: one
// bucket per label, and one for the rows that do not count. sort_count adds the counters up. sort_scatter adds up the counts of all
// pieces, and of the pieces before its own, for each bucket; so it knows where its rows go, counts again and writes them there. Every
// block does the same sums: at N = 65536, C = 100 this adds 8 us, where a launch of one block that did them for all took 21 (H100). If
// there are too many labels for the beginnings of the buckets to fit into shared memory, sort_scan does the sums, between the two.
// Within a warp the lanes of one bucket are ranked by a match instruction, so the order is that of the rows, whatever the schedule.
#pragma once

#include "../plan/layout.h"
#include "rows.cuh"

namespace ldmi::cuda {

inline constexpr int kScanThreads = 1024, kScanPieces = 4;
inline constexpr int kScanAhead = 16;  // loads of counts that a thread has in flight

using plan::LabelOrder;
using plan::take_order;

// Where run `part` of `parts` nearly equal runs of `count` things begins
LDMI_HOST_DEVICE int64_t cut(int64_t count, int64_t parts, int64_t part) {
  return count / parts * part + (count % parts < part ? count % parts : part);
}

// A counter of this warp, in shared memory or in global memory that no other warp touches
template <bool kShared>
LDMI_DEVICE uint32_t read_counter(const uint32_t* p) {
  return kShared ? *p : load(p);
}
template <bool kShared>
LDMI_DEVICE void write_counter(uint32_t* p, uint32_t value) {
  if constexpr (kShared) {
    *p = value;
  } else {
    store(p, value);
  }
}

// Visits the rows begin..end, 32 at a time: each(row, bucket, rank among the visited rows of its bucket) in every lane that has a row.
// `counter` [K + 1] of this warp goes from the ranks' beginning to their end.
template <bool kShared, class Each>
LDMI_DEVICE void visit_rows(const Batch& batch, int64_t begin, int64_t end, uint32_t* counter, bool& bad, Each&& each) {
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t i = base + lane();
    const bool inside = i < end;
    int64_t bucket = -1;
    if (inside) {
      double weight;
      bucket = used_label(batch, i, weight, bad);
      if (bucket == kUnused) bucket = batch.num_labels;
    }
    const unsigned same = match_any(static_cast<uint64_t>(bucket));
    uint32_t before = 0;
    if (inside) before = read_counter<kShared>(counter + bucket);
    sync_warp();
    if (inside) {
      if (lowest(same) == lane()) write_counter<kShared>(counter + bucket, before + static_cast<uint32_t>(popcount(same)));
      each(i, bucket, before + static_cast<uint32_t>(popcount(same & lanes_below())));
    }
    sync_warp();
  }
}

// The sum over the lanes up to this one
LDMI_DEVICE int64_t scan_warp(int64_t value) {
  LDMI_UNROLL
  for (int by = 1; by < kWarp; by *= 2) {
    const int64_t other = shfl_up(value, by);
    if (lane() >= by) value += other;
  }
  return value;
}

// This warp's counters, zeroed
template <bool kShared>
LDMI_DEVICE uint32_t* zeroed_counters(uint32_t* counters, int64_t buckets) {
  uint32_t* const mine = counters + warp() * buckets;
  for (int64_t b = lane(); b < buckets; b += kWarp) write_counter<kShared>(mine + b, 0);
  sync_warp();
  return mine;
}

template <bool kShared>
LDMI_DEVICE void count_labels(const Batch& batch, const LabelOrder& sort) {
  const int64_t buckets = batch.num_labels + 1, rows = batch.logits.rows;
  const int parts = block_dim() / kWarp;
  Carve carve;
  uint32_t* const shared = kShared ? carve.take<uint32_t>(parts * buckets) : nullptr;
  for (int64_t piece = block_idx(); piece < sort.pieces; piece += grid_dim()) {
    const int64_t begin = cut(rows, sort.pieces, piece), count = cut(rows, sort.pieces, piece + 1) - begin;
    uint32_t* const counters = kShared ? shared : sort.counts + piece * parts * buckets;
    uint32_t* const mine = zeroed_counters<kShared>(counters, buckets);
    bool bad = false;
    visit_rows<kShared>(batch, begin + cut(count, parts, warp()), begin + cut(count, parts, warp() + 1), mine, bad,
                        [](int64_t, int64_t, uint32_t) {});
    bad = sync_block_or(bad);
    for (int64_t b = thread_idx(); b < buckets; b += block_dim()) {
      int64_t total = 0;
      for (int p = 0; p < parts; ++p) total += read_counter<kShared>(counters + p * buckets + b);
      store(sort.offset + piece * buckets + b, total);
    }
    if (thread_idx() == 0) store(sort.bad + piece, bad ? 1u : 0u);
    sync_block();
  }
}

// Turns the counts of each bucket's pieces into the beginning of each piece's rows within the bucket, and start[b] into the size of
// the bucket. One warp per bucket, kScanPieces loads in flight per lane.
LDMI_DEVICE void scan_pieces(int64_t buckets, const LabelOrder& sort) {
  const int64_t warps = grid_dim() * (block_dim() / kWarp);
  for (int64_t b = block_idx() * (block_dim() / kWarp) + warp(); b < buckets; b += warps) {
    int64_t carry = 0;
    for (int64_t base = 0; base < sort.pieces; base += kWarp * kScanPieces) {
      const int64_t first = base + lane() * kScanPieces;
      int64_t count[kScanPieces], own = 0;
      LDMI_UNROLL
      for (int j = 0; j < kScanPieces; ++j) {
        count[j] = first + j < sort.pieces ? load(sort.offset + (first + j) * buckets + b) : 0;
        own += count[j];
      }
      const int64_t through = scan_warp(own);
      int64_t at = carry + through - own;
      LDMI_UNROLL
      for (int j = 0; j < kScanPieces; ++j) {
        if (first + j < sort.pieces) store(sort.offset + (first + j) * buckets + b, at);
        at += count[j];
      }
      carry += shfl(through, kWarp - 1);
    }
    if (lane() == 0) store(sort.start + b, carry);
  }
}

// Turns the sizes of the buckets, rows_of(b), into their beginnings: calls begin(b, where), and begin(buckets, all). One block.
template <class RowsOf, class Begin>
LDMI_DEVICE void scan_starts(int64_t buckets, int64_t* warp_total, const RowsOf& rows_of, const Begin& begin) {
  int64_t carry = 0;
  for (int64_t base = 0; base < buckets; base += block_dim()) {
    const int64_t b = base + thread_idx();
    const int64_t own = b < buckets ? rows_of(b) : 0, through = scan_warp(own);
    if (lane() == kWarp - 1) warp_total[warp()] = through;
    sync_block();
    int64_t at = carry + through - own, all = 0;
    for (int w = 0; w < block_dim() / kWarp; ++w) {
      if (w < warp()) at += warp_total[w];
      all += warp_total[w];
    }
    carry += all;
    if (b < buckets) begin(b, at);
    sync_block();
  }
  if (thread_idx() == 0) begin(buckets, carry);
}

template <bool kShared>
LDMI_DEVICE void scatter_labels(const Batch& batch, const LabelOrder& sort) {
  const int64_t buckets = batch.num_labels + 1, rows = batch.logits.rows;
  const int parts = block_dim() / kWarp;
  Carve carve;
  uint32_t* const shared = kShared ? carve.take<uint32_t>(parts * buckets) : nullptr;
  int64_t* const begins = kShared ? carve.take<int64_t>(buckets) : nullptr;  // where the rows of a piece go, per bucket
  int64_t* const warp_total = kShared ? carve.take<int64_t>(kThreads / kWarp) : nullptr;
  for (int64_t piece = block_idx(); piece < sort.pieces; piece += grid_dim()) {
    const int64_t begin = cut(rows, sort.pieces, piece), count = cut(rows, sort.pieces, piece + 1) - begin;
    const int64_t first = begin + cut(count, parts, warp()), last = begin + cut(count, parts, warp() + 1);
    uint32_t* const counters = kShared ? shared : sort.counts + piece * parts * buckets;
    uint32_t* const mine = zeroed_counters<kShared>(counters, buckets);
    bool bad = false;
    if constexpr (kShared) {
      scan_starts(
          buckets, warp_total,
          [&](int64_t b) {
            int64_t all = 0, before = 0;
            for (int64_t base = 0; base < sort.pieces; base += kScanAhead) {
              int64_t part[kScanAhead];
              LDMI_UNROLL
              for (int j = 0; j < kScanAhead; ++j) {
                part[j] = base + j < sort.pieces ? load(sort.offset + (base + j) * buckets + b) : 0;
              }
              LDMI_UNROLL
              for (int j = 0; j < kScanAhead; ++j) {
                all += part[j];
                before += base + j < piece ? part[j] : 0;
              }
            }
            begins[b] = before;
            return all;
          },
          [&](int64_t b, int64_t where) {
            if (b < buckets) begins[b] += where;
            if (piece == 0) store(sort.start + b, where);
          });
    }
    visit_rows<kShared>(batch, first, last, mine, bad, [](int64_t, int64_t, uint32_t) {});
    sync_block();
    for (int64_t b = thread_idx(); b < buckets;
         b += block_dim()) {  // turns the counts of the parts into their beginnings within the piece
      uint32_t total = 0;
      for (int p = 0; p < parts; ++p) {
        const uint32_t here = read_counter<kShared>(counters + p * buckets + b);
        write_counter<kShared>(counters + p * buckets + b, total);
        total += here;
      }
    }
    sync_block();
    const int64_t* const offset = sort.offset + piece * buckets;
    visit_rows<kShared>(batch, first, last, mine, bad, [&](int64_t i, int64_t bucket, uint32_t rank) {
      const int64_t from = kShared ? begins[bucket] : load(sort.start + bucket) + load(offset + bucket);
      store(sort.order + from + rank, i);
    });
    sync_block();
  }
}

template <bool kShared>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1) sort_count(Batch batch, LabelOrder sort) {
  count_labels<kShared>(batch, sort);
}

// One block
template <int kBlock>
LDMI_KERNEL void LDMI_BOUNDS(kBlock, 1) sort_scan(int64_t buckets, LabelOrder sort) {
  Carve carve;
  int64_t* const warp_total = carve.take<int64_t>(kBlock / kWarp);
  scan_pieces(buckets, sort);
  sync_block();
  scan_starts(
      buckets, warp_total, [&](int64_t b) { return load(sort.start + b); },
      [&](int64_t b, int64_t where) { store(sort.start + b, where); });
}

template <bool kShared>
LDMI_KERNEL void LDMI_BOUNDS(kThreads, 1) sort_scatter(Batch batch, LabelOrder sort) {
  scatter_labels<kShared>(batch, sort);
}

inline int launch_sort(const Batch& batch, const LabelOrder& sort, const plan::CudaSort& plan, Stream stream) {
  Grid grid;
  grid.blocks = plan.pieces;
  grid.threads = plan.warps * kWarp;
  if (plan.shared) {
    Carve carve;
    carve.take<uint32_t>(plan.warps * (batch.num_labels + 1));
    grid.smem = carve.bytes();
    if (const int error = launch(sort_count<true>, grid, stream, batch, sort); error != 0) return error;
    carve.take<int64_t>(batch.num_labels + 1);
    carve.take<int64_t>(kThreads / kWarp);
    grid.smem = carve.bytes();
    return launch(sort_scatter<true>, grid, stream, batch, sort);
  }
  Grid scan;
  scan.threads = kScanThreads;
  Carve carve;
  carve.take<int64_t>(kScanThreads / kWarp);
  scan.smem = carve.bytes();
  if (const int error = launch(sort_count<false>, grid, stream, batch, sort); error != 0) return error;
  if (const int error = launch(sort_scan<kScanThreads>, scan, stream, batch.num_labels + 1, sort); error != 0) return error;
  return launch(sort_scatter<false>, grid, stream, batch, sort);
}

}  // namespace ldmi::cuda
