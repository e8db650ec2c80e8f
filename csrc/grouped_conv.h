// Builds the GroupedConvShape of a call from its tensors, and refuses what the kernels do not serve.
//
// The Python layer guarantees all of this already; the checks stand here because a wrong shape in C++ is a write past
// the end of a buffer. They cost well under a microsecond.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "shape.h"

namespace resnext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes4 = std::array<int64_t, 4>;

namespace detail {

inline std::string format_sizes(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + ")";
}

inline std::string format_sizes(const Tensor& tensor) {
  return format_sizes(tensor.sizes().data(), tensor.dim());
}

inline Sizes4 sizes4(const Tensor& tensor, const char* name, const char* axes) {
  STD_TORCH_CHECK(tensor.dim() == 4, "grouped_conv2d: expected ", name, " with 4 dimensions ", axes, ", got shape ",
                  format_sizes(tensor), "; add or remove dimensions");
  Sizes4 sizes = {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 1, "grouped_conv2d: expected ", name,
                    " with at least one element per dimension, got shape ", format_sizes(tensor),
                    "; handle empty tensors before the kernel");
  }
  return sizes;
}

// Strides of dimensions of size 1 are free, as in torch.Tensor.is_contiguous.
inline void check_dense(const Tensor& tensor, const char* name, bool channels_last) {
  constexpr std::array<int, 4> kOrderNhwc = {1, 3, 2, 0};
  constexpr std::array<int, 4> kOrderNchw = {3, 2, 1, 0};
  int64_t expected = 1;
  for (int dim : channels_last ? kOrderNhwc : kOrderNchw) {
    STD_TORCH_CHECK(tensor.size(dim) == 1 || tensor.stride(dim) == expected, "grouped_conv2d: expected ", name,
                    " dense in ", channels_last ? "channels_last" : "contiguous", " layout, got strides ",
                    format_sizes(tensor.strides().data(), tensor.dim()), " for shape ", format_sizes(tensor),
                    "; call .contiguous(memory_format=torch.",
                    channels_last ? "channels_last" : "contiguous_format", ")");
    expected *= tensor.size(dim);
  }
}

// Weights are small: the kernels read and write them in either layout.
inline void check_dense_either_way(const Tensor& weight, const char* name) {
  check_dense(weight, name, /*channels_last=*/weight.size(1) > 1 && weight.stride(1) == 1);
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "grouped_conv2d: expected ", name, " of the dtype of ",
                  first_name, ", ", toString(first.scalar_type()), ", got ", toString(tensor.scalar_type()),
                  "; cast one of them");
  STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(),
                  "grouped_conv2d: expected ", name, " on the device of ", first_name, ", got another device; move it");
}

inline void check_sizes(const Tensor& tensor, const char* name, const Sizes4& expected) {
  const Sizes4 sizes = sizes4(tensor, name, "");
  STD_TORCH_CHECK(sizes == expected, "grouped_conv2d: expected ", name, " of shape ",
                  format_sizes(expected.data(), 4), ", got ", format_sizes(tensor),
                  "; check channels, groups, stride and image size");
}

inline void check_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "grouped_conv2d: expected ", name, " of dtype Float, Half or BFloat16, got ", toString(dtype),
                  "; cast it or use the torch backend");
}

inline GroupedConvShape make_shape(const Sizes4& x, int64_t out_channels, int64_t stride_h, int64_t stride_w,
                                   int64_t groups, bool channels_last) {
  STD_TORCH_CHECK((stride_h == 1 || stride_h == 2) && (stride_w == 1 || stride_w == 2),
                  "grouped_conv2d: expected strides of 1 or 2, got (", stride_h, ", ", stride_w,
                  "); use the torch backend");
  STD_TORCH_CHECK(groups >= 1 && x[1] % groups == 0 && out_channels % groups == 0,
                  "grouped_conv2d: expected groups that divide both channel counts, got groups=", groups, " for ", x[1],
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
  return shape;
}

inline Sizes4 input_sizes(const GroupedConvShape& shape) {
  return {shape.batch, shape.in_channels, shape.height, shape.width};
}

inline Sizes4 output_sizes(const GroupedConvShape& shape) {
  return {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
}

inline Sizes4 weight_sizes(const GroupedConvShape& shape) {
  return {shape.out_channels, shape.group_in(), 3, 3};
}

}  // namespace detail

// Forward: out (N, C_out, H_out, W_out) from x (N, C_in, H, W), weight (C_out, C_in/groups, 3, 3) and bias (C_out).
inline GroupedConvShape check_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t groups,
                                  bool channels_last) {
  using namespace detail;
  check_dtype(x, "input");
  const GroupedConvShape shape = make_shape(sizes4(x, "input", "(N, C, H, W)"),
                                            sizes4(weight, "weight", "(C_out, C_in/groups, 3, 3)")[0], stride_h,
                                            stride_w, groups, channels_last);
  check_sizes(weight, "weight", weight_sizes(shape));
  check_sizes(out, "output", output_sizes(shape));
  check_like(weight, "weight", x, "input");
  check_like(out, "output", x, "input");
  check_dense(x, "input", channels_last);
  check_dense_either_way(weight, "weight");
  check_dense(out, "output", channels_last);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.out_channels &&
                        (shape.out_channels == 1 || bias->stride(0) == 1),
                    "grouped_conv2d: expected contiguous bias of shape (", shape.out_channels, "), got ",
                    format_sizes(*bias), "; give one value per output channel");
    check_like(*bias, "bias", x, "input");
  }
  return shape;
}

// Gradient of the input: out (N, C_in, H, W) from grad (N, C_out, H_out, W_out) and weight (C_out, C_in/groups, 3, 3).
inline GroupedConvShape check_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& out, int64_t stride_h,
                                    int64_t stride_w, int64_t groups, bool channels_last) {
  using namespace detail;
  check_dtype(grad, "grad");
  const GroupedConvShape shape =
      make_shape(sizes4(out, "output", "(N, C, H, W)"), sizes4(grad, "grad", "(N, C_out, H_out, W_out)")[1], stride_h,
                 stride_w, groups, channels_last);
  check_sizes(grad, "grad", output_sizes(shape));
  check_sizes(weight, "weight", weight_sizes(shape));
  check_like(weight, "weight", grad, "grad");
  check_like(out, "output", grad, "grad");
  check_dense(grad, "grad", channels_last);
  check_dense_either_way(weight, "weight");
  check_dense(out, "output", channels_last);
  return shape;
}

// Gradient of the weight: out (C_out, C_in/groups, 3, 3) from grad (N, C_out, H_out, W_out) and x (N, C_in, H, W).
inline GroupedConvShape check_wgrad(const Tensor& grad, const Tensor& x, const Tensor& out, int64_t stride_h,
                                    int64_t stride_w, int64_t groups, bool channels_last) {
  using namespace detail;
  check_dtype(grad, "grad");
  const GroupedConvShape shape = make_shape(sizes4(x, "input", "(N, C, H, W)"),
                                            sizes4(grad, "grad", "(N, C_out, H_out, W_out)")[1], stride_h, stride_w,
                                            groups, channels_last);
  check_sizes(grad, "grad", output_sizes(shape));
  check_sizes(out, "output", weight_sizes(shape));
  check_like(x, "input", grad, "grad");
  check_like(out, "output", grad, "grad");
  check_dense(grad, "grad", channels_last);
  check_dense(x, "input", channels_last);
  check_dense_either_way(out, "output");
  return shape;
}

}  // namespace resnext
