// Launchers of the stem's max pool.
#include "channel_launch.h"
#include "max_pool.cuh"
#include "reduce.cuh"

namespace resnext::cuda {
namespace {

ImageShape pooled_shape(const ImageShape& shape) {
  return {shape.batch, shape.channels, (shape.height - 1) / 2 + 1, (shape.width - 1) / 2 + 1, shape.channels_last};
}

PoolShape pool_shape(const ImageShape& shape, const ImageShape& pooled) {
  return {shape.channels, shape.height, shape.width, pooled.height, pooled.width, shape.channels_last};
}

}  // namespace

cudaError_t launch_affine_relu_max_pool(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                        const Affine& affine, void* out, uint8_t* taps) {
  const ImageShape pooled = pooled_shape(shape);
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, false>(pooled, {z, out, taps}, [&](auto layout) {
      using Layout = decltype(layout);
      const MaxPoolJob<T, Layout::kWidth, Layout::kAcross> job{
          {}, static_cast<const T*>(z), affine, static_cast<T*>(out), taps, pool_shape(shape, pooled)};
      return launch_job(job, pooled, context, nullptr);
    });
  });
}

cudaError_t launch_affine_relu_max_pool_bwd(const ImageShape& shape, Dtype dtype, const Context& context,
                                            const void* dout, const uint8_t* taps, const void* z, const Affine& affine,
                                            void* dz, float* dscale, float* dshift) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, false>(shape, {dout, taps, z, dz}, [&](auto layout) {
      using Layout = decltype(layout);
      const MaxPoolGradJob<T, Layout::kWidth, Layout::kAcross> job{
          {}, static_cast<const T*>(dout), taps, static_cast<const T*>(z), affine, static_cast<T*>(dz),
          pool_shape(shape, pooled_shape(shape))};
      float* const sums[] = {dshift, dscale};
      Partial partial;
      const cudaError_t error = launch_job(job, shape, context, dshift != nullptr ? &partial : nullptr);
      if (error != cudaSuccess || dshift == nullptr) {
        return error;
      }
      return launch_sum_planes(partial, sums, shape.channels, context.stream);
    });
  });
}

}  // namespace resnext::cuda
