// The limits of a CUDA device that plans and launchers depend on: one record for the plan, the kernels' launchers and Python.
#pragma once

#include <cstdint>

namespace ldmi::plan {

// Thread blocks per cluster, where clusters are used. 8 is the largest portable cluster size, so every device that has clusters
// accepts it.
inline constexpr int kClusterBlocks = 8;

struct DeviceLimits {
  int sms = 0;              // multiprocessors
  int64_t smem_block = 0;   // dynamic shared memory that one block can have, in bytes
  int64_t smem_sm = 0;      // shared memory per multiprocessor, in bytes
  int64_t l2 = 0;           // level 2 cache, in bytes
  int capability = 0;       // compute capability: 80, 90, ...
  bool cooperative = true;  // whether the blocks of a grid may wait for each other: one launch for a whole forward
  int clusters = 0;         // clusters of kClusterBlocks blocks that run at once, each block alone on its multiprocessor
};

// Calls visit(name, field) for every field, in order: the names under which Python sees them.
template <class Limits, class Visit>
void for_each_limit(Limits& limits, Visit&& visit) {
  visit("sms", limits.sms);
  visit("smem_block", limits.smem_block);
  visit("smem_sm", limits.smem_sm);
  visit("l2", limits.l2);
  visit("capability", limits.capability);
  visit("cooperative", limits.cooperative);
  visit("clusters", limits.clusters);
}

}  // namespace ldmi::plan
