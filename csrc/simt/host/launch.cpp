// A launch: the life of its clusters, blocks and threads, and the checks when they end.

#include "machine.h"

namespace ldmi::simt::host {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 16;
constexpr size_t kSpare = 16 * 1024;  // of shared memory, for the redzones

}  // namespace

void Machine::start_cluster(int64_t first) {
  clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *clusters.back();
  std::vector<Fiber*> fibers;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.cluster = &cluster;
    block.index = first + rank;
    block.warps.resize(static_cast<size_t>(grid.threads / kWarp));
    block.arena.resize(128 + grid.smem + kSpare);
    fill_redzone(block.shared(), block.shared_size());
    poison(block.shared(), block.shared_size());
    for (int thread = 0; thread < grid.threads; ++thread) {
      Fiber* const fiber = new_fiber(*this);
      static_cast<Context&>(*fiber) = {thread, grid.threads, block.index, grid.blocks};
      fiber->home = &block;
      fiber->carves = 0;
      fiber->fake_stack = nullptr;
      fiber->pending.clear();
      fiber->copies.clear();
      fiber->groups.clear();
      unpoison(fiber->stack, fiber->stack_size);
      prepare(*fiber);
      block.fibers.push_back(fiber);
      fibers.push_back(fiber);
    }
  }
  draw_late(fibers);
  if (random.one_in(2)) random.shuffle(fibers);
  if (random.one_in(2)) std::reverse(fibers.begin(), fibers.end());
  for (Fiber* fiber : fibers) pick_ready(fiber);
}

void Machine::end_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    unpoison(block->arena.data(), block->arena.size());
    const unsigned char* const base = block->shared();
    for (size_t i = 0; grid.cluster > 1 && i < block->shared_size(); ++i) {
      if (base[i] != kPoison)
        fail(text("a thread wrote to the shared memory of block %lld after the block had ended", number(block->index)));
    }
    merge(block->pending, cluster.pending);
    unused.insert(unused.end(), block->fibers.begin(), block->fibers.end());
  }
  merge(cluster.pending, orphans);
  if (random.one_in(drain)) drain_all(orphans);
  const auto it = std::find_if(clusters.begin(), clusters.end(), [&](const auto& other) { return other.get() == &cluster; });
  clusters.erase(it);
}

// The last thing that a fiber does.
void Machine::end_thread() {
  Fiber& fiber = *current;
  Block& block = *fiber.home;
  Cluster& cluster = *block.cluster;
  if (!fiber.copies.empty() ||
      std::any_of(fiber.groups.begin(), fiber.groups.end(), [](const auto& group) { return !group.empty(); })) {
    fail("the thread ended with incomplete asynchronous copies");
  }
  for (const auto& [barrier, whose] : {std::pair{&block.barrier, "block"}, {&cluster.barrier, "cluster"}, {&grid_barrier, "grid"}}) {
    if (barrier->waiting.empty()) continue;
    fail(text("the thread ended while %zu threads of its %s wait at %s (%s)", barrier->waiting.size(), whose, barrier->what,
              name_of(barrier->site).c_str()));
  }
  Lanes& lanes = block.warps[static_cast<size_t>(fiber.thread / kWarp)];
  for (unsigned waiting = lanes.waiting; waiting != 0; waiting &= waiting - 1) {
    const auto l = static_cast<size_t>(lowest(waiting));
    const Fiber& mate = *block.fibers[static_cast<size_t>(fiber.thread / kWarp * kWarp) + l];
    if ((mate.mask >> fiber.thread % kWarp & 1) != 0) {
      fail(text("the thread ended while lane %zu waits for it at %s (%s)", l, mate.what, name_of(mate.site).c_str()));
    }
  }
  lanes.done |= 1u << fiber.thread % kWarp;
  merge(fiber.pending, block.pending);
  ++grid_done;
  if (++block.done == block.fibers.size()) {
    check_arena(block, "when the block ended");
    std::memset(block.shared(), kPoison, block.shared_size());
    poison(block.shared(), block.shared_size());
  }
  fiber.state = State::kDone;
  if (++cluster.done == block.fibers.size() * cluster.blocks.size()) {
    switch_to(&launcher);
  } else {
    resume_next();
  }
}

