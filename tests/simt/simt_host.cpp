// Runs kernels on the CPU: the fibers, their schedule, the barriers and the memory of simt_host.h.
//
// One fiber a CUDA thread. A fiber runs until it waits (or is made to pause), then the schedule, drawn from the seed, says who is
// next; the fiber in which launch() was called starts blocks, a few at once and in any order, and takes over when a cluster has
// ended or something is wrong. A wrong kernel is abandoned where it stands: its fibers are never run again.
//
// Global stores are kept back, level by level: a thread's own are seen by itself, until a barrier of its block shows them to the
// block, one of the cluster to the cluster, and a fence to everyone. Some get there earlier, as the seed has it.

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/cuda/simt.cuh"

#if defined(__SANITIZE_ADDRESS__) && !defined(LDMI_SIMT_ASAN)
#define LDMI_SIMT_ASAN  // also to be defined where the cases have AddressSanitizer, but this file is built without
#endif
#if defined(LDMI_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LDMI_NO_ASAN __attribute__((no_sanitize_address, noinline))
#else
#define LDMI_NO_ASAN
#endif

#if defined(__x86_64__) && !defined(LDMI_SIMT_UCONTEXT)
// Saves the callee-saved registers on the stack that it leaves and takes them from the one that it enters.
asm(R"(
.text
.globl ldmi_simt_switch
.type ldmi_simt_switch, @function
ldmi_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ldmi_simt_switch, .-ldmi_simt_switch
)");
extern "C" void ldmi_simt_switch(void** leave, void* enter);
#else
#include <ucontext.h>
#endif

namespace ldmi::simt {
namespace host {

Context* context = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGap = 32;           // the least redzone after a piece of shared memory
constexpr size_t kSpare = 16 * 1024;  // of shared memory, for the redzones
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 16;
constexpr size_t kMaxPending = 256;                                       // stores of one thread that are kept back
constexpr unsigned char kPoison = 0xff;                                   // a NaN in every format, -1 in the integers
constexpr std::array<unsigned char, 4> kRedzone{0xf5, 0xff, 0xf5, 0xff};  // NaNs too

// ------------------------------------------------------------------------------------------------------------ randomness

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t end) { return static_cast<size_t>(static_cast<unsigned __int128>(next()) * end >> 64); }
  bool one_in(size_t n) { return n != 0 && below(n) == 0; }  // never for 0
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
};

// ---------------------------------------------------------------------------------------------------------------- memory

// What AddressSanitizer lets the kernels touch
void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(LDMI_SIMT_ASAN)
  __asan_poison_memory_region(begin, size);
#endif
}
void unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(LDMI_SIMT_ASAN)
  __asan_unpoison_memory_region(begin, size);
#endif
}

// The bytes of registered memory, which AddressSanitizer is told are out of bounds while a kernel runs.
LDMI_NO_ASAN void raw_read(const unsigned char* from, size_t size, unsigned char* to) {
  for (size_t i = 0; i < size; ++i) to[i] = from[i];
}
LDMI_NO_ASAN void raw_write(unsigned char* to, uint64_t bytes, unsigned mask) {
  for (int i = 0; i < 8; ++i) {
    if ((mask >> i & 1) != 0) to[i] = static_cast<unsigned char>(bytes >> 8 * i);
  }
}

struct Word {  // 8 aligned bytes, those in the mask
  uintptr_t at = 0;
  uint64_t bytes = 0;
  unsigned mask = 0;
};

// Stores kept back: by address, the latest of each byte.
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
  static constexpr size_t kLinear = 12;  // searched one by one up to here
  size_t slot_of(uintptr_t at) const {
    size_t slot = (at >> 3) * 0x9e3779b97f4a7c15u >> 32 & (table_.size() - 1);
    while (table_[slot] != 0 && words_[table_[slot] - 1].at != at) slot = (slot + 1) & (table_.size() - 1);
    return slot;
  }
  void index() {  // the last word is new
    if (table_.size() < words_.size() * 2 || words_.size() == kLinear + 1) {
      table_.assign(std::bit_ceil(words_.size() * 4), 0u);
      for (size_t i = 0; i < words_.size(); ++i) table_[slot_of(words_[i].at)] = static_cast<unsigned>(i + 1);
    } else {
      table_[slot_of(words_.back().at)] = static_cast<unsigned>(words_.size());
    }
  }
  std::vector<Word> words_;
  std::vector<unsigned> table_;  // of the indices into words_, plus 1
};

