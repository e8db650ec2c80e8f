// Launchers of the weight gradient, plain and in training between batch norms: the tensor-core kernel where it fits,
// else the direct one (for training, of a gradient and an activation in scratch memory); then the ordered sum.
#include "direct_wgrad.cuh"
#include "reduce.cuh"
#include "strip_plan.h"
#include "tensor_core_wgrad.cuh"

namespace resnext::cuda {
namespace {

int64_t weight_elements(const GroupedConvShape& shape) { return shape.out_channels * shape.group_in() * kTapCount; }

template <int kStride, bool kFused>
int64_t shared_bytes(const TensorCoreWgradShape& problem, int prefetch) {
  using Rows = RowAxis<Pass::kForward, kStride>;
  const int64_t grad_groups = prefetch + 1 + (kFused ? prefetch : 0);
  const int64_t rows =
      int64_t{prefetch + 2} * Rows::advance * problem.grid.pixels + grad_groups * Rows::outputs * kStripPositions;
  const int64_t prologues =
      kFused ? kPrologueBytes<ActivationPrologue<Half>> + kPrologueBytes<StatisticsPrologue<Half>> : 0;
  return rows * pixel_pitch(problem.tile_channels) + problem.tile_channels * prologues;
}

struct TensorCoreWgradPlan {
  TensorCoreWgradShape problem;  // no splits: the kernel does not take it
  int64_t blocks, shared_bytes;
};

template <int kStride, bool kFused>
TensorCoreWgradPlan plan_tensor_core_wgrad(const GroupedConvShape& shape, const Device& device) {
  TensorCoreWgradPlan plan{};
  TensorCoreWgradShape& problem = plan.problem;
  problem.channels = static_cast<int>(shape.in_channels);
  problem.group_width = static_cast<int>(shape.group_in());
  const bool packed = problem.group_width <= kTile;
  problem.tile_channels = packed ? kPackedSlabChannels : 2 * kTile;
  problem.slab_channels = packed ? kPackedSlabChannels : problem.group_width;
  problem.slabs = static_cast<int>(ceil_div(problem.channels, problem.slab_channels));
  problem.slab_tiles = static_cast<int>(ceil_div(problem.slab_channels, problem.tile_channels));
  problem.grid = make_strip_grid<RowAxis<Pass::kForward, kStride>, ColAxis<Pass::kForward, kStride>>(shape, false);
  int64_t resident = 0;
  std::tie(problem.prefetch, plan.shared_bytes, resident) =
      deepest_prefetch(device, kWgradBlocksPerMultiprocessor,
                       [&](int prefetch) { return shared_bytes<kStride, kFused>(problem, prefetch); });
  if (resident > 0 && problem.grid.all_steps <= INT32_MAX) {
    const int64_t blocks_per_split = int64_t{problem.slabs} * problem.slab_tiles * problem.slab_tiles;
    problem.splits = static_cast<int>(splits_of(problem.grid, blocks_per_split, device.multiprocessors * resident));
    plan.blocks = blocks_per_split * problem.splits;
  }
  return plan;
}

Partial allocate_partial(const GroupedConvShape& shape, const Context& context, int splits) {
  return {context.scratch.allocate_array<float>(splits * weight_elements(shape)), splits};
}

template <typename T, int kStride, bool kFused>
std::optional<cudaError_t> launch_tensor_cores(const GroupedConvShape& shape, const Context& context, const void* grad,
                                               const void* x, const WgradPrologues& prologues, Partial* partial) {
  const TensorCoreWgradPlan plan = plan_tensor_core_wgrad<kStride, kFused>(shape, context.device);
  if (plan.problem.splits == 0) {
    return std::nullopt;
  }
  *partial = allocate_partial(shape, context, plan.problem.splits);
  return launch(tensor_core_wgrad_kernel<T, kStride, kFused>, plan.blocks, kMaxWarps * kWarpSize,
                dynamic_shared(context.device, plan.shared_bytes), context.stream, static_cast<const T*>(grad),
                static_cast<const T*>(x), partial->values, prologues, plan.problem);
}

template <typename T, bool kFused>
std::optional<cudaError_t> try_tensor_cores(const GroupedConvShape& shape, Dtype dtype, const Context& context,
                                            const void* grad, const void* x, const WgradPrologues& prologues,
                                            Partial* partial) {
  if constexpr (!std::is_same_v<T, float>) {
    if (tensor_cores_serve(shape, dtype, context.device) && aligned(grad, 16) && aligned(x, 16) &&
        aligned(prologues.grad.z, 16)) {
      return shape.stride_h == 1 ? launch_tensor_cores<T, 1, kFused>(shape, context, grad, x, prologues, partial)
                                 : launch_tensor_cores<T, 2, kFused>(shape, context, grad, x, prologues, partial);
    }
  }
  return std::nullopt;
}

template <typename T>
cudaError_t launch_direct(const GroupedConvShape& shape, const Context& context, const void* grad, const void* x,
                          Partial* partial) {
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  constexpr int64_t kMinRowsPerSplit = 4 * kDirectWgradWarps;
  const int64_t blocks_per_split = ceil_div(shape.out_channels, kWarpSize) * shape.group_in();
  const int64_t wave = context.device.multiprocessors * kBlocksPerMultiprocessor;
  const int64_t most = std::max<int64_t>(1, shape.batch * shape.out_height / kMinRowsPerSplit);
  *partial = allocate_partial(shape, context,
                              static_cast<int>(std::clamp<int64_t>(ceil_div(wave, blocks_per_split), 1, most)));
  return launch(direct_wgrad_kernel<T>, blocks_per_split * partial->splits, kDirectWgradWarps * kWarpSize,
                DynamicShared{}, context.stream, static_cast<const T*>(grad), static_cast<const T*>(x), partial->values,
                shape, partial->splits);
}

// out (C_out, C_in/groups, 3, 3) from partial results of which the taps come first.
template <typename T>
struct KeepWeight {
  T* out;
  WeightOrder order;
  int64_t plane;  // elements of a tap

