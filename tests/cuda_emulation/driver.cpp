// C entry points of the emulated launchers, for ctypes (tests/test_cuda_sources.py).
#include <limits>
#include <vector>

#include "../../csrc/cuda/conv_launch.cu"
#include "../../csrc/cuda/wgrad_launch.cu"

using resnext::GroupedConvShape;
using namespace resnext::cuda;

namespace {

// One multiprocessor: small problems already give a block several units, bands and splits.
Device emulated_device(int shared_memory, bool tensor_cores) { return {1, shared_memory, tensor_cores}; }

}  // namespace

// sizes: batch, in_channels, out_channels, height, width, groups, stride_h, stride_w. dtype: the values of Dtype.
extern "C" {

GroupedConvShape* make_shape(const int64_t* sizes) {
  auto* shape = new GroupedConvShape{};
  shape->batch = sizes[0];
  shape->in_channels = sizes[1];
  shape->out_channels = sizes[2];
  shape->height = sizes[3];
  shape->width = sizes[4];
  shape->groups = sizes[5];
  shape->stride_h = sizes[6];
  shape->stride_w = sizes[7];
  shape->out_height = (shape->height - 1) / shape->stride_h + 1;
  shape->out_width = (shape->width - 1) / shape->stride_w + 1;
  shape->channels_last = true;
  return shape;
}

void free_shape(GroupedConvShape* shape) { delete shape; }

void set_descending_order(int descending) { emulation::set_descending_order(descending != 0); }

int uses_tensor_cores(const GroupedConvShape* shape, int dtype) {
  return tensor_cores_serve(*shape, static_cast<Dtype>(dtype), emulated_device(227 * 1024, true));
}

int emulated_fwd(const GroupedConvShape* shape, int dtype, int shared_memory, int tensor_cores, const void* x,
                 const void* weight, const void* bias, void* out) {
  return launch_fwd(*shape, static_cast<Dtype>(dtype), emulated_device(shared_memory, tensor_cores), x, weight, bias,
                    out, nullptr);
}

int emulated_dgrad(const GroupedConvShape* shape, int dtype, int shared_memory, int tensor_cores, const void* grad,
                   const void* weight, void* out) {
  return launch_dgrad(*shape, static_cast<Dtype>(dtype), emulated_device(shared_memory, tensor_cores), grad, weight,
                      out, nullptr);
}

int emulated_wgrad(const GroupedConvShape* shape, int dtype, int shared_memory, int tensor_cores, const void* grad,
                   const void* x, void* out) {
  const Device device = emulated_device(shared_memory, tensor_cores);
  const WgradPlan plan = plan_wgrad(*shape, static_cast<Dtype>(dtype), device, grad, x);
  std::vector<float> workspace(plan.workspace_elements, std::numeric_limits<float>::quiet_NaN());
  return launch_wgrad(*shape, static_cast<Dtype>(dtype), device, plan, grad, x, workspace.data(), out, nullptr);
}
}
