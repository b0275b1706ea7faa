// Barriers of a block, a cluster and a grid, and the collectives of a warp.

#include "machine.h"

namespace ldmi::simt::host {
namespace {

enum class Scope { kBlock, kCluster, kGrid };

// Waits for all threads of the scope, then makes their stores visible to each other. Returns the sum of the votes.
int arrive(Scope scope, const char* what, int vote, Site site) {
  Machine& m = machine();
  Fiber& me = *m.current;
  Block& block = *me.home;
  Cluster& cluster = *block.cluster;
  const char* const whose = scope == Scope::kBlock ? "block" : scope == Scope::kCluster ? "cluster" : "grid";
  Barrier& barrier = scope == Scope::kBlock ? block.barrier : scope == Scope::kCluster ? cluster.barrier : m.grid_barrier;
  const size_t ended = scope == Scope::kBlock ? block.done : scope == Scope::kCluster ? cluster.done : m.grid_done;
  const size_t blocks = scope == Scope::kBlock     ? 1
                        : scope == Scope::kCluster ? cluster.blocks.size()
                                                   : static_cast<size_t>(m.grid.blocks);
  if (ended > 0) fail(text("at %s (%s), but %zu threads of its %s have ended", what, name_of(site).c_str(), ended, whose));
  if (barrier.waiting.empty()) {
    barrier.what = what;
    barrier.site = site;
  } else if (std::strcmp(barrier.what, what) != 0 || !same(barrier.site, site)) {
    fail(text("at %s (%s), but %zu threads of its %s wait at %s (%s)", what, name_of(site).c_str(), barrier.waiting.size(), whose,
              barrier.what, name_of(barrier.site).c_str()));
  }
  barrier.votes += vote;
  barrier.waiting.push_back(&me);
  me.state = State::kBarrier;
  me.what = what;
  me.site = site;
  if (barrier.waiting.size() == block.fibers.size() * blocks) {
    for (Fiber* fiber : barrier.waiting) {
      if (scope == Scope::kCluster) m.merge(fiber->home->pending, cluster.pending);
      if (scope == Scope::kGrid) m.drain_all(fiber->home->cluster->pending);
      if (scope == Scope::kGrid) m.drain_all(fiber->home->pending);
    }
    for (Fiber* fiber : barrier.waiting) {
      if (scope == Scope::kGrid) {
        m.drain_all(fiber->pending);
      } else {
        m.merge(fiber->pending, scope == Scope::kBlock ? block.pending : cluster.pending);
      }
      fiber->votes = barrier.votes;
    }
    for (Fiber* fiber : barrier.waiting) {
      if (fiber->thread == 0) m.draw_late(fiber->home->fibers);
    }
    for (Fiber* fiber : barrier.waiting) m.pick_ready(fiber);
    barrier.waiting.clear();
    barrier.votes = 0;
  }
  m.resume_next();
  return me.votes;
}

}  // namespace

int barrier_block(const char* what, int vote, Site site) { return arrive(Scope::kBlock, what, vote, site); }

void barrier_cluster(Site site) { arrive(Scope::kCluster, "sync_cluster", 0, site); }

void barrier_grid(Site site) {
  if (!machine().grid.cooperative) fail(text("sync_grid in a grid that is not cooperative (%s)", name_of(site).c_str()));
  arrive(Scope::kGrid, "sync_grid", 0, site);
}

void collective(const char* what, unsigned mask, const void* in, void* out, Run run, Site site) {
  Machine& m = machine();
  Fiber& me = *m.current;
  Block& block = *me.home;
  if ((mask >> me.thread % kWarp & 1) == 0) fail(text("at %s (%s) with mask %08x, without itself", what, name_of(site).c_str(), mask));
  me.what = what;
  me.mask = mask;
  me.in = in;
  me.out = out;
  me.site = site;
  me.state = State::kCollective;
  Fiber* const* const lanes = block.fibers.data() + me.thread / kWarp * kWarp;
  Lanes& warp = block.warps[static_cast<size_t>(me.thread / kWarp)];
  if ((mask & warp.done) != 0) {
    fail(text("at %s (%s) with mask %08x, but lane %d has ended", what, name_of(site).c_str(), mask, lowest(mask & warp.done)));
  }
  if ((mask & warp.waiting) != 0) {  // all that wait are at this same collective, unless there is an error: check one
    const auto l = static_cast<size_t>(lowest(mask & warp.waiting));
    const Fiber& mate = *lanes[l];
    if (mate.mask != mask || std::strcmp(mate.what, what) != 0 || !same(mate.site, site)) {
      fail(text("at %s (%s) with mask %08x, but lane %zu waits at %s (%s) with mask %08x", what, name_of(site).c_str(), mask, l,
                mate.what, name_of(mate.site).c_str(), mate.mask));
    }
  }
  warp.waiting |= 1u << me.thread % kWarp;
  if ((warp.waiting & mask) == mask) {
    warp.waiting &= ~mask;
    std::array<const void*, kWarp> ins{};
    std::array<void*, kWarp> outs{};
    for (size_t l = 0; l < kWarp; ++l) {
      if ((mask >> l & 1) == 0) continue;
      ins[l] = lanes[l]->in;
      outs[l] = lanes[l]->out;
    }
    run(mask, ins.data(), outs.data());
    for (size_t l = 0; l < kWarp; ++l) {
      if ((mask >> l & 1) == 0) continue;
      if (in == nullptr) m.merge(lanes[l]->pending, block.pending);  // sync_warp, the only collective that orders memory
      if (lanes[l] != &me) m.pick_ready(lanes[l]);
    }
    if (m.random.one_in(2)) {
      me.state = State::kReady;
      return;
    }
    m.pick_ready(&me);
  }
  m.resume_next();
}

}  // namespace ldmi::simt::host
