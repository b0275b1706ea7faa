// The smallest whole case: a row sum. Copy it for a new kernel; README.md explains.

#include "case.h"

namespace ldmi::example {
namespace {

using namespace simt;

// One block per row, grid-stride; out[row] = sum of the row. Rows are `stride` values apart.
template <class T>
LDMI_KERNEL void LDMI_BOUNDS(128, 1) row_sum(const T* in, int64_t rows, int64_t columns, int64_t stride, float* out) {
  Carve carve;
  float* const part = carve.take<float>(block_dim() / kWarp);
  for (int64_t row = block_idx(); row < rows; row += grid_dim()) {
    float sum = 0.0f;
    for (int64_t c = thread_idx(); c < columns; c += block_dim()) sum += widen(load_once(in + row * stride + c));
    sum = warp_sum(sum);
    if (lane() == 0) part[warp()] = sum;
    sync_block();
    if (thread_idx() == 0) {
      float total = 0.0f;
      for (int w = 0; w < block_dim() / kWarp; ++w) total += part[w];
      store(out + row, total);
    }
    sync_block();
  }
}

// The launcher: what csrc/torch calls, and what the case tests
template <class T>
int launch_row_sum(const T* in, int64_t rows, int64_t columns, int64_t stride, float* out, Stream stream) {
  Device limits;
  if (const int error = device(&limits); error != 0) return error;
  Grid grid;
  grid.blocks = rows < limits.sms ? rows : limits.sms;
  grid.threads = 128;
  Carve carve;
  carve.take<float>(grid.threads / kWarp);
  grid.smem = carve.bytes();
  return launch(row_sum<T>, grid, stream, in, rows, columns, stride, out);
}

template <class T>
void check_row_sum(test::Random& random) {
  const int64_t rows = random.integer(1, 9), columns = random.integer(1, 300), stride = columns + random.integer(0, 2);
  std::vector<T> in(static_cast<size_t>((rows - 1) * stride + columns));
  for (T& x : in) {
    if constexpr (sizeof(T) == 2) {
      x.bits = static_cast<uint16_t>(0x3c00 + random.integer(0, 255));  // about 1 as fp16, about 0.01 as bf16
    } else {
      x = static_cast<T>(random.uniform(-1.0, 1.0));
    }
  }
  std::vector<double> want(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const T& x = in[static_cast<size_t>(r * stride + c)];
      if constexpr (std::is_same_v<T, Half>) {
        want[static_cast<size_t>(r)] += 1.0 + (x.bits - 0x3c00) * 0x1p-10;
      } else {
        want[static_cast<size_t>(r)] += x;
      }
    }
  }
  const test::Buffer<T> input(in, "in", random.integer(0, 1));
  const test::Buffer<float> output(rows, "out");
  test::require_success(launch_row_sum<T>(input.data(), rows, columns, stride, output.data(), Stream{}), "row_sum");
  test::require_close(output.download(), want, 1e-4, 1e-6, "row_sum");
}

}  // namespace

void check(test::Random& random) {
  check_row_sum<float>(random);
  check_row_sum<Half>(random);
}

}  // namespace ldmi::example

int main(int count, char** words) { return ldmi::test::run("example", ldmi::test::Options(count, words), ldmi::example::check); }
