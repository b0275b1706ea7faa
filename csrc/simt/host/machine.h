// The state of the emulated GPU and what its parts share. Included by the sources of this folder alone.
//
// Each CUDA thread is one fiber. A fiber runs until it waits (or is made to pause); then the schedule, drawn from the seed, picks the
// next. The fiber in which launch() was called starts blocks, a few at once and in any order, and takes over when a cluster has ended
// or an error was found. A kernel with an error is abandoned: its fibers never run again.
//
// Global stores are kept back, level by level. A thread sees its own at once. A barrier of the block shows them to the block, one of
// the cluster to the cluster, and a fence to every thread. The seed decides that some become visible earlier.
//
//     fibers.cpp    switching between the threads, and the schedule
//     memory.cpp    global memory: regions, pending stores, atomics, fences
//     shared.cpp    shared memory: pieces, redzones, asynchronous copies
//     barriers.cpp  barriers and warp collectives
//     launch.cpp    the life of clusters, blocks and threads; a launch
//     machine.cpp   the emulated device, and error messages
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../simt.cuh"

// Also to be defined where the kernels have AddressSanitizer but these sources are built without it.
#if defined(__SANITIZE_ADDRESS__) && !defined(LDMI_SIMT_ASAN)
#define LDMI_SIMT_ASAN
#endif
#if defined(LDMI_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

// fibers.cpp has its own switch for x86-64. Other processors use that of the C library, and so does x86-64 with LDMI_SIMT_UCONTEXT.
#if !defined(__x86_64__) && !defined(LDMI_SIMT_UCONTEXT)
#define LDMI_SIMT_UCONTEXT
#endif
#if defined(LDMI_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace ldmi::simt::host {

inline constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format, -1 as an integer
inline constexpr std::array<unsigned char, 4> kRedzone{0xf5, 0xff, 0xf5, 0xff};  // NaNs too

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t end) { return static_cast<size_t>(static_cast<unsigned __int128>(next()) * end >> 64); }
  bool one_in(size_t n) { return n != 0 && below(n) == 0; }  // never if n is 0
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
};

// ------------------------------------------------------------------------------------------- stores that are kept back

struct Word {  // 8 aligned bytes, of which those in the mask count
  uintptr_t at = 0;
  uint64_t bytes = 0;
  unsigned mask = 0;
};

// Stores that are kept back: the latest value of each byte, found by address.
class Pending {
 public:
  bool empty() const { return words_.empty(); }
  size_t size() const { return words_.size(); }
  Word* find(uintptr_t at) {
    if (words_.size() <= kLinear) {
      for (Word& word : words_) {
        if (word.at == at) return &word;
      }
      return nullptr;
    }
    const size_t slot = slot_of(at);
    return table_[slot] == 0 ? nullptr : &words_[table_[slot] - 1];
  }
  void add(const Word& word) {
    Word* const old = find(word.at);
    if (old == nullptr) {
      words_.push_back(word);
      if (words_.size() > kLinear) index();
      return;
    }
    uint64_t select = 0;
    for (int i = 0; i < 8; ++i) select |= (word.mask >> i & 1) != 0 ? uint64_t{0xff} << 8 * i : 0;
    old->bytes = (old->bytes & ~select) | (word.bytes & select);
    old->mask |= word.mask;
  }
  Word& operator[](size_t i) { return words_[i]; }
  void clear() {
    words_.clear();
    std::fill(table_.begin(), table_.end(), 0u);
  }

 private:
  static constexpr size_t kLinear = 12;  // up to this size the words are searched one by one
  size_t slot_of(uintptr_t at) const {
    size_t slot = (at >> 3) * 0x9e3779b97f4a7c15u >> 32 & (table_.size() - 1);
    while (table_[slot] != 0 && words_[table_[slot] - 1].at != at) slot = (slot + 1) & (table_.size() - 1);
    return slot;
  }
  void index() {  // after a word was appended
    if (table_.size() < words_.size() * 2 || words_.size() == kLinear + 1) {
      table_.assign(std::bit_ceil(words_.size() * 4), 0u);
      for (size_t i = 0; i < words_.size(); ++i) table_[slot_of(words_[i].at)] = static_cast<unsigned>(i + 1);
    } else {
      table_[slot_of(words_.back().at)] = static_cast<unsigned>(words_.size());
    }
  }
  std::vector<Word> words_;
  std::vector<unsigned> table_;  // hashed indices into words_, plus 1; 0 is free
};

// Forbid and allow the kernels to touch memory directly, by AddressSanitizer.
inline void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(LDMI_SIMT_ASAN)
  __asan_poison_memory_region(begin, size);
#endif
}
inline void unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(LDMI_SIMT_ASAN)
  __asan_unpoison_memory_region(begin, size);
#endif
}

inline bool is_redzone(const unsigned char* begin, const unsigned char* p) {
  return *p == kRedzone[static_cast<size_t>(p - begin) % 4];
}

// ------------------------------------------------------------------------------------------- threads, blocks, clusters

struct Fiber;
struct Block;

struct Barrier {
  int votes = 0;
  const char* what = nullptr;
  Site site;
  std::vector<Fiber*> waiting;
};

