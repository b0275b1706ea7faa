// The ops on CUDA devices. No function here waits for the device: scratch memory comes from torch's allocator, launches go to the
// current stream, and decisions that depend on data are made on the device.

#include <array>

#include "../cuda/device.h"
#include "../cuda/kernels.h"
#include "ops.h"

// A function of libtorch_cuda. It is weak, so that this module also loads with a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ldmi {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// The context of one call: its device, made current, with its stream and limits.
class Call {
 public:
  explicit Call(const Tensor& logits) : place(place_of(logits)), limits(cuda::limits_of(place.index)), guard_(place.index) {
    STD_TORCH_CHECK(limits.sms > 0, "ldmi_fast: the CUDA runtime does not know device ", place.index);
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(place.index, &current) == 0,
                    "ldmi_fast: torch has no current stream for device ", place.index);
    stream = static_cast<simt::Stream>(current);
  }

  void same_device(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(place_of(tensor) == place, "ldmi_fast: ", name, " must be on the device of the logits");
  }
  Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) const { return empty(sizes, type, place); }
  Tensor workspace(int64_t bytes) const { return empty({bytes}, ScalarType::Byte, place); }

  const Place place;
  const plan::DeviceLimits& limits;
  simt::Stream stream;

 private:
  cuda::DeviceGuard guard_;
};

void check(int code, const char* kernel) {
  STD_TORCH_CHECK(code == 0, "ldmi_fast: launching ", kernel, " failed: ", cuda::refused(code));
}

int64_t bytes_of(cpu::Type type) { return type == cpu::Type::kFloat64 ? 8 : type == cpu::Type::kFloat32 ? 4 : 2; }

