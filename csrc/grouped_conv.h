// Builds the GroupedConvShape of a call from its tensors, and refuses what the kernels do not serve.
#pragma once

#include "checks.h"
#include "shape.h"

namespace resnext {

// The kernel size of a weight: 1 for the 1x1 convolutions that CPU kernels serve, else 3, which the checks insist on.
inline int64_t kernel_of(const Tensor& weight, int64_t groups, bool channels_last) {
  const bool pointwise = weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1;
  return pointwise && groups == 1 && channels_last ? 1 : 3;
}

inline GroupedConvShape make_shape(const char* op, const Sizes4& x, int64_t out_channels, int64_t stride_h,
                                   int64_t stride_w, int64_t groups, bool channels_last, int64_t kernel) {
  STD_TORCH_CHECK((stride_h == 1 || stride_h == 2) && (stride_w == 1 || stride_w == 2), op,
                  ": expected strides of 1 or 2, got (", stride_h, ", ", stride_w, "); use the torch backend");
  STD_TORCH_CHECK(groups >= 1 && x[1] % groups == 0 && out_channels % groups == 0, op,
                  ": expected groups that divide both channel counts, got groups=", groups, " for ", x[1],
                  " input and ", out_channels, " output channels; change groups");
  GroupedConvShape shape{};
  shape.batch = x[0];
  shape.in_channels = x[1];
  shape.out_channels = out_channels;
  shape.height = x[2];
  shape.width = x[3];
  shape.out_height = (x[2] - 1) / stride_h + 1;
  shape.out_width = (x[3] - 1) / stride_w + 1;
  shape.groups = groups;
  shape.stride_h = stride_h;
  shape.stride_w = stride_w;
  shape.channels_last = channels_last;
  shape.kernel = kernel;
  return shape;
}

inline Sizes4 input_sizes(const GroupedConvShape& shape) {
  return {shape.batch, shape.in_channels, shape.height, shape.width};
}

inline Sizes4 output_sizes(const GroupedConvShape& shape) {
  return {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
}

inline Sizes4 weight_sizes(const GroupedConvShape& shape) {
  return {shape.out_channels, shape.group_in(), shape.kernel, shape.kernel};
}

// Forward: out (N, C_out, H_out, W_out) from x (N, C_in, H, W), weight (C_out, C_in/groups, 3, 3) and bias (C_out).
inline GroupedConvShape check_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                                  int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last,
                                  const char* op = "grouped_conv2d", int64_t kernel = 3) {
  const Checks check(op);
  check.dtype(x, "input");
  const GroupedConvShape shape = make_shape(op, check.sizes4(x, "input"),
                                            check.sizes4(weight, "weight", "(C_out, C_in/groups, k, k)")[0], stride_h,
                                            stride_w, groups, channels_last, kernel);
  check.sizes(weight, "weight", weight_sizes(shape));
  check.weight_like(weight, "weight", x, "input");
  check.dense(x, "input", channels_last);
  check.image(out, "output", output_sizes(shape), x, "input", channels_last);
  if (bias.has_value()) check.vector(*bias, "bias", shape.out_channels, x.scalar_type(), x, "input");
  return shape;
}

// Gradient of the input: out (N, C_in, H, W) from grad (N, C_out, H_out, W_out) and weight (C_out, C_in/groups, 3, 3).
inline GroupedConvShape check_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& out, int64_t stride_h,
                                    int64_t stride_w, int64_t groups, bool channels_last,
                                    const char* op = "grouped_conv2d", int64_t kernel = 3) {
  const Checks check(op);
  check.dtype(grad, "grad");
  const GroupedConvShape shape =
      make_shape(op, check.sizes4(out, "output"), check.sizes4(grad, "grad", "(N, C_out, H_out, W_out)")[1], stride_h,
                 stride_w, groups, channels_last, kernel);
  check.sizes(grad, "grad", output_sizes(shape));
  check.sizes(weight, "weight", weight_sizes(shape));
  check.weight_like(weight, "weight", grad, "grad");
  check.like(out, "output", grad, "grad");
  check.dense(grad, "grad", channels_last);
  check.dense(out, "output", channels_last);
  return shape;
}

// Gradient of the weight: out (C_out, C_in/groups, 3, 3) from grad (N, C_out, H_out, W_out) and x (N, C_in, H, W).
inline GroupedConvShape check_wgrad(const Tensor& grad, const Tensor& x, const Tensor& out, int64_t stride_h,
                                    int64_t stride_w, int64_t groups, bool channels_last,
                                    const char* op = "grouped_conv2d", int64_t kernel = 3) {
  const Checks check(op);
  check.dtype(grad, "grad");
  const GroupedConvShape shape = make_shape(op, check.sizes4(x, "input"),
                                            check.sizes4(grad, "grad", "(N, C_out, H_out, W_out)")[1], stride_h,
                                            stride_w, groups, channels_last, kernel);
  check.sizes(grad, "grad", output_sizes(shape));
  check.sizes(out, "output", weight_sizes(shape));
  check.like(x, "input", grad, "grad");
  check.weight_like(out, "output", grad, "grad");
  check.dense(grad, "grad", channels_last);
  check.dense(x, "input", channels_last);
  return shape;
}