bool is_redzone(const unsigned char* begin, const unsigned char* p) { return *p == kRedzone[static_cast<size_t>(p - begin) % 4]; }

// ---------------------------------------------------------------------------------------------------------------- fibers

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

enum class State { kReady, kBarrier, kCollective, kSpin, kDone };

struct Fiber : Context {
  // the fiber itself
#if defined(__x86_64__) && !defined(LDMI_SIMT_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  unsigned char* stack = nullptr;  // its lowest byte; null for the fiber of launch()
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  // the CUDA thread
  Block* home = nullptr;
  State state = State::kReady;
  const char* what = nullptr;  // what it waits at
  Site site;
  int votes = 0;  // the barrier's answer
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  const unsigned* flag = nullptr;
  unsigned flag_value = 0;
  int carves = 0;
  bool late = false;  // runs only when no other can
  Pending pending;
  std::vector<Copy> copies;               // not committed
  std::vector<std::vector<Copy>> groups;  // the oldest first
};

struct Piece {
  size_t at = 0, bytes = 0;  // in the arena
};

struct Cluster;

struct Lanes {           // of a warp
  unsigned waiting = 0;  // at a collective
  unsigned done = 0;
};

struct Block {
  Cluster* cluster = nullptr;
  int64_t index = 0;
  int rank = 0;
  std::vector<Fiber*> fibers;
  std::vector<Lanes> warps;
  size_t done = 0;
  Barrier barrier;
  Pending pending;
  std::vector<unsigned char> arena;         // shared memory, with redzones
  std::vector<std::vector<Piece>> layouts;  // one a Carve
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

void enter_fiber();

// --------------------------------------------------------------------------------------------------------------- machine

struct Machine {
  Random random;
  uint64_t seed = 0;
  Device device;
  int occupancy = 1;                    // blocks an SM, at most
  std::map<uintptr_t, Region> regions;  // by the end of the payload
  Region* recent = nullptr;

