// Shows that the shim finds what it is for: small kernels, right as they stand, and each with defects that are switched on one by
// one. `demo` runs everything, under many seeds, and prints for each how often it was found wrong, and the first reason.
// For a GPU only what is right runs, unless --only names a defect for compute-sanitizer to find: it may hang.

#include <functional>

#include "case.h"

namespace ldmi::demo {
namespace {

using namespace simt;
using test::Buffer;

enum class Defect {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kSkippedWrite,
  kReadPastEnd,
  kWritePastEnd,
  kSharedPastEnd,
  kUnstored,
  kMisaligned,
  kTooLittleShared,
  kDivergentCollective,
  kDivergentBarrier,
  kEarlyExit,
  kNoFence,
  kNoReset,
  kNoWait,
  kWaitsForTooFew,
  kNotCooperative,
  kNoWarpSync,
  kNotAtomic,
  kWaitsForLaterBlocks,
  kNoPublish,
  kReadOnlyLoad,
  kPlainPointer,
};
using enum Defect;

std::vector<float> random_values(test::Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = static_cast<float>(random.integer(1, 1000));  // sums are exact
  return values;
}

// ------------------------------------------------------------------------------------------- a transpose, through a tile

constexpr int kTile = 32, kPitch = 33;

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(256, 1) transpose(const float* in, int64_t rows, int64_t columns, float* out) {
  Carve carve;
  float* const tile = carve.take<float>(defect == kSharedPastEnd ? kTile * kTile : kTile * kPitch);
  const int64_t across = (columns + kTile - 1) / kTile, tiles = across * ((rows + kTile - 1) / kTile);
  for (int64_t t = block_idx(); t < tiles; t += grid_dim()) {
    const int64_t row = t / across * kTile, column = t % across * kTile;
    for (int r = warp(); r < kTile; r += block_dim() / kWarp) {
      const bool inside = (defect == kReadPastEnd || row + r < rows) && column + lane() < columns;
      if (defect == kSkippedWrite && r == 0) continue;
      const float* const from = in + (row + r) * columns + column + lane();
      if (inside) tile[r * kPitch + lane()] = defect == kPlainPointer ? *from : load_once(from);
    }
    if constexpr (defect != kNoBarrier) sync_block();
    for (int c = warp(); c < kTile; c += block_dim() / kWarp) {
      const bool inside = (defect == kWritePastEnd || column + c < columns) && row + lane() < rows;
      if (defect == kUnstored && c == 0) continue;
      if (inside) store(out + (column + c) * rows + row + lane(), tile[lane() * kPitch + c]);
    }
    if constexpr (defect != kNoSecondBarrier) sync_block();
  }
}

template <Defect defect>
void check_transpose(test::Random& random) {
  const int64_t rows = 32 + random.integer(1, 31), columns = 32 + random.integer(1, 31);  // 4 tiles, none but one full
  const std::vector<float> in = random_values(random, rows * columns);
  std::vector<float> want(in.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) want[static_cast<size_t>(c * rows + r)] = in[static_cast<size_t>(r * columns + c)];
  }
  const Buffer<float> input(in, "in"), output(rows * columns, "out");
  Carve carve;
  carve.take<float>(kTile * kPitch);
  const Grid grid{.blocks = random.integer(1, 2), .threads = 256, .smem = carve.bytes()};
  test::require_success(launch(transpose<defect>, grid, Stream{}, input.data(), rows, columns, output.data()), "transpose");
  test::require_equal(output.download(), want, "transpose");
}

// ------------------------------------------------------------------------------------------------- a sum within a block

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(256, 1) reduce(const float* in, int64_t count, float* out) {
  Carve carve;
  float* const part = carve.take<float>(block_dim() / kWarp);
  if (defect == kEarlyExit && thread_idx() >= count) return;
  float sum = 0.0f;
  if constexpr (defect == kMisaligned) {
    if (thread_idx() == 0) sum = load16(in + 1)[0];
  }
  for (int64_t i = thread_idx(); i < count; i += block_dim()) sum += load(in + i);
  if constexpr (defect == kDivergentCollective) {
    if (thread_idx() < count) sum = warp_sum(sum);
  } else {
    sum = warp_sum(sum);
  }
  if (lane() == 0) part[warp()] = sum;
  if constexpr (defect == kDivergentBarrier) {
    if (warp() == 0) {
      sync_block();
    }
  } else if constexpr (defect != kNoBarrier) {
    sync_block();
  }
  if (warp() == 0) {
    const float total = warp_sum(lane() < block_dim() / kWarp ? part[lane()] : 0.0f);
    if (lane() == 0) store(out, total);
  }
}

template <Defect defect>
void check_reduce(test::Random& random) {
  const int threads = static_cast<int>(kWarp * random.integer(2, 8));
  const int64_t count = threads - random.integer(1, 31);
  const std::vector<float> in = random_values(random, count);
  std::vector<double> want(1);
  for (const float x : in) want[0] += x;
  const Buffer<float> input(in, "in"), output(1, "out");
  Carve carve;
  carve.take<float>(threads / kWarp);
  const Grid grid{.threads = threads, .smem = carve.bytes() - (defect == kTooLittleShared ? 16 : 0)};
  test::require_success(launch(reduce<defect>, grid, Stream{}, input.data(), count, output.data()), "reduce");
  test::require_equal(output.download(), want, "sum");
}

// ------------------------------------------------------------------------- a sum in one launch: the last block finishes it

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(128, 1) last_block_sum(const float* in, int64_t count, float* parts, unsigned* counter, float* out) {
  const int64_t warps = block_dim() / kWarp;
  float sum = 0.0f;
  for (int64_t i = block_idx() * block_dim() + thread_idx(); i < count; i += grid_dim() * block_dim()) sum += load_once(in + i);
  sum = warp_sum(sum);
  if (lane() == 0) store(parts + block_idx() * warps + warp(), sum);
  bool last;
  if constexpr (defect == kNoFence || defect == kNoReset) {
    sync_block();
    unsigned ticket = 0;
    if constexpr (defect == kNoReset) {
      last = sync_block_or(last_block(counter, 0x7fffffff));  // never wraps
    } else {
      if (thread_idx() == 0) ticket = atomic_add(counter, 1u);
      last = sync_block_or(thread_idx() == 0 && ticket == grid_dim() - 1);
      if (last && thread_idx() == 0) store(counter, 0u);
    }
  } else if constexpr (defect == kNoBarrier) {
    // one thread's ticket, while its neighbours' stores are not yet ordered before it
    last = false;
    if (thread_idx() == 0) {
      publish(counter + 1, 1u);
      last = atomic_add(counter, 1u) == grid_dim() - 1;
      if (last) store(counter, 0u);
    }
    last = sync_block_or(last);
  } else {
    last = last_block(counter, grid_dim());
  }
  if (last && warp() == 0) {
    float total = 0.0f;
    for (int64_t i = lane(); i < grid_dim() * warps; i += kWarp) total += load(parts + i);
    total = warp_sum(total);
    if (lane() == 0) store(out, total);
  }
}

template <Defect defect>
void check_last_block(test::Random& random) {
  const int64_t blocks = random.integer(3, 9), count = random.integer(1, 2000);
  const Buffer<float> parts(blocks * 4, "parts");
  const Buffer<unsigned> counter(2, "counter");
  test::require_success(zero(counter.data(), counter.bytes(), Stream{}), "zero");
  for (int replay = 0; replay < 2; ++replay) {
    const std::vector<float> in = random_values(random, count);
    std::vector<double> want(1);
    for (const float x : in) want[0] += x;
    const Buffer<float> input(in, "in"), output(1, "out");
    const Grid grid{.blocks = blocks, .threads = 128};
    test::require_success(
        launch(last_block_sum<defect>, grid, Stream{}, input.data(), count, parts.data(), counter.data(), output.data()),
        "last_block_sum");
    test::require_equal(output.download(), want, "sum");
  }
}

// ---------------------------------------------------------------------------------- a pipeline of asynchronous copies

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(128, 1) pipeline(const float* in, int64_t count, float* out) {
  const int width = 4 * block_dim();  // values of a tile; out[i] = in[i] + the value half a tile on, cyclic in the tile
  Carve carve;
  float* const stage[2] = {carve.take<float>(width), carve.take<float>(width)};
  const int64_t tiles = (count + width - 1) / width;
  const auto fetch = [&](int64_t tile, int which) {
    const int64_t at = tile * width + 4 * thread_idx();
    const int64_t left = at < count ? (count - at < 4 ? count - at : 4) : 0;
    const int valid = defect == kReadPastEnd ? 16 : static_cast<int>(left) * 4;
    if (tile < tiles) copy_async<16>(stage[which] + 4 * thread_idx(), in + (valid == 0 ? 0 : at), valid);
    commit_copies();
  };
  fetch(block_idx(), 0);
  int which = 0;
  for (int64_t tile = block_idx(); tile < tiles; tile += grid_dim(), which ^= 1) {
    fetch(tile + grid_dim(), which ^ 1);
    if constexpr (defect == kWaitsForTooFew) {
      wait_copies<2>();
    } else if constexpr (defect != kNoWait) {
      wait_copies<1>();
    }
    if constexpr (defect != kNoBarrier) sync_block();
    for (int i = thread_idx(); i < width; i += block_dim()) {
      const float sum = stage[which][i] + stage[which][(i + width / 2) % width];
      if (tile * width + i < count) store(out + tile * width + i, sum);
    }
    if constexpr (defect != kNoSecondBarrier) sync_block();
  }
  wait_copies();
}

template <Defect defect>
void check_pipeline(test::Random& random) {
  const int threads = static_cast<int>(kWarp * random.integer(2, 4));
  const int64_t width = 4 * threads, count = 5 * width + random.integer(1, width - 1), blocks = 2;
  const std::vector<float> in = random_values(random, count);
  std::vector<float> want(in.size());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t other = i / width * width + (i + width / 2) % width;
    want[static_cast<size_t>(i)] = in[static_cast<size_t>(i)] + (other < count ? in[static_cast<size_t>(other)] : 0.0f);
  }
  const Buffer<float> input(in, "in"), output(count, "out");
  Carve carve;
  carve.take<float>(width);
  carve.take<float>(width);
  const Grid grid{.blocks = blocks, .threads = threads, .smem = carve.bytes()};
  test::require_success(launch(pipeline<defect>, grid, Stream{}, input.data(), count, output.data()), "pipeline");
  test::require_equal(output.download(), want, "pipeline");
}

