#include "case.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

#include "formats.h"

namespace ldmi::test {
namespace {

using cpu::Type;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Layout {
  const char* name;
  int64_t row_stride, column_stride;
  bool shared;  // elements share memory
};

Layout draw_layout(Random& random, int64_t rows, int64_t columns) {
  const int64_t gap = random.integer(1, 5);
  switch (random.integer(0, 11)) {
    case 0:
      return {"padded rows", columns + gap, 1, false};
    case 1:
      return {"transposed", 1, rows, false};
    case 2:
      return {"transposed, padded", 1, rows + gap, false};
    case 3:
      return {"gaps between columns", columns * (gap + 1), gap + 1, false};
    case 4:
      return {"one row, expanded", 0, 1, true};
    case 5:
      return {"one column, expanded", gap, 0, true};
    case 6:
      return {"one element, expanded", 0, 0, true};
    case 7:
      return {"overlapping rows", 1, 1, true};
    default:
      return {"contiguous", columns, 1, false};
  }
}

Memory allocate(Random& random, Type type, int64_t elements) {
  Memory memory;
  memory.type = type;
  memory.lead = random.integer(0, 3);
  memory.bytes = std::vector<std::byte>(static_cast<std::size_t>((memory.lead + elements) * size_of(type)));
  return memory;
}

// The number of elements that a strided matrix spans.
int64_t reach(const Layout& layout, int64_t rows, int64_t columns) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * layout.row_stride + (columns - 1) * layout.column_stride + 1;
}

Shape draw_shape(Random& random, Regime regime) {
  switch (regime) {
    case Regime::kTiny: {
      const int64_t classes = random.integer(1, 20);
      return {random.integer(0, 40), classes, classes, random.chance(0.25)};
    }
    case Regime::kTransposed: {
      const int64_t classes = random.one_of({7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65});
      return {random.integer(1, 300), classes, classes, random.chance(0.2)};
    }
    case Regime::kRows: {
      const int64_t classes = random.one_of({65, 66, 95, 96, 97, 126, 127, 128, 129, 130, 160, 191, 192, 193, 255, 256, 257, 300});
      return {random.integer(1, 120), classes, classes, random.chance(0.2)};
    }
    case Regime::kStacked: {
      const int64_t classes = random.integer(1, 70), problems = random.integer(2, 40);
      return {random.integer(1, 500), classes, classes * problems, false};
    }
    case Regime::kWide:
      return {random.integer(1, 12), random.one_of({1000, 2047, 2048, 4095, 4096, 4097, 5003}), random.integer(1, 24), false};
    case Regime::kManyRows: {
      const int64_t classes = random.integer(1, 10);
      return {random.integer(5000, 20000), classes, classes, random.chance(0.1)};
    }
    case Regime::kManyByLabel:
      // K * C on both sides of the two limits of the plan, C = 17 and 70 at K = 986 and 980
      if (random.chance(0.5)) return {random.integer(8190, 9000), 17, 17 * 58, false};
      return {random.integer(1900, 2500), 70, 70 * 14, false};
    default: {
      const int64_t classes = random.integer(30, 60);
      return {random.integer(3000, 4500), classes, classes, true};
    }
  }
}

// Labels of every width; out-of-range ones are rare, because one makes the whole joint NaN.
void draw_labels(Random& random, Case& out, std::ostringstream& text) {
  Problem& problem = out.problem;
  const int64_t rows = problem.rows;
  const int bytes = random.one_of({1, 2, 4, 8, 8, 8});
  const bool is_signed = bytes == 8 ? random.chance(0.8) : random.chance(0.5);
  const int64_t stride = random.one_of({1, 1, 1, 2, 3, 0});
  const int64_t lead = random.integer(0, 3);
  const int64_t most = bytes == 8 ? INT64_MAX : (int64_t{1} << (8 * bytes - (is_signed ? 1 : 0))) - 1;
  const int64_t least = is_signed ? (bytes == 8 ? INT64_MIN : -most - 1) : 0;
  const int64_t ignore = random.one_of<int64_t>({-100, -100, -1, 0, 1, 127, 255, INT64_MIN});
  const double ignored_share = random.one_of({0.0, 0.0, 0.1, 1.0});
  const double wrong_share = random.chance(0.06) ? 0.05 : 0;
  const int64_t used = random.chance(0.3) ? random.integer(1, problem.labels) : problem.labels;  // some classes are absent
  out.labels = std::vector<std::byte>(static_cast<std::size_t>(bytes * (lead + (rows == 0 ? 0 : (rows - 1) * stride + 1))));
  problem.y.resize(rows);
  problem.ignored.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t label = random.integer(0, used - 1);
    if (random.chance(ignored_share) && ignore >= least && ignore <= most) label = ignore;
    if (random.chance(wrong_share)) label = random.one_of<int64_t>({-1, -7, least, problem.labels, problem.labels + 300, most, -1});
    const uint64_t pattern = static_cast<uint64_t>(label);
    std::memcpy(&out.labels[bytes * (lead + i * stride)], &pattern, bytes);  // little-endian: the low bytes
  }
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t pattern = 0;
    std::memcpy(&pattern, &out.labels[bytes * (lead + i * stride)], bytes);
    if (is_signed && bytes < 8 && (pattern >> (8 * bytes - 1)) != 0) pattern |= ~uint64_t{0} << (8 * bytes);
    const bool huge = !is_signed && (pattern >> 63) != 0;
    problem.y[i] = huge ? -1 : static_cast<int64_t>(pattern);  // a label that no class has
    problem.ignored[i] = !huge && problem.y[i] == ignore;
  }
  out.batch.labels = {rows == 0 ? nullptr : &out.labels[bytes * lead], bytes, is_signed, stride};
  out.batch.ignore_index = ignore;
  text << (is_signed ? ", int" : ", uint") << 8 * bytes << " labels of stride " << stride << ", ignore " << ignore;
}

