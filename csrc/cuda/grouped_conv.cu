// The CUDA operators: PyTorch's tensors, device, stream and allocator around the launchers of launch.h.
//
// The kernels work in NHWC. An NCHW call is served by a layout change before and after, which costs one more read and
// write of each tensor and spares every kernel a second form.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../grouped_conv.h"
#include "launch.h"

namespace resnext::cuda {
namespace {

using torch::headeronly::MemoryFormat;

Dtype kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat;  // check_dtype leaves no other
  }
}

Device current_device(int index) {
  int multiprocessors = 0, shared_memory = 0, capability = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
  return {multiprocessors, shared_memory, capability >= 8};
}

cudaStream_t current_stream(int device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor to_nhwc(const Tensor& tensor) { return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast); }

Tensor to_oihw(const Tensor& weight) { return torch::stable::contiguous(weight, MemoryFormat::Contiguous); }

// The tensor the kernels fill: `out` itself if it has the layout they write, else one that store() copies into it.
class Output {
 public:
  Output(const Tensor& out, bool has_layout, MemoryFormat layout)
      : out_(out),
        target_(has_layout ? out
                           : torch::stable::empty(out.sizes(), out.scalar_type(), std::nullopt, out.device(),
                                                  std::nullopt, layout)),
        copy_(!has_layout) {}

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

void grouped_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out,
                        int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_fwd(x, weight, bias, out, stride_h, stride_w, groups, channels_last);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x_nhwc = to_nhwc(x);
  Output target(out, channels_last, MemoryFormat::ChannelsLast);
  STD_CUDA_CHECK(launch_fwd(shape, kernel_dtype(x), current_device(device), x_nhwc.const_data_ptr(),
                            to_oihw(weight).const_data_ptr(), bias.has_value() ? bias->const_data_ptr() : nullptr,
                            target.data(), current_stream(device)));
  target.store();
}

void grouped_conv2d_dgrad(const Tensor& grad, const Tensor& weight, Tensor out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_dgrad(grad, weight, out, stride_h, stride_w, groups, channels_last);
  const int device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor grad_nhwc = to_nhwc(grad);
  Output target(out, channels_last, MemoryFormat::ChannelsLast);
  STD_CUDA_CHECK(launch_dgrad(shape, kernel_dtype(grad), current_device(device), grad_nhwc.const_data_ptr(),
                              to_oihw(weight).const_data_ptr(), target.data(), current_stream(device)));
  target.store();
}

void grouped_conv2d_wgrad(const Tensor& grad, const Tensor& x, Tensor out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_wgrad(grad, x, out, stride_h, stride_w, groups, channels_last);
  const int index = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Tensor grad_nhwc = to_nhwc(grad), x_nhwc = to_nhwc(x);
  const Dtype dtype = kernel_dtype(grad);
  const Device device = current_device(index);
  const WgradPlan plan = plan_wgrad(shape, dtype, device, grad_nhwc.const_data_ptr(), x_nhwc.const_data_ptr());
  Output target(out, out.is_contiguous(), MemoryFormat::Contiguous);
  const Tensor workspace = torch::stable::new_empty(out, {plan.workspace_elements}, ScalarType::Float);
  STD_CUDA_CHECK(launch_wgrad(shape, dtype, device, plan, grad_nhwc.const_data_ptr(), x_nhwc.const_data_ptr(),
                              static_cast<float*>(workspace.mutable_data_ptr()), target.data(), current_stream(index)));
  target.store();
}

}  // namespace
}  // namespace resnext::cuda

STABLE_TORCH_LIBRARY_IMPL(resnext_C, CUDA, m) {
  m.impl("grouped_conv2d_fwd", TORCH_BOX(&resnext::cuda::grouped_conv2d_fwd));
  m.impl("grouped_conv2d_dgrad", TORCH_BOX(&resnext::cuda::grouped_conv2d_dgrad));
  m.impl("grouped_conv2d_wgrad", TORCH_BOX(&resnext::cuda::grouped_conv2d_wgrad));
}