  // the launch under way
  Grid grid;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Fiber*> ready, ready_late, spinning;
  Barrier grid_barrier;
  size_t grid_done = 0;
  Pending orphans;                                          // of clusters that have ended
  size_t newest_first = 0, drain = 0, pause = 0, late = 0;  // one in so many; 0: never
  bool late_first = false;                                  // the first thread is late, not warps
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
  // Who lags behind from here on: nobody, some warps, the first thread (which often does the block's own work), or all
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

Machine& machine() {
  static Machine it;
  return it;
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char line[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  return line;
}
std::string name_of(const Site& site) {
  const char* file = site.file_name();
  if (const char* slash = std::strrchr(file, '/')) file = slash + 1;
  return text("%s:%u", file, static_cast<unsigned>(site.line()));
}
long long number(int64_t x) { return x; }
bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

struct Abandoned {};  // unwinds a fiber; the machine has the reason

// Ends the launch with this message.
[[noreturn]] void fail(const std::string& message) {
  Machine& m = machine();
  if (m.current == nullptr || m.current == &m.launcher) {
    throw Error(message + text(" (seed %llu)", static_cast<unsigned long long>(m.seed)));
  }
  m.error = text("block %lld, thread %d: ", number(m.current->block), m.current->thread) + message;
  throw Abandoned();
}

Machine::Machine() {
  const char* const text_seed = std::getenv("LDMI_SIMT_SEED");
  start(text_seed == nullptr ? 0 : std::strtoull(text_seed, nullptr, 0));
}

void Machine::start(uint64_t new_seed) {
  seed = new_seed;
  random.state = ~new_seed;  // other numbers than a case draws from the same seed
  static constexpr struct {
    int capability;
    size_t block, sm;
  } kinds[] = {
      {80, 163 * 1024, 164 * 1024}, {90, 227 * 1024, 228 * 1024}, {100, 227 * 1024, 228 * 1024}, {120, 99 * 1024, 100 * 1024}};
  const auto& kind = kinds[random.below(4)];
  device = {1 + static_cast<int>(random.below(6)), kind.block, kind.sm, size_t{1} << 20, kind.capability};
  occupancy = 1 + static_cast<int>(random.below(3));
  if (const char* sms = std::getenv("LDMI_SIMT_SMS")) device.sms = std::atoi(sms);
}

#if defined(__x86_64__) && !defined(LDMI_SIMT_UCONTEXT)
void prepare(Fiber& fiber) {
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + fiber.stack_size);
  *--top = 0;  // enter_fiber returns to nowhere
  *--top = reinterpret_cast<uint64_t>(&enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers
  fiber.stack_pointer = top;
}
void jump(Fiber& from, Fiber& to) { ldmi_simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Fiber& fiber) {
  getcontext(&fiber.registers);
  fiber.registers.uc_stack.ss_sp = fiber.stack;
  fiber.registers.uc_stack.ss_size = fiber.stack_size;
  fiber.registers.uc_link = nullptr;
  makecontext(&fiber.registers, &enter_fiber, 0);
}
void jump(Fiber& from, Fiber& to) { swapcontext(&from.registers, &to.registers); }
#endif

#if defined(LDMI_SIMT_ASAN)
// The other stack's bounds are learned on arrival: those of the launcher change from launch to launch.
void arrived() {
  Machine& m = machine();
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(m.current->fake_stack, &bottom, &size);
  if (m.launcher.stack == nullptr) {
    m.launcher.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
    m.launcher.stack_size = size;
  }
}
#else
void arrived() {}
#endif

void Machine::switch_to(Fiber* next) {
  Fiber* const from = current;
  if (next == from) return;
  current = next;
  context = next == &launcher ? nullptr : next;
#if defined(LDMI_SIMT_ASAN)
  __sanitizer_start_switch_fiber(from->state == State::kDone ? nullptr : &from->fake_stack, next->stack, next->stack_size);
#endif
  jump(*from, *next);
  arrived();
}

// Leaves the current fiber, which waits or is among the ready ones, for another.
void Machine::resume_next() {
  if (!spinning.empty() && ((ready.empty() && ready_late.empty()) || random.one_in(4))) {
    for (size_t i = 0; i < spinning.size();) {
      unsigned seen = 0;
      raw_read(reinterpret_cast<const unsigned char*>(spinning[i]->flag), sizeof(seen), reinterpret_cast<unsigned char*>(&seen));
      if (seen >= spinning[i]->flag_value) {
        pick_ready(spinning[i]);
        spinning[i] = spinning.back();
        spinning.pop_back();
      } else {
        ++i;
      }
    }
  }
  if (ready.empty() && ready_late.empty()) {
    error = "deadlock: nobody can go on\n" + who_waits();
    switch_to(&launcher);
    return;
  }
  std::vector<Fiber*>& from = ready.empty() ? ready_late : ready;
  const size_t pick = random.one_in(newest_first) ? from.size() - 1 : random.below(from.size());
  Fiber* const next = from[pick];
  from[pick] = from.back();
  from.pop_back();
  switch_to(next);
}

void enter_fiber() {
  arrived();
  Machine& m = machine();
  try {
    m.body(m.arguments);
    m.end_thread();
  } catch (const Abandoned&) {
  } catch (const std::exception& problem) {
    m.error = std::string("a kernel threw: ") + problem.what();
  }
  m.switch_to(&m.launcher);
  std::abort();  // not reached: nobody resumes a thread that has failed
}

Fiber* new_fiber(Machine& m) {
  if (!m.unused.empty()) {
    Fiber* const fiber = m.unused.back();
    m.unused.pop_back();
    return fiber;
  }
  m.all.push_back(std::make_unique<Fiber>());
  Fiber* const fiber = m.all.back().get();
  const size_t page = 4096;
  void* const memory =
      mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  fiber->stack = static_cast<unsigned char*>(memory) + page;
  fiber->stack_size = kStack;
  return fiber;
}

// --------------------------------------------------------------------------------------------------------- global memory

Region& Machine::region_of(const void* p, size_t size, const char* what, Site site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % size != 0) {
    fail(text("misaligned %s of %zu bytes at %p (%s)", what, size, p, name_of(site).c_str()));
  }
  if (recent != nullptr) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(recent->begin);
    if (at >= begin && at + size <= begin + recent->size) return *recent;
  }
  const auto found = regions.upper_bound(at);
  if (found != regions.end()) {
    Region& region = found->second;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(region.begin);
    if (at >= begin && at + size <= begin + region.size) {
      recent = &region;
      return region;
    }
  }
  for (auto& [end, region] : regions) {
    const auto allocation = reinterpret_cast<uintptr_t>(region.allocation);
    if (at < allocation || at >= allocation + region.allocated) continue;
    const auto offset = static_cast<long long>(at - reinterpret_cast<uintptr_t>(region.begin));
    fail(text("%s of %zu bytes out of bounds: %s has %zu bytes, this is at byte %lld (%s)", what, size, region.name.c_str(),
              region.size, offset, name_of(site).c_str()));
  }
  const Region* nearest = nullptr;
  int64_t beyond = 1 << 16;  // bytes past its end
  for (auto& [end, region] : regions) {
    if (at < end || static_cast<int64_t>(at - end) >= beyond) continue;
    nearest = &region;
    beyond = static_cast<int64_t>(at - end);
  }
  const std::string hint = nearest == nullptr ? "" : text(", %lld bytes past the end of %s", number(beyond), nearest->name.c_str());
  fail(text("%s of %zu bytes at %p, which is no global memory%s (%s)", what, size, p, hint.c_str(), name_of(site).c_str()));
}

// Writes a word that was kept back, and forgets it.
void Machine::drain_word(Word& word) {
  if (word.mask == 0) return;
  raw_write(reinterpret_cast<unsigned char*>(word.at), word.bytes, word.mask);
  // The word lies in one region, or at the seam of none: store() checked each byte.
  const auto found = regions.upper_bound(word.at);
  for (auto it = found; it != regions.end(); ++it) {
    Region& region = it->second;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(region.begin);
    if (begin >= word.at + 8) break;
    for (unsigned i = 0; i < 8; ++i) {
      const uintptr_t byte = word.at + i;
      if ((word.mask >> i & 1) != 0 && byte >= begin && byte < begin + region.size) region.shadow[byte - begin] = kWritten;
    }
  }
  word.mask = 0;
}

void Machine::drain_all(Pending& pending) {
  for (size_t i = 0; i < pending.size(); ++i) drain_word(pending[i]);
  pending.clear();
}

void Machine::merge(Pending& from, Pending& to) {
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].mask != 0) to.add(from[i]);
  }
  from.clear();
}