struct Copy {
  unsigned char* to = nullptr;
  const unsigned char* from = nullptr;
  int bytes = 0, valid = 0;
  Site site;
};

enum class State { kReady, kBarrier, kCollective, kDone };

struct Fiber : Context {
  // the fiber itself
#if defined(LDMI_SIMT_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  unsigned char* stack = nullptr;  // lowest byte; null for the fiber of launch()
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  // the CUDA thread
  Block* home = nullptr;
  State state = State::kReady;
  const char* what = nullptr;  // what it waits for
  Site site;
  int votes = 0;  // the barrier's result
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  int carves = 0;
  bool late = false;  // runs only when no other thread can
  Pending pending;
  std::vector<Copy> copies;               // not yet committed
  std::vector<std::vector<Copy>> groups;  // the oldest first
};

struct Piece {
  size_t at = 0, bytes = 0;  // in the arena
};

struct Cluster;

struct Lanes {           // masks of the lanes of a warp
  unsigned waiting = 0;  // at a collective
  unsigned done = 0;
};

struct Block {
  Cluster* cluster = nullptr;
  int64_t index = 0;
  std::vector<Fiber*> fibers;
  std::vector<Lanes> warps;
  size_t done = 0;
  Barrier barrier;
  Pending pending;
  std::vector<unsigned char> arena;         // shared memory, with redzones
  std::vector<std::vector<Piece>> layouts;  // one per Carve
  unsigned char* shared() {
    unsigned char* const p = arena.data();
    return p + (-reinterpret_cast<uintptr_t>(p) & 127);
  }
  size_t shared_size() const { return arena.size() - 128; }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  size_t done = 0;  // threads
  Barrier barrier;
  Pending pending;
};

// --------------------------------------------------------------------------------------------------------- the machine

struct Machine {
  Random random;
  uint64_t seed = 0;
  Device device;
  int occupancy = 1;                    // most blocks per SM
  std::map<uintptr_t, Region> regions;  // by the end of their bytes
  Region* recent = nullptr;             // the last one that was found

  // the launch that is running
  Grid grid;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Fiber*> ready, ready_late;
  Barrier grid_barrier;
  size_t grid_done = 0;
  Pending orphans;                                          // of clusters that have ended
  size_t newest_first = 0, drain = 0, pause = 0, late = 0;  // probability 1 / value; 0: never
  bool late_first = false;                                  // the first thread is late, not whole warps
  uint64_t until_pause = 0;
  std::string error;

  Fiber launcher;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> all;  // every fiber that was ever made
  std::vector<Fiber*> unused;

  Machine();
  void start(uint64_t new_seed);

  // switching
  void switch_to(Fiber* next);
  void resume_next();
  void pick_ready(Fiber* fiber) {
    fiber->state = State::kReady;
    (fiber->late ? ready_late : ready).push_back(fiber);
  }
  // Draws which threads lag behind from here on: none, some warps, all, or the first thread (which often works for the whole block).
  void draw_late(const std::vector<Fiber*>& fibers) {
    const bool everyone = late != 0 && random.one_in(8);
    bool now = false;
    for (Fiber* fiber : fibers) {
      if (fiber->thread % kWarp == 0) now = !late_first && random.one_in(fiber->thread == 0 && late != 0 ? 2 : late);
      fiber->late = everyone || now;
    }
    if (late_first && random.one_in(2)) fibers[0]->late = true;
  }
  void yield() {
    pick_ready(current);
    resume_next();
  }
  void pause_perhaps() {
    if (--until_pause == 0) {
      draw_pause();
      yield();
    }
  }
  void draw_pause() { until_pause = pause == 0 ? ~uint64_t{0} : 1 + random.below(2 * pause); }

  // memory
  Region& region_of(const void* p, size_t size, const char* what, Site site);
  void drain_word(Word& word);
  void drain_all(Pending& pending);
  void merge(Pending& from, Pending& to);
  void supersede(const Word& word, const Block& block);
  uint64_t visible(uintptr_t at, unsigned wanted, unsigned* set, bool* delayed);
  void read(const void* p, size_t size, void* out, Load kind, const char* what, Site site);
  Piece* piece_of(Block& block, const void* p, size_t size);
  Block* shared_owner(const void* p, size_t size);
  void check_arena(Block& block, const char* when);
  void land(const Copy& copy);

  // the parts of a launch
  void start_cluster(int64_t first);
  void end_cluster(Cluster& cluster);
  void end_thread();
  void verify_regions();
  void forget_launch();
  std::string who_waits() const;
};

inline Machine& machine() {
  static Machine it;
  return it;
}

// -------------------------------------------------------------------------------------------------------------- errors

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Site& site);
bool same(const Site& a, const Site& b);
inline long long number(int64_t x) { return x; }

struct Abandoned {};  // unwinds a fiber; the machine has the reason

// Ends the launch with this message.
[[noreturn]] void fail(const std::string& message);

// -------------------------------------------------------------------------------------- what one part calls of another

Fiber* new_fiber(Machine& m);
void prepare(Fiber& fiber);  // the fiber starts with the kernel when it is first switched to
bool in_arena(Block& block, const void* p);

}  // namespace ldmi::simt::host
