// combine against its formulas in long double.

#include <limits>

#include "../../csrc/cuda/combine.cu"
#include "batches.h"

namespace ldmi::cuda {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Answer {
  double loss, scale, ce_scale;
};

Answer formula(double log_abs_det, int64_t kept, double total, double ce, const LossOptions& options) {
  const bool empty = total == 0;
  const long double W = empty ? 1 : total;
  const long double level = log_abs_det - (options.normalize ? static_cast<long double>(kept) * std::log(W) : 0.0L);
  const long double a = options.cross_entropy_weight;
  long double loss = -level, scale = 1;
  if (options.eps > 0) {
    const long double det = std::exp(level), eps = options.eps;
    loss = std::isinf(det) ? -level : -std::log(det + eps);
    scale = std::isinf(det) ? 1 : det / (det + eps);
  }
  if (empty) loss = 0;
  if (options.cross_entropy_weight != 0) loss += a / W * ce;
  return {static_cast<double>(loss), static_cast<double>(scale), static_cast<double>(a / W)};
}

// Weights of any type for soft targets, which combine sums; else n's sum is the total
void check_combine(test::Random& random, const DeviceLimits& limits) {
  const bool soft = random.chance(0.5), weighted = random.chance(0.7);
  const int64_t N =
      random.one_of({int64_t{0}, random.integer(1, 40), random.integer(1, 5) * plan::kWeightRows + random.integer(-1, 1)});
  const int64_t K = random.integer(1, 100), stride = random.integer(1, 2);
  const Type type = random.one_of({Type::kFloat16, Type::kBFloat16, Type::kFloat32, Type::kFloat64});
  const bool nothing = random.chance(0.1), poisoned = random.chance(0.1);
  std::vector<double> n(static_cast<size_t>(K));
  long double total = 0;
  for (double& x : n) total += x = nothing || random.chance(0.2) ? 0 : random.uniform(0, 100);
  test::Memory weights;
  weights.type = type;
  weights.bytes.resize(static_cast<size_t>(((N > 0 ? N - 1 : 0) * stride + 1) * test::size_of(type)));
  if (soft) total = static_cast<long double>(N);
  if (soft && weighted) total = 0;
  for (int64_t i = 0; i < N; ++i) {
    weights.put(i * stride, nothing ? 0 : random.uniform(0, 4));
    if (soft && weighted) total += weights.get(i * stride);
  }
  const LossOptions options{false, random.one_of({0.0, 1e-3, 1e-30, 2.0}), random.chance(0.5), random.one_of({0.0, 0.5, 3.0})};
  const double log_abs_det = poisoned ? kNaN : random.one_of({-kInfinity, 0.0, random.uniform(-5, 5), random.uniform(-3000, 3000)});
  const double ce = random.uniform(0, 100);
  const int64_t kept = random.integer(0, K);

  const test::Buffer<std::byte> weights_at(weights.bytes, "weights");
  const test::Buffer<double> n_at(n, "n"), l_at(std::vector<double>{log_abs_det}, "log_abs_det"), ce_at(std::vector<double>{ce}, "ce");
  const test::Buffer<int64_t> kept_at(std::vector<int64_t>{kept}, "kept");
  const test::Buffer<double> scale(1, "scale"), ce_scale(1, "ce_scale"), wide(1, "loss");
  const test::Buffer<float> narrow_loss(1, "loss");
  const plan::CudaCombine plan = plan::cuda_combine(N, soft && weighted, limits);
  const test::Buffer<unsigned char> workspace(plan.workspace_bytes, "workspace");
  Batch batch{};
  batch.logits.rows = N;
  batch.num_labels = K;
  if (soft) batch.soft.data = n_at.data();  // is not read
  if (weighted) batch.weights = {weights_at.data(), type, stride};
  const bool in_double = random.chance(0.5);
  void* const loss = in_double ? static_cast<void*>(wide.data()) : narrow_loss.data();
  test::require_success(
      combine(batch, l_at.data(), kept_at.data(), n_at.data(), ce_at.data(), options, loss,
              in_double ? Type::kFloat64 : Type::kFloat32, scale.data(), ce_scale.data(), workspace.data(), limits, simt::Stream{}),
      "combine");
  const Answer want = formula(log_abs_det, kept, static_cast<double>(total), ce, options);
  // a sum of N numbers in another order, and the cancellation of log|det| against k log W
  const double size =
      std::isfinite(log_abs_det)
          ? std::fabs(log_abs_det) + static_cast<double>(kept) * std::fabs(std::log(std::fmax(static_cast<double>(total), 1e-9)))
          : 0;
  const double error = 0x1p-52 * (4 * size + 100 + 2 * static_cast<double>(N) + std::fabs(want.ce_scale * ce) * 100);
  const std::vector<double> wanted{want.loss};
  if (in_double) {
    test::require_close(wide.download(), wanted, error, 1e-14, "loss");
  } else {
    test::require_close(narrow_loss.download(), wanted, error, 1e-7, "loss");
  }
  test::require_close(scale.download(), std::vector<double>{want.scale}, 0, 2 * error + 1e-14, "scale");
  test::require_close(ce_scale.download(), std::vector<double>{want.ce_scale}, 0, error + 1e-14, "ce_scale");
}

void check(test::Random& random) {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  check_combine(random, limits);
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) { return ldmi::test::run("combine", ldmi::test::Options(count, words), ldmi::cuda::check); }
