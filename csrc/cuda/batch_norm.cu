// The CUDA operators around the convolutions: batch norm's statistics, affine-add-ReLU and the stem's max pool. All of
// them work in the tensors' own layout.
#include "../batch_norm.h"
#include "../operators.h"
#include "operator.h"

namespace resnext::cuda {
namespace {

void statistics(const Tensor& z, const Tensor& mean, const Tensor& var, bool channels_last) {
  check_statistics(z, mean, var, channels_last);
  STD_CUDA_CHECK(launch_statistics(image_shape(z, channels_last), kernel_dtype(z), Call(z), z.const_data_ptr(),
                                   mutable_vector_data(mean), mutable_vector_data(var)));
}

void statistics_bwd(const Tensor& dz, const Tensor& z, const Tensor& mean, const Tensor& dmean, const Tensor& dvar,
                    const Tensor& g, bool channels_last) {
  check_statistics_bwd(dz, z, mean, dmean, dvar, g, channels_last);
  STD_CUDA_CHECK(launch_statistics_bwd(image_shape(z, channels_last), kernel_dtype(z), Call(z), dz.const_data_ptr(),
                                       statistics_of(z, mean, dmean, dvar), g.mutable_data_ptr()));
}

void affine_add_relu(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                     const OptionalTensor& residual, const OptionalTensor& residual_center,
                     const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const Tensor& out,
                     bool channels_last) {
  check_affine_add_relu(z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, out,
                        channels_last);
  STD_CUDA_CHECK(launch_affine_add_relu(
      image_shape(z, channels_last), kernel_dtype(z), Call(z), z.const_data_ptr(), affine_of(center, scale, shift),
      data(residual), affine_of(residual_center, residual_scale, residual_shift), out.mutable_data_ptr()));
}

void affine_add_relu_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z, const OptionalTensor& center,
                         const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                         const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                         const OptionalTensor& dz, const OptionalTensor& dresidual, const OptionalTensor& dscale,
                         const OptionalTensor& dshift, const OptionalTensor& dresidual_scale, bool channels_last) {
  check_affine_add_relu_bwd(dout, out, z, center, scale, shift, residual, residual_center, residual_scale, dz,
                            dresidual, dscale, dshift, dresidual_scale, channels_last);
  const AffineAddReluGrads grads{mutable_data(dz), mutable_data(dresidual), mutable_vector_data(dshift),
                                 mutable_vector_data(dscale), mutable_vector_data(dresidual_scale)};
  STD_CUDA_CHECK(launch_affine_add_relu_bwd(image_shape(z, channels_last), kernel_dtype(z), Call(z),
                                            dout.const_data_ptr(), /*wide_dout=*/false, data(out), z.const_data_ptr(),
                                            affine_of(center, scale, shift), data(residual),
                                            affine_of(residual_center, residual_scale, std::nullopt), grads));
}

void affine_relu_max_pool(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                          const Tensor& out, const OptionalTensor& taps, bool channels_last) {
  check_affine_relu_max_pool(z, center, scale, shift, out, taps, channels_last);
  STD_CUDA_CHECK(launch_affine_relu_max_pool(image_shape(z, channels_last), kernel_dtype(z), Call(z),
                                             z.const_data_ptr(), affine_of(center, scale, shift),
                                             out.mutable_data_ptr(), static_cast<uint8_t*>(mutable_data(taps))));
}

void affine_relu_max_pool_bwd(const Tensor& dout, const Tensor& taps, const Tensor& z, const OptionalTensor& center,
                              const Tensor& scale, const Tensor& shift, const OptionalTensor& dz,
                              const OptionalTensor& dscale, const OptionalTensor& dshift, bool channels_last) {
  check_affine_relu_max_pool_bwd(dout, taps, z, center, scale, shift, dz, dscale, dshift, channels_last);
  STD_CUDA_CHECK(launch_affine_relu_max_pool_bwd(
      image_shape(z, channels_last), kernel_dtype(z), Call(z), dout.const_data_ptr(),
      static_cast<const uint8_t*>(taps.const_data_ptr()), z.const_data_ptr(), affine_of(center, scale, shift),
      mutable_data(dz), mutable_vector_data(dscale), mutable_vector_data(dshift)));
}

}  // namespace

void add_batch_norm(Operators& operators) {
  operators.statistics = &statistics;
  operators.statistics_bwd = &statistics_bwd;
  operators.affine_add_relu = &affine_add_relu;
  operators.affine_add_relu_bwd = &affine_add_relu_bwd;
  operators.affine_relu_max_pool = &affine_relu_max_pool;
  operators.affine_relu_max_pool_bwd = &affine_relu_max_pool_bwd;
}

}  // namespace resnext::cuda