// A word that a thread of the block is about to write: what was stored there before, and is kept back, must not come after it.
void Machine::supersede(const Word& word, const Block& block) {
  for (Pending* pending : {const_cast<Pending*>(&block.pending), &block.cluster->pending}) {
    if (pending->empty()) continue;
    if (Word* const old = pending->find(word.at)) old->mask &= ~word.mask;
  }
}

// What the current thread sees of a word: memory, under what the cluster, the block and the thread itself have stored.
uint64_t Machine::visible(uintptr_t at, unsigned wanted, unsigned* set, bool* delayed) {
  uint64_t bytes = 0;
  *set = 0;
  for (Pending* pending : {&current->pending, &current->home->pending, &current->home->cluster->pending}) {
    if (pending->empty()) continue;
    const Word* const word = pending->find(at);
    if (word == nullptr) continue;
    for (int i = 0; i < 8; ++i) {
      if ((word->mask & wanted & ~*set) >> i & 1) bytes |= word->bytes & uint64_t{0xff} << 8 * i;
    }
    *set |= word->mask & wanted;
  }
  *delayed = *set != 0;
  return bytes;
}

void Machine::read(const void* p, size_t size, void* out, Load kind, const char* what, Site site) {
  const Region& region = region_of(p, size, what, site);
  const auto* const from = static_cast<const unsigned char*>(p);
  auto* const to = static_cast<unsigned char*>(out);
  raw_read(from, size, to);
  const uint8_t* const shadow = region.shadow + (from - region.begin);
  unsigned unset = 0, written = 0;  // by byte
  for (size_t i = 0; i < size; ++i) {
    unset |= static_cast<unsigned>(shadow[i] == kUnset) << i;
    written |= static_cast<unsigned>(shadow[i] == kWritten) << i;
  }
  if (!current->pending.empty() || !current->home->pending.empty() || !current->home->cluster->pending.empty()) {
    for (size_t done = 0; done < size;) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(from + done), word = at & ~uintptr_t{7};
      const size_t skip = at - word, count = std::min(size - done, 8 - skip);
      unsigned set = 0;
      bool delayed = false;
      const uint64_t bytes = visible(word, ((1u << count) - 1u) << skip, &set, &delayed);
      for (size_t i = 0; delayed && i < count; ++i) {
        if ((set >> (skip + i) & 1) == 0) continue;
        to[done + i] = static_cast<unsigned char>(bytes >> 8 * (skip + i));
        unset &= ~(1u << (done + i));
        written |= 1u << (done + i);
      }
      done += count;
    }
  }
  const auto offset = static_cast<size_t>(from - region.begin);
  if (unset != 0) {
    fail(text("%s of %zu bytes at byte %zu of %s, which nobody has written, or not so that this thread may see it (%s)", what, size,
              offset, region.name.c_str(), name_of(site).c_str()));
  }
  if (kind == Load::kReadOnly && written != 0) {
    fail(text("read-only load of %zu bytes at byte %zu of %s, which this launch has written (%s)", size, offset, region.name.c_str(),
              name_of(site).c_str()));
  }
}

