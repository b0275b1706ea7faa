// logits_grad against plain loops over doubles, on random batches of every kind.

#include "../../csrc/cuda/logits_grad/launch.cuh"
#include "batches.h"

namespace ldmi::cuda {
namespace {

template <class E>
void check_grad(const test::Case& from, test::Random& random, const DeviceLimits& limits) {
  using F = Compute<E>;
  const test::Problem& problem = from.problem;
  const bool packed = random.chance(0.6);
  const test::DeviceBatch on_device(from, packed);
  const int64_t N = problem.rows, C = problem.classes, K = problem.labels;
  const plan::CudaLogitsGrad plan = plan::cuda_logits_grad(N, C, K, problem.soft, sizeof(E), limits);
  const std::string context = from.text + ", order " + std::to_string(static_cast<int>(plan.order)) + (packed ? ", packed" : "");

  std::vector<double> V(static_cast<size_t>(K * C));
  const double size = random.one_of({1.0, 1.0, 1e-3, 1e4, 1e60, 1e-60});  // 1 / n, of any weights
  for (double& v : V) v = size * random.normal();
  const double unit = size > 1e50 || size < 1e-50 ? 1 / size : 1;
  const double scale = unit * random.one_of({1.0, 1.0, -0.7, 0.0}), ce_scale = random.one_of({0.0, 0.0, 0.3, 1e-3});
  // lse as joint writes it, rounded; 0 in rows that do not count
  std::vector<F> lse;
  for (const test::Bounded& value : test::joint(problem).lse) lse.push_back(static_cast<F>(value.value));
  const std::vector<test::Bounded> exact = test::logits_grad(problem, V, 0, scale, ce_scale);
  std::vector<test::Bounded> want;
  for (const test::Bounded& value : exact) want.push_back(test::stored(value, from.batch.logits.type));

  const test::Buffer<F> row_lse(lse, "lse");
  const test::Buffer<double> table(V, "V"), factor(std::vector<double>{scale}, "scale"),
      ce_factor(std::vector<double>{ce_scale}, "ce_scale");
  const test::Buffer<E> grad(N * C, "grad", random.integer(0, 5) == 0 ? 1 : 0);
  const test::Buffer<unsigned char> workspace(plan.workspace_bytes, "workspace");
  test::require_success(launch_logits_grad<E>(on_device.batch, row_lse.data(), table.data(), factor.data(), ce_factor.data(),
                                              grad.data(), workspace.data(), limits, Stream{}),
                        "logits_grad");
  test::synchronize();
  const std::vector<E> raw = grad.download();
  std::vector<double> got;
  for (size_t i = 0; i < raw.size(); ++i) {
    got.push_back(test::read(reinterpret_cast<const std::byte*>(raw.data()), static_cast<int64_t>(i), from.batch.logits.type));
  }
  test::require_bounded(got, want, "grad", context);
  for (int64_t i = 0; i < N; ++i) {
    if (problem.counts(i)) continue;
    for (int64_t c = 0; c < C; ++c)
      test::require(got[static_cast<size_t>(i * C + c)] == 0, "a row that does not count has a gradient");
  }
}

void check(test::Random& random) {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  if (random.chance(0.3)) limits.l2 = 1000;  // in the order of the labels
  const test::Case drawn = test::draw_batch(random);
  with_type(drawn.batch.logits.type, [&](auto type) {
    check_grad<decltype(type)>(drawn, random, limits);
    return 0;
  });
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) { return ldmi::test::run("logits_grad", ldmi::test::Options(count, words), ldmi::cuda::check); }