void draw_weights(Random& random, Case& out, std::ostringstream& text) {
  Problem& problem = out.problem;
  const int64_t rows = problem.rows;
  problem.w.assign(rows, 1.0);
  if (rows == 0 || random.chance(0.5)) return;
  // some labels have hardly any weight: they are absent, or just above the threshold
  const bool stale = !problem.soft && random.chance(0.2);
  const double share = stale ? random.one_of({1e-9, 1e-15, 1e-200, 1e-310}) : 1.0;
  const Type type = stale ? Type::kFloat64 : random.one_of({Type::kFloat16, Type::kBFloat16, Type::kFloat32, Type::kFloat64});
  const int64_t stride = stale ? random.integer(1, 3) : random.one_of({1, 1, 1, 2, 3, 0});
  out.weights = allocate(random, type, (rows - 1) * stride + 1);
  const double zeros = random.one_of({0.0, 0.2, 1.0});
  const double bad = random.chance(0.1) ? 0.05 : 0;
  // fp32 products of weights and soft targets underflow; hard labels keep the weight in double
  const bool wide = !problem.soft && (type == Type::kFloat32 || type == Type::kFloat64);
  const double size = wide ? random.one_of({1.0, 1.0, 1e-30, 1e30}) : 1.0;
  for (int64_t i = 0; i < rows; ++i) {
    double weight = size * random.uniform(0.1, 4);
    if (stale && problem.y[i] % 3 == 0) weight *= share;
    if (random.chance(zeros)) weight = random.chance(0.5) ? 0.0 : -0.0;
    if (random.chance(bad)) weight = random.one_of({kNaN, -1.0, kInfinity, -kInfinity});
    out.weights.put(i * stride, weight);
  }
  for (int64_t i = 0; i < rows; ++i) problem.w[i] = out.weights.get(i * stride);
  out.batch.weights = {out.weights.data(), type, stride};
  text << ", weights of type " << static_cast<int>(type) << " and stride " << stride << " of size " << size << ", some " << share;
}

// Rows that do not count may hold anything; a few that count hold infinities and NaN.
void draw_values(Random& random, Memory& memory, const Layout& layout, const Problem& problem, int64_t columns, bool logits,
                 std::vector<double>& values, std::ostringstream& text) {
  const int64_t rows = problem.rows;
  const bool half = memory.type == Type::kFloat16;
  const double scale = random.one_of({0.1, 1.0, 3.0, half ? 50.0 : 1000.0});
  const double shift = random.chance(0.2) ? random.one_of({-1.0, 1.0}) * (half ? 1e3 : 1e4) : 0;
  const double holes = random.chance(0.2) ? 0.3 : 0;
  const double wild = random.chance(0.1) ? 0.01 : 0;
  const bool distribution = !logits || problem.probs;
  if (!distribution) text << ", scale " << scale << ", shift " << shift;
  values.resize(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    const bool free = !problem.counts(i) && !layout.shared;
    for (int64_t c = 0; c < columns; ++c) {
      double value = distribution ? random.uniform(0.01, 1) : scale * random.normal() + shift;
      if (random.chance(holes)) value = distribution ? 0.0 : -kInfinity;
      if (free || random.chance(wild / static_cast<double>(columns))) {
        value = distribution && !free ? kNaN : random.one_of({kNaN, kInfinity, -kInfinity, 1e30, -1e30});
      }
      memory.put(i * layout.row_stride + c * layout.column_stride, value);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      values[i * columns + c] = memory.get(i * layout.row_stride + c * layout.column_stride);
    }
  }
}

Case draw_case(Random& random, Regime regime, const Shape& shape, Type type);

}  // namespace