// --------------------------------------------------------------------------------------------------------- shared memory

Piece* Machine::piece_of(Block& block, const void* p, size_t size) {
  if (block.layouts.empty()) return nullptr;
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(block.shared());
  for (Piece& piece : block.layouts.back()) {
    if (at >= base + piece.at && at + size <= base + piece.at + piece.bytes) return &piece;
  }
  return nullptr;
}

// The block of the current cluster in whose shared memory this lies
Block* Machine::shared_owner(const void* p, size_t size) {
  for (auto& block : current->home->cluster->blocks) {
    if (piece_of(*block, p, size) != nullptr) return block.get();
  }
  return nullptr;
}

bool in_arena(Block& block, const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(block.shared());
  return at >= base && at < base + block.shared_size();
}

// Whether everything outside the pieces still holds the redzone's pattern
void Machine::check_arena(Block& block, const char* when) {
  const unsigned char* const base = block.shared();
  unpoison(base, block.shared_size());
  if (block.layouts.empty()) return;
  const std::vector<Piece>& pieces = block.layouts.back();
  size_t at = 0;
  for (size_t i = 0; i <= pieces.size(); ++i) {
    const size_t end = i < pieces.size() ? pieces[i].at : block.shared_size();
    for (; at < end; ++at) {
      if (is_redzone(base, base + at)) continue;
      std::string where = "before the first piece";
      if (i > 0) {
        where = text("%zu bytes past the end of piece %zu (%zu bytes)", at - pieces[i - 1].at - pieces[i - 1].bytes, i - 1,
                     pieces[i - 1].bytes);
      }
      fail(text("block %lld wrote outside its shared memory, %s; seen %s", number(block.index), where.c_str(), when));
    }
    if (i < pieces.size()) at += pieces[i].bytes;
  }
}

void Machine::land(const Copy& copy) {
  std::array<unsigned char, 16> value{};
  // read in the largest aligned parts, as `valid` may be any number
  for (int done = 0; done < copy.valid;) {
    size_t part = 16;
    while (part > static_cast<size_t>(copy.valid - done) || reinterpret_cast<uintptr_t>(copy.from + done) % part != 0) part /= 2;
    read(copy.from + done, part, value.data() + done, Load::kPlain, "copy_async", copy.site);
    done += static_cast<int>(part);
  }
  std::memcpy(copy.to, value.data(), static_cast<size_t>(copy.bytes));
}

// ----------------------------------------------------------------------------------------------------------- the launch

void Machine::start_cluster(int64_t first) {
  clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *clusters.back();
  std::vector<Fiber*> fibers;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.cluster = &cluster;
    block.index = first + rank;
    block.rank = rank;
    block.warps.resize(static_cast<size_t>(grid.threads / kWarp));
    block.arena.resize(128 + grid.smem + kSpare);
    fill_redzone(block.shared(), block.shared_size());
    poison(block.shared(), block.shared_size());
    for (int thread = 0; thread < grid.threads; ++thread) {
      Fiber* const fiber = new_fiber(*this);
      static_cast<Context&>(*fiber) = {thread, grid.threads, block.index, grid.blocks, rank, grid.cluster};
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
      if (base[i] != kPoison) fail(text("somebody wrote to the shared memory of block %lld after it had ended", number(block->index)));
    }
    merge(block->pending, cluster.pending);
    unused.insert(unused.end(), block->fibers.begin(), block->fibers.end());
  }
  merge(cluster.pending, orphans);
  if (random.one_in(drain)) drain_all(orphans);
  const auto it = std::find_if(clusters.begin(), clusters.end(), [&](const auto& other) { return other.get() == &cluster; });
  clusters.erase(it);
}

