// LDMI_EVERYWHERE goes before a function that every compiler takes: inline, and with nvcc for host and device.
#pragma once

#ifdef __CUDACC__
#define LDMI_EVERYWHERE __host__ __device__ __forceinline__
#else
#define LDMI_EVERYWHERE inline
#endif
