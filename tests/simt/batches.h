// Random batches for the kernels over rows: those of the CPU engine's tests (tests/csrc), with their reference answers and error
// bounds, in global memory.
#pragma once

#include <memory>

#include "../csrc/case.h"
#include "case.h"

namespace ldmi::test {

// Global memory of `count` elements of `size` bytes, `lead` elements off the alignment of 256 bytes.
class Elements {
 public:
  Elements(const std::byte* from, int64_t count, int64_t size, int64_t lead, const std::string& name) {
    switch (size) {
      case 1:
        hold<uint8_t>(from, count, lead, name);
        break;
      case 2:
        hold<uint16_t>(from, count, lead, name);
        break;
      case 4:
        hold<uint32_t>(from, count, lead, name);
        break;
      default:
        hold<uint64_t>(from, count, lead, name);
    }
  }
  void* data() const { return data_; }

 private:
  template <class T>
  void hold(const std::byte* from, int64_t count, int64_t lead, const std::string& name) {
    std::vector<T> values(static_cast<size_t>(count));
    if (count != 0) std::memcpy(values.data(), from, values.size() * sizeof(T));
    auto buffer = std::make_shared<Buffer<T>>(values, name, lead);
    data_ = buffer->data();
    owner_ = std::move(buffer);
  }
  void* data_ = nullptr;
  std::shared_ptr<void> owner_;
};

inline Elements elements(const Memory& memory, const std::string& name) {
  const int64_t size = size_of(memory.type), all = static_cast<int64_t>(memory.bytes.size()) / size;
  const int64_t lead = all == 0 ? 0 : memory.lead;
  return {memory.bytes.data() + lead * size, all - lead, size, lead, name};
}

// The same matrix, contiguous and aligned
inline Memory packed_memory(cpu::Type type, const std::vector<double>& values) {
  Memory memory;
  memory.type = type;
  memory.bytes = std::vector<std::byte>(values.size() * static_cast<size_t>(size_of(type)));
  for (size_t i = 0; i < values.size(); ++i) memory.put(static_cast<int64_t>(i), values[i]);
  return memory;
}

// The batch of a case in global memory; `packed`: its logits contiguous and aligned, whatever they are in the case.
class DeviceBatch {
 public:
  DeviceBatch(const Case& from, bool packed)
      : logits_(elements(packed ? packed_memory(from.logits.type, from.problem.x) : from.logits, "logits")),
        soft_(elements(from.soft, "soft targets")),
        weights_(elements(from.weights, "weights")),
        labels_(labels_of(from)),
        batch(from.batch) {
    batch.logits.data = logits_.data();
    if (packed) {
      batch.logits.row_stride = batch.logits.columns;
      batch.logits.column_stride = 1;
    }
    if (from.problem.soft) batch.soft.data = soft_.data();
    if (from.batch.weights.data != nullptr) batch.weights.data = weights_.data();
    batch.labels.data = labels_.data();
  }

 private:
  static Elements labels_of(const Case& from) {
    const int64_t size = from.problem.soft ? 1 : from.batch.labels.bytes;
    const std::byte* const first = static_cast<const std::byte*>(from.batch.labels.data);
    const int64_t lead = first == nullptr ? 0 : (first - from.labels.data()) / size;
    const int64_t all = first == nullptr ? 0 : static_cast<int64_t>(from.labels.size()) / size;
    return {from.labels.data() + lead * size, all - lead, size, lead, "labels"};
  }
  Elements logits_, soft_, weights_, labels_;

 public:
  cpu::Batch batch;
};

// Fails unless every number is within its bound.
template <class T>
void require_bounded(const std::vector<T>& got, const std::vector<Bounded>& want, const char* what, const std::string& context) {
  require(got.size() == want.size(), std::string(what) + ": sizes differ");
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = static_cast<double>(got[i]);
    if (want[i].accepts(g)) continue;
    char line[300];
    std::snprintf(line, sizeof(line), "%s: value %zu of %zu is %.17g, expected %.17g within %.3g\n  ", what, i, got.size(), g,
                  want[i].value, want[i].error);
    throw Failure(line + context);
  }
}

// The error that rounding to the stored type may add to an answer.
inline Bounded stored(Bounded answer, cpu::Type type) {
  if (type == cpu::Type::kFloat16) {
    answer.error += std::fabs(answer.value) * 0x1p-11 + 0x1p-25;
    // 65520 and above become infinite
    if (std::fabs(answer.value) + answer.error >= 65504) answer.error = std::numeric_limits<double>::quiet_NaN();
  } else if (type == cpu::Type::kBFloat16) {
    answer.error += std::fabs(answer.value) * 0x1p-8 + 0x1p-134;
  }
  return answer;
}

// A batch for a seed: mostly a shape at the edges of the kernels' tiles and regimes, otherwise one from the CPU's tests.
inline Case draw_batch(Random& random) {
  const auto type = static_cast<cpu::Type>(random.integer(0, 3));
  const uint64_t seed = random.bits() >> 8;
  switch (random.integer(0, 7)) {
    case 0:  // the classes of a tile, whole and partial tiles of rows
    case 1: {
      const int64_t classes = random.one_of<int64_t>({1, 2, 7, 8, 9, 14, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64});
      return make_case(
          seed, {random.one_of<int64_t>({0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 513}), classes, classes, false}, type);
    }
    case 2: {  // stacked, on both sides of the tiles' labels
      const int64_t classes = random.one_of<int64_t>({1, 3, 8, 14, 16, 20, 32, 64}), problems = random.integer(1, 9);
      return make_case(seed, {random.integer(1, 400), classes, classes * problems, false}, type);
    }
    case 3:
      if (random.chance(0.3)) {  // enough rows for several blocks to sort the labels
        const int64_t classes = random.one_of<int64_t>({65, 66, 72});
        return make_case(seed, {random.integer(1024, 2600), classes, random.chance(0.5) ? classes : 2 * classes, false}, type);
      }
      [[fallthrough]];
    case 4: {  // by label: one warp per row, one block per row, vector accesses and single values
      const int64_t classes = random.one_of<int64_t>(
          {65, 66, 68, 96, 100, 104, 127, 128, 129, 200, 255, 256, 257, 264, 300, 1000, 1023, 1024, 1025, 1032});
      return make_case(
          seed, {random.integer(0, classes > 256 ? 40 : 160), classes, classes > 300 ? random.integer(1, 30) : classes, false}, type);
    }
    case 5:  // rows as long as a block's registers, and longer ones
      return make_case(
          seed,
          {random.integer(1, 6), random.one_of<int64_t>({2048, 4095, 4096, 4097, 4104, 8192, 9001}), random.integer(1, 9), false},
          type);
    case 6: {  // soft targets, on both sides of their tiles
      const int64_t classes = random.one_of<int64_t>({1, 2, 14, 31, 32, 33, 63, 64, 65, 100, 128, 130, 257});
      return make_case(seed, {random.one_of<int64_t>({0, 1, 15, 31, 32, 33, 64, 65, 200, 600}), classes, classes, true}, type);
    }
    default:
      return make_case(seed, random.integer(0, 1 << 20));
  }
}

}  // namespace ldmi::test
