// Launchers of the CUDA kernels. Tensors are raw device pointers in NHWC order (weights OIHW); nothing here needs
// PyTorch, so that the same launchers run on the emulated device of tests/cuda_emulation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../shape.h"
#include "device.cuh"

namespace resnext::cuda {

enum class Dtype { kFloat, kHalf, kBFloat16 };

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes one block may use after opting in
  bool tensor_cores;  // mma.m16n8k16 and cp.async: compute capability 8.0 and up
};

// out (N, H_out, W_out, C_out) from x (N, H, W, C_in), weight and bias (C_out) or null.
cudaError_t launch_fwd(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* x,
                       const void* weight, const void* bias, void* out, cudaStream_t stream);

// out (N, H, W, C_in) from grad (N, H_out, W_out, C_out) and weight.
cudaError_t launch_dgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* grad,
                         const void* weight, void* out, cudaStream_t stream);

// How a weight gradient is split over N*H*W: each split sums its part into its own fp32 copy of the weight gradient.
struct WgradPlan {
  bool tensor_cores;
  int splits;
  int64_t workspace_elements;  // float32
};

WgradPlan plan_wgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* grad,
                     const void* x);

// out (C_out, C_in/groups, 3, 3) from grad (N, H_out, W_out, C_out) and x (N, H, W, C_in).
cudaError_t launch_wgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const WgradPlan& plan,
                         const void* grad, const void* x, float* workspace, void* out, cudaStream_t stream);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace resnext::cuda
