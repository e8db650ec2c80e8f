// The ordered second stage of sums: the partial results of the splits, added in the same order on every call, so that
// results repeat bit for bit.
#pragma once

#include "launch.h"

namespace resnext::cuda {

constexpr int kSumRows = 8;

// out[e, p] = sum over splits of partial[split, p, e], p one of kPlanes: thread row y adds splits y, y + 8, ..., then the
// rows are added in order.
template <int kPlanes, typename T>
__global__ void __launch_bounds__(kSumRows* kWarpSize)
    sum_splits_kernel(const float* __restrict__ partial, T* __restrict__ out, int64_t elements, int splits) {
  __shared__ float sums[kSumRows][kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int row = threadIdx.x / kWarpSize;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  for (int split = row; split < splits && element < elements; split += kSumRows) {
    sum += partial[split * elements + element];
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && element < elements) {
    sum = 0.0f;
    for (int r = 0; r < kSumRows; ++r) {
      sum += sums[r][lane];
    }
    const int64_t plane = elements / kPlanes;
    out[element % plane * kPlanes + element / plane] = static_cast<T>(sum);
  }
}

template <int kPlanes = 1, typename T>
cudaError_t launch_sum_splits(const float* partial, T* out, int64_t elements, int splits, cudaStream_t stream) {
  return launch(sum_splits_kernel<kPlanes, T>, ceil_div(elements, kWarpSize), kSumRows * kWarpSize, DynamicShared{}, stream,
                partial, out, elements, splits);
}

// out[s] (channels) from plane s; null: not wanted.
template <int kSums>
cudaError_t launch_sum_planes(const Partial& partial, float* const (&out)[kSums], int64_t channels,
                              cudaStream_t stream) {
  for (int s = 0; s < kSums; ++s) {
    if (out[s] != nullptr) {
      const float* const plane = partial.values + s * partial.splits * channels;
      const cudaError_t error = launch_sum_splits(plane, out[s], channels, partial.splits, stream);
      if (error != cudaSuccess) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace resnext::cuda
