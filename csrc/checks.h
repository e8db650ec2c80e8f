// Refuses tensors the kernels do not serve, with an error that says what was expected, what came and what to do.
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
#include <initializer_list>
#include <optional>
#include <string>

namespace resnext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes4 = std::array<int64_t, 4>;

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

// The checks of one operator, whose name starts every message.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  const char* op() const { return op_; }

  Sizes4 sizes4(const Tensor& tensor, const char* name, const char* axes = "(N, C, H, W)") const {
    STD_TORCH_CHECK(tensor.dim() == 4, op_, ": expected ", name, " with 4 dimensions ", axes, ", got shape ",
                    format_sizes(tensor), "; add or remove dimensions");
    const Sizes4 sizes = {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 1, op_, ": expected ", name, " with at least one element per dimension, got shape ",
                      format_sizes(tensor), "; handle empty tensors before the kernel");
    }
    return sizes;
  }

  void dtype(const Tensor& tensor, const char* name) const {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op_,
                    ": expected ", name, " of dtype Float, Half or BFloat16, got ", toString(dtype),
                    "; cast it or use the torch backend");
  }

  void sizes(const Tensor& tensor, const char* name, const Sizes4& expected) const {
    STD_TORCH_CHECK(sizes4(tensor, name) == expected, op_, ": expected ", name, " of shape ",
                    format_sizes(expected.data(), 4), ", got ", format_sizes(tensor),
                    "; check channels, groups, stride and image size");
  }

  // Strides of dimensions of size 1 are free, as in torch.Tensor.is_contiguous.
  void dense(const Tensor& tensor, const char* name, bool channels_last) const {
    constexpr std::array<int, 4> kOrderNhwc = {1, 3, 2, 0};
    constexpr std::array<int, 4> kOrderNchw = {3, 2, 1, 0};
    int64_t expected = 1;
    for (int dim : channels_last ? kOrderNhwc : kOrderNchw) {
      STD_TORCH_CHECK(tensor.size(dim) == 1 || tensor.stride(dim) == expected, op_, ": expected ", name, " dense in ",
                      channels_last ? "channels_last" : "contiguous", " layout, got strides ",
                      format_sizes(tensor.strides().data(), tensor.dim()), " for shape ", format_sizes(tensor),
                      "; call .contiguous(memory_format=torch.",
                      channels_last ? "channels_last" : "contiguous_format", ")");
      expected *= tensor.size(dim);
    }
  }

  // Weights are small: the kernels read and write them in either layout.
  void dense_either_way(const Tensor& weight, const char* name) const {
    dense(weight, name, /*channels_last=*/weight.size(1) > 1 && weight.stride(1) == 1);
  }

  void same_dtype(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op_, ": expected ", name, " of the dtype of ",
                    first_name, ", ", toString(first.scalar_type()), ", got ", toString(tensor.scalar_type()),
                    "; cast one of them");
  }

  void same_device(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) const {
    STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), op_,
                    ": expected ", name, " on the device of ", first_name, ", got another device; move it");
  }

  void like(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) const {
    same_dtype(tensor, name, first, first_name);
    same_device(tensor, name, first, first_name);
  }

  // A weight, or its gradient: on the CPU also float32 beside 16-bit images, in whose dtype it is read then.
  void weight_like(const Tensor& weight, const char* name, const Tensor& first, const char* first_name) const {
    const bool wider = weight.scalar_type() == ScalarType::Float && !weight.is_cuda();
    if (!wider) same_dtype(weight, name, first, first_name);
    same_device(weight, name, first, first_name);
    dense_either_way(weight, name);
  }

  // A dense activation of the given sizes, dtype and device.
  void image(const Tensor& tensor, const char* name, const Sizes4& expected, const Tensor& first,
             const char* first_name, bool channels_last) const {
    sizes(tensor, name, expected);
    like(tensor, name, first, first_name);
    dense(tensor, name, channels_last);
  }

  // One value per channel: of the dtype given, contiguous, on the device of `first`.
  void vector(const Tensor& tensor, const char* name, int64_t channels, ScalarType dtype, const Tensor& first,
              const char* first_name) const {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels && (channels == 1 || tensor.stride(0) == 1), op_,
                    ": expected contiguous ", name, " of shape (", channels, "), got ", format_sizes(tensor),
                    "; give one value per channel");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op_, ": expected ", name, " of dtype ", toString(dtype), ", got ",
                    toString(tensor.scalar_type()), "; cast it");
    same_device(tensor, name, first, first_name);
  }

  // As above, in float32, unless there is none.
  void vector(const OptionalTensor& tensor, const char* name, int64_t channels, const Tensor& first,
              const char* first_name) const {
    if (tensor.has_value()) vector(*tensor, name, channels, ScalarType::Float, first, first_name);
  }

  // A tensor that makes sense only with another.
  void given_with(const OptionalTensor& tensor, const char* name, bool other_given, const char* other_name) const {
    STD_TORCH_CHECK(!tensor.has_value() || other_given, op_, ": expected ", other_name, " with ", name,
                    ", got none; give it too");
  }

  // All of these tensors or none; returns whether they are there.
  bool together(std::initializer_list<const OptionalTensor*> tensors, const char* names) const {
    size_t count = 0;
    for (const OptionalTensor* tensor : tensors) count += tensor->has_value() ? 1 : 0;
    STD_TORCH_CHECK(count == 0 || count == tensors.size(), op_, ": expected all of ", names, " or none, got ", count,
                    " of them; give the others too");
    return count != 0;
  }

 private:
  const char* op_;
};

}  // namespace resnext
