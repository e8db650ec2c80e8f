// What the kernels need from the machine: nvcc's own language plus ptx.cuh, or, compiled by an ordinary C++ compiler,
// the emulation of tests/cuda_emulation, which runs the same sources on a CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "cuda_emulation.h"
#endif

namespace resnext::cuda {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kWarpSize = 32;

}  // namespace resnext::cuda
