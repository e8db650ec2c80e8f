// Launchers of batch norm's statistics, of affine-add-ReLU and of their gradients.
#include "channel_launch.h"
#include "reduce.cuh"

namespace resnext::cuda {
namespace {

constexpr int kMomentLanes = 8;
constexpr int kMomentRows = 64;
constexpr int kMomentsAtOnce = 4;

// Thread row y merges splits y, y + 64, ..., of which a few are on their way at once; then the rows are merged.
__global__ void __launch_bounds__(kMomentRows* kMomentLanes)
    merge_moments_kernel(const float* __restrict__ partial, float* __restrict__ mean, float* __restrict__ var,
                         int64_t channels, int splits) {
  constexpr int kPlanes = Moments<1>::kPlanes;
  const int row = threadIdx.x / kMomentLanes;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kMomentLanes + threadIdx.x % kMomentLanes;
  Moments<1> moments = {};
  for (int first = row; first < splits && channel < channels; first += kMomentsAtOnce * kMomentRows) {
    float planes[kMomentsAtOnce][kPlanes];
#pragma unroll
    for (int i = 0; i < kMomentsAtOnce; ++i) {
      const int split = first + i * kMomentRows;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        planes[i][p] =
            split < splits ? partial[(static_cast<int64_t>(split) * kPlanes + p) * channels + channel] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kMomentsAtOnce; ++i) {
      moments.merge({planes[i][0], {planes[i][1]}, {planes[i][2]}});
    }
  }
  merge_rows<kMomentRows * kMomentLanes>(moments, row, kMomentRows, kMomentLanes);
  if (row == 0 && channel < channels) {
    mean[channel] = moments.mean[0];
    var[channel] = moments.squares[0] / moments.count;
  }
}

}  // namespace

cudaError_t launch_merge_moments(const Partial& partial, int64_t channels, const Context& context, float* mean,
                                 float* var) {
  return launch(merge_moments_kernel, ceil_div(channels, kMomentLanes), kMomentRows * kMomentLanes, DynamicShared{},
                context.stream, partial.values, mean, var, channels, partial.splits);
}

cudaError_t launch_statistics(const ImageShape& shape, Dtype dtype, const Context& context, const void* z, float* mean,
                              float* var) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, true>(shape, {z}, [&](auto layout) {
      using Layout = decltype(layout);
      const StatisticsJob<T, Layout::kWidth, Layout::kAcross> job{{}, static_cast<const T*>(z)};
      Partial partial;
      const cudaError_t error = launch_job(job, shape, context, &partial);
      return error != cudaSuccess ? error : launch_merge_moments(partial, shape.channels, context, mean, var);
    });
  });
}

cudaError_t launch_statistics_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dz,
                                  const StatisticsGradients& statistics, void* g) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, true>(shape, {dz, statistics.z, g}, [&](auto layout) {
      using Layout = decltype(layout);
      const StatisticsGradJob<T, Layout::kWidth, Layout::kAcross> job{
          {}, static_cast<const T*>(dz), statistics, static_cast<T*>(g)};
      return launch_job(job, shape, context, nullptr);
    });
  });
}

cudaError_t launch_affine_add_relu(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                   const Affine& affine, const void* residual, const Affine& residual_affine,
                                   void* out) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, true>(shape, {z, residual, out}, [&](auto layout) {
      using Layout = decltype(layout);
      const AffineAddReluJob<T, Layout::kWidth, Layout::kAcross> job{
          {}, static_cast<const T*>(z), affine, static_cast<const T*>(residual), residual_affine, static_cast<T*>(out)};
      return launch_job(job, shape, context, nullptr);
    });
  });
}

namespace {

template <typename T, typename Grad>
cudaError_t launch_add_relu_grad(const ImageShape& shape, const Context& context, const void* dout, const void* out,
                                 const void* z, const Affine& affine, const void* residual,
                                 const Affine& residual_affine, const AffineAddReluGrads& grads) {
  const auto tensors = {
      dout, out, z, residual, static_cast<const void*>(grads.dz), static_cast<const void*>(grads.dresidual)};
  return with_layout<T, true>(shape, tensors, [&](auto layout) {
    using Layout = decltype(layout);
    const AffineAddReluGradJob<T, Layout::kWidth, Layout::kAcross, Grad> job{{},
                                                                             static_cast<const Grad*>(dout),
                                                                             static_cast<const T*>(out),
                                                                             static_cast<const T*>(z),
                                                                             affine,
                                                                             static_cast<const T*>(residual),
                                                                             residual_affine,
                                                                             static_cast<T*>(grads.dz),
                                                                             static_cast<T*>(grads.dresidual)};
    float* const sums[] = {grads.dshift, grads.dscale, grads.dresidual_scale};
    const bool sums_wanted = std::any_of(std::begin(sums), std::end(sums), [](float* sum) { return sum != nullptr; });
    Partial partial;
    const cudaError_t error = launch_job(job, shape, context, sums_wanted ? &partial : nullptr);
    if (error != cudaSuccess || !sums_wanted) {
      return error;
    }
    return launch_sum_planes(partial, sums, shape.channels, context.stream);
  });
}

}  // namespace

cudaError_t launch_affine_add_relu_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dout,
                                       bool wide_dout, const void* out, const void* z, const Affine& affine,
                                       const void* residual, const Affine& residual_affine,
                                       const AffineAddReluGrads& grads) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto grad) {
      return launch_add_relu_grad<T, decltype(grad)>(shape, context, dout, out, z, affine, residual, residual_affine,
                                                     grads);
    };
    return wide_dout ? run(float{}) : run(T{});
  });
}

}  // namespace resnext::cuda
