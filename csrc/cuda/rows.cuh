// What the kernels share: which rows count, reading rows of any type and stride, tiles of rows in shared memory, and the softmax.
//
// A row that counts and holds NaN, +inf or no finite value has a sum of exponentials that is NaN, and with it everything that is
// divided by that sum. The maximum need not carry the NaN: fmax ignores it, exp(NaN - m) does not.
#pragma once

#include <type_traits>

#include "../simt/simt.cuh"
#include "kernels.h"

namespace ldmi::cuda {

using namespace simt;

// The precision of the softmax of logits of type E
template <class E>
using Compute = std::conditional_t<std::is_same_v<E, double>, double, float>;

inline constexpr int kThreads = 256;  // of a block, in the kernels over rows
inline constexpr int64_t kUnused = -1;

template <class F>
LDMI_HOST_DEVICE constexpr F infinity() {
  return static_cast<F>(__builtin_huge_valf());
}
template <class F>
LDMI_HOST_DEVICE constexpr F not_a_number() {
  return static_cast<F>(__builtin_nanf(""));
}

// ------------------------------------------------------------------------------------------------------- which rows count

LDMI_DEVICE double weight_of(const Weights& w, int64_t i) {
  if (w.data == nullptr) return 1;
  const int64_t at = i * w.stride;
  switch (w.type) {
    case Type::kFloat32:
      return load_const(static_cast<const float*>(w.data) + at);
    case Type::kFloat64:
      return load_const(static_cast<const double*>(w.data) + at);
    case Type::kFloat16:
      return widen(load_const(static_cast<const Half*>(w.data) + at));
    case Type::kBFloat16:
      return widen(load_const(static_cast<const BFloat16*>(w.data) + at));
  }
  return 1;
}

// A label as a signed number. A value that does not fit becomes the largest one, which is no class.
LDMI_DEVICE int64_t label_of(const Labels& y, int64_t i) {
  const int64_t at = i * y.stride;
  switch (y.bytes) {
    case 1: {
      const uint8_t label = load_const(static_cast<const uint8_t*>(y.data) + at);
      return y.is_signed ? static_cast<int64_t>(static_cast<int8_t>(label)) : label;
    }
    case 2: {
      const uint16_t label = load_const(static_cast<const uint16_t*>(y.data) + at);
      return y.is_signed ? static_cast<int64_t>(static_cast<int16_t>(label)) : label;
    }
    case 4: {
      const uint32_t label = load_const(static_cast<const uint32_t*>(y.data) + at);
      return y.is_signed ? static_cast<int64_t>(static_cast<int32_t>(label)) : label;
    }
    default: {
      const int64_t label = load_const(static_cast<const int64_t*>(y.data) + at);
      return y.is_signed || label >= 0 ? label : INT64_MAX;
    }
  }
}

// Weights that are finite and not negative; a NaN fails both comparisons.
LDMI_DEVICE bool good_weight(double weight) { return weight >= 0 && weight <= 1.7976931348623157e308; }

// The label of row i and its weight; kUnused and 0 for a row that does not count. A row whose label or weight is out of range does not
// count either, and sets `bad`.
LDMI_DEVICE int64_t used_label(const Batch& batch, int64_t i, double& weight, bool& bad) {
  weight = weight_of(batch.weights, i);
  if (weight == 0) return kUnused;
  const int64_t label = label_of(batch.labels, i);
  if (label == batch.ignore_index || label < 0 || label >= batch.num_labels || !good_weight(weight)) {
    if (label != batch.ignore_index) bad = true;
    weight = 0;
    return kUnused;
  }
  return label;
}

// The weight of row i with a soft target; 0 for one that does not count. A weight out of range sets `bad`.
LDMI_DEVICE double used_weight(const Batch& batch, int64_t i, bool& bad) {
  const double weight = weight_of(batch.weights, i);
  if (good_weight(weight)) return weight;
  bad = true;
  return 0;
}

// The column of the row's own label: stacked problems have labels y + b C.
LDMI_DEVICE int64_t column_of(int64_t label, int64_t classes) { return label < classes ? label : label % classes; }

// ----------------------------------------------------------------------------------------------------------- reading rows

template <class E>
LDMI_DEVICE const E* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const E*>(m.data) + row * m.row_stride + column * m.column_stride;
}

