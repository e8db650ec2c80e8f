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

// Where the scalars of a weight (rows, columns, 3, 3) are: tap by tap in each column (OIHW), or column by column in
// each tap (OHWI).
struct WeightOrder {
  int columns, column, tap;

  __host__ __device__ WeightOrder(int columns, bool channels_last)
      : columns(columns), column(channels_last ? 1 : 9), tap(channels_last ? columns : 1) {}

  __host__ __device__ int64_t index(int64_t r, int c, int t) const { return r * columns * 9 + c * column + t * tap; }
};

}  // namespace resnext::cuda
