// The ops on the CPU. ldmi_fast/ops.py defines their schemas.

#include "ops.h"

#include "../plan/plan.h"

namespace ldmi {
namespace {

const Place kHere{aoti_torch_device_type_cpu(), 0};

const cpu::Threads kThreads{[](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}};

std::tuple<Tensor, Tensor, Tensor, Tensor> joint(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, int64_t num_labels,
                                                 int64_t ignore_index, std::string input) {
  const cpu::Batch batch = batch_of(logits, target, sample_weight, num_labels, ignore_index, input);
  Tensor S = empty({num_labels, batch.logits.columns}, ScalarType::Double, kHere);
  Tensor n = empty({num_labels}, ScalarType::Double, kHere);
  Tensor lse = empty({batch.logits.rows}, compute_type(logits), kHere);
  Tensor ce = empty({}, ScalarType::Double, kHere);
  cpu::kernels().joint(batch, static_cast<double*>(S.data_ptr()), static_cast<double*>(n.data_ptr()), lse.data_ptr(),
                       static_cast<double*>(ce.data_ptr()), kThreads);
  return {S, n, lse, ce};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logdet_inverse(Tensor S, Tensor n, std::string absent) {
  const bool strict = strict_of(absent);
  const Factors f(S, n);
  const int64_t C = f.C;
  const auto one = [&, s = static_cast<const double*>(f.S.data_ptr()), weights = static_cast<const double*>(f.n.data_ptr()),
                    v = static_cast<double*>(f.V.data_ptr()), l = static_cast<double*>(f.log_abs_det.data_ptr()),
                    g = static_cast<double*>(f.sign.data_ptr()), k = static_cast<int64_t*>(f.kept.data_ptr())](int64_t i) {
    const cpu::Determinant found = cpu::kernels().logdet_inverse(s + i * C * C, weights + i * C, C, strict, v + i * C * C, kThreads);
    l[i] = found.log_abs_det;
    g[i] = found.sign;
    k[i] = found.kept;
  };
  // small matrices take one thread each; larger ones all threads, one after another
  if (!plan::cpu_logdet_inverse(C).parallel) {
    cpu::for_each_task(kThreads, f.count, one);
  } else {
    for (int64_t i = 0; i < f.count; ++i) one(i);
  }
  return f.results();
}

Tensor logits_grad(Tensor logits, Tensor target, std::optional<Tensor> sample_weight, Tensor lse, Tensor V, Tensor scale,
                   Tensor ce_scale, int64_t ignore_index, std::string input) {
  check_gradient(logits, lse, V, scale, ce_scale);
  const cpu::Batch batch = batch_of(logits, target, sample_weight, V.size(0), ignore_index, input);
  STD_TORCH_CHECK(target.dim() == 1 || V.size(0) == V.size(1) || *static_cast<const double*>(ce_scale.data_ptr()) == 0,
                  "ldmi_fast: the cross entropy of soft targets needs one column for each of ", V.size(1), " classes, target has ",
                  V.size(0));
  V = dense(V);
  lse = dense(lse);
  Tensor grad = empty({logits.size(0), logits.size(1)}, logits.scalar_type(), kHere);
  cpu::kernels().logits_grad(batch, lse.data_ptr(), static_cast<const double*>(V.data_ptr()),
                             *static_cast<const double*>(scale.data_ptr()), *static_cast<const double*>(ce_scale.data_ptr()),
                             grad.data_ptr(), kThreads);
  return grad;
}

Tensor scalar(double value, ScalarType type) {
  Tensor out = empty({}, type, kHere);
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
  const cpu::LossOptions options = options_of(absent, eps, normalize, cross_entropy_weight);
  Tensor S = empty({C, C}, ScalarType::Double, kHere), n = empty({C}, ScalarType::Double, kHere),
         V = empty({kept, kept}, ScalarType::Double, kHere);
  Tensor lse = empty({batch.logits.rows}, compute_type(logits), kHere);
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
  Tensor grad = empty({logits.size(0), logits.size(1)}, logits.scalar_type(), kHere);
  const double loss = cpu::kernels().fused(batch, options_of(absent, eps, normalize, cross_entropy_weight), grad.data_ptr(), kThreads);
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