// The last thing that a fiber does
void Machine::end_thread() {
  Fiber& fiber = *current;
  Block& block = *fiber.home;
  Cluster& cluster = *block.cluster;
  if (!fiber.copies.empty() ||
      std::any_of(fiber.groups.begin(), fiber.groups.end(), [](const auto& group) { return !group.empty(); })) {
    fail("the thread ended with asynchronous copies under way");
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
      std::map<std::string, std::pair<int, int>> groups;  // what: the first thread, how many
      for (const Fiber* fiber : block->fibers) {
        std::string what;
        switch (fiber->state) {
          case State::kDone:
            what = "ended";
            break;
          case State::kReady:
            what = "can run";
            break;
          case State::kSpin:
            what = text("waits in acquire for a flag of at least %u (%s)", fiber->flag_value, name_of(fiber->site).c_str());
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
  spinning.clear();
  grid_barrier = {};
  grid_done = 0;
  orphans.clear();
  error.clear();
  for (auto& [end, region] : regions) unpoison(region.begin, region.size);
  current = nullptr;
  context = nullptr;
}

// -------------------------------------------------------------------------------------------------------------- barriers

enum class Scope { kBlock, kCluster, kGrid };

// Waits until all threads of the scope have come to the barrier, then shows them what they have stored. Returns the sum of the votes.
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

// ---------------------------------------------------------------------------------------------------- simt_host.h's names

void set_seed(uint64_t seed) { machine().start(seed); }
void set_device(const Device& device) { machine().device = device; }

void fill_redzone(unsigned char* begin, size_t size) {
  for (size_t i = 0; i < size; ++i) begin[i] = kRedzone[i % 4];
}
void add_region(const Region& region) {
  Machine& m = machine();
  m.recent = nullptr;
  m.regions[reinterpret_cast<uintptr_t>(region.begin) + region.size] = region;
}
void remove_region(const unsigned char* begin) {
  Machine& m = machine();
  m.recent = nullptr;
  std::erase_if(m.regions, [&](const auto& entry) { return entry.second.begin == begin; });
}

void read_global(const void* p, size_t size, void* out, Load kind, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  m.read(p, size, out, kind, "load", site);
}

void write_global(void* p, size_t size, const void* value, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  m.region_of(p, size, "store", site);
  Pending& pending = m.current->pending;
  for (size_t done = 0; done < size;) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p) + done, word = at & ~uintptr_t{7};
    const size_t skip = at - word, count = std::min(size - done, 8 - skip);
    uint64_t bytes = 0;
    std::memcpy(&bytes, static_cast<const unsigned char*>(value) + done, count);
    pending.add({word, bytes << 8 * skip, ((1u << count) - 1u) << skip});
    done += count;
  }
  if (m.random.one_in(m.drain)) {
    Word& word = pending[m.random.below(pending.size())];
    m.supersede(word, *m.current->home);
    m.drain_word(word);
  }
  if (pending.size() >= kMaxPending) {
    for (size_t i = 0; i < pending.size(); ++i) {
      m.supersede(pending[i], *m.current->home);
      m.drain_word(pending[i]);
    }
    pending.clear();
  }
}

void atomic_read(void* p, size_t size, void* out, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  Block& block = *m.current->home;
  if (m.shared_owner(p, size) != nullptr) {
    std::memcpy(out, p, size);
    return;
  }
  for (auto& mate : block.cluster->blocks) {
    if (in_arena(*mate, p)) fail(text("atomic on shared memory outside what was carved (%s)", name_of(site).c_str()));
  }
  const Region& region = m.region_of(p, size, "atomic", site);
  // What this thread or its mates have stored there comes first.
  const uintptr_t word = reinterpret_cast<uintptr_t>(p) & ~uintptr_t{7};
  for (Pending* pending : {&block.cluster->pending, &block.pending, &m.current->pending}) {
    if (pending->empty()) continue;
    if (Word* const stored = pending->find(word)) m.drain_word(*stored);
  }
  const auto offset = static_cast<size_t>(static_cast<unsigned char*>(p) - region.begin);
  for (size_t i = 0; i < size; ++i) {
    if (region.shadow[offset + i] == kUnset) {
      fail(text("atomic at byte %zu of %s, which nobody has written (%s)", offset, region.name.c_str(), name_of(site).c_str()));
    }
  }
  raw_read(static_cast<const unsigned char*>(p), size, static_cast<unsigned char*>(out));
}

void atomic_write(void* p, size_t size, const void* value) {
  Machine& m = machine();
  if (m.shared_owner(p, size) != nullptr) {
    std::memcpy(p, value, size);
    return;
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), word = at & ~uintptr_t{7};
  uint64_t bytes = 0;
  std::memcpy(&bytes, value, size);
  Word stored{word, bytes << 8 * (at - word), ((1u << size) - 1u) << (at - word)};
  m.drain_word(stored);
}

void shared_access(const void* p, size_t size, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  if (reinterpret_cast<uintptr_t>(p) % size != 0) {
    fail(text("misaligned access of %zu bytes to shared memory (%s)", size, name_of(site).c_str()));
  }
  if (m.shared_owner(p, size) == nullptr) {
    fail(text("access of %zu bytes outside the shared memory that was carved (%s)", size, name_of(site).c_str()));
  }
}

int new_carve() { return machine().current->carves++; }

void* take_shared(int carve, int piece, size_t offset, size_t bytes, Site site) {
  Machine& m = machine();
  Block& block = *m.current->home;
  unsigned char* const base = block.shared();
  if (static_cast<size_t>(carve) == block.layouts.size()) {
    m.check_arena(block, "when another Carve began");
    block.layouts.emplace_back();
    fill_redzone(base, block.shared_size());
    poison(base, block.shared_size());
  }
  if (static_cast<size_t>(carve) + 1 < block.layouts.size()) {
    fail(text("takes shared memory that another thread has carved anew: sync_block() before a second Carve (%s)",
              name_of(site).c_str()));
  }
  if (static_cast<size_t>(carve) >= block.layouts.size()) {
    fail(text("the threads of a block must use the same Carves in the same order (%s)", name_of(site).c_str()));
  }
  std::vector<Piece>& pieces = block.layouts[static_cast<size_t>(carve)];
  if (static_cast<size_t>(piece) == pieces.size()) {
    if (offset + bytes > m.grid.smem) {
      fail(text("takes shared memory up to byte %zu, but the launch gave %zu (%s)", offset + bytes, m.grid.smem,
                name_of(site).c_str()));
    }
    const size_t end = pieces.empty() ? 0 : pieces.back().at + pieces.back().bytes;
    const size_t at = (end + kGap + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    if (at + bytes + kGap > block.shared_size()) fail("too many pieces of shared memory for the shim's redzones");
    pieces.push_back({at, bytes});
    unpoison(base + at, bytes);
    std::memset(base + at, kPoison, bytes);
  } else if (static_cast<size_t>(piece) > pieces.size() || pieces[static_cast<size_t>(piece)].bytes != bytes) {
    fail(text("takes %zu bytes as piece %d of the shared memory, unlike the other threads of its block (%s)", bytes, piece,
              name_of(site).c_str()));
  }
  return base + pieces[static_cast<size_t>(piece)].at;
}

int barrier_block(const char* what, int vote, Site site) { return arrive(Scope::kBlock, what, vote, site); }

void barrier_cluster(Site site) { arrive(Scope::kCluster, "sync_cluster", 0, site); }

void barrier_grid(Site site) {
  if (!machine().grid.cooperative) fail(text("sync_grid in a grid that is not cooperative (%s)", name_of(site).c_str()));
  arrive(Scope::kGrid, "sync_grid", 0, site);
}

void* map_to_rank(const void* p, int rank, Site site) {
  Block& block = *machine().current->home;
  if (rank < 0 || rank >= static_cast<int>(block.cluster->blocks.size())) {
    fail(text("map_shared to rank %d of a cluster of %zu (%s)", rank, block.cluster->blocks.size(), name_of(site).c_str()));
  }
  const auto* const at = static_cast<const unsigned char*>(p);
  if (!in_arena(block, p)) fail(text("map_shared of what is not this block's shared memory (%s)", name_of(site).c_str()));
  return block.cluster->blocks[static_cast<size_t>(rank)]->shared() + (at - block.shared());
}

void fence() {
  Machine& m = machine();
  Block& block = *m.current->home;
  m.drain_all(block.cluster->pending);
  m.drain_all(block.pending);
  m.drain_all(m.current->pending);
}

void spin(const unsigned* flag, unsigned value, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  m.region_of(flag, sizeof(*flag), "acquire", site);
  Fiber& me = *m.current;
  me.flag = flag;
  me.flag_value = value;
  me.site = site;
  me.state = State::kSpin;
  m.spinning.push_back(&me);
  m.resume_next();
}

void copy(void* shared, const void* global, int bytes, int valid, Site site) {
  Machine& m = machine();
  m.pause_perhaps();
  const auto size = static_cast<size_t>(bytes);
  if (valid < 0 || valid > bytes) fail(text("copy_async of %d of %d bytes (%s)", valid, bytes, name_of(site).c_str()));
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 || reinterpret_cast<uintptr_t>(global) % size != 0) {
    fail(text("misaligned copy_async of %d bytes (%s)", bytes, name_of(site).c_str()));
  }
  if (m.piece_of(*m.current->home, shared, size) == nullptr) {
    fail(text("copy_async to outside the shared memory that was carved (%s)", name_of(site).c_str()));
  }
  std::memset(shared, kPoison, size);
  const Copy it{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid, site};
  if (m.random.one_in(m.drain)) {
    m.land(it);
  } else {
    m.current->copies.push_back(it);
  }
}
void commit() {
  Fiber& me = *machine().current;
  me.groups.push_back(std::move(me.copies));
  me.copies.clear();
}
void wait(int groups) {
  Machine& m = machine();
  m.pause_perhaps();
  Fiber& me = *m.current;
  while (me.groups.size() > static_cast<size_t>(groups)) {
    for (const Copy& it : me.groups.front()) m.land(it);
    me.groups.erase(me.groups.begin());
  }
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
  if ((mask & warp.waiting) != 0) {  // those that wait here, if all is well: any of them will do
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
      if (in == nullptr) m.merge(lanes[l]->pending, block.pending);  // sync_warp: it alone orders memory
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

int run_grid(const Grid& grid, void (*body)(const void*), const void* arguments) {
  Machine& m = machine();
  if (m.current != nullptr) throw Error("launch() inside a kernel");
  if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads > kMaxThreads || grid.threads % kWarp != 0)
    return 9;
  if (grid.cluster < 1 || grid.cluster > kMaxCluster || grid.blocks % grid.cluster != 0) return 9;
  if (grid.cluster > 1 && m.device.capability < 90) return 9;
  if (grid.smem > m.device.smem_block) return 1;
  const int fit = detail::blocks_per_sm(grid.threads, grid.smem);
  if (fit < 1) return 701;
  const int64_t room = int64_t{fit} * m.device.sms;
  if (grid.cooperative && grid.blocks > room) return 720;

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
      grid.cooperative ? order.size() : 1 + m.random.below(static_cast<size_t>(std::max<int64_t>(1, room / grid.cluster)));
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

}  // namespace host

namespace detail {
int blocks_per_sm(int threads, size_t smem) {
  const host::Machine& m = host::machine();
  const size_t by_smem = m.device.smem_sm / (smem + 1024), by_threads = 2048 / static_cast<size_t>(std::max(threads, 1));
  return static_cast<int>(std::min({by_smem, by_threads, static_cast<size_t>(m.occupancy)}));
}
}  // namespace detail

int device(Device* out) {
  *out = host::machine().device;
  return 0;
}

const char* error_text(int error) {
  switch (error) {
    case 0:
      return "no error";
    case 1:
      return "invalid argument: more shared memory than a block can have";
    case 9:
      return "invalid configuration of blocks, threads or clusters";
    case 701:
      return "too many resources requested for launch";
    case 720:
      return "too many blocks in cooperative launch";
    default:
      return "unknown error";
  }
}

int zero(void* p, size_t bytes, Stream) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (auto& [end, region] : host::machine().regions) {
    const auto first = reinterpret_cast<uintptr_t>(region.begin);
    if (begin < first || begin + bytes > first + region.size) continue;
    std::memset(p, 0, bytes);
    std::memset(region.shadow + (begin - first), host::kSet, bytes);
    return 0;
  }
  throw host::Error("zero() of what is no global memory");
}

}  // namespace ldmi::simt