// ----------------------------------------------------------------------- blocks of a cluster read each other's shared memory

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(64, 1) exchange(const float* in, float* out) {
  Carve carve;
  float* const mine = carve.take<float>(block_dim());
  const int64_t at = block_idx() * block_dim() + thread_idx();
  mine[thread_idx()] = load_once(in + at);
  if constexpr (defect == kNoBarrier) {
    sync_block();
  } else {
    sync_cluster();
  }
  const float* const theirs = map_shared(mine, (cluster_rank() + 1) % cluster_size());
  store(out + at, theirs[block_dim() - 1 - thread_idx()]);
  if constexpr (defect != kNoSecondBarrier) sync_cluster();
}

template <Defect defect>
void check_exchange(test::Random& random) {
  Device limits;
  test::require_success(device(&limits), "device");
#ifdef __CUDACC__
  if (limits.capability < 90) return;
#else
  limits.capability = 90;
  host::set_device(limits);
#endif
  const int64_t cluster = random.integer(2, 4), blocks = cluster * random.integer(1, 3), threads = 64;
  const std::vector<float> in = random_values(random, blocks * threads);
  std::vector<float> want(in.size());
  for (int64_t i = 0; i < blocks * threads; ++i) {
    const int64_t block = i / threads, next = block / cluster * cluster + (block % cluster + 1) % cluster;
    want[static_cast<size_t>(i)] = in[static_cast<size_t>(next * threads + threads - 1 - i % threads)];
  }
  const Buffer<float> input(in, "in"), output(blocks * threads, "out");
  const Grid grid{.blocks = blocks, .threads = 64, .smem = 64 * sizeof(float), .cluster = static_cast<int>(cluster)};
  test::require_success(launch(exchange<defect>, grid, Stream{}, input.data(), output.data()), "exchange");
  test::require_equal(output.download(), want, "exchange");
}