int64_t size_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

const void* Memory::data() const { return bytes.data() + lead * size_of(type); }

void Memory::put(int64_t at, double value) {
  std::byte* to = bytes.data() + (lead + at) * size_of(type);
  const float single = static_cast<float>(value);
  const uint16_t half = encode(value, type == Type::kFloat16 ? kHalf : kBFloat16);
  switch (type) {
    case Type::kFloat64:
      std::memcpy(to, &value, 8);
      break;
    case Type::kFloat32:
      std::memcpy(to, &single, 4);
      break;
    default:
      std::memcpy(to, &half, 2);
  }
}

double Memory::get(int64_t at) const { return read(bytes.data(), lead + at, type); }

double read(const std::byte* data, int64_t at, Type type) {
  const std::byte* from = data + at * size_of(type);
  double value;
  float single;
  uint16_t half;
  switch (type) {
    case Type::kFloat64:
      std::memcpy(&value, from, 8);
      return value;
    case Type::kFloat32:
      std::memcpy(&single, from, 4);
      return single;
    default:
      std::memcpy(&half, from, 2);
      return decode(half, type == Type::kFloat16 ? kHalf : kBFloat16);
  }
}

const char* name_of(Regime regime) {
  constexpr const char* names[] = {"tiny", "transposed", "rows", "stacked", "wide", "many rows", "many by label", "soft blocks"};
  return names[static_cast<int>(regime)];
}

Case make_case(uint64_t seed, int64_t number) {
  Random random(seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(number));
  // small problems are cheap and find most
  const bool large = random.chance(0.08);
  const Regime regime = large ? random.one_of({Regime::kManyRows, Regime::kManyByLabel, Regime::kSoftBlocks})
                              : random.one_of({Regime::kTiny, Regime::kTiny, Regime::kTransposed, Regime::kTransposed, Regime::kRows,
                                               Regime::kRows, Regime::kStacked, Regime::kWide});
  const Shape shape = draw_shape(random, regime);
  const Type type = random.one_of({Type::kFloat16, Type::kBFloat16, Type::kFloat32, Type::kFloat32, Type::kFloat32, Type::kFloat64});
  return draw_case(random, regime, shape, type);
}

Case make_case(uint64_t seed, const Shape& shape, Type type) {
  Random random(seed * 0x9e3779b97f4a7c15u);
  return draw_case(random, Regime::kRows, shape, type);
}

namespace {

Case draw_case(Random& random, Regime regime, const Shape& shape, Type type) {
  Case out{regime, {}, {}, {}, {}, {}, {}, {}};
  std::ostringstream text;
  text << name_of(regime) << ": N = " << shape.rows << ", C = " << shape.classes << ", K = " << shape.labels << ", type "
       << static_cast<int>(type);

  Problem& problem = out.problem;
  problem.rows = shape.rows;
  problem.classes = shape.classes;
  problem.labels = shape.labels;
  problem.soft = shape.soft;
  problem.probs = random.chance(0.15);
  // fp64 answers are compared with a reference in fp64, which rounds as well
  problem.unit = type == Type::kFloat64 ? 0x1p-52 : 0x1p-24;
  problem.smallest = type == Type::kFloat64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  out.batch.num_labels = shape.labels;
  out.batch.probs = problem.probs;
  if (problem.probs) text << ", probs";

  if (!shape.soft) draw_labels(random, out, text);
  draw_weights(random, out, text);
  const Layout layout = draw_layout(random, shape.rows, shape.classes);
  out.logits = allocate(random, type, reach(layout, shape.rows, shape.classes));
  text << ", " << layout.name;
  draw_values(random, out.logits, layout, problem, shape.classes, true, problem.x, text);
  out.batch.logits = {
      shape.rows == 0 ? nullptr : out.logits.data(), type, shape.rows, shape.classes, layout.row_stride, layout.column_stride};
  if (shape.soft) {
    const Type soft_type = random.one_of({Type::kFloat16, Type::kBFloat16, Type::kFloat32, type});
    const Layout soft_layout = draw_layout(random, shape.rows, shape.labels);
    out.soft = allocate(random, soft_type, reach(soft_layout, shape.rows, shape.labels));
    text << ", soft targets of type " << static_cast<int>(soft_type) << ", " << soft_layout.name;
    draw_values(random, out.soft, soft_layout, problem, shape.labels, false, problem.t, text);
    // an address that is not null means soft targets, even if there are no rows
    static const double nothing = 0;
    out.batch.soft = {shape.rows == 0 ? &nothing : out.soft.data(),
                      soft_type,
                      shape.rows,
                      shape.labels,
                      soft_layout.row_stride,
                      soft_layout.column_stride};
  }
  out.text = text.str();
  return out;
}

}  // namespace
}  // namespace ldmi::test
