// loss_forward against plain loops over doubles, in each of its regimes, and a gradient from what it leaves.

#include "../../csrc/cuda/combine.cu"
#include "../../csrc/cuda/joint.cu"
#include "../../csrc/cuda/logdet_inverse.cu"
#include "../../csrc/cuda/loss_forward.cu"
#include "losses.h"

namespace ldmi::cuda {
namespace {

test::Case draw(test::Random& random) {
  const Type type = random.one_of({Type::kFloat16, Type::kBFloat16, Type::kFloat32, Type::kFloat32, Type::kFloat64});
  const uint64_t seed = random.bits() >> 8;
  if (random.chance(0.5)) {  // one block
    const int64_t classes = random.one_of<int64_t>({1, 2, 7, 8, 9, 14, 14, 16, 17, 24, 25, 31, 32, 33, 48, 63, 64});
    const int64_t rows =
        random.chance(0.5) ? classes * random.integer(2, 20) : random.one_of<int64_t>({0, 1, 31, 32, 33, 255, 256, 257});
    return test::make_case(seed, {std::min(rows, plan::kCudaFusedElements / classes), classes, classes, false}, type);
  }
  if (random.chance(0.4)) {  // soft targets
    const int64_t classes = random.one_of<int64_t>({1, 2, 8, 9, 14, 16, 17, 24, 25, 32, 33, 64, 65, 100});
    return test::make_case(seed, {random.one_of<int64_t>({0, 1, 40, 64, 65, 300, 600}), classes, classes, true}, type);
  }
  if (random.chance(0.3)) {  // rows enough for the labels to be sorted by several blocks
    const int64_t classes = random.one_of<int64_t>({65, 66, 72});
    return test::make_case(seed, {random.integer(1024, 2600), classes, classes, false}, type);
  }
  const int64_t classes = random.one_of<int64_t>({7, 14, 16, 24, 31, 32, 33, 64, 65, 95, 96, 97, 110});
  const int64_t least = classes <= 64 ? plan::kCudaFusedElements / classes + 1 : 0;
  return test::make_case(seed, {least + random.integer(0, 200), classes, classes, false}, type);
}

template <class F>
void check_forward(const test::Case& from, bool packed, const LossOptions& options, bool gradient, const DeviceLimits& limits) {
  const test::Problem& problem = from.problem;
  const test::DeviceBatch on_device(from, packed);
  const int64_t N = problem.rows, C = problem.classes;
  const int64_t bytes = test::size_of(from.batch.logits.type);
  const plan::CudaLossForward plan =
      plan::cuda_loss_forward(N, C, problem.soft, bytes, from.batch.weights.data != nullptr, limits, gradient);
  if (plan.path == plan::CudaLoss::kLu) {
    test::require(C > 32, "a library for so few classes");
    return;
  }
  char text[200];
  std::snprintf(text, sizeof(text), "; way %d, strict %d, eps %g, normalize %d, ce %g", static_cast<int>(plan.path), options.strict,
                options.eps, options.normalize, options.cross_entropy_weight);
  const std::string context = from.text + text;
  const test::LossAnswer want = test::loss_of(problem, options);
  const test::Buffer<F> loss(1, "loss"), lse(N, "lse");
  const test::Buffer<double> V(C * C, "V"), scale(1, "scale"), ce_scale(1, "ce_scale");
  const test::Buffer<unsigned char> workspace(plan.workspace_bytes, "workspace");
  test::require_success(loss_forward(on_device.batch, options, loss.data(), lse.data(), gradient ? V.data() : nullptr, scale.data(),
                                     ce_scale.data(), workspace.data(), limits, Stream{}),
                        "loss_forward");
  test::synchronize();
  test::require_bounded(lse.download(), test::joint(problem).lse, "lse", context);
  const F value = loss.download()[0];
  if (want.nan) {
    test::require(std::isnan(static_cast<double>(value)), "the loss is not NaN\n  " + context);
  } else if (want.clear) {
    test::require_bounded(loss.download(), {want.loss}, "loss", context);
    test::require_bounded(scale.download(), {want.scale}, "scale", context);
    test::require_bounded(ce_scale.download(), {want.ce_scale}, "ce_scale", context);
  }
  if (!gradient) return;
  const std::vector<double> got = V.download();
  for (size_t i = 0; i < got.size(); ++i) {
    const test::Bounded bound = want.nan ? test::Bounded{std::numeric_limits<double>::quiet_NaN(), 0}
                                         : test::Bounded{want.V[i], want.V_error + 1e-12 * std::fabs(want.V[i])};
    if (want.nan || want.clear) test::require(bound.accepts(got[i]), "V\n  " + context);
    if (!want.nan) test::require(!std::isnan(got[i]), "V is NaN\n  " + context);
  }
}

void check(test::Random& random) {
  DeviceLimits limits;
  test::require_success(simt::device(&limits), "device");
  limits.cooperative = random.chance(0.7);  // in one launch, or step by step
  // one block holds fewer classes: a grid factors, or with the step by step a library
  if (random.chance(0.25)) limits.smem_block = plan::grid_smem(100, 8, 1);
  const test::Case from = draw(random);
  const LossOptions options = test::draw_options(random);
  const bool gradient = random.chance(0.8), packed = random.chance(0.6);
  if (from.batch.logits.type == Type::kFloat64) {
    check_forward<double>(from, packed, options, gradient, limits);
  } else {
    check_forward<float>(from, packed, options, gradient, limits);
  }
}

}  // namespace
}  // namespace ldmi::cuda

int main(int count, char** words) { return ldmi::test::run("loss_forward", ldmi::test::Options(count, words), ldmi::cuda::check); }