// --------------------------------------------------------------------------------------- two phases, with a sync of the grid

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(64, 1) two_phases(const float* in, int64_t count, float* squares, float* out) {
  const int64_t first = block_idx() * block_dim() + thread_idx(), step = grid_dim() * block_dim();
  for (int64_t i = first; i < count; i += step) store(squares + i, load_once(in + i) * load_once(in + i));
  if constexpr (defect == kNoBarrier) {
    sync_block();
  } else {
    sync_grid();
  }
  for (int64_t i = first; i < count; i += step) {
    const float* const from = squares + (count - 1 - i);
    store(out + i, defect == kReadOnlyLoad ? load_const(from) : load(from));
  }
}

template <Defect defect>
void check_two_phases(test::Random& random) {
  int fit = 0;
  Device limits;
  test::require_success(device(&limits), "device");
  limits.sms = limits.sms < 2 ? 2 : limits.sms;
#ifndef __CUDACC__
  host::set_device(limits);
#endif
  test::require_success(blocks_per_sm(two_phases<defect>, 64, 0, &fit), "blocks_per_sm");
  const int64_t blocks = random.integer(2, fit * limits.sms < 8 ? fit * limits.sms : 8), count = blocks * random.integer(64, 200);
  const std::vector<float> in = random_values(random, count);
  std::vector<float> want(in.size());
  for (int64_t i = 0; i < count; ++i) {
    const float x = in[static_cast<size_t>(count - 1 - i)];
    want[static_cast<size_t>(i)] = x * x;
  }
  const Buffer<float> input(in, "in"), squares(count, "squares"), output(count, "out");
  const Grid grid{.blocks = blocks, .threads = 64, .cooperative = defect != kNotCooperative};
  test::require_success(launch(two_phases<defect>, grid, Stream{}, input.data(), count, squares.data(), output.data()), "two_phases");
  test::require_equal(output.download(), want, "two_phases");
}