// The element of a matrix of any type, as an F
template <class F>
LDMI_DEVICE F value_at(const Matrix& m, int64_t row, int64_t column) {
  switch (m.type) {
    case Type::kFloat32:
      return static_cast<F>(load_const(element<float>(m, row, column)));
    case Type::kFloat64:
      return static_cast<F>(load_const(element<double>(m, row, column)));
    case Type::kFloat16:
      return widen(load_const(element<Half>(m, row, column)));
    case Type::kBFloat16:
      return widen(load_const(element<BFloat16>(m, row, column)));
  }
  return 0;
}

// `count` values of one access of count * sizeof(E) bytes (1 value, or 8 or 16 bytes), aligned to that
template <class E, int count>
LDMI_DEVICE void load_values(const E* from, E (&to)[count]) {
  if constexpr (count == 1) {
    to[0] = load_once(from);
  } else if constexpr (count * sizeof(E) == 8) {
    struct Raw {
      E value[count];
    };
    const Raw raw = bit_cast<Raw>(load_once(reinterpret_cast<const uint64_t*>(from)));
    LDMI_UNROLL
    for (int k = 0; k < count; ++k) to[k] = raw.value[k];
  } else {
    static_assert(count * sizeof(E) == 16);
    const Pack<E> raw = load16_once(from);
    LDMI_UNROLL
    for (int k = 0; k < count; ++k) to[k] = raw[k];
  }
}
template <class E, int count>
LDMI_DEVICE void store_values(E* to, const E (&from)[count]) {
  if constexpr (count == 1) {
    store_streaming(to, from[0]);
  } else if constexpr (count * sizeof(E) == 8) {
    struct Raw {
      E value[count];
    } raw;
    LDMI_UNROLL
    for (int k = 0; k < count; ++k) raw.value[k] = from[k];
    store_streaming(reinterpret_cast<uint64_t*>(to), bit_cast<uint64_t>(raw));
  } else {
    static_assert(count * sizeof(E) == 16);
    Pack<E> raw;
    LDMI_UNROLL
    for (int k = 0; k < count; ++k) raw[k] = from[k];
    store16_streaming(to, raw);
  }
}

// Which columns of a run of kGroup * kColumns a thread of a group has: accesses of kAccess values, those of neighbouring threads
// adjacent.
template <int kAccess, int kGroup>
struct Columns {
  int thread;  // of the group
  LDMI_DEVICE int operator()(int j) const { return (thread + j / kAccess * kGroup) * kAccess + j % kAccess; }
};

// `to` = this thread's columns of the run from `from` on, of which `left` are inside the row; `outside` where there is none
template <int kAccess, int kGroup, int kColumns, class E, class F>
LDMI_DEVICE void load_columns(const E* from, int64_t column_stride, const Columns<kAccess, kGroup>& column, int left, F outside,
                              F (&to)[kColumns]) {
  LDMI_UNROLL
  for (int j = 0; j < kColumns; j += kAccess) {
    E raw[kAccess];
    const bool inside = column(j) < left;
    if constexpr (kAccess == 1) {
      if (inside) load_values<E, 1>(from + column(j) * column_stride, raw);
    } else {
      if (inside) load_values<E, kAccess>(from + column(j), raw);
    }
    LDMI_UNROLL
    for (int k = 0; k < kAccess; ++k) to[j + k] = inside ? static_cast<F>(widen(raw[k])) : outside;
  }
}

// ------------------------------------------------------------------------------------------- rows in shared memory (tiles)