  __device__ __forceinline__ void operator()(int64_t element, float sum) const {
    const int64_t of_tap = element % plane;
    const int column = static_cast<int>(of_tap % order.columns);
    out[order.index(of_tap / order.columns, column, static_cast<int>(element / plane))] = static_cast<T>(sum);
  }
};

template <typename T>
cudaError_t launch_sum(const GroupedConvShape& shape, const Context& context, const Partial& partial,
                       const WeightResult& out) {
  const int64_t elements = weight_elements(shape);
  const WeightOrder order(static_cast<int>(shape.group_in()), out.channels_last);
  return launch_sum_splits(partial, KeepWeight<T>{static_cast<T*>(out.data), order, elements / kTapCount}, elements,
                           context.stream);
}

template <typename T>
cudaError_t launch_composed(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                            const StatisticsGradients& statistics, const void* x, const Affine& prologue,
                            const WeightResult& dw) {
  if (statistics.given()) {
    const ImageShape image = output_image(shape);
    T* const gradient = context.scratch.allocate_array<T>(image.elements());
    const cudaError_t error = launch_statistics_bwd(image, dtype, context, dz, statistics, gradient);
    if (error != cudaSuccess) {
      return error;
    }
    dz = gradient;
  }
  if (prologue.given()) {
    const ImageShape image = input_image(shape);
    T* const activation = context.scratch.allocate_array<T>(image.elements());
    const cudaError_t error = launch_affine_add_relu(image, dtype, context, x, prologue, nullptr, Affine{}, activation);
    if (error != cudaSuccess) {
      return error;
    }
    x = activation;
  }
  return launch_wgrad(shape, dtype, context, dz, x, dw);
}

}  // namespace

cudaError_t launch_wgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* grad,
                         const void* x, const WeightResult& out) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    Partial partial;
    const auto status = try_tensor_cores<T, false>(shape, dtype, context, grad, x, WgradPrologues{}, &partial);
    const cudaError_t error = status.has_value() ? *status : launch_direct<T>(shape, context, grad, x, &partial);
    return error != cudaSuccess ? error : launch_sum<T>(shape, context, partial, out);
  });
}

cudaError_t launch_conv_stats_wgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* dz,
                                    const StatisticsGradients& statistics, const void* x, const Affine& prologue,
                                    const WeightResult& dw) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    Partial partial;
    const auto status = try_tensor_cores<T, true>(shape, dtype, context, dz, x, {statistics, prologue}, &partial);
    if (!status.has_value()) {
      return launch_composed<T>(shape, dtype, context, dz, statistics, x, prologue, dw);
    }
    return *status != cudaSuccess ? *status : launch_sum<T>(shape, context, partial, dw);
  });
}

}  // namespace resnext::cuda
