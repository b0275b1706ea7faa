// joint against plain loops over doubles, on random batches of every kind.

#include "../../csrc/cuda/joint/launch.cuh"
#include "batches.h"

namespace ldmi::cuda {
namespace {

// Launches twice with different garbage in the workspace: the results have the same bits.
template <class F>
void check_joint(const test::Case& from, bool packed, const DeviceLimits& limits) {
  const test::Problem& problem = from.problem;
  const test::DeviceBatch on_device(from, packed);
  const int64_t N = problem.rows, C = problem.classes, K = problem.labels;
  const plan::CudaJoint plan = plan::cuda_joint(N, C, K, problem.soft, test::size_of(from.batch.logits.type), limits);
  const std::string context = from.text + ", order " + std::to_string(static_cast<int>(plan.order)) + (packed ? ", packed" : "");
  std::vector<double> first_S;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const test::Buffer<double> S(K * C, "S"), n(K, "n"), ce(1, "ce");
    const test::Buffer<F> lse(N, "lse");
    const test::Buffer<unsigned char> workspace(plan.workspace_bytes, "workspace");
    const int error = with_type(from.batch.logits.type, [&](auto type) {
      return launch_joint<decltype(type)>(on_device.batch, S.data(), n.data(), lse.data(), ce.data(), workspace.data(), limits,
                                          Stream{});
    });
    test::require_success(error, "joint");
    test::synchronize();
    const test::JointAnswer want = test::joint(problem);
    const std::vector<double> got = S.download();
    test::require_bounded(n.download(), want.n, "n", context);
    test::require_bounded(lse.download(), want.lse, "lse", context);
    test::require_bounded(got, want.S, "S", context);
    test::require_bounded(ce.download(), {want.ce}, "ce", context);
    if (repeat == 1) {
      test::require(got.empty() || std::memcmp(got.data(), first_S.data(), got.size() * sizeof(double)) == 0,
                    "not deterministic: " + context);
    }
    first_S = got;
    if (N % 4 != 0) break;
  }
}

// Equal rows in every tile and block: the rows of R are equal to the last bits, so that the joint is found to be singular.
void check_equal_rows(test::Random& random, const DeviceLimits& limits) {
  const int64_t C = random.integer(2, 80), N = random.integer(C, 400);
  std::vector<float> row(static_cast<size_t>(C)), x;
  for (float& value : row) value = static_cast<float>(3 * random.normal());
  std::vector<int64_t> y;
  for (int64_t i = 0; i < N; ++i) {
    x.insert(x.end(), row.begin(), row.end());
    y.push_back(random.integer(0, C - 1));
  }
  const test::Buffer<float> logits(x, "logits"), lse(N, "lse");
  const test::Buffer<int64_t> labels(y, "labels");
  const test::Buffer<double> S(C * C, "S"), n(C, "n"), ce(1, "ce");
  Batch batch{};
  batch.logits = {logits.data(), Type::kFloat32, N, C, C, 1};
  batch.labels = {labels.data(), 8, true, 1};
  batch.num_labels = C;
  batch.ignore_index = -100;
  const test::Buffer<unsigned char> workspace(plan::cuda_joint(N, C, C, false, 4, limits).workspace_bytes, "workspace");
  test::require_success(launch_joint<float>(batch, S.data(), n.data(), lse.data(), ce.data(), workspace.data(), limits, Stream{}),
                        "joint");
  const std::vector<double> sums = S.download(), counts = n.download();
  std::vector<double> first;
  for (int64_t k = 0; k < C; ++k) {
    const auto at = [&](int64_t c) { return sums[static_cast<size_t>(k * C + c)] / counts[static_cast<size_t>(k)]; };
    if (counts[static_cast<size_t>(k)] == 0) continue;
    for (int64_t c = 0; c < C; ++c) {
      if (static_cast<int64_t>(first.size()) < C) {
        first.push_back(at(c));
      } else {
        test::require(std::fabs(at(c) - first[static_cast<size_t>(c)]) <= 0x1p-51 * first[static_cast<size_t>(c)],
                      "equal rows differ");
      }
    }
  }
}

void check(test::Random& random) {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  const test::Case drawn = test::draw_batch(random);
  const bool packed = random.chance(0.6);
  if (drawn.batch.logits.type == Type::kFloat64) {
    check_joint<double>(drawn, packed, limits);
  } else {
    check_joint<float>(drawn, packed, limits);
  }
  if (random.integer(0, 7) == 0) check_equal_rows(random, limits);
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) { return ldmi::test::run("joint", ldmi::test::Options(count, words), ldmi::cuda::check); }
