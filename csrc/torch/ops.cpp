// The seam between torch and the kernels: checks, allocation and dispatch of the ops whose schemas ldmi_fast/ops.py defines. LibTorch
// stable ABI only, so that one build runs on every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "../plan/plan.h"

namespace ldmi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised contiguous tensor on the CPU. By the shim directly: the wrappers in stable/ops.h look their operator up by name at
// every call, which costs more than a small problem's whole computation.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4];
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                           torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                           aoti_torch_device_type_cpu(), 0, &handle) == 0,
                  "ldmi_fast: out of memory");
  return Tensor(handle);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

const cpu::Threads kThreads{[](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}};

cpu::Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return cpu::Type::kFloat16;
    case ScalarType::BFloat16:
      return cpu::Type::kBFloat16;
    case ScalarType::Float:
      return cpu::Type::kFloat32;
    case ScalarType::Double:
      return cpu::Type::kFloat64;
    default:
      STD_TORCH_CHECK(false, "ldmi_fast: ", name, " must be float16, bfloat16, float32 or float64");
  }
}

cpu::Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "ldmi_fast: ", name, " must be a matrix, got ", tensor.dim(), " dimensions");
  return {tensor.data_ptr(), type_of(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

cpu::Labels labels_of(const Tensor& target) {
  const int64_t stride = target.stride(0);
  void* data = target.data_ptr();
  switch (target.scalar_type()) {
    case ScalarType::Char:
      return {data, 1, true, stride};
    case ScalarType::Byte:
      return {data, 1, false, stride};
    case ScalarType::Short:
      return {data, 2, true, stride};
    case ScalarType::UInt16:
      return {data, 2, false, stride};
    case ScalarType::Int:
      return {data, 4, true, stride};
    case ScalarType::UInt32:
      return {data, 4, false, stride};
    case ScalarType::Long:
      return {data, 8, true, stride};
    case ScalarType::UInt64:
      return {data, 8, false, stride};
    default:
      STD_TORCH_CHECK(false, "ldmi_fast: target must hold integers (N) or floating point numbers (N, K)");
  }
}

cpu::Batch batch_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& sample_weight, int64_t num_labels,
                    int64_t ignore_index, const std::string& input) {
  cpu::Batch batch{};
  batch.logits = matrix_of(logits, "logits");
  STD_TORCH_CHECK(batch.logits.columns > 0, "ldmi_fast: logits must have at least one class");
  STD_TORCH_CHECK(num_labels > 0, "ldmi_fast: num_labels must be at least 1, got ", num_labels);
  const int64_t rows = batch.logits.rows;
  if (target.dim() == 1) {
    batch.labels = labels_of(target);
  } else {
    batch.soft = matrix_of(target, "a target of two dimensions");
    STD_TORCH_CHECK(batch.soft.columns == num_labels, "ldmi_fast: target has ", batch.soft.columns, " columns, expected ", num_labels);
  }
  STD_TORCH_CHECK(target.size(0) == rows, "ldmi_fast: target has ", target.size(0), " rows, logits ", rows);
  if (sample_weight.has_value()) {
    STD_TORCH_CHECK(sample_weight->dim() == 1 && sample_weight->size(0) == rows, "ldmi_fast: sample_weight must have shape [", rows,
                    "]");
    batch.weights = {sample_weight->data_ptr(), type_of(*sample_weight, "sample_weight"), sample_weight->stride(0)};
  }
  // an empty tensor has no address, and a null address means that there is none
  static const double nothing = 0;
  if (rows == 0) {
    if (target.dim() == 2) batch.soft.data = &nothing;
    batch.weights.data = nullptr;
  }
  STD_TORCH_CHECK(input == "logits" || input == "probs", "ldmi_fast: input must be logits or probs, got ", input);
  batch.num_labels = num_labels;
  batch.ignore_index = ignore_index;
  batch.probs = input == "probs";
  return batch;
}

bool strict_of(const std::string& absent) {
  STD_TORCH_CHECK(absent == "present" || absent == "strict", "ldmi_fast: absent must be present or strict, got ", absent);
  return absent == "strict";
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_double(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "ldmi_fast: ", name, " must be float64");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> joint(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, int64_t num_labels,
                                                 int64_t ignore_index, std::string input) {
  const cpu::Batch batch = batch_of(logits, target, sample_weight, num_labels, ignore_index, input);
  Tensor S = empty({num_labels, batch.logits.columns}, ScalarType::Double);
  Tensor n = empty({num_labels}, ScalarType::Double);
  Tensor lse = empty({batch.logits.rows}, compute_type(logits));
  Tensor ce = empty({}, ScalarType::Double);
  cpu::kernels().joint(batch, static_cast<double*>(S.data_ptr()), static_cast<double*>(n.data_ptr()), lse.data_ptr(),
                       static_cast<double*>(ce.data_ptr()), kThreads);
  return {S, n, lse, ce};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logdet_inverse(Tensor S, Tensor n, std::string absent) {
  check_double(S, "S");
  check_double(n, "n");
  const int64_t dim = S.dim();
  STD_TORCH_CHECK(dim >= 2 && S.size(dim - 1) == S.size(dim - 2), "ldmi_fast: S must have shape [..., C, C]");
  STD_TORCH_CHECK(n.dim() == dim - 1 && n.size(dim - 2) == S.size(dim - 1), "ldmi_fast: n must have shape [..., C]");
  const bool strict = strict_of(absent);
  S = dense(S);
  n = dense(n);
  const int64_t C = S.size(dim - 1);
  std::vector<int64_t> batch;
  int64_t count = 1;
  for (int64_t d = 0; d < dim - 2; ++d) {
    batch.push_back(S.size(d));
    count *= S.size(d);
  }
  // the leading dimensions are views of one
  const auto shaped = [&](const Tensor& flat, bool matrix) {
    std::vector<int64_t> shape = batch;
    if (matrix) shape.insert(shape.end(), {C, C});
    return dim == 3 ? flat : torch::stable::view(flat, shape);
  };
  Tensor log_abs_det = empty({count}, ScalarType::Double);
  Tensor sign = empty({count}, ScalarType::Double);
  Tensor kept = empty({count}, ScalarType::Long);
  Tensor V = empty({count, C, C}, ScalarType::Double);
  const double* s = static_cast<const double*>(S.data_ptr());
  const double* weights = static_cast<const double*>(n.data_ptr());
  double* v = static_cast<double*>(V.data_ptr());
  const auto write = [&, l = static_cast<double*>(log_abs_det.data_ptr()), g = static_cast<double*>(sign.data_ptr()),
                      k = static_cast<int64_t*>(kept.data_ptr())](int64_t i, const cpu::Determinant& found) {
    l[i] = found.log_abs_det;
    g[i] = found.sign;
    k[i] = found.kept;
  };
  const auto one = [&](int64_t i) {
    write(i, cpu::kernels().logdet_inverse(s + i * C * C, weights + i * C, C, strict, v + i * C * C, kThreads));
  };
  // a thread for each of many small matrices, or all threads for each larger one
  if (!plan::cpu_logdet_inverse(C).parallel) {
    cpu::for_each_task(kThreads, count, one);
  } else {
    for (int64_t i = 0; i < count; ++i) one(i);
  }
  return {shaped(log_abs_det, false), shaped(sign, false), shaped(kept, false), shaped(V, true)};
}

Tensor logits_grad(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, Tensor lse, Tensor V, Tensor scale,
                   Tensor ce_scale, int64_t ignore_index, std::string input) {
  check_double(V, "V");
  check_double(scale, "scale");
  check_double(ce_scale, "ce_scale");
  STD_TORCH_CHECK(scale.numel() == 1 && ce_scale.numel() == 1, "ldmi_fast: scale and ce_scale must be scalars");
  STD_TORCH_CHECK(logits.dim() == 2, "ldmi_fast: logits must be a matrix");
  STD_TORCH_CHECK(V.dim() == 2 && V.size(1) == logits.size(1), "ldmi_fast: V must have shape [K, C]");
  STD_TORCH_CHECK(lse.scalar_type() == compute_type(logits) && lse.dim() == 1 && lse.size(0) == logits.size(0),
                  "ldmi_fast: lse must have shape [N] and be float32 (float64 for float64 logits)");
  const cpu::Batch batch = batch_of(logits, target, sample_weight, V.size(0), ignore_index, input);
  STD_TORCH_CHECK(target.dim() == 1 || V.size(0) == V.size(1) || *static_cast<const double*>(ce_scale.data_ptr()) == 0,
                  "ldmi_fast: the cross entropy of soft targets needs a column for each of ", V.size(1), " classes, target has ",
                  V.size(0));
  V = dense(V);
  lse = dense(lse);
  Tensor grad = empty({logits.size(0), logits.size(1)}, logits.scalar_type());
  cpu::kernels().logits_grad(batch, lse.data_ptr(), static_cast<const double*>(V.data_ptr()),
                             *static_cast<const double*>(scale.data_ptr()), *static_cast<const double*>(ce_scale.data_ptr()),
                             grad.data_ptr(), kThreads);
  return grad;
}

Tensor scalar(double value, ScalarType type) {
  Tensor out = empty({}, type);
  if (type == ScalarType::Double) {
    *static_cast<double*>(out.data_ptr()) = value;
  } else {
    *static_cast<float*>(out.data_ptr()) = static_cast<float>(value);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor target, std::optional<Tensor> sample_weight,
                                                                int64_t ignore_index, std::string absent, double eps, bool normalize,
                                                                double cross_entropy_weight, std::string input, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2, "ldmi_fast: logits must be a matrix");
  const int64_t C = logits.size(1), kept = gradient ? C : 0;
  const cpu::Batch batch = batch_of(logits, target, sample_weight, C, ignore_index, input);
  const cpu::LossOptions options{strict_of(absent), eps, normalize, cross_entropy_weight};
  Tensor S = empty({C, C}, ScalarType::Double), n = empty({C}, ScalarType::Double), V = empty({kept, kept}, ScalarType::Double);
  Tensor lse = empty({batch.logits.rows}, compute_type(logits));
  double* s = static_cast<double*>(S.data_ptr());
  const double* weights = static_cast<const double*>(n.data_ptr());
  double ce = 0;
  cpu::kernels().joint(batch, s, static_cast<double*>(n.data_ptr()), lse.data_ptr(), &ce, kThreads);
  const cpu::Determinant det =
      cpu::kernels().logdet_inverse(s, weights, C, options.strict, gradient ? static_cast<double*>(V.data_ptr()) : nullptr, kThreads);
  const cpu::Loss loss = cpu::combine(det, cpu::total_weight(batch, weights), ce, options);
  return {scalar(loss.loss, compute_type(logits)), lse, V, scalar(loss.scale, ScalarType::Double),
          scalar(loss.ce_scale, ScalarType::Double)};
}

std::tuple<Tensor, Tensor> fused(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, int64_t ignore_index,
                                 std::string absent, double eps, bool normalize, double cross_entropy_weight, std::string input) {
  STD_TORCH_CHECK(target.dim() == 1 && logits.dim() == 2, "ldmi_fast: fused takes logits [N, C] and class indices [N]");
  const cpu::Batch batch = batch_of(logits, target, sample_weight, logits.size(1), ignore_index, input);
  Tensor grad = empty({logits.size(0), logits.size(1)}, logits.scalar_type());
  const double loss =
      cpu::kernels().fused(batch, {strict_of(absent), eps, normalize, cross_entropy_weight}, grad.data_ptr(), kThreads);
  return {scalar(loss, compute_type(logits)), grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ldmi_fast, CPU, m) {
  m.impl("joint", TORCH_BOX(&joint));
  m.impl("logdet_inverse", TORCH_BOX(&logdet_inverse));
  m.impl("logits_grad", TORCH_BOX(&logits_grad));
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("fused", TORCH_BOX(&fused));
}

}  // namespace ldmi