// -------------------------------------------------------------------------------- the stable order of labels, by counting

constexpr int kClasses = 5;

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(128, 1) sort_labels(const int* labels, int64_t count, int* total, int* order) {
  const int warps = block_dim() / kWarp;
  Carve carve;
  int* const next = carve.take<int>(warps * kClasses);  // [warp][class]: where its next label goes
  for (int i = thread_idx(); i < warps * kClasses; i += block_dim()) next[i] = 0;
  if constexpr (defect != kNoBarrier) sync_block();
  // each warp has one contiguous part, read 32 labels at a time
  const int64_t part = (count + warps - 1) / warps;
  const int64_t begin = warp() * part, end = begin + part < count ? begin + part : count;
  int* const mine = next + warp() * kClasses;
  for (int64_t i = begin + lane(); i < end; i += kWarp) {
    const int label = load_const(labels + i);
    atomic_add(mine + label, 1);
    if constexpr (defect == kNotAtomic) {
      store(total + label, load(total + label) + 1);
    } else {
      atomic_add(total + label, 1);
    }
  }
  sync_block();
  if (thread_idx() == 0) {
    int sum = 0;
    for (int label = 0; label < kClasses; ++label) {
      for (int w = 0; w < warps; ++w) {
        const int here = next[w * kClasses + label];
        next[w * kClasses + label] = sum;
        sum += here;
      }
    }
  }
  if constexpr (defect != kNoSecondBarrier) sync_block();
  for (int64_t base = begin; base < end; base += kWarp) {
    const bool inside = base + lane() < end;
    const int label = inside ? load_const(labels + base + lane()) : kClasses;
    const unsigned equal = match_any(static_cast<unsigned>(label));
    const int rank = popcount(equal & lanes_below());
    const int at = inside ? mine[label] + rank : 0;
    if (inside) store(order + at, static_cast<int>(base) + lane());
    if constexpr (defect != kNoWarpSync) sync_warp();
    if (inside && rank == 0) mine[label] = at + popcount(equal);
    if constexpr (defect != kNoWarpSync) sync_warp();
  }
}

