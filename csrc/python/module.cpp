// ldmi_fast._C: what Python asks of the compiled code besides the ops, which register themselves when this module is loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/kernels.h"
#include "../plan/plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ldmi_fast: plans and build information. The ops are in torch.ops.ldmi_fast.";
  m.def(
      "plan",
      [](int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs) {
        const ldmi::plan::Plan plan = ldmi::plan::cpu(rows, classes, labels, soft, value_bytes, probs);
        py::dict out;
        out["kernels"] = plan.kernels;
        out["regime"] = plan.regime;
        out["workspace_bytes"] = plan.workspace_bytes;
        out["reason"] = plan.reason;
        return out;
      },
      py::arg("rows"), py::arg("classes"), py::arg("labels"), py::arg("soft"), py::arg("value_bytes"), py::arg("probs"),
      "The plan of the CPU engine for N rows, C classes and K labels: kernels, regime, workspace_bytes, reason.");
  m.def(
      "fused_limits", [] { return py::make_tuple(ldmi::plan::kFusedElements, ldmi::plan::kFusedRowsPerClass); },
      "(N * C, N / C): the loss and its gradient come from one call up to either of these.");
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
