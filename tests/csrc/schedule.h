// How the tasks of a call are run: in which order, on how many threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "random.h"

namespace ldmi::test {

struct Schedule {
  const char* name;
  int threads;    // 0: on the caller's thread
  uint64_t seed;  // of the order; 0: in ascending order
};
inline Schedule schedule{"in order", 0, 0};

inline void run_tasks(int64_t tasks, void* context, void (*body)(void* context, int64_t task)) {
  std::vector<int64_t> order(tasks);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (schedule.seed != 0) {
    Random random(schedule.seed);
    for (int64_t i = tasks - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
  }
  if (schedule.threads == 0) {
    for (const int64_t task : order) body(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < schedule.threads; ++t) {
    threads.emplace_back([&] {
      for (int64_t i = next++; i < tasks; i = next++) body(context, order[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline const cpu::Threads kThreads{run_tasks};

}  // namespace ldmi::test