template <Defect defect>
void check_sort(test::Random& random) {
  const int threads = static_cast<int>(kWarp * random.integer(2, 4));
  const int64_t count = random.integer(400, 700);
  std::vector<int> labels(static_cast<size_t>(count)), want_order, want_total(kClasses);
  for (int& label : labels) label = static_cast<int>(random.integer(0, kClasses - 1));
  for (int label = 0; label < kClasses; ++label) {
    for (int i = 0; i < count; ++i) {
      if (labels[static_cast<size_t>(i)] != label) continue;
      want_order.push_back(i);
      ++want_total[static_cast<size_t>(label)];
    }
  }
  const Buffer<int> input(labels, "labels"), total(std::vector<int>(kClasses), "total"), order(count, "order");
  Carve carve;
  carve.take<int>(threads / kWarp * kClasses);
  const Grid grid{.threads = threads, .smem = carve.bytes()};
  test::require_success(launch(sort_labels<defect>, grid, Stream{}, input.data(), count, total.data(), order.data()), "sort_labels");
  test::require_equal(order.download(), want_order, "order");
  test::require_equal(total.download(), want_total, "total");
}

// ------------------------------------------------------------------------ a running sum: each block waits for the one before

template <Defect defect>
LDMI_KERNEL void LDMI_BOUNDS(32, 1) running_sum(const float* in, unsigned* state, float* out) {
  unsigned ticket = 0;  // blocks may start in any order: the tile is the order in which they came
  if constexpr (defect == kWaitsForLaterBlocks) {
    ticket = static_cast<unsigned>(block_idx());
  } else {
    if (lane() == 0) ticket = atomic_add(state, 1u);
    ticket = shfl(ticket, 0);
  }
  unsigned* const flags = state + 1;
  const float sum = warp_sum(load_once(in + int64_t{ticket} * kWarp + lane()));
  if (lane() == 0) {
    float before = 0.0f;
    if (ticket > 0) {
      acquire(flags + ticket - 1, 1u);
      before = load(out + ticket - 1);
    }
    store(out + ticket, before + sum);
    if constexpr (defect == kNoFence) {
      atomic_or(flags + ticket, 1u);
    } else if constexpr (defect != kNoPublish) {
      publish(flags + ticket, 1u);
    }
  }
}

template <Defect defect>
void check_running_sum(test::Random& random) {
  const int64_t tiles = random.integer(20, 40);
  const std::vector<float> in = random_values(random, tiles * kWarp);
  std::vector<double> want(static_cast<size_t>(tiles));
  double sum = 0.0;
  for (size_t i = 0; i < in.size(); ++i) want[i / kWarp] = sum += in[i];
  const Buffer<float> input(in, "in"), output(tiles, "out");
  const Buffer<unsigned> state(std::vector<unsigned>(static_cast<size_t>(tiles) + 1), "state");
  const Grid grid{.blocks = tiles, .threads = kWarp};
  test::require_success(launch(running_sum<defect>, grid, Stream{}, input.data(), state.data(), output.data()), "running_sum");
  test::require_equal(output.download(), want, "running_sum");
}

// -------------------------------------------------------------------------------------------------------------- the list

enum class Kind {
  kWrong,
  kRight,
  kForAsan,  // nothing but AddressSanitizer, which ends the process, finds it
};

struct Entry {
  const char* name;
  std::function<void(test::Random&)> check;
  Kind kind = Kind::kWrong;
};

