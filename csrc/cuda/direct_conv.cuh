// Forward and input gradient of any grouped 3x3 convolution on the CUDA cores: float32, and every 16-bit shape that
// tensor_core_conv.cuh does not take.
//
// Both passes are one gather: out[p, o] = epilogue(sum over taps (r, s) and k of source[q(p, r, s), k] * weight), with
// k over the source channels of o's group. Forward: q = p*stride + (r, s) - 1. Input gradient: q = (p + 1 - (r,
// s)) / stride where that divides. A block computes 32 pixels x 32 channels: lane = channel, so that loads and stores
// of NHWC rows coalesce; each warp owns 4 pixels, so that a weight read from shared memory serves 4 products. Weights
// pass through shared memory 8 source channels at a time.
//
// Bytes: every source element is read up to 9 times, but through L1; DRAM sees it about once. Source elements outside
// the image are skipped, not multiplied by zero, and groups never mix: NaN and Inf stay where they belong.
#pragma once

#include "conv_fusion.cuh"

namespace resnext::cuda {

constexpr int kDirectThreads = 256;
constexpr int kDirectChannels = 32;
constexpr int kDirectPixels = 32;

// The convolution as a gather from `source` to `out`, whichever of the two passes it is.
struct GatherShape {
  int64_t pixels;                                    // of out, over the whole batch
  int source_height, source_width, source_channels;  // one axis always fits into 32 bits (launchers check)
  int out_height, out_width, out_channels;
  int source_group, out_group;  // channels per group
  int stride_h, stride_w;
  bool weight_channels_last;
};

// Source coordinate that tap `tap` of output coordinate `out` reads along one axis, or -1, which is also what the
// arithmetic gives before the first pixel.
template <bool kDgrad>
__device__ __forceinline__ int source_coordinate(int out, int tap, int stride, int size) {
  if constexpr (kDgrad) {
    const int scaled = out + 1 - tap;
    if (stride == 2 && scaled % 2 != 0) {
      return -1;
    }
    const int source = stride == 2 ? scaled / 2 : scaled;
    return source < size ? source : -1;
  } else {
    const int source = out * stride + tap - 1;
    return source < size ? source : -1;
  }
}

template <typename T, bool kDgrad, typename Out, typename Fusion>
__global__ void __launch_bounds__(kDirectThreads, 2)
    direct_conv_kernel(const T* __restrict__ source, const T* __restrict__ weight, Out* __restrict__ out, Fusion fusion,
                       GatherShape shape) {
  constexpr int kDepth = 8;  // source channels per pass through shared memory
  constexpr int kTaps = 9;
  constexpr int kWarps = kDirectThreads / kWarpSize;
  constexpr int kPixelsPerWarp = kDirectPixels / kWarps;
  __shared__ float weights[kDepth * kTaps][kDirectChannels + 1];  // + 1: no bank conflicts while filling

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int channel_blocks = (shape.out_channels + kDirectChannels - 1) / kDirectChannels;
  const int first_channel = static_cast<int>(blockIdx.x % channel_blocks) * kDirectChannels;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / channel_blocks) * kDirectPixels + warp;
  const int channel = first_channel + lane;
  const bool channel_valid = channel < shape.out_channels;
  const int source_channel = channel / shape.out_group * shape.source_group;

  int64_t image[kPixelsPerWarp];
  int row[kPixelsPerWarp], col[kPixelsPerWarp];
  float acc[kPixelsPerWarp] = {};
#pragma unroll
  for (int u = 0; u < kPixelsPerWarp; ++u) {
    const int64_t out_row = (first_pixel + u * kWarps) / shape.out_width;
    col[u] = static_cast<int>((first_pixel + u * kWarps) % shape.out_width);
    row[u] = static_cast<int>(out_row % shape.out_height);
    image[u] = out_row / shape.out_height;
  }

  for (int k0 = 0; k0 < shape.source_group; k0 += kDepth) {
    const int depth = shape.source_group - k0 < kDepth ? shape.source_group - k0 : kDepth;
    __syncthreads();
    for (int i = threadIdx.x; i < kDirectChannels * kDepth * kTaps; i += kDirectThreads) {
      const int entry = i % (kDepth * kTaps);
      const int o = first_channel + i / (kDepth * kTaps);
      const int k = k0 + entry / kTaps;
      float value = 0.0f;
      if (o < shape.out_channels && k < shape.source_group) {
        const int weight_row = kDgrad ? o / shape.out_group * shape.source_group + k : o;
        const int weight_col = kDgrad ? o % shape.out_group : k;
        const int weight_cols = kDgrad ? shape.out_group : shape.source_group;
        const WeightOrder order(weight_cols, shape.weight_channels_last);
        value = static_cast<float>(weight[order.index(weight_row, weight_col, entry % kTaps)]);
      }
      weights[entry][i / (kDepth * kTaps)] = value;
    }
    __syncthreads();

    for (int tap = 0; tap < kTaps; ++tap) {
      const T* pixels[kPixelsPerWarp];
#pragma unroll
      for (int u = 0; u < kPixelsPerWarp; ++u) {
        const int h = source_coordinate<kDgrad>(row[u], tap / 3, shape.stride_h, shape.source_height);
        const int w = source_coordinate<kDgrad>(col[u], tap % 3, shape.stride_w, shape.source_width);
        const bool valid = channel_valid && h >= 0 && w >= 0 && first_pixel + u * kWarps < shape.pixels;
        const int64_t pixel = (image[u] * shape.source_height + h) * shape.source_width + w;
        pixels[u] = valid ? source + pixel * shape.source_channels + source_channel + k0 : nullptr;
      }
      for (int k = 0; k < depth; ++k) {
        const float w = weights[k * kTaps + tap][lane];
#pragma unroll
        for (int u = 0; u < kPixelsPerWarp; ++u) {
          if (pixels[u] != nullptr) {
            acc[u] += static_cast<float>(pixels[u][k]) * w;
          }
        }
      }
    }
  }

  if (!channel_valid) {
    return;
  }
  typename Fusion::template Epilogue<1> epilogue(fusion, channel);
  NoTotals none;
#pragma unroll
  for (int u = 0; u < kPixelsPerWarp; ++u) {
    const int64_t pixel = first_pixel + u * kWarps;
    if (pixel < shape.pixels) {
      const int64_t element = pixel * shape.out_channels + channel;
      float value[1] = {acc[u]};
      epilogue.begin(element);
      epilogue(value, epilogue.load_at(0, 0), 0, 0, none);
      out[element] = static_cast<Out>(value[0]);
    }
  }
}

}  // namespace resnext::cuda
