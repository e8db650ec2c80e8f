// Weight gradient of any grouped 3x3 convolution on the CUDA cores.
//
// dw[o, i, r, s] = sum over pixels p of grad[p, o] * x[p*stride + (r, s) - 1, i]. A block computes the 9 taps of 32
// output channels (lane = channel) x 1 input channel of their groups over its split of the output rows; its 8 warps
// take rows in turn and their sums are added in warp order. Bytes: grad is read once per input channel of a group, x
// once per output channel, mostly from L2.
//
// reduce.cuh sums the splits in a fixed order: the result is the same bit for bit on every call.
#pragma once

#include "../shape.h"
#include "device.cuh"

namespace resnext::cuda {

constexpr int kDirectWgradWarps = 8;

// partial (splits, 3, 3, C_out, C_in/groups)
template <typename T>
__global__ void __launch_bounds__(kDirectWgradWarps* kWarpSize, 2)
    direct_wgrad_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partial,
                        GroupedConvShape shape, int splits) {
  constexpr int kTaps = 9;
  __shared__ float sums[kDirectWgradWarps][kTaps][kWarpSize];

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t group_in = shape.in_channels / shape.groups;
  const int64_t group_out = shape.out_channels / shape.groups;
  const int64_t channel_blocks = (shape.out_channels + kWarpSize - 1) / kWarpSize;
  const int64_t out_channel = blockIdx.x % channel_blocks * kWarpSize + lane;
  const int64_t in_local = blockIdx.x / channel_blocks % group_in;
  const int64_t split = blockIdx.x / channel_blocks / group_in;
  const bool valid = out_channel < shape.out_channels;
  const int64_t in_channel = valid ? out_channel / group_out * group_in + in_local : 0;

  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const int out_width = static_cast<int>(shape.out_width), stride_w = static_cast<int>(shape.stride_w);
  const int64_t rows = shape.batch * shape.out_height;
  const int64_t last = rows * (split + 1) / splits;
  float acc[kTaps] = {};
  for (int64_t row = rows * split / splits + warp; valid && row < last; row += kDirectWgradWarps) {
    const T* grad_pixel = grad + row * shape.out_width * shape.out_channels + out_channel;
    const int top = static_cast<int>(row % shape.out_height * shape.stride_h) - 1;
    const T* x_rows[3];  // null: outside the image
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const int64_t x_row = row / shape.out_height * shape.height + top + r;
      const bool inside = top + r >= 0 && top + r < height;
      x_rows[r] = inside ? x + x_row * shape.width * shape.in_channels + in_channel : nullptr;
    }
    for (int col = 0; col < out_width; ++col, grad_pixel += shape.out_channels) {
      const float g = static_cast<float>(*grad_pixel);
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const int w = col * stride_w + s - 1;
        const int64_t offset = w * shape.in_channels;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (x_rows[r] != nullptr && w >= 0 && w < width) {
            acc[r * 3 + s] += g * static_cast<float>(x_rows[r][offset]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    sums[warp][tap][lane] = acc[tap];
  }
  __syncthreads();
  if (!valid) {
    return;
  }
  for (int tap = warp; tap < kTaps; tap += kDirectWgradWarps) {
    float sum = 0.0f;
    for (int w = 0; w < kDirectWgradWarps; ++w) {
      sum += sums[w][tap][lane];
    }
    partial[((split * kTaps + tap) * shape.out_channels + out_channel) * group_in + in_local] = sum;
  }
}

}  // namespace resnext::cuda
