// Tables that choose the instantiation of a row kernel by the length of the rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

namespace ldmi::cuda {

struct RowTuning {
  int64_t most_classes;  // for rows of at most this length; 0: never, and not compiled
  int group;             // threads per row
  int columns;           // per thread
  int rows;              // in flight per group
};

namespace tuning {

template <class Table, size_t kEntry, class Start>
bool try_entry(int64_t classes, const Start& start) {
  if constexpr (Table::entries[kEntry].most_classes > 0) {
    if (classes <= Table::entries[kEntry].most_classes) {
      start(std::integral_constant<size_t, kEntry>{});
      return true;
    }
  }
  return false;
}

template <class Table, class Start, size_t... kEntries>
bool try_entries(int64_t classes, const Start& start, std::index_sequence<kEntries...>) {
  return (try_entry<Table, kEntries>(classes, start) || ...);
}

}  // namespace tuning

// Calls start with the index, as a constant, of the first entry of Table::entries that takes rows of this length. Returns whether
// there is one.
template <class Table, class Start>
bool with_tuning(int64_t classes, const Start& start) {
  return tuning::try_entries<Table>(classes, start, std::make_index_sequence<std::size(Table::entries)>{});
}

}  // namespace ldmi::cuda