cpu::Batch batch_on(const Call& call, const Tensor& logits, const Tensor& target, const std::optional<Tensor>& sample_weight,
                    int64_t num_labels, int64_t ignore_index, const std::string& input) {
  call.same_device(target, "target");
  if (sample_weight.has_value()) call.same_device(*sample_weight, "sample_weight");
  return batch_of(logits, target, sample_weight, num_labels, ignore_index, input);
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

void sum_joint(const Call& call, const cpu::Batch& batch, const Tensor& S, const Tensor& n, const Tensor& lse, const Tensor& ce) {
  const int64_t bytes = plan::cuda_joint(batch.logits.rows, batch.logits.columns, batch.num_labels, batch.soft.data != nullptr,
                                         bytes_of(batch.logits.type), call.limits)
                            .workspace_bytes;
  const Tensor workspace = call.workspace(bytes);
  check(cuda::joint(batch, doubles(S), doubles(n), lse.data_ptr(), doubles(ce), workspace.data_ptr(), call.limits, call.stream),
        "joint");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> joint(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, int64_t num_labels,
                                                 int64_t ignore_index, std::string input) {
  const Call call(logits);
  const cpu::Batch batch = batch_on(call, logits, target, sample_weight, num_labels, ignore_index, input);
  Tensor S = call.allocate({num_labels, batch.logits.columns}, ScalarType::Double);
  Tensor n = call.allocate({num_labels}, ScalarType::Double);
  Tensor lse = call.allocate({batch.logits.rows}, compute_type(logits));
  Tensor ce = call.allocate({}, ScalarType::Double);
  sum_joint(call, batch, S, n, lse, ce);
  return {S, n, lse, ce};
}

// Returns a tensor of matrices [count, C, C] in the memory of another tensor, column-major or row-major.
Tensor matrices_over(const Tensor& memory, int64_t count, int64_t C, Place place, bool column_major) {
  const int64_t sizes[] = {count, C, C}, strides[] = {C * C, column_major ? 1 : C, column_major ? C : 1};
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_create_tensor_from_blob(memory.data_ptr(), 3, sizes, strides, 0, aoti_torch_dtype_float64(), place.type,
                                                     place.index, &handle) == 0,
                  "ldmi_fast: cannot wrap a matrix");
  return Tensor(handle);
}

// Replaces X by T^{-1} X.
void solve_triangular(const Tensor& T, const Tensor& X, bool upper, bool unitriangular) {
  std::array<StableIValue, 6> solve{from(T), from(X), from(upper), from(true), from(unitriangular), from(X)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::linalg_solve_triangular", "out", solve.data(), TORCH_ABI_VERSION) == 0,
                  "ldmi_fast: solving with a triangular matrix failed");
  (void)to<Tensor>(solve[0]);
}

// For more classes than our own kernels take: torch's LU, with kernels around it that keep the contract. It takes the memory of two
// matrices, and the one for V may be that of S. torch's solve from LU would take a third one, for the permutation.
void factor_by_library(const Call& call, Factors& f, bool strict, bool over_S, int64_t workspace_bytes) {
  const bool inverse = f.V.size(0) != 0;
  const Tensor workspace = call.workspace(workspace_bytes);
  const Tensor memory = over_S ? f.S : call.allocate({f.count, f.C, f.C}, ScalarType::Double);
  const Tensor pivots = call.allocate({f.count, f.C}, ScalarType::Int), info = call.allocate({f.count}, ScalarType::Int);
  const auto* n = doubles(f.n);
  const auto* exchanges = static_cast<const int32_t*>(pivots.data_ptr());
  check(cuda::logdet_inverse_equilibrate(doubles(f.S), n, f.count, f.C, doubles(memory), inverse ? doubles(f.V) : nullptr,
                                         workspace.data_ptr(), call.limits, call.stream),
        "equilibrate");
  const Tensor factors = matrices_over(memory, f.count, f.C, call.place, true);
  std::array<StableIValue, 6> factor{from(factors), from(true), from(false), from(factors), from(pivots), from(info)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::linalg_lu_factor_ex", "out", factor.data(), TORCH_ABI_VERSION) == 0,
                  "ldmi_fast: LU factorisation failed");
  for (int i = 0; i < 3; ++i) (void)to<Tensor>(factor[static_cast<std::size_t>(i)]);
  check(cuda::logdet_inverse_determinant(doubles(memory), exchanges, n, f.count, f.C, strict, doubles(f.log_abs_det), doubles(f.sign),
                                         static_cast<int64_t*>(f.kept.data_ptr()), workspace.data_ptr(), call.limits, call.stream),
        "determinant");
  if (!inverse) return;
  const Tensor transposed = matrices_over(memory, f.count, f.C, call.place, false);
  const Tensor X = matrices_over(f.V, f.count, f.C, call.place, true);
  solve_triangular(transposed, X, false, false);  // U^T
  solve_triangular(transposed, X, true, true);    // L^T
  check(cuda::logdet_inverse_finish(doubles(f.V), exchanges, n, f.count, f.C, doubles(memory), workspace.data_ptr(), call.limits,
                                    call.stream),
        "finish");
  f.V = torch::stable::view(memory, {f.count, f.C, f.C});
}

// If `over_S`, the caller no longer needs S; the LU path may return V in its memory.
void factor(const Call& call, Factors& f, bool strict, bool over_S) {
  if (f.count == 0) return;
  const bool inverse = f.V.size(0) != 0;
  const plan::CudaLogdetInverse how = plan::cuda_logdet_inverse(f.count, f.C, call.limits, inverse);
  if (how.factor == plan::CudaFactor::kLu) {
    factor_by_library(call, f, strict, over_S, how.workspace_bytes);
    return;
  }
  const Tensor workspace = call.workspace(how.workspace_bytes);
  check(cuda::logdet_inverse(doubles(f.S), doubles(f.n), f.count, f.C, strict, doubles(f.log_abs_det), doubles(f.sign),
                             static_cast<int64_t*>(f.kept.data_ptr()), inverse ? doubles(f.V) : nullptr, workspace.data_ptr(),
                             call.limits, call.stream),
        "logdet_inverse");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logdet_inverse(Tensor S, Tensor n, std::string absent) {
  const Call call(S);
  const bool strict = strict_of(absent);
  Factors f(S, n);
  factor(call, f, strict, false);
  return f.results();
}

Tensor logits_grad(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, Tensor lse, Tensor V, Tensor scale,
                   Tensor ce_scale, int64_t ignore_index, std::string input) {
  const Call call(logits);
  call.same_device(lse, "lse");
  call.same_device(V, "V");
  call.same_device(scale, "scale");
  call.same_device(ce_scale, "ce_scale");
  check_gradient(logits, lse, V, scale, ce_scale);
  const cpu::Batch batch = batch_on(call, logits, target, sample_weight, V.size(0), ignore_index, input);
  V = dense(V);
  lse = dense(lse);
  Tensor grad = call.allocate({logits.size(0), logits.size(1)}, logits.scalar_type());
  const Tensor workspace = call.workspace(plan::cuda_logits_grad(batch.logits.rows, batch.logits.columns, batch.num_labels,
                                                                 batch.soft.data != nullptr, bytes_of(batch.logits.type), call.limits)
                                              .workspace_bytes);
  check(cuda::logits_grad(batch, lse.data_ptr(), doubles(V), doubles(scale), doubles(ce_scale), grad.data_ptr(), workspace.data_ptr(),
                          call.limits, call.stream),
        "logits_grad");
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor target, std::optional<Tensor> sample_weight,
                                                                int64_t ignore_index, std::string absent, double eps, bool normalize,
                                                                double cross_entropy_weight, std::string input, bool gradient) {
  const Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2, "ldmi_fast: logits must be a matrix");
  const int64_t C = logits.size(1), kept = gradient ? C : 0;
  const cpu::Batch batch = batch_on(call, logits, target, sample_weight, C, ignore_index, input);
  const cpu::LossOptions options = options_of(absent, eps, normalize, cross_entropy_weight);
  Tensor loss = call.allocate({}, compute_type(logits)), lse = call.allocate({batch.logits.rows}, compute_type(logits));
  Tensor scale = call.allocate({}, ScalarType::Double), ce_scale = call.allocate({}, ScalarType::Double);
  const bool soft = batch.soft.data != nullptr, weighted = sample_weight.has_value();
  const plan::CudaLossForward plan =
      plan::cuda_loss_forward(batch.logits.rows, C, soft, bytes_of(batch.logits.type), weighted, call.limits, gradient);
  if (plan.path != plan::CudaLoss::kLu) {
    Tensor V = call.allocate({kept, kept}, ScalarType::Double);
    const Tensor workspace = call.workspace(plan.workspace_bytes);
    check(cuda::loss_forward(batch, options, loss.data_ptr(), lse.data_ptr(), gradient ? doubles(V) : nullptr, doubles(scale),
                             doubles(ce_scale), workspace.data_ptr(), call.limits, call.stream),
          "loss_forward");
    return {loss, lse, V, scale, ce_scale};
  }
  const Tensor S = call.allocate({C, C}, ScalarType::Double), n = call.allocate({C}, ScalarType::Double);
  const Tensor ce = call.allocate({}, ScalarType::Double);
  sum_joint(call, batch, S, n, lse, ce);
  Factors f(S, n, gradient);
  factor(call, f, options.strict, true);
  const Tensor workspace = call.workspace(plan::cuda_combine(batch.logits.rows, soft && weighted, call.limits).workspace_bytes);
  check(cuda::combine(batch, doubles(f.log_abs_det), static_cast<const int64_t*>(f.kept.data_ptr()), doubles(n), doubles(ce), options,
                      loss.data_ptr(), batch.logits.type == cpu::Type::kFloat64 ? cpu::Type::kFloat64 : cpu::Type::kFloat32,
                      doubles(scale), doubles(ce_scale), workspace.data_ptr(), call.limits, call.stream),
        "combine");
  return {loss, lse, gradient ? torch::stable::view(f.V, {C, C}) : call.allocate({0, 0}, ScalarType::Double), scale, ce_scale};
}

std::tuple<Tensor, Tensor> fused(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, int64_t ignore_index,
                                 std::string absent, double eps, bool normalize, double cross_entropy_weight, std::string input) {
  STD_TORCH_CHECK(target.dim() == 1 && logits.dim() == 2, "ldmi_fast: fused takes logits [N, C] and class indices [N]");
  const Call call(logits);
  const cpu::Batch batch = batch_on(call, logits, target, sample_weight, logits.size(1), ignore_index, input);
  const int64_t bytes = bytes_of(batch.logits.type);  // in half precision the kernel computes no gradient
  if (bytes < 4 || !plan::cuda_fused(batch.logits.rows, batch.logits.columns, bytes, sample_weight.has_value(), call.limits).runs) {
    auto [loss, lse, V, scale, ce_scale] =
        loss_forward(logits, target, sample_weight, ignore_index, absent, eps, normalize, cross_entropy_weight, input, true);
    return {loss, logits_grad(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)};
  }
  Tensor loss = call.allocate({}, compute_type(logits)), grad = call.allocate({logits.size(0), logits.size(1)}, logits.scalar_type());
  check(cuda::fused(batch, options_of(absent, eps, normalize, cross_entropy_weight), loss.data_ptr(), grad.data_ptr(), call.limits,
                    call.stream),
        "fused");
  return {loss, grad};
}

}  // namespace

bool cuda_torch() { return aoti_torch_get_current_cuda_stream != nullptr; }

STABLE_TORCH_LIBRARY_IMPL(ldmi_fast, CUDA, m) {
  m.impl("joint", TORCH_BOX(&joint));
  m.impl("logdet_inverse", TORCH_BOX(&logdet_inverse));
  m.impl("logits_grad", TORCH_BOX(&logits_grad));
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("fused", TORCH_BOX(&fused));
}

}  // namespace ldmi
