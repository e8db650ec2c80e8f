// The CUDA operators of the grouped convolution, plain, in training between batch norms, and for inference.
#include "../grouped_conv.h"
#include "../operators.h"
#include "operator.h"

namespace resnext::cuda {
namespace {

void grouped_conv2d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                        int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_fwd(x, weight, bias, out, stride_h, stride_w, groups, channels_last);
  const Call call(x);
  Output target(out, channels_last);
  STD_CUDA_CHECK(launch_fwd(shape, kernel_dtype(x), call, to_nhwc(x).const_data_ptr(), weight_of(weight), data(bias),
                            target.data()));
  target.store();
}

void grouped_conv2d_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& out, int64_t stride_h,
                          int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_dgrad(grad, weight, out, stride_h, stride_w, groups, channels_last);
  const Call call(grad);
  Output target(out, channels_last);
  STD_CUDA_CHECK(
      launch_dgrad(shape, kernel_dtype(grad), call, to_nhwc(grad).const_data_ptr(), weight_of(weight), target.data()));
  target.store();
}

void grouped_conv2d_wgrad(const Tensor& grad, const Tensor& x, const Tensor& out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_wgrad(grad, x, out, stride_h, stride_w, groups, channels_last);
  const Call call(grad);
  STD_CUDA_CHECK(launch_wgrad(shape, kernel_dtype(grad), call, to_nhwc(grad).const_data_ptr(),
                              to_nhwc(x).const_data_ptr(), weight_result(out)));
}

void conv_stats_fwd(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                    const OptionalTensor& shift, const Tensor& weight, const Tensor& z, const OptionalTensor& mean,
                    const OptionalTensor& var, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape =
      check_conv_stats_fwd(x, center, scale, shift, weight, z, mean, var, stride_h, stride_w, groups, channels_last);
  const Call call(x);
  Output target(z, channels_last);
  STD_CUDA_CHECK(launch_conv_stats_fwd(shape, kernel_dtype(x), call, to_nhwc(x).const_data_ptr(),
                                       affine_of(center, scale, shift), weight_of(weight), target.data(),
                                       mutable_vector_data(mean), mutable_vector_data(var)));
  target.store();
}

void conv_stats_dgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                      const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& weight,
                      const OptionalTensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, const Tensor& dx, const OptionalTensor& dscale,
                      const OptionalTensor& dshift, const OptionalTensor& onto, int64_t stride_h, int64_t stride_w,
                      int64_t groups, bool channels_last) {
  const GroupedConvShape shape =
      check_conv_stats_dgrad(dz, z, mean, dmean, dvar, weight, x, center, scale, shift, dx, dscale, dshift, onto,
                             stride_h, stride_w, groups, channels_last);
  const Call call(dz);
  const OptionalTensor z_nhwc = to_nhwc(z);
  Output target(dx, channels_last);
  STD_CUDA_CHECK(launch_conv_stats_dgrad(shape, kernel_dtype(dz), call, to_nhwc(dz).const_data_ptr(),
                                         statistics_of(z_nhwc, mean, dmean, dvar), weight_of(weight), data(to_nhwc(x)),
                                         affine_of(center, scale, shift), target.data(), mutable_vector_data(dscale),
                                         mutable_vector_data(dshift)));
  target.store();
}

void conv_stats_wgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                      const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& x,
                      const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift,
                      const Tensor& dw, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_conv_stats_wgrad(dz, z, mean, dmean, dvar, x, center, scale, shift, dw, stride_h,
                                                        stride_w, groups, channels_last);
  const Call call(dz);
  const OptionalTensor z_nhwc = to_nhwc(z);
  STD_CUDA_CHECK(launch_conv_stats_wgrad(shape, kernel_dtype(dz), call, to_nhwc(dz).const_data_ptr(),
                                         statistics_of(z_nhwc, mean, dmean, dvar), to_nhwc(x).const_data_ptr(),
                                         affine_of(center, scale, shift), weight_result(dw)));
}

void conv_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& packed, const OptionalTensor& scale,
                 const OptionalTensor& shift, const OptionalTensor& residual, bool relu, const Tensor& y,
                 int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape =
      check_conv_affine(x, weight, packed, scale, shift, residual, y, stride_h, stride_w, groups, channels_last);
  const Call call(x);
  Output target(y, channels_last);
  STD_CUDA_CHECK(launch_conv_affine(shape, kernel_dtype(x), call, to_nhwc(x).const_data_ptr(), weight_of(weight),
                                    affine_of(std::nullopt, scale, shift), data(to_nhwc(residual)), relu,
                                    target.data()));
  target.store();
}

}  // namespace

void add_convolutions(Operators& operators) {
  operators.grouped_conv2d_fwd = &grouped_conv2d_fwd;
  operators.grouped_conv2d_dgrad = &grouped_conv2d_dgrad;
  operators.grouped_conv2d_wgrad = &grouped_conv2d_wgrad;
  operators.conv_stats_fwd = &conv_stats_fwd;
  operators.conv_stats_dgrad = &conv_stats_dgrad;
  operators.conv_stats_wgrad = &conv_stats_wgrad;
  operators.conv_affine = &conv_affine;
}

}  // namespace resnext::cuda
