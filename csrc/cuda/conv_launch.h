// Host side of the forward and of the input gradient, plain or fused: the tensor-core kernel where it fits, and the
// direct one.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include "direct_conv.cuh"
#include "strip_plan.h"
#include "tensor_core_conv.cuh"

namespace resnext::cuda {

template <typename T, Pass kPass, typename Out, typename Fusion>
cudaError_t launch_direct_conv(const GroupedConvShape& shape, const Context& context, const void* source,
                               const Weight& weight, Out* out, const Fusion& fusion) {
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
  gather.weight_channels_last = weight.channels_last;
  const int64_t blocks = ceil_div(gather.out_channels, kDirectChannels) * ceil_div(gather.pixels, kDirectPixels);
  return launch(direct_conv_kernel<T, kDgrad, Out, Fusion>, blocks, kDirectThreads, DynamicShared{}, context.stream,
                static_cast<const T*>(source), static_cast<const T*>(weight.data), out, fusion, gather);
}

struct TensorCoreConvPlan {
  TensorCoreConvShape problem;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// Fewer output tiles per block until weights and source rows fit into shared memory; none if they never do.
template <Pass kPass, int kStride, typename Fusion>
std::optional<TensorCoreConvPlan> plan_tensor_core_conv(const GroupedConvShape& shape, const Device& device) {
  using Rows = RowAxis<kPass, kStride>;
  using Cols = ColAxis<kPass, kStride>;
  using Prologue = typename Fusion::Prologue;
  constexpr int kResident = kConvBlocksPerMultiprocessor<kPass, kStride, Fusion>;
  const int group_width = static_cast<int>(shape.group_in());
  TensorCoreConvPlan plan{};
  TensorCoreConvShape& problem = plan.problem;
  problem.channels = static_cast<int>(shape.in_channels);
  problem.group_width = group_width;
  problem.slab_channels =
      group_width > kPackedSlabChannels ? group_width : kPackedSlabChannels / group_width * group_width;
  problem.slabs = static_cast<int>(ceil_div(problem.channels, problem.slab_channels));

  problem.grid = make_strip_grid<Rows, Cols>(shape, kPass == Pass::kDgrad);
  if (problem.grid.all_steps > INT32_MAX) {
    return std::nullopt;
  }
  const bool packed = group_width <= kTile;

  const int slab_tiles = problem.slab_channels / kTile;
  for (problem.part_tiles = std::min(slab_tiles, kMaxWarps); problem.part_tiles >= 1; problem.part_tiles /= 2) {
    problem.parts = static_cast<int>(ceil_div(slab_tiles, problem.part_tiles));
    const int64_t blocks_per_split = int64_t{problem.slabs} * problem.parts;
    const int64_t group_bytes = int64_t{Rows::advance} * problem.grid.pixels * pixel_pitch(problem.slab_channels);
    const int64_t weights_bytes = packed ? 0
                                         : int64_t{problem.part_tiles} * (group_width / kTile) * kTapCount * kWarpSize *
                                               static_cast<int64_t>(sizeof(WeightTile));
    int64_t resident = 0;
    std::tie(problem.prefetch, plan.shared_bytes, resident) = deepest_prefetch(device, kResident, [&](int prefetch) {
      const int64_t rings_bytes = (prefetch + 2 + (kHasCompanion<Prologue> ? prefetch : 0)) * group_bytes;
      return weights_bytes + problem.slab_channels * kPrologueBytes<Prologue> +
             std::max<int64_t>(rings_bytes, problem.part_tiles * kStagedWeightBytes);
    });
    plan.threads = problem.part_tiles * kWarpSize;
    if (resident == 0 || problem.slab_channels / kGranule > plan.threads) {
      continue;
    }
    problem.splits = static_cast<int>(splits_of(problem.grid, blocks_per_split, device.multiprocessors * resident));
    plan.blocks = blocks_per_split * problem.splits;
    return plan;
  }
  return std::nullopt;
}

template <typename T, Pass kPass, int kStride, typename Fusion>
std::optional<cudaError_t> launch_tensor_cores(const GroupedConvShape& shape, const Context& context,
                                               const void* source, const Weight& weight, void* out, Fusion fusion,
                                               Partial* partial) {
  using Totals = typename Fusion::template Totals<kLaneChannels>;
  auto plan = plan_tensor_core_conv<kPass, kStride, Fusion>(shape, context.device);
  if (!plan.has_value()) {
    return std::nullopt;
  }
  plan->problem.weight_channels_last = weight.channels_last;
  if constexpr (!std::is_empty_v<Totals>) {
    if (partial != nullptr) {
      const int64_t plane = plan->problem.splits * int64_t{plan->problem.channels};
      *partial = {context.scratch.allocate_array<float>(Totals::kPlanes * plane), plan->problem.splits};
      fusion.partial = partial->values;
    }
  }
  return launch(shape.group_in() <= kTile ? tensor_core_conv_kernel<T, kPass, kStride, true, Fusion>
                                          : tensor_core_conv_kernel<T, kPass, kStride, false, Fusion>,
                plan->blocks, plan->threads, dynamic_shared(context.device, plan->shared_bytes), context.stream,
                static_cast<const T*>(source), static_cast<const T*>(weight.data), static_cast<T*>(out), fusion,
                plan->problem);
}

// Launches the tensor-core kernel where it serves the problem. Its totals go to scratch memory, which partial receives;
// null: they are not wanted. fused_tensors are those that the fusion reads (or null).
template <typename T, Pass kPass, typename Fusion>
std::optional<cudaError_t> try_tensor_cores(const GroupedConvShape& shape, Dtype dtype, const Context& context,
                                            const void* source, const Weight& weight, void* out, const Fusion& fusion,
                                            Partial* partial, std::initializer_list<const void*> fused_tensors) {
  if constexpr (!std::is_same_v<T, float>) {
    const auto fits = [](const void* tensor) { return aligned(tensor, 16); };
    if (tensor_cores_serve(shape, dtype, context.device) && fits(source) && fits(weight.data) && fits(out) &&
        std::all_of(fused_tensors.begin(), fused_tensors.end(), fits)) {
      return shape.stride_h == 1
                 ? launch_tensor_cores<T, kPass, 1>(shape, context, source, weight, out, fusion, partial)
                 : launch_tensor_cores<T, kPass, 2>(shape, context, source, weight, out, fusion, partial);
    }
  }
  return std::nullopt;
}

}  // namespace resnext::cuda
