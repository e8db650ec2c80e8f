// The ordered second stage of sums: the partial results of the splits, added in the same order on every call, so that
// results repeat bit for bit.
#pragma once

#include "launch.h"

namespace resnext::cuda {

// Few elements have many splits: a block takes few, and its loads do not wait for each other.
constexpr int kSumLanes = 8;
constexpr int kSumRows = 32;
constexpr int kSumsAtOnce = 4;

// keep(e, sum over splits of partial[split, e]): thread row y adds splits y, y + 32, ..., then the rows are added in
// order.
template <typename Keep>
__global__ void __launch_bounds__(kSumRows* kSumLanes)
    sum_splits_kernel(const float* __restrict__ partial, Keep keep, int64_t elements, int splits) {
  __shared__ float sums[kSumRows][kSumLanes];
  const int lane = threadIdx.x % kSumLanes;
  const int row = threadIdx.x / kSumLanes;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kSumLanes + lane;
  float sum = 0.0f;
  for (int first = row; first < splits && element < elements; first += kSumsAtOnce * kSumRows) {
    float values[kSumsAtOnce];
#pragma unroll
    for (int i = 0; i < kSumsAtOnce; ++i) {
      const int split = first + i * kSumRows;
      values[i] = split < splits ? partial[split * elements + element] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSumsAtOnce; ++i) {
      sum += values[i];
    }
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && element < elements) {
    sum = 0.0f;
    for (int r = 0; r < kSumRows; ++r) {
      sum += sums[r][lane];
    }
    keep(element, sum);
  }
}

template <typename Keep>
cudaError_t launch_sum_splits(const Partial& partial, const Keep& keep, int64_t elements, cudaStream_t stream) {
  return launch(sum_splits_kernel<Keep>, ceil_div(elements, kSumLanes), kSumRows * kSumLanes, DynamicShared{}, stream,
                partial.values, keep, elements, partial.splits);
}

// out[s] (channels) from totals' planes s (batch_norm.cuh); null: not wanted.
template <int kSums>
struct KeepPlanes {
  float* out[kSums];
  int64_t channels;

  __device__ __forceinline__ void operator()(int64_t element, float sum) const {
    float* plane = nullptr;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {  // indexed by a constant: an index in a register needs memory
      plane = element / channels == s ? out[s] : plane;
    }
    if (plane != nullptr) {
      plane[element % channels] = sum;
    }
  }
};

template <int kSums>
cudaError_t launch_sum_planes(const Partial& partial, float* const (&out)[kSums], int64_t channels,
                              cudaStream_t stream) {
  KeepPlanes<kSums> keep{{}, channels};
  for (int s = 0; s < kSums; ++s) {
    keep.out[s] = out[s];
  }
  return launch_sum_splits(partial, keep, kSums * channels, stream);
}

}  // namespace resnext::cuda
