// LDMI_EVERYWHERE goes before a function that both the CPU's compiler and nvcc compile, the latter for host and device.
#pragma once

#ifdef __CUDACC__
#define LDMI_EVERYWHERE __host__ __device__
#else
#define LDMI_EVERYWHERE
#endif