std::string Machine::who_waits() const {
  std::string lines;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      std::map<std::string, std::pair<int, int>> groups;  // from what to its first thread and the number of threads
      for (const Fiber* fiber : block->fibers) {
        std::string what;
        switch (fiber->state) {
          case State::kDone:
            what = "ended";
            break;
          case State::kReady:
            what = "can run";
            break;
          case State::kCollective:
            what = text("waits at %s with mask %08x (%s)", fiber->what, fiber->mask, name_of(fiber->site).c_str());
            break;
          case State::kBarrier:
            what = text("waits at %s (%s)", fiber->what, name_of(fiber->site).c_str());
            break;
        }
        ++groups.try_emplace(what, fiber->thread, 0).first->second.second;
      }
      for (const auto& [what, threads] : groups) {
        lines += text("  block %lld: thread %d", number(block->index), threads.first);
        if (threads.second > 1) lines += text(" and %d more", threads.second - 1);
        lines += ": " + what + "\n";
        if (lines.size() > 4000) return lines + "  ...\n";
      }
    }
  }
  return lines;
}

void Machine::verify_regions() {
  for (auto& [end, region] : regions) {
    for (size_t i = 0; i < region.allocated; ++i) {
      const unsigned char* const p = region.allocation + i;
      if (p >= region.begin && p < region.begin + region.size) continue;
      if (is_redzone(region.allocation, p)) continue;
      throw Error(text("something wrote outside %s (%zu bytes), at byte %lld (seed %llu)", region.name.c_str(), region.size,
                       number(p - region.begin), static_cast<unsigned long long>(seed)));
    }
    for (size_t i = 0; i < region.size; ++i) region.shadow[i] = region.shadow[i] == kUnset ? kUnset : kSet;
  }
}

void Machine::forget_launch() {
  for (auto& cluster : clusters) {
    for (auto& block : cluster->blocks) {
      unpoison(block->arena.data(), block->arena.size());
      unused.insert(unused.end(), block->fibers.begin(), block->fibers.end());
    }
  }
  clusters.clear();
  ready.clear();
  ready_late.clear();
  grid_barrier = {};
  grid_done = 0;
  orphans.clear();
  error.clear();
  for (auto& [end, region] : regions) unpoison(region.begin, region.size);
  current = nullptr;
  context = nullptr;
}

int run_grid(const Grid& grid, void (*body)(const void*), const void* arguments) {
  Machine& m = machine();
  if (m.current != nullptr) throw Error("launch() inside a kernel");
  if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads > kMaxThreads || grid.threads % kWarp != 0)
    return 9;
  if (grid.cluster < 1 || grid.cluster > kMaxCluster || grid.blocks % grid.cluster != 0) return 9;
  if (grid.cluster > 1 && m.device.capability < 90) return 9;
  if (static_cast<int64_t>(grid.smem) > m.device.smem_block) return 1;
  const int fit = detail::blocks_per_sm(grid.threads, grid.smem);
  if (fit < 1) return 701;
  const int64_t resident = int64_t{fit} * m.device.sms;
  if (grid.cooperative && grid.blocks > resident) return 720;

  m.forget_launch();
  m.grid = grid;
  m.body = body;
  m.arguments = arguments;
  constexpr std::array<size_t, 3> newest{0, 1, 2}, drain{0, 16, 2}, pause{0, 3, 50}, late{0, 2, 6};
  m.newest_first = newest[m.random.below(newest.size())];
  m.drain = drain[m.random.below(drain.size())];
  m.pause = pause[m.random.below(pause.size())];
  m.late = late[m.random.below(late.size())];
  m.late_first = m.late != 0 && m.random.one_in(2);
  m.draw_pause();
  for (auto& [end, region] : m.regions) poison(region.begin, region.size);

  std::vector<int64_t> order(static_cast<size_t>(grid.blocks / grid.cluster));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i) * grid.cluster;
  m.random.shuffle(order);
  const size_t at_once =
      grid.cooperative ? order.size() : 1 + m.random.below(static_cast<size_t>(std::max<int64_t>(1, resident / grid.cluster)));
  m.current = &m.launcher;
  m.launcher.state = State::kReady;
  m.launcher.stack = nullptr;
  std::string error;
  try {
    while (!order.empty() || !m.clusters.empty()) {
      while (!order.empty() && m.clusters.size() < at_once) {
        m.start_cluster(order.back());
        order.pop_back();
      }
      m.resume_next();
      if (!m.error.empty()) break;
      const auto ended = std::find_if(m.clusters.begin(), m.clusters.end(), [&](const auto& cluster) {
        return cluster->done == cluster->blocks.size() * static_cast<size_t>(grid.threads);
      });
      if (ended != m.clusters.end()) m.end_cluster(**ended);
    }
    error = m.error;
    m.drain_all(m.orphans);
  } catch (...) {
    m.forget_launch();
    throw;
  }
  m.forget_launch();
  if (!error.empty()) throw Error(error + text(" (seed %llu)", static_cast<unsigned long long>(m.seed)));
  m.verify_regions();
  return 0;
}

}  // namespace ldmi::simt::host
