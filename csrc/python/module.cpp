// ldmi_fast._C: what Python asks of the compiled code besides the ops, which register themselves when this module is loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/kernels.h"
#ifdef LDMI_CUDA_BUILD
#include "../cuda/device.h"
#endif
#include "../plan/cuda_plan.h"
#include "../plan/plan.h"

namespace py = pybind11;

#ifdef LDMI_CUDA_BUILD
namespace ldmi {
bool cuda_torch();  // csrc/torch/ops_cuda.cpp
}
#endif

namespace {

py::dict shown(const ldmi::plan::Plan& plan) {
  py::dict out;
  out["kernels"] = plan.kernels;
  out["regime"] = plan.regime;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["reason"] = plan.reason;
  return out;
}

}  // namespace

// What the functions keep is made once, behind std::call_once and the initialisation of statics: free-threaded Python needs no lock.
#if PYBIND11_VERSION_HEX >= 0x020D0000
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(_C, m) {
#endif
  m.doc() = "Compiled kernels of ldmi_fast: plans and build information. The ops are in torch.ops.ldmi_fast.";
  m.def(
      "plan",
      [](int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs) {
        return shown(ldmi::plan::cpu(rows, classes, labels, soft, value_bytes, probs));
      },
      py::arg("rows"), py::arg("classes"), py::arg("labels"), py::arg("soft"), py::arg("value_bytes"), py::arg("probs"),
      "The plan of the CPU engine for N rows, C classes and K labels: kernels, regime, workspace_bytes, reason.");
  m.def(
      "cuda_plan",
      [](int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, int sms, int64_t smem_block,
         int64_t smem_sm, int64_t l2, int capability, bool cooperative, int clusters) {
        return shown(ldmi::plan::cuda(rows, classes, labels, soft, value_bytes, probs,
                                      {sms, smem_block, smem_sm, l2, capability, cooperative, clusters}));
      },
      py::arg("rows"), py::arg("classes"), py::arg("labels"), py::arg("soft"), py::arg("value_bytes"), py::arg("probs"),
      py::arg("sms"), py::arg("smem_block"), py::arg("smem_sm"), py::arg("l2"), py::arg("capability"), py::arg("cooperative"),
      py::arg("clusters"),
      "The plan of the CUDA engine on a device with these limits: multiprocessors, bytes of shared memory of a block and of a "
      "multiprocessor, bytes of L2 cache, compute capability times 10, whether it takes cooperative grids, and how many clusters of 8 "
      "blocks, "
      "a multiprocessor each, run at once.");
#ifdef LDMI_CUDA_BUILD
  m.def("cuda_torch", &ldmi::cuda_torch, "Whether the torch that is loaded has CUDA, so that its current stream can be asked for.");
  m.def(
      "cuda_limits",
      [](int device) {
        const ldmi::plan::DeviceLimits& limits = ldmi::cuda::limits_of(device);
        return py::make_tuple(limits.sms, limits.smem_block, limits.smem_sm, limits.l2, limits.capability, limits.cooperative,
                              limits.clusters);
      },
      py::arg("device"), "The limits of a CUDA device, in the order in which cuda_plan takes them.");
#endif
  m.def(
      "cuda_fused_limits", [] { return py::make_tuple(ldmi::plan::kCudaFusedElements, ldmi::plan::kCudaFusedClasses); },
      "(N * C, C): on a CUDA device the loss and its gradient come from one launch up to both of these.");
  m.def(
      "fused_limits", [] { return py::make_tuple(ldmi::plan::kFusedElements, ldmi::plan::kFusedRowsPerClass); },
      "(N * C, N / C): the loss and its gradient come from one call up to either of these.");
  m.attr("cuda_archs") = LDMI_CUDA_ARCHS;  // what the CUDA kernels are built for, or "none"
  m.def(
      "build_info",
      [] {
        py::dict out;
        out["version"] = LDMI_VERSION;
        out["compiler"] = LDMI_COMPILER;
        out["torch"] = LDMI_TORCH_VERSION;
        out["cuda"] = LDMI_CUDA_VERSION;
        out["cuda_archs"] = LDMI_CUDA_ARCHS;
        out["isa"] = ldmi::cpu::kernels().isa;
        return out;
      },
      "How this module was built (version, compiler, torch, cuda, cuda_archs) and the instruction set that runs here (isa).");
}
