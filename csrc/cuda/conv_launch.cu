// Launchers of the forward and of the input gradient: the tensor-core kernel where it fits, else the direct one.
#include "direct_conv.cuh"
#include "launch.h"
#include "strip_plan.h"
#include "tensor_core_conv.cuh"

namespace resnext::cuda {
namespace {

struct Operands {
  const void* source;
  const void* weight;
  const void* bias;
  void* out;
};

template <typename T, Pass kPass>
cudaError_t launch_direct(const GroupedConvShape& shape, const Operands& operands, cudaStream_t stream) {
  constexpr bool kDgrad = kPass == Pass::kDgrad;
  const auto axis = [](int64_t size) { return static_cast<int>(size); };
  GatherShape gather{};
  gather.out_height = axis(kDgrad ? shape.height : shape.out_height);
  gather.out_width = axis(kDgrad ? shape.width : shape.out_width);
  gather.out_channels = axis(kDgrad ? shape.in_channels : shape.out_channels);
  gather.out_group = axis(kDgrad ? shape.group_in() : shape.group_out());
  gather.source_height = axis(kDgrad ? shape.out_height : shape.height);
  gather.source_width = axis(kDgrad ? shape.out_width : shape.width);
  gather.source_channels = axis(kDgrad ? shape.out_channels : shape.in_channels);
  gather.source_group = axis(kDgrad ? shape.group_out() : shape.group_in());
  gather.pixels = shape.batch * gather.out_height * gather.out_width;
  gather.stride_h = static_cast<int>(shape.stride_h);
  gather.stride_w = static_cast<int>(shape.stride_w);
  const int64_t blocks =
      ceil_div(gather.out_channels, kDirectChannels) * ceil_div(gather.pixels, kDirectPixels);
  return launch(direct_conv_kernel<T, kDgrad>, blocks, kDirectThreads, DynamicShared{}, stream,
                static_cast<const T*>(operands.source), static_cast<const T*>(operands.weight),
                static_cast<const T*>(operands.bias), static_cast<T*>(operands.out), gather);
}

template <typename T, Pass kPass, int kStride>
cudaError_t launch_tensor_cores(const GroupedConvShape& shape, const Device& device, const Operands& operands,
                                cudaStream_t stream) {
  using Rows = RowAxis<kPass, kStride>;
  using Cols = ColAxis<kPass, kStride>;
  const int group_width = static_cast<int>(shape.group_in());
  const bool packed = group_width <= kTile;
  TensorCoreConvShape problem{};
  problem.channels = static_cast<int>(shape.in_channels);
  problem.group_width = group_width;
  problem.slab_channels = group_width > kPackedSlabChannels ? group_width
                                                            : kPackedSlabChannels / group_width * group_width;
  problem.slabs = static_cast<int>(ceil_div(problem.channels, problem.slab_channels));

  // Fewer output tiles per block until weights and source rows fit into shared memory.
  const int slab_tiles = problem.slab_channels / kTile;
  for (problem.part_tiles = std::min(slab_tiles, kMaxWarps); problem.part_tiles >= 1; problem.part_tiles /= 2) {
    problem.parts = static_cast<int>(ceil_div(slab_tiles, problem.part_tiles));
    const int64_t blocks_per_unit = int64_t{problem.slabs} * problem.parts;
    problem.grid = make_strip_grid<Rows, Cols>(
        shape, kPass == Pass::kDgrad, blocks_per_unit,
        int64_t{device.multiprocessors} * kConvBlocksPerMultiprocessor<kPass, kStride>);
    const int64_t rows_bytes =
        int64_t{Rows::inputs + Rows::advance} * problem.grid.pixels * pixel_pitch(problem.slab_channels);
    const int64_t weights_bytes =
        packed ? 0 : int64_t{problem.part_tiles} * (group_width / kTile) * kTapCount * kWarpSize * sizeof(WeightTile);
    const int64_t bytes = weights_bytes + std::max<int64_t>(rows_bytes, problem.part_tiles * kStagedWeightBytes);
    const int threads = problem.part_tiles * kWarpSize;
    const int64_t resident = resident_blocks(device, bytes, kConvBlocksPerMultiprocessor<kPass, kStride>);
    if (resident == 0 || problem.slab_channels / 8 > threads || problem.grid.units > INT32_MAX) {
      continue;
    }
    // One wave of blocks, so that each lays out its weights once.
    problem.splits = static_cast<int>(
        std::clamp<int64_t>(device.multiprocessors * resident / blocks_per_unit, 1, problem.grid.units));
    return launch(packed ? tensor_core_conv_kernel<T, kPass, kStride, true>
                         : tensor_core_conv_kernel<T, kPass, kStride, false>,
                  blocks_per_unit * problem.splits, threads, dynamic_shared(device, bytes), stream,
                  static_cast<const T*>(operands.source), static_cast<const T*>(operands.weight),
                  static_cast<const T*>(operands.bias), static_cast<T*>(operands.out), problem);
  }
  return launch_direct<T, kPass>(shape, operands, stream);
}

template <typename T, Pass kPass>
cudaError_t launch_16_bit(const GroupedConvShape& shape, Dtype dtype, const Device& device, const Operands& operands,
                          cudaStream_t stream) {
  if (!tensor_cores_serve(shape, dtype, device) || !aligned(operands.source, 16) || !aligned(operands.weight, 16) ||
      !aligned(operands.out, sizeof(PackedChannels))) {
    return launch_direct<T, kPass>(shape, operands, stream);
  }
  return shape.stride_h == 1 ? launch_tensor_cores<T, kPass, 1>(shape, device, operands, stream)
                             : launch_tensor_cores<T, kPass, 2>(shape, device, operands, stream);
}

template <Pass kPass>
cudaError_t launch_conv(const GroupedConvShape& shape, Dtype dtype, const Device& device, const Operands& operands,
                        cudaStream_t stream) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  switch (dtype) {
    case Dtype::kHalf:
      return launch_16_bit<Half, kPass>(shape, dtype, device, operands, stream);
    case Dtype::kBFloat16:
      return launch_16_bit<BFloat16, kPass>(shape, dtype, device, operands, stream);
    default:
      return launch_direct<float, kPass>(shape, operands, stream);
  }
}

}  // namespace

cudaError_t launch_fwd(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* x,
                       const void* weight, const void* bias, void* out, cudaStream_t stream) {
  return launch_conv<Pass::kForward>(shape, dtype, device, {x, weight, bias, out}, stream);
}

cudaError_t launch_dgrad(const GroupedConvShape& shape, Dtype dtype, const Device& device, const void* grad,
                         const void* weight, void* out, cudaStream_t stream) {
  return launch_conv<Pass::kDgrad>(shape, dtype, device, {grad, weight, nullptr, out}, stream);
}

}  // namespace resnext::cuda
