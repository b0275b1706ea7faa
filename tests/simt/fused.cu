// fused against plain loops over doubles: every shape at the edges of its warps and tiles, every option.

#include "../../csrc/cuda/fused.cuh"
#include "losses.h"

namespace ldmi::cuda {
namespace {

DeviceLimits current_limits() {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  return limits;
}

// The problem and its numbers: batches of the CPU engine's tests, in shapes of this regime.
test::Case draw(test::Random& random) {
  const Type type = random.chance(0.3) ? Type::kFloat64 : Type::kFloat32;
  const int64_t classes =
      random.one_of<int64_t>({1, 2, 3, 7, 8, 9, 10, 13, 14, 14, 15, 16, 17, 24, 25, 31, 32, 33, 40, 41, 48, 63, 64});
  int64_t rows = random.one_of<int64_t>({0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 400, 1000, 1023, 1024});
  // most of the time enough rows of each class for a joint that is not singular
  if (random.chance(0.5)) rows = classes * random.integer(2, 20);
  rows = std::min(rows, plan::kCudaFusedElements / classes);
  return test::make_case(random.bits() >> 8, {rows, classes, classes, false}, type);
}

template <class F>
void check_fused(const test::Case& from, bool packed, const LossOptions& options, int64_t lead, const DeviceLimits& limits) {
  const test::Problem& problem = from.problem;
  const test::DeviceBatch on_device(from, packed);
  const plan::CudaFused plan = plan::cuda_fused(problem.rows, problem.classes, sizeof(F), from.batch.weights.data != nullptr, limits);
  if (!plan.runs) {  // fp64 on a device with little shared memory
    test::require(sizeof(F) == 8 || problem.classes > 32, "fused does not fit: " + from.text);
    return;
  }
  char text[200];
  std::snprintf(text, sizeof(text), "%s; strict %d, eps %g, normalize %d, ce %g", packed ? ", packed" : "", options.strict,
                options.eps, options.normalize, options.cross_entropy_weight);
  const std::string context = from.text + text;
  const test::LossAnswer want = test::loss_of(problem, options);
  std::vector<F> first;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const test::Buffer<F> loss(1, "loss"), grad(problem.rows * problem.classes, "grad", lead);
    test::require_success(launch_fused<F, true>(on_device.batch, options,
                                                {loss.data(), grad.data(), nullptr, nullptr, nullptr, nullptr}, plan, Stream{}),
                          "fused");
    test::synchronize();
    std::vector<F> all = grad.download();
    const F value = loss.download()[0];
    test::require_loss(problem, from.batch.logits.type, want, value, all, context);
    all.push_back(value);
    if (repeat == 1) {
      test::require(std::memcmp(all.data(), first.data(), all.size() * sizeof(F)) == 0, "not deterministic: " + context);
    }
    first = all;
    if (problem.rows % 4 != 0) break;
  }
}

// The plan's bytes are those that the kernel uses.
template <class F, int kWidth>
void check_space(int64_t rows, int64_t classes, bool weighted, const DeviceLimits& limits) {
  const plan::CudaFused plan = plan::cuda_fused(rows, classes, sizeof(F), weighted, limits);
  if (plan.width != kWidth) return;
  Carve carve;
  const FusedSpace<F, kWidth> space(carve, static_cast<int>(rows), static_cast<int>(classes), weighted, fused_tiles(plan));
  static_cast<void>(space);
  test::require(static_cast<int64_t>(carve.bytes()) == plan.smem_bytes || !plan.runs,
                "the plan has " + std::to_string(plan.smem_bytes) + " bytes, the kernel " + std::to_string(carve.bytes()));
}

void check(test::Random& random) {
  const DeviceLimits limits = current_limits();
  const test::Case from = draw(random);
  const LossOptions options = test::draw_options(random);
  const bool packed = random.chance(0.6);
  const int64_t lead = random.integer(0, 3) == 0 ? 1 : 0;
  if (from.batch.logits.type == Type::kFloat64) {
    check_fused<double>(from, packed, options, lead, limits);
  } else {
    check_fused<float>(from, packed, options, lead, limits);
  }
  for (int i = 0; i < 20; ++i) {
    const int64_t classes = random.integer(1, 64), rows = random.integer(0, plan::kCudaFusedElements / classes);
    const bool weighted = random.chance(0.5);
    check_space<float, 16>(rows, classes, weighted, limits);
    check_space<float, 32>(rows, classes, weighted, limits);
    check_space<float, 64>(rows, classes, weighted, limits);
    check_space<double, 16>(rows, classes, weighted, limits);
    check_space<double, 32>(rows, classes, weighted, limits);
    check_space<double, 64>(rows, classes, weighted, limits);
  }
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) { return ldmi::test::run("fused", ldmi::test::Options(count, words), ldmi::cuda::check); }
