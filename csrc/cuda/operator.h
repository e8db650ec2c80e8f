// What every CUDA operator does around its launcher: PyTorch's tensors, device, stream and allocator.
//
// The convolution kernels work in NHWC. An NCHW call is served by a layout change before and after, which costs one
// more read and write of each tensor and spares every kernel a second form.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "../checks.h"
#include "launch.h"

namespace resnext::cuda {

using torch::headeronly::MemoryFormat;

inline Dtype kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat;  // Checks::dtype leaves no other
  }
}

// Makes the device of a tensor the current one for as long as it lives, and holds what launchers need of it.
class Call {
 public:
  explicit Call(const Tensor& tensor)
      : guard_(tensor.get_device_index()),
        scratch_(tensor),
        context_{current_device(tensor.get_device_index()), scratch_, current_stream(tensor.get_device_index())} {}

  operator const Context&() const { return context_; }

 private:
  // Freed tensors go back to the allocator of the stream the kernels run on, so they may go before those have run.
  class TensorScratch final : public Scratch {
   public:
    explicit TensorScratch(const Tensor& like) : like_(like) {}

    void* allocate(int64_t bytes) override {
      tensors_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
      return tensors_.back().mutable_data_ptr();
    }

   private:
    Tensor like_;
    std::vector<Tensor> tensors_;
  };

  static Device current_device(int index) {
    int multiprocessors = 0, shared_memory = 0, capability = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
    return {multiprocessors, shared_memory, capability >= 8};
  }

  static cudaStream_t current_stream(int device_index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  TensorScratch scratch_;
  Context context_;
};

inline Tensor to_nhwc(const Tensor& tensor) { return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast); }

inline OptionalTensor to_nhwc(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(to_nhwc(*tensor)) : std::nullopt;
}

// Of a weight that is dense in either order (checked).
inline Weight weight_of(const Tensor& weight) { return {weight.const_data_ptr(), !weight.is_contiguous()}; }

inline WeightResult weight_result(const Tensor& weight) { return {weight.mutable_data_ptr(), !weight.is_contiguous()}; }

inline ImageShape image_shape(const Tensor& z, bool channels_last) {
  return {z.size(0), z.size(1), z.size(2), z.size(3), channels_last};
}

inline const void* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline void* mutable_data(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr;
}

inline const float* vector_data(const OptionalTensor& vector) { return static_cast<const float*>(data(vector)); }

inline float* mutable_vector_data(const OptionalTensor& vector) { return static_cast<float*>(mutable_data(vector)); }

inline Affine affine_of(const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift) {
  return {vector_data(center), vector_data(scale), vector_data(shift)};
}

inline StatisticsGradients statistics_of(const OptionalTensor& z, const OptionalTensor& mean,
                                         const OptionalTensor& dmean, const OptionalTensor& dvar) {
  if (!z.has_value()) {
    return {};
  }
  const auto count = static_cast<float>(z->size(0) * z->size(2) * z->size(3));
  return {z->const_data_ptr(), vector_data(mean), vector_data(dmean), vector_data(dvar), count};
}

// The tensor the kernels fill: `out` itself if it is in NHWC order, else one that store() copies into it.
class Output {
 public:
  Output(const Tensor& out, bool channels_last)
      : out_(out),
        target_(channels_last ? out
                              : torch::stable::empty(out.sizes(), out.scalar_type(), std::nullopt, out.device(),
                                                     std::nullopt, MemoryFormat::ChannelsLast)),
        copy_(!channels_last) {}

  void* data() const { return target_.mutable_data_ptr(); }

  void store() {
    if (copy_) {
      torch::stable::copy_(out_, target_);
    }
  }

 private:
  Tensor out_, target_;
  bool copy_;
};

}  // namespace resnext::cuda
