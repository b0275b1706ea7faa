// All of csrc/simt: what a file with kernels and their launchers includes.
#pragma once

#include "device.cuh"
#include "launch.cuh"
#include "mma.cuh"
