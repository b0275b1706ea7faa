// Random batches for the kernels, in memory exactly as large as the contract allows, and the same batches as mathematics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "random.h"
#include "reference.h"

namespace ldmi::test {

// A strided array of one type on the heap, `lead` elements before the first and none after the last: beyond is
// AddressSanitizer's red zone.
struct Memory {
  cpu::Type type = cpu::Type::kFloat32;
  std::vector<std::byte> bytes;
  int64_t lead = 0;

  const void* data() const;
  void put(int64_t at, double value);  // rounds to the type
  double get(int64_t at) const;
};
int64_t size_of(cpu::Type);
double read(const std::byte* data, int64_t at, cpu::Type);

// Which shapes are drawn, named after the code that they reach.
enum class Regime {
  kTiny,         // fewer rows and classes than a vector has lanes
  kTransposed,   // up to 64 classes: tiles of transposed rows
  kRows,         // more classes: row by row, on both sides of the order by label
  kStacked,      // several problems in one joint
  kWide,         // rows longer than a tile
  kManyRows,     // several tasks
  kManyByLabel,  // several tasks and several pieces of the counting sort
  kSoftBlocks,   // soft targets, several blocks of rows
  kCount
};
const char* name_of(Regime);

struct Case {
  Regime regime;
  std::string text;  // for messages
  Problem problem;
  cpu::Batch batch;  // points into the memory below
  Memory logits, soft, weights;
  std::vector<std::byte> labels;
};

struct Shape {
  int64_t rows, classes, labels;
  bool soft;
};

// Batch `number` of the sequence that `seed` generates.
Case make_case(uint64_t seed, int64_t number);

// A batch of that shape and type; everything else is drawn.
Case make_case(uint64_t seed, const Shape& shape, cpu::Type type);

}  // namespace ldmi::test
