// Launchers of the convolution between batch norms, in training: forward and input gradient.
//
// On tensor cores everything happens inside the convolution kernel. What those do not serve (float32 above all) is
// composed of the plain convolution and the elementwise passes, with the activation or the gradient in scratch memory.
#include "conv_launch.h"
#include "reduce.cuh"

namespace resnext::cuda {
namespace {

template <typename T>
cudaError_t launch_forward(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                           const Affine& prologue, const Weight& weight, void* z, float* mean, float* var) {
  Partial partial;
  const auto status =
      try_tensor_cores<T, Pass::kForward>(shape, dtype, context, x, weight, z, ForwardFusion<T>{prologue, nullptr},
                                          mean != nullptr ? &partial : nullptr, {});
  if (status.has_value()) {
    return *status != cudaSuccess || mean == nullptr
               ? *status
               : launch_merge_moments(partial, shape.out_channels, context, mean, var);
  }
  if (prologue.given()) {
    const ImageShape image = input_image(shape);
    T* const activation = context.scratch.allocate_array<T>(image.elements());
    const cudaError_t error = launch_affine_add_relu(image, dtype, context, x, prologue, nullptr, Affine{}, activation);
    if (error != cudaSuccess) {
      return error;
    }
    x = activation;
  }
  const cudaError_t error = launch_fwd(shape, dtype, context, x, weight, nullptr, z);
  return error != cudaSuccess || mean == nullptr ? error
                                                 : launch_statistics(output_image(shape), dtype, context, z, mean, var);
}

template <typename T>
cudaError_t launch_input_gradient(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                                  const StatisticsGradients& statistics, const Weight& weight, const void* x,
                                  const Affine& prologue, void* dx, float* dscale, float* dshift) {
  Partial partial;
  const GradientFusion<T> fusion{statistics, static_cast<const T*>(x), prologue, nullptr};
  const auto status = try_tensor_cores<T, Pass::kDgrad>(shape, dtype, context, dz, weight, dx, fusion,
                                                        prologue.given() ? &partial : nullptr, {statistics.z, x});
  if (status.has_value()) {
    float* const sums[] = {dshift, dscale};
    return *status != cudaSuccess || !prologue.given()
               ? *status
               : launch_sum_planes(partial, sums, shape.in_channels, context.stream);
  }
  if (statistics.given()) {
    const ImageShape image = output_image(shape);
    T* const gradient = context.scratch.allocate_array<T>(image.elements());
    const cudaError_t error = launch_statistics_bwd(image, dtype, context, dz, statistics, gradient);
    if (error != cudaSuccess) {
      return error;
    }
    dz = gradient;
  }
  if (!prologue.given()) {
    return launch_dgrad(shape, dtype, context, dz, weight, dx);
  }
  // In float32, so that dx is rounded once.
  const ImageShape image = input_image(shape);
  float* const gradient = context.scratch.allocate_array<float>(image.elements());
  const cudaError_t error = launch_direct_conv<T, Pass::kDgrad>(shape, context, dz, weight, gradient, PlainFusion<T>{});
  return error != cudaSuccess
             ? error
             : launch_affine_add_relu_bwd(image, dtype, context, gradient, /*wide_dout=*/true, nullptr, x, prologue,
                                          nullptr, Affine{}, {dx, nullptr, dshift, dscale, nullptr});
}

}  // namespace

cudaError_t launch_conv_stats_fwd(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                                  const Affine& prologue, const Weight& weight, void* z, float* mean, float* var) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto element) {
    return launch_forward<decltype(element)>(shape, dtype, context, x, prologue, weight, z, mean, var);
  });
}

cudaError_t launch_conv_stats_dgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                                    const StatisticsGradients& statistics, const Weight& weight, const void* x,
                                    const Affine& prologue, void* dx, float* dscale, float* dshift) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto element) {
    return launch_input_gradient<decltype(element)>(shape, dtype, context, dz, statistics, weight, x, prologue, dx,
                                                    dscale, dshift);
  });
}

}  // namespace resnext::cuda