// Whether chunks of whole rows can be copied as one run of 16-byte pieces: rows follow each other, from an aligned address.
LDMI_HOST_DEVICE bool is_flat(const Matrix& m) {
  return (m.column_stride == 1 || m.columns == 1) && (m.row_stride == m.columns || m.rows == 1) &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// Rows first .. first + count of a flat matrix, copied asynchronously into `tile` (packed rows), which holds whole pieces of 16 bytes
// and whose rows at multiples of `first` begin on one. commit_copies and wait_copies are the caller's.
template <class E>
LDMI_DEVICE void copy_flat(const Matrix& m, int64_t first, int count, E* tile) {
  const int bytes = count * static_cast<int>(m.columns * static_cast<int64_t>(sizeof(E)));
  const char* const from = reinterpret_cast<const char*>(static_cast<const E*>(m.data) + first * m.columns);
  char* const to = reinterpret_cast<char*>(tile);
  for (int at = thread_idx() * 16; at < bytes; at += block_dim() * 16) {
    copy_async<16>(to + at, from + at, bytes - at < 16 ? bytes - at : 16);
  }
}

// The same rows of any matrix, at once
template <class E>
LDMI_DEVICE void copy_strided(const Matrix& m, int64_t first, int count, E* tile) {
  const int columns = static_cast<int>(m.columns), total = count * columns;
  for (int at = thread_idx(); at < total; at += block_dim()) {
    const int row = at / columns;
    tile[at] = load_once(element<E>(m, first + row, at - row * columns));
  }
}

// -------------------------------------------------------------------------------------------------------------- reductions

// The sum over the block of one value per thread, always in the same order, in thread 0. `scratch` holds one value per warp; the block
// may use it again after its next barrier.
LDMI_DEVICE double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (lane() == 0) scratch[warp()] = value;
  sync_block();
  double total = 0;
  if (thread_idx() == 0) {
    for (int w = 0; w < block_dim() / kWarp; ++w) total += scratch[w];
  }
  return total;
}

// Each group of `kGroup` threads (a warp or part of it, or the whole block) reduces `count` values per thread at once; all threads get
// the results. For a block `scratch` holds count values per warp. It is free again after two more barriers, or after the second next
// call of this function.
template <int kGroup, bool kMax, int count, class F>
LDMI_DEVICE void group_reduce(F (&value)[count], F* scratch) {
  constexpr int width = kGroup < kWarp ? kGroup : kWarp;
  LDMI_UNROLL
  for (int u = 0; u < count; ++u) {
    LDMI_UNROLL
    for (int bits = width / 2; bits > 0; bits /= 2) {
      const F other = shfl_xor(value[u], bits);
      value[u] = kMax ? fmax(value[u], other) : value[u] + other;
    }
  }
  if constexpr (kGroup > kWarp) {
    constexpr int warps = kGroup / kWarp;
    if (lane() == 0) {
      LDMI_UNROLL
      for (int u = 0; u < count; ++u) scratch[u * warps + warp()] = value[u];
    }
    sync_block();
    LDMI_UNROLL
    for (int u = 0; u < count; ++u) {
      value[u] = scratch[u * warps];
      LDMI_UNROLL
      for (int w = 1; w < warps; ++w) {
        value[u] = kMax ? fmax(value[u], scratch[u * warps + w]) : value[u] + scratch[u * warps + w];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------- host

// work(E{}) with the type of the logits
template <class Work>
int with_type(Type type, Work&& work) {
  switch (type) {
    case Type::kFloat16:
      return work(Half{});
    case Type::kBFloat16:
      return work(BFloat16{});
    case Type::kFloat32:
      return work(float{});
    default:
      return work(double{});
  }
}

// How many values one access can move: 16 bytes, 8, or one value.
template <class E>
int access_of(const Matrix& m) {
  const int64_t size = static_cast<int64_t>(sizeof(E));
  for (const int64_t bytes : {16, 8}) {
    const bool fits = m.columns * size % bytes == 0 && (m.rows == 1 || m.row_stride * size % bytes == 0);
    if (bytes > size && m.column_stride == 1 && fits && reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(bytes) == 0) {
      return static_cast<int>(bytes / size);
    }
  }
  return 1;
}

// work(std::integral_constant<int, values of an access>)
template <class E, class Work>
int with_access(const Matrix& m, Work&& work) {
  const int access = access_of<E>(m);
  if (access == 16 / static_cast<int>(sizeof(E))) return work(std::integral_constant<int, 16 / sizeof(E)>{});
  if constexpr (sizeof(E) == 2) {
    if (access == 4) return work(std::integral_constant<int, 4>{});
  }
  return work(std::integral_constant<int, 1>{});
}

using plan::Workspace;

}  // namespace ldmi::cuda