const std::vector<Entry>& entries() {
  static const std::vector<Entry> all{
      {"transpose", check_transpose<kNone>, Kind::kRight},
      {"transpose no-barrier", check_transpose<kNoBarrier>},
      {"transpose no-second-barrier", check_transpose<kNoSecondBarrier>},
      {"transpose skipped-write", check_transpose<kSkippedWrite>},
      {"transpose read-past-end", check_transpose<kReadPastEnd>},
      {"transpose write-past-end", check_transpose<kWritePastEnd>},
      {"transpose shared-past-end", check_transpose<kSharedPastEnd>},
      {"transpose unstored", check_transpose<kUnstored>},
      {"transpose plain-pointer", check_transpose<kPlainPointer>, Kind::kForAsan},
      {"reduce", check_reduce<kNone>, Kind::kRight},
      {"reduce no-barrier", check_reduce<kNoBarrier>},
      {"reduce divergent-collective", check_reduce<kDivergentCollective>},
      {"reduce divergent-barrier", check_reduce<kDivergentBarrier>},
      {"reduce early-exit", check_reduce<kEarlyExit>},
      {"reduce misaligned", check_reduce<kMisaligned>},
      {"reduce too-little-shared", check_reduce<kTooLittleShared>},
      {"last-block", check_last_block<kNone>, Kind::kRight},
      {"last-block no-fence", check_last_block<kNoFence>},
      {"last-block no-barrier", check_last_block<kNoBarrier>},
      {"last-block no-reset", check_last_block<kNoReset>},
      {"pipeline", check_pipeline<kNone>, Kind::kRight},
      {"pipeline no-wait", check_pipeline<kNoWait>},
      {"pipeline waits-for-too-few", check_pipeline<kWaitsForTooFew>},
      {"pipeline no-barrier", check_pipeline<kNoBarrier>},
      {"pipeline no-second-barrier", check_pipeline<kNoSecondBarrier>},
      {"pipeline read-past-end", check_pipeline<kReadPastEnd>},
      {"exchange", check_exchange<kNone>, Kind::kRight},
      {"exchange no-barrier", check_exchange<kNoBarrier>},
      {"exchange no-second-barrier", check_exchange<kNoSecondBarrier>},
      {"two-phases", check_two_phases<kNone>, Kind::kRight},
      {"two-phases no-barrier", check_two_phases<kNoBarrier>},
      {"two-phases not-cooperative", check_two_phases<kNotCooperative>},
      {"two-phases read-only-load", check_two_phases<kReadOnlyLoad>},
      {"sort", check_sort<kNone>, Kind::kRight},
      {"sort no-barrier", check_sort<kNoBarrier>},
      {"sort no-second-barrier", check_sort<kNoSecondBarrier>},
      {"sort no-warp-sync", check_sort<kNoWarpSync>},
      {"sort not-atomic", check_sort<kNotAtomic>},
      {"running-sum", check_running_sum<kNone>, Kind::kRight},
      {"running-sum no-fence", check_running_sum<kNoFence>},
      {"running-sum waits-for-later-blocks", check_running_sum<kWaitsForLaterBlocks>},
      {"running-sum no-publish", check_running_sum<kNoPublish>},
  };
  return all;
}

// Prints `name: found F of N: the first reason`. False if what is right was found wrong.
bool run(const Entry& entry, const test::Options& options) {
  int64_t found = 0;
  std::string reason;
  for (int64_t i = 0; i < options.iterations; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    try {
      test::set_seed(seed);
      test::Random random(seed);
      entry.check(random);
      test::synchronize();
    } catch (const std::exception& problem) {
      if (found++ == 0) reason = problem.what();
    }
  }
  for (char& c : reason) c = c == '\n' ? ' ' : c;
  std::printf("%s: found %lld of %lld: %s\n", entry.name, static_cast<long long>(found), static_cast<long long>(options.iterations),
              reason.c_str());
  return found == 0 || entry.kind != Kind::kRight;
}

}  // namespace
}  // namespace ldmi::demo

int main(int count, char** words) {
  const ldmi::test::Options options(count, words);
  const std::string only = options.value("only", "");
  const bool all = ldmi::test::kEmulated && !options.flag("right");
  bool good = true;
  for (const auto& entry : ldmi::demo::entries()) {
    const bool wanted = entry.kind == ldmi::demo::Kind::kRight || (all && entry.kind == ldmi::demo::Kind::kWrong);
    if (only.empty() ? wanted : only == entry.name) good = ldmi::demo::run(entry, options) && good;
  }
  return good ? 0 : 1;
}
