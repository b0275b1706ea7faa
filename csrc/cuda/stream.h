// The stream type alone, for code that calls the kernels without compiling them.
#pragma once

#if defined(__CUDACC__) || defined(LDMI_CUDA_BUILD)
struct CUstream_st;
namespace ldmi::simt {
using Stream = CUstream_st*;  // cudaStream_t
}
#else
#include "../simt/launch.cuh"
#endif
