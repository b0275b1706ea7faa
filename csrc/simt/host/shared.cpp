// Shared memory: the pieces of each block with redzones around them, the shared memory of a cluster, and asynchronous copies.

#include "machine.h"

namespace ldmi::simt::host {
namespace {

constexpr size_t kGap = 32;  // the smallest redzone after a piece of shared memory

}  // namespace

Piece* Machine::piece_of(Block& block, const void* p, size_t size) {
  if (block.layouts.empty()) return nullptr;
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(block.shared());
  for (Piece& piece : block.layouts.back()) {
    if (at >= base + piece.at && at + size <= base + piece.at + piece.bytes) return &piece;
  }
  return nullptr;
}

// The block of the current cluster whose shared memory has these bytes; null if there is none.
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

// Fails unless all bytes outside the pieces still have the pattern of the redzone.
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
  // read in the largest aligned parts, because `valid` may be any number
  for (int done = 0; done < copy.valid;) {
    size_t part = 16;
    while (part > static_cast<size_t>(copy.valid - done) || reinterpret_cast<uintptr_t>(copy.from + done) % part != 0) part /= 2;
    read(copy.from + done, part, value.data() + done, Load::kPlain, "copy_async", copy.site);
    done += static_cast<int>(part);
  }
  std::memcpy(copy.to, value.data(), static_cast<size_t>(copy.bytes));
}

void fill_redzone(unsigned char* begin, size_t size) {
  for (size_t i = 0; i < size; ++i) begin[i] = kRedzone[i % 4];
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
    if (at + bytes + kGap > block.shared_size()) fail("too many pieces of shared memory for the emulator's redzones");
    pieces.push_back({at, bytes});
    unpoison(base + at, bytes);
    std::memset(base + at, kPoison, bytes);
  } else if (static_cast<size_t>(piece) > pieces.size() || pieces[static_cast<size_t>(piece)].bytes != bytes) {
    fail(text("takes %zu bytes as piece %d of the shared memory, unlike the other threads of its block (%s)", bytes, piece,
              name_of(site).c_str()));
  }
  return base + pieces[static_cast<size_t>(piece)].at;
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

}  // namespace ldmi::simt::host
