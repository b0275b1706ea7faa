// Global memory: regions and their bounds, stores that are kept back, loads, atomics and fences.

#include "machine.h"

#if defined(LDMI_SIMT_ASAN)
#define LDMI_NO_ASAN __attribute__((no_sanitize_address, noinline))
#else
#define LDMI_NO_ASAN
#endif

namespace ldmi::simt {
namespace host {
namespace {

constexpr size_t kMaxPending = 256;  // most stores of one thread that are kept back

// Access registered memory, which AddressSanitizer forbids while a kernel runs.
LDMI_NO_ASAN void raw_read(const unsigned char* from, size_t size, unsigned char* to) {
  for (size_t i = 0; i < size; ++i) to[i] = from[i];
}
LDMI_NO_ASAN void raw_write(unsigned char* to, uint64_t bytes, unsigned mask) {
  for (int i = 0; i < 8; ++i) {
    if ((mask >> i & 1) != 0) to[i] = static_cast<unsigned char>(bytes >> 8 * i);
  }
}

}  // namespace

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

// Writes a word that was kept back to memory, and forgets it.
void Machine::drain_word(Word& word) {
  if (word.mask == 0) return;
  raw_write(reinterpret_cast<unsigned char*>(word.at), word.bytes, word.mask);
  // A word may touch two regions; write_global() checked each byte.
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

// A thread of the block is about to write this word to memory. Older stores to it that are kept back must not follow later.
void Machine::supersede(const Word& word, const Block& block) {
  for (Pending* pending : {const_cast<Pending*>(&block.pending), &block.cluster->pending}) {
    if (pending->empty()) continue;
    if (Word* const old = pending->find(word.at)) old->mask &= ~word.mask;
  }
}

// The bytes of a word that the current thread sees before they are in memory: its own stores, then those of its block and its cluster.
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
    fail(text("%s of %zu bytes at byte %zu of %s, which no thread has written, or not so that this thread may see it (%s)", what, size,
              offset, region.name.c_str(), name_of(site).c_str()));
  }
  if (kind == Load::kReadOnly && written != 0) {
    fail(text("read-only load of %zu bytes at byte %zu of %s, which this launch has written (%s)", size, offset, region.name.c_str(),
              name_of(site).c_str()));
  }
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
  // What this thread, its block or its cluster has stored there comes first.
  const uintptr_t word = reinterpret_cast<uintptr_t>(p) & ~uintptr_t{7};
  for (Pending* pending : {&block.cluster->pending, &block.pending, &m.current->pending}) {
    if (pending->empty()) continue;
    if (Word* const stored = pending->find(word)) m.drain_word(*stored);
  }
  const auto offset = static_cast<size_t>(static_cast<unsigned char*>(p) - region.begin);
  for (size_t i = 0; i < size; ++i) {
    if (region.shadow[offset + i] == kUnset) {
      fail(text("atomic at byte %zu of %s, which no thread has written (%s)", offset, region.name.c_str(), name_of(site).c_str()));
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

void fence() {
  Machine& m = machine();
  Block& block = *m.current->home;
  m.drain_all(block.cluster->pending);
  m.drain_all(block.pending);
  m.drain_all(m.current->pending);
}

}  // namespace host

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