// The affine map relu(scale * (x - center) + shift) of a convolution's input; returns whether there is one.
inline bool check_prologue(const Checks& check, const Tensor& x, const OptionalTensor& center,
                           const OptionalTensor& scale, const OptionalTensor& shift) {
  check.vector(center, "center", x.size(1), x, "input");
  check.vector(scale, "scale", x.size(1), x, "input");
  check.vector(shift, "shift", x.size(1), x, "input");
  const bool given = check.together({&scale, &shift}, "scale and shift");
  check.given_with(center, "center", given, "scale");
  return given;
}

// The raw output z, its mean and the gradients of its statistics; returns whether there are any.
inline bool check_grad_prologue(const Checks& check, const Tensor& dz, const OptionalTensor& z,
                                const OptionalTensor& mean, const OptionalTensor& dmean, const OptionalTensor& dvar,
                                bool channels_last) {
  const Sizes4 sizes = check.sizes4(dz, "grad");
  if (z.has_value()) check.image(*z, "z", sizes, dz, "grad", channels_last);
  check.vector(mean, "mean", sizes[1], dz, "grad");
  check.vector(dmean, "dmean", sizes[1], dz, "grad");
  check.vector(dvar, "dvar", sizes[1], dz, "grad");
  return check.together({&z, &mean, &dmean, &dvar}, "z, mean, dmean and dvar");
}

inline GroupedConvShape check_conv_stats_fwd(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                                             const OptionalTensor& shift, const Tensor& weight, const Tensor& z,
                                             const OptionalTensor& mean, const OptionalTensor& var, int64_t stride_h,
                                             int64_t stride_w, int64_t groups, bool channels_last,
                                             int64_t kernel = 3) {
  constexpr const char* kOp = "conv_stats";
  const GroupedConvShape shape =
      check_fwd(x, weight, std::nullopt, z, stride_h, stride_w, groups, channels_last, kOp, kernel);
  const Checks check(kOp);
  check_prologue(check, x, center, scale, shift);
  check.vector(mean, "mean", shape.out_channels, x, "input");
  check.vector(var, "var", shape.out_channels, x, "input");
  check.together({&mean, &var}, "mean and var");
  return shape;
}

// With a prologue, the raw input x is needed for ReLU's mask, and dscale and dshift are filled.
inline GroupedConvShape check_conv_stats_dgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                                               const OptionalTensor& dmean, const OptionalTensor& dvar,
                                               const Tensor& weight, const OptionalTensor& x,
                                               const OptionalTensor& center, const OptionalTensor& scale,
                                               const OptionalTensor& shift, const Tensor& dx,
                                               const OptionalTensor& dscale, const OptionalTensor& dshift,
                                               const OptionalTensor& onto, int64_t stride_h, int64_t stride_w,
                                               int64_t groups, bool channels_last, int64_t kernel = 3) {
  constexpr const char* kOp = "conv_stats";
  const GroupedConvShape shape = check_dgrad(dz, weight, dx, stride_h, stride_w, groups, channels_last, kOp, kernel);
  const Checks check(kOp);
  check_grad_prologue(check, dz, z, mean, dmean, dvar, channels_last);
  if (x.has_value()) check.image(*x, "input", input_sizes(shape), dz, "grad", channels_last);
  check_prologue(check, dx, center, scale, shift);
  check.vector(dscale, "dscale", shape.in_channels, dz, "grad");
  check.vector(dshift, "dshift", shape.in_channels, dz, "grad");
  const bool masked = check.together({&x, &scale, &shift, &dscale, &dshift}, "input, scale, shift, dscale and dshift");
  if (onto.has_value()) {
    const bool serves = kernel == 1 && !masked && !dz.is_cuda() && onto->data_ptr() == dx.data_ptr();
    STD_TORCH_CHECK(serves, kOp, ": expected onto with a 1x1 convolution on the CPU, without a prologue, and as its ",
                    "dx, got it with another; add it up");
  }
  return shape;
}

inline GroupedConvShape check_conv_stats_wgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                                               const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& x,
                                               const OptionalTensor& center, const OptionalTensor& scale,
                                               const OptionalTensor& shift, const Tensor& dw, int64_t stride_h,
                                               int64_t stride_w, int64_t groups, bool channels_last,
                                               int64_t kernel = 3) {
  constexpr const char* kOp = "conv_stats";
  const GroupedConvShape shape = check_wgrad(dz, x, dw, stride_h, stride_w, groups, channels_last, kOp, kernel);
  const Checks check(kOp);
  check_grad_prologue(check, dz, z, mean, dmean, dvar, channels_last);
  check_prologue(check, x, center, scale, shift);
  return shape;
}

// `packed`: what pack_pointwise, pack_winograd or pack_filters made of the weight.
inline GroupedConvShape check_conv_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& packed,
                                          const OptionalTensor& scale, const OptionalTensor& shift,
                                          const OptionalTensor& residual, const Tensor& y, int64_t stride_h,
                                          int64_t stride_w, int64_t groups, bool channels_last, int64_t kernel = 3) {
  constexpr const char* kOp = "conv_affine";
  const GroupedConvShape shape =
      check_fwd(x, weight, std::nullopt, y, stride_h, stride_w, groups, channels_last, kOp, kernel);
  const Checks check(kOp);
  check.given_with(packed, "a packed weight", !x.is_cuda(), "tensors on the CPU");
  check.vector(scale, "scale", shape.out_channels, x, "input");
  check.vector(shift, "shift", shape.out_channels, x, "input");
  if (residual.has_value()) check.image(*residual, "residual", output_sizes(shape), x, "input", channels_last);
  return shape;
}

}  // namespace resnext
