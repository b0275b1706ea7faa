// Buffers that are handed out piece by piece.
#pragma once

#include <cstdint>

#include "everywhere.h"

namespace ldmi::plan {

inline constexpr int64_t kSharedAlignment = 16;  // of every piece of shared memory, in bytes
inline constexpr int64_t kWorkspaceAlignment = 256;

constexpr int64_t round_up(int64_t bytes, int64_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

// Hands out aligned pieces of a buffer, one after the other. Without a buffer it only counts, so that the function that takes the
// pieces of a layout also tells the layout's size.
template <int64_t kAlignment>
class Pieces {
 public:
  explicit constexpr Pieces(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  // Returns `count` values of T, not initialised; null without a buffer.
  template <class T>
  constexpr T* take(int64_t count) {
    char* const piece = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return static_cast<T*>(static_cast<void*>(piece));
  }
  constexpr int64_t bytes() const { return bytes_; }  // taken so far

 private:
  char* base_;
  int64_t bytes_ = 0;
};

using Workspace = Pieces<kWorkspaceAlignment>;
using SharedSize = Pieces<kSharedAlignment>;  // counts what a kernel's Carve takes

}  // namespace ldmi::plan
