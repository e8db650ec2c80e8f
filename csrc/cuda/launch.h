// Launchers of the CUDA kernels. Tensors are raw device pointers, not null unless it says so; those of convolutions are
// in NHWC order. Nothing here needs PyTorch, so that the same launchers run on the emulated device of
// tests/cuda_emulation.
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

// Device memory for the length of one operator, aligned for any vector load.
class Scratch {
 public:
  virtual void* allocate(int64_t bytes) = 0;

  template <typename T>
  T* allocate_array(int64_t elements) {
    return static_cast<T*>(allocate(elements * static_cast<int64_t>(sizeof(T))));
  }

 protected:
  ~Scratch() = default;
};

struct Context {
  Device device;
  Scratch& scratch;
  cudaStream_t stream;
};

// scale * (v - center) + shift, one float32 per channel each. Null stands for center 0, scale 1, shift 0.
struct Affine {
  const float *center, *scale, *shift;

  __host__ __device__ bool given() const { return scale != nullptr; }
};

// What a gradient dz of a raw output z still lacks: the part that comes through the statistics of z.
struct StatisticsGradients {
  const void* z;  // null: nothing is lacking
  const float *mean, *dmean, *dvar;
  float count;  // elements per channel

  __host__ __device__ bool given() const { return z != nullptr; }
};

// Images (N, C, H, W) of the elementwise passes, in either layout.
struct ImageShape {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t area() const { return height * width; }
  int64_t elements() const { return batch * channels * area(); }
};

// A weight (C_out, C_in/groups, 3, 3), dense in OIHW order or, channels_last, in OHWI order.
struct Weight {
  const void* data;
  bool channels_last;
};

struct WeightResult {
  void* data;
  bool channels_last;
};

inline ImageShape input_image(const GroupedConvShape& shape) {
  return {shape.batch, shape.in_channels, shape.height, shape.width, /*channels_last=*/true};
}

inline ImageShape output_image(const GroupedConvShape& shape) {
  return {shape.batch, shape.out_channels, shape.out_height, shape.out_width, /*channels_last=*/true};
}

// out (N, H_out, W_out, C_out) from x (N, H, W, C_in), weight and bias (C_out) or null.
cudaError_t launch_fwd(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                       const Weight& weight, const void* bias, void* out);

// out (N, H, W, C_in) from grad (N, H_out, W_out, C_out) and weight.
cudaError_t launch_dgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* grad,
                         const Weight& weight, void* out);

// out (C_out, C_in/groups, 3, 3) from grad (N, H_out, W_out, C_out) and x (N, H, W, C_in).
cudaError_t launch_wgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* grad,
                         const void* x, const WeightResult& out);

// y = relu?(affine(conv(x, weight)) + residual); residual may be null, the affine has no center.
cudaError_t launch_conv_affine(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                               const Weight& weight, const Affine& affine, const void* residual, bool relu, void* y);

// z = conv(relu(prologue(x)), weight) with mean and var (C_out), both or neither null. No prologue: x as it is.
cudaError_t launch_conv_stats_fwd(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                                  const Affine& prologue, const Weight& weight, void* z, float* mean, float* var);

// dx and, with a prologue, dscale and dshift (C_in); x is read only with a prologue.
cudaError_t launch_conv_stats_dgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                                    const StatisticsGradients& statistics, const Weight& weight, const void* x,
                                    const Affine& prologue, void* dx, float* dscale, float* dshift);

cudaError_t launch_conv_stats_wgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                                    const StatisticsGradients& statistics, const void* x, const Affine& prologue,
                                    const WeightResult& dw);

cudaError_t launch_statistics(const ImageShape& shape, Dtype dtype, const Context& context, const void* z, float* mean,
                              float* var);

// Partial results of a tensor's splits, float32, of which a second stage makes one: totals (splits, planes, channels).
struct Partial {
  float* values;
  int splits;
};

// mean and biased variance (channels) from the planes of Moments.
cudaError_t launch_merge_moments(const Partial& partial, int64_t channels, const Context& context, float* mean,
                                 float* var);

// g = dz with what comes through the statistics.
cudaError_t launch_statistics_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dz,
                                  const StatisticsGradients& statistics, void* g);

// out = relu(affine(z) + residual_affine(residual)); residual may be null.
cudaError_t launch_affine_add_relu(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                   const Affine& affine, const void* residual, const Affine& residual_affine,
                                   void* out);

struct AffineAddReluGrads {  // null: not wanted
  void *dz, *dresidual;
  float *dshift, *dscale, *dresidual_scale;
};

// dout is of dtype, or float32 if wide_dout. out null: what forward makes of z without a residual; residual null: none
// with an affine.
cudaError_t launch_affine_add_relu_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dout,
                                       bool wide_dout, const void* out, const void* z, const Affine& affine,
                                       const void* residual, const Affine& residual_affine,
                                       const AffineAddReluGrads& grads);

// Channel attention. act is relu if `relu`, else nothing; mean, gate, dgate and added are (N, C). A residual's affine,
// where it has one, is given with its values.
cudaError_t launch_affine_mean(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                               const Affine& affine, bool relu, float* mean);

cudaError_t launch_affine_gate(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                               const Affine& affine, bool relu, const float* gate, const void* residual,
                               const Affine& residual_affine, void* out);

struct GateGrads {  // null, all but dgate: not wanted
  float* dgate;
  void* dresidual;
  float *dresidual_scale, *dresidual_shift;
};

// out null: there was no residual; residual null: none with an affine.
cudaError_t launch_affine_gate_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dout,
                                   const void* out, const void* z, const Affine& affine, bool relu,
                                   const void* residual, const Affine& residual_affine, const GateGrads& grads);

struct GatedGradient {  // gate * (dout where out, if there is one, is above zero) + added; either term may be null
  const void *dout, *out;
  const float *gate, *added;
};

// dscale and dshift may be null.
cudaError_t launch_gated_affine_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                    const Affine& affine, bool relu, const GatedGradient& gradient, void* dz,
                                    float* dscale, float* dshift);

// 3x3, stride 2, padding 1: out and taps (N, C, (H - 1) / 2 + 1, (W - 1) / 2 + 1); taps may be null.
cudaError_t launch_affine_relu_max_pool(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                        const Affine& affine, void* out, uint8_t* taps);

// dz, or dscale and dshift, may be null.
cudaError_t launch_affine_relu_max_pool_bwd(const ImageShape& shape, Dtype dtype, const Context& context,
                                            const void* dout, const uint8_t* taps, const void* z, const Affine& affine,
                                            void* dz, float* dscale, float* dshift);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls run(T{}) with the element type that dtype names.
template <typename Run>
cudaError_t with_element(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kHalf:
      return run(Half{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace resnext::cuda
