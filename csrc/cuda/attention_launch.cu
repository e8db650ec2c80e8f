// Launchers of channel attention.
#include "attention.cuh"
#include "channel_launch.h"
#include "reduce.cuh"

namespace resnext::cuda {
namespace {

// Of the totals of every split of every image, [split][image][plane][channel]: plane 0 times a factor, (image, channel).
struct KeepFirstPlane {
  float* out;
  int64_t channels, planes;
  float factor;

  __device__ __forceinline__ void operator()(int64_t element, float sum) const {
    const int64_t row = element / channels;
    if (row % planes == 0) {
      out[row / planes * channels + element % channels] = factor * sum;
    }
  }
};

cudaError_t launch_sum_images(const Partial& partial, const ImageShape& shape, int64_t planes, float factor, float* out,
                              cudaStream_t stream) {
  const KeepFirstPlane keep{out, shape.channels, planes, factor};
  const Partial splits{partial.values, static_cast<int>(partial.splits / shape.batch)};
  return launch_sum_splits(splits, keep, shape.batch * planes * shape.channels, stream);
}

}  // namespace

cudaError_t launch_affine_mean(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                               const Affine& affine, bool relu, float* mean) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, true>(shape, {z}, [&](auto layout) {
      using Layout = decltype(layout);
      using Job = MeanJob<T, Layout::kWidth, Layout::kAcross>;
      const Job job{{}, static_cast<const T*>(z), affine, relu};
      Partial partial;
      const cudaError_t error = launch_job(job, shape, context, &partial);
      if (error != cudaSuccess) {
        return error;
      }
      const float factor = 1.0f / static_cast<float>(shape.area());
      return launch_sum_images(partial, shape, Job::Totals::kPlanes, factor, mean, context.stream);
    });
  });
}

cudaError_t launch_affine_gate(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                               const Affine& affine, bool relu, const float* gate, const void* residual,
                               const Affine& residual_affine, void* out) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return with_layout<T, true>(shape, {z, residual, out}, [&](auto layout) {
      using Layout = decltype(layout);
      const GateJob<T, Layout::kWidth, Layout::kAcross> job{{},
                                                            static_cast<const T*>(z),
                                                            affine,
                                                            relu,
                                                            gate,
                                                            static_cast<const T*>(residual),
                                                            residual_affine,
                                                            static_cast<T*>(out)};
      return launch_job(job, shape, context, nullptr);
    });
  });
}

cudaError_t launch_affine_gate_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* dout,
                                   const void* out, const void* z, const Affine& affine, bool relu,
                                   const void* residual, const Affine& residual_affine, const GateGrads& grads) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto tensors = {dout, out, z, residual, static_cast<const void*>(grads.dresidual)};
    return with_layout<T, true>(shape, tensors, [&](auto layout) {
      using Layout = decltype(layout);
      using Job = GateSumsJob<T, Layout::kWidth, Layout::kAcross>;
      const Job job{{},
                    static_cast<const T*>(dout),
                    static_cast<const T*>(out),
                    static_cast<const T*>(z),
                    affine,
                    relu,
                    static_cast<const T*>(residual),
                    residual_affine,
                    static_cast<T*>(grads.dresidual)};
      Partial partial;
      cudaError_t error = launch_job(job, shape, context, &partial);
      if (error == cudaSuccess) {
        error = launch_sum_images(partial, shape, Job::Totals::kPlanes, 1.0f, grads.dgate, context.stream);
      }
      if (error != cudaSuccess || residual == nullptr) {
        return error;
      }
      float* const sums[] = {nullptr, grads.dresidual_shift, grads.dresidual_scale};
      return launch_sum_planes(partial, sums, shape.channels, context.stream);
    });
  });
}

cudaError_t launch_gated_affine_bwd(const ImageShape& shape, Dtype dtype, const Context& context, const void* z,
                                    const Affine& affine, bool relu, const GatedGradient& gradient, void* dz,
                                    float* dscale, float* dshift) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto tensors = {z, gradient.dout, gradient.out, static_cast<const void*>(dz)};
    return with_layout<T, true>(shape, tensors, [&](auto layout) {
      using Layout = decltype(layout);
      const GateGradJob<T, Layout::kWidth, Layout::kAcross> job{{},
                                                                static_cast<const T*>(z),
                                                                affine,
                                                                relu,
                                                                static_cast<const T*>(gradient.dout),
                                                                static_cast<const T*>(gradient.out),
                                                                gradient.gate,
                                                                gradient.added,
                                                                static_cast<T*>(dz)};
      Partial partial;
      const cudaError_t error = launch_job(job, shape, context, dshift == nullptr ? nullptr : &partial);
      if (error != cudaSuccess || dshift == nullptr) {
        return error;
      }
      float* const sums[] = {dshift, dscale};
      return launch_sum_planes(partial, sums, shape.channels, context.stream);
    });
  });
}

}  // namespace resnext::cuda
