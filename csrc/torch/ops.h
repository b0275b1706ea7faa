// What the ops of every device share: allocation, and the checks that memory safety needs. It uses LibTorch's stable ABI only, so that
// one build runs on every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

namespace ldmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a tensor, in the numbers of the C shim.
struct Place {
  int32_t type, index;
  bool operator==(const Place&) const = default;
};

inline Place place_of(const Tensor& tensor) {
  Place out{};
  STD_TORCH_CHECK(
      aoti_torch_get_device_type(tensor.get(), &out.type) == 0 && aoti_torch_get_device_index(tensor.get(), &out.index) == 0,
      "ldmi_fast: a tensor without a device");
  return out;
}

// Returns an uninitialised contiguous tensor. It calls the C shim directly: the wrappers in stable/ops.h look up their operator by
// name at every call, which costs more than the whole computation of a small problem.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, Place place) {
  int64_t strides[4];
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                           torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), place.type,
                                           place.index, &handle) == 0,
                  "ldmi_fast: out of memory");
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline cpu::Type type_of(const Tensor& tensor, const char* name) {
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

inline cpu::Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "ldmi_fast: ", name, " must be a matrix, got ", tensor.dim(), " dimensions");
  return {tensor.data_ptr(), type_of(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

inline cpu::Labels labels_of(const Tensor& target) {
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

inline cpu::Batch batch_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& sample_weight, int64_t num_labels,
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
  // an empty tensor has a null address, which elsewhere means that there is no tensor
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

inline bool strict_of(const std::string& absent) {
  STD_TORCH_CHECK(absent == "present" || absent == "strict", "ldmi_fast: absent must be present or strict, got ", absent);
  return absent == "strict";
}

inline cpu::LossOptions options_of(const std::string& absent, double eps, bool normalize, double cross_entropy_weight) {
  return {strict_of(absent), eps, normalize, cross_entropy_weight};
}

inline ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_double(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "ldmi_fast: ", name, " must be float64");
}

// Checks what logits_grad needs besides the batch.
inline void check_gradient(const Tensor& logits, const Tensor& lse, const Tensor& V, const Tensor& scale, const Tensor& ce_scale) {
  check_double(V, "V");
  check_double(scale, "scale");
  check_double(ce_scale, "ce_scale");
  STD_TORCH_CHECK(scale.numel() == 1 && ce_scale.numel() == 1, "ldmi_fast: scale and ce_scale must be scalars");
  STD_TORCH_CHECK(logits.dim() == 2, "ldmi_fast: logits must be a matrix");
  STD_TORCH_CHECK(V.dim() == 2 && V.size(1) == logits.size(1), "ldmi_fast: V must have shape [K, C]");
  STD_TORCH_CHECK(lse.scalar_type() == compute_type(logits) && lse.dim() == 1 && lse.size(0) == logits.size(0),
                  "ldmi_fast: lse must have shape [N] and be float32 (float64 for float64 logits)");
}

// The inputs S [..., C, C] and n [..., C] of logdet_inverse, made dense, and its outputs.
struct Factors {
  Tensor S, n, log_abs_det, sign, kept, V;
  int64_t C, count = 1;
  std::vector<int64_t> batch;

  // Without `inverse`, V is [0, C, C].
  Factors(const Tensor& joint, const Tensor& weights, bool inverse = true) {
    check_double(joint, "S");
    check_double(weights, "n");
    const int64_t dim = joint.dim();
    STD_TORCH_CHECK(dim >= 2 && joint.size(dim - 1) == joint.size(dim - 2), "ldmi_fast: S must have shape [..., C, C]");
    STD_TORCH_CHECK(weights.dim() == dim - 1 && weights.size(dim - 2) == joint.size(dim - 1), "ldmi_fast: n must have shape [..., C]");
    const Place place = place_of(joint);
    STD_TORCH_CHECK(place == place_of(weights), "ldmi_fast: S and n must be on one device");
    C = joint.size(dim - 1);
    for (int64_t d = 0; d < dim - 2; ++d) {
      batch.push_back(joint.size(d));
      count *= joint.size(d);
    }
    S = dense(joint);
    n = dense(weights);
    log_abs_det = empty({count}, ScalarType::Double, place);
    sign = empty({count}, ScalarType::Double, place);
    kept = empty({count}, ScalarType::Long, place);
    V = empty({inverse ? count : 0, C, C}, ScalarType::Double, place);
  }

  // Returns the outputs with the leading dimensions of S, as views.
  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
    const auto shaped = [&](const Tensor& flat, bool matrix) {
      std::vector<int64_t> shape = batch;
      if (matrix) shape.insert(shape.end(), {C, C});
      return batch.size() == 1 ? flat : torch::stable::view(flat, shape);
    };
    return {shaped(log_abs_det, false), shaped(sign, false), shaped(kept, false), shaped(V, true)};
  }
};

}  // namespace ldmi
