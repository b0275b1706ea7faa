// ldmi_fast._C: what Python calls in the compiled code besides the ops, which register themselves when this module is loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <type_traits>

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

// Returns a dict with one entry per limit.
[[maybe_unused]] py::dict shown(const ldmi::plan::DeviceLimits& limits) {
  py::dict out;
  ldmi::plan::for_each_limit(limits, [&](const char* name, auto value) { out[name] = value; });
  return out;
}

// Reads the limits from a dict that must have each of them and nothing else.
ldmi::plan::DeviceLimits limits_from(const py::dict& given) {
  ldmi::plan::DeviceLimits limits;
  std::size_t known = 0;
  ldmi::plan::for_each_limit(limits, [&](const char* name, auto& value) {
    if (!given.contains(name)) throw py::value_error(std::string("limits must have ") + name);
    value = py::cast<std::decay_t<decltype(value)>>(given[name]);
    ++known;
  });
  if (given.size() != known) throw py::value_error("limits has unknown entries");
  return limits;
}

py::dict shown(const ldmi::plan::Plan& plan) {
  py::dict out;
  out["kernels"] = plan.kernels;
  out["regime"] = plan.regime;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["reason"] = plan.reason;
  return out;
}

}  // namespace

// All state is initialised once, by std::call_once or as a static variable: free-threaded Python needs no lock.
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
      [](int64_t rows, int64_t classes, int64_t labels, bool soft, int64_t value_bytes, bool probs, const py::dict& limits) {
        return shown(ldmi::plan::cuda(rows, classes, labels, soft, value_bytes, probs, limits_from(limits)));
      },
      py::arg("rows"), py::arg("classes"), py::arg("labels"), py::arg("soft"), py::arg("value_bytes"), py::arg("probs"),
      py::arg("limits"),
      "The plan of the CUDA engine on a device with these limits, a dict: sms (multiprocessors), smem_block and smem_sm (bytes of "
      "shared memory of a block and of a multiprocessor), l2 (bytes of L2 cache), capability (compute capability times 10), "
      "cooperative (whether the device has cooperative grids), clusters (the number of clusters of 8 blocks that run at once, one "
      "block per multiprocessor).");
#ifdef LDMI_CUDA_BUILD
  m.def("cuda_torch", &ldmi::cuda_torch, "Whether the loaded torch has CUDA, so that its current stream can be queried.");
  m.def(
      "cuda_limits", [](int device) { return shown(ldmi::cuda::limits_of(device)); }, py::arg("device"),
      "The limits of a CUDA device, a dict as cuda_plan takes it.");
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
