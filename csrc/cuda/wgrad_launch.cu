// Launcher of the weight gradient: the tensor-core kernel where it fits, else the direct one; then the ordered sum.
#include "direct_wgrad.cuh"
#include "launch.h"
#include "strip_plan.h"
#include "tensor_core_wgrad.cuh"

namespace resnext::cuda {
namespace {

template <int kStride>
int64_t shared_bytes(const TensorCoreWgradShape& problem) {
  using Rows = RowAxis<Pass::kForward, kStride>;
  return int64_t{(Rows::inputs + Rows::advance) * problem.grid.pixels + 2 * Rows::outputs * kStripPositions} *
         pixel_pitch(problem.tile_channels);
}

// One wave of blocks: more would only add partial sums. No splits: not even one block fits.
template <int kStride>
TensorCoreWgradShape tensor_core_problem(const GroupedConvShape& shape, const Device& device) {
  TensorCoreWgradShape problem{};
  problem.channels = static_cast<int>(shape.in_channels);
  problem.group_width = static_cast<int>(shape.group_in());
  const bool packed = problem.group_width <= kTile;
  problem.tile_channels = packed ? kPackedSlabChannels : 2 * kTile;
  problem.slab_channels = packed ? kPackedSlabChannels : problem.group_width;
  problem.slabs = static_cast<int>(ceil_div(problem.channels, problem.slab_channels));
  problem.slab_tiles = static_cast<int>(ceil_div(problem.slab_channels, problem.tile_channels));
  const int64_t blocks_per_unit = int64_t{problem.slabs} * problem.slab_tiles * problem.slab_tiles;
  problem.grid = make_strip_grid<RowAxis<Pass::kForward, kStride>, ColAxis<Pass::kForward, kStride>>(
      shape, false, blocks_per_unit, int64_t{device.multiprocessors} * kWgradBlocksPerMultiprocessor);
  const int64_t resident = resident_blocks(device, shared_bytes<kStride>(problem), kWgradBlocksPerMultiprocessor);
  const int64_t splits =
      std::clamp<int64_t>(device.multiprocessors * resident / blocks_per_unit, 1, problem.grid.units);
  problem.splits = resident == 0 ? 0 : static_cast<int>(splits);
  return problem;
}

template <typename T, int kStride>
cudaError_t launch_tensor_cores(const GroupedConvShape& shape, const Device& device, const T* grad, const T* x,
                                float* workspace, cudaStream_t stream) {
  const TensorCoreWgradShape problem = tensor_core_problem<kStride>(shape, device);
  const int64_t blocks = int64_t{problem.slabs} * problem.slab_tiles * problem.slab_tiles * problem.splits;
  return launch(tensor_core_wgrad_kernel<T, kStride>, blocks, kMaxWarps * kWarpSize,
                dynamic_shared(device, shared_bytes<kStride>(problem)), stream, grad, x, workspace, problem);
}

template <typename T>
cudaError_t launch_partials(const GroupedConvShape& shape, const Device& device, const WgradPlan& plan, const T* grad,
                            const T* x, float* workspace, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (plan.tensor_cores) {
      return shape.stride_h == 1 ? launch_tensor_cores<T, 1>(shape, device, grad, x, workspace, stream)
                                 : launch_tensor_cores<T, 2>(shape, device, grad, x, workspace, stream);
    }
  }
  const int64_t blocks = ceil_div(shape.out_channels, kWarpSize) * shape.group_in() * plan.splits;
  return launch(direct_wgrad_kernel<T>, blocks, kDirectWgradWarps * kWarpSize, DynamicShared{}, stream, grad, x,
                workspace, shape, plan.splits);
}

template <typename T>
cudaError_t launch_typed(const GroupedConvShape& shape, const Device& device, const WgradPlan& plan, const void* grad,
                         const void* x, float* workspace, void* out, cudaStream_t stream) {
  const cudaError_t error = launch_partials(shape, device, plan, static_cast<const T*>(grad), static_cast<const T*>(x),
                                            workspace, stream);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t elements = plan.workspace_elements / plan.splits;
  return launch(wgrad_reduce_kernel<T>, ceil_div(elements, kWarpSize), kReduceRows * kWarpSize, DynamicShared{},
                stream, static_cast<const float*>(workspace), static_cast<T*>(out), elements, plan.splits);
}

}  // namespace

WgradPlan plan_wgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* grad,
                     const void* x) {
  WgradPlan plan{};
  if (tensor_cores_serve(shape, dtype, device) && aligned(grad, 16) && aligned(x, 16)) {
    plan.splits = shape.stride_h == 1 ? tensor_core_problem<1>(shape, device).splits
                                      : tensor_core_problem<2>(shape, device).splits;
  }
  plan.tensor_cores = plan.splits > 0;
  if (!plan.tensor_cores) {
    constexpr int64_t kBlocksPerMultiprocessor = 4;
    constexpr int64_t kMinRowsPerSplit = 4 * kDirectWgradWarps;
    const int64_t blocks_per_split = ceil_div(shape.out_channels, kWarpSize) * shape.group_in();
    const int64_t wave = device.multiprocessors * kBlocksPerMultiprocessor;
    const int64_t most = std::max<int64_t>(1, shape.batch * shape.out_height / kMinRowsPerSplit);
    plan.splits = static_cast<int>(std::clamp<int64_t>(ceil_div(wave, blocks_per_split), 1, most));
  }
  plan.workspace_elements = plan.splits * shape.out_channels * shape.group_in() * 9;
  return plan;
}

cudaError_t launch_wgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const WgradPlan& plan,
                         const void* grad, const void* x, float* workspace, void* out, cudaStream_t stream) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  switch (dtype) {
    case Dtype::kHalf:
      return launch_typed<Half>(shape, device, plan, grad, x, workspace, out, stream);
    case Dtype::kBFloat16:
      return launch_typed<BFloat16>(shape, device, plan, grad, x, workspace, out, stream);
    default:
      return launch_typed<float>(shape, device, plan, grad, x, workspace, out, stream);
  }
}

}  // namespace resnext::cuda
