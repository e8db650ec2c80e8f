// Host side of channel_kernel.cuh: how a tensor is cut, and which vectors fit it.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "channel_kernel.cuh"

namespace resnext::cuda {

constexpr int kVectorBytes = 16;

template <typename Job>
ChannelGrid make_channel_grid(const ImageShape& shape, const Device& device) {
  constexpr int kWaves = 2;  // whole ones: blocks are alike
  constexpr int kMinPlacesPerThread = 4;
  ChannelGrid grid{};
  grid.channels = shape.channels;
  grid.inner = shape.channels_last ? 1 : shape.area();
  grid.inner_vectors = grid.inner / (Job::kWidth / Job::kChannels);
  grid.images = Job::kByImage ? shape.batch : 1;
  grid.image_elements = shape.channels * shape.area();
  grid.positions = shape.batch / grid.images * (shape.channels_last ? shape.area() : grid.inner_vectors);
  const int64_t vectors = shape.channels / Job::kChannels;
  grid.lanes = 1;
  while (shape.channels_last && grid.lanes < std::min<int64_t>(vectors, kWarpSize)) {
    grid.lanes *= 2;
  }
  grid.tiles = ceil_div(vectors, grid.lanes);
  const int64_t most = ceil_div(grid.positions, kMinPlacesPerThread * (kChannelThreads / grid.lanes));
  const int64_t blocks = int64_t{device.multiprocessors} * kChannelBlocksPerMultiprocessor<Job> * kWaves;
  grid.splits = static_cast<int>(std::min(most, ceil_div(blocks, grid.tiles * grid.images)));
  return grid;
}

// partial receives the totals of the job's splits, in scratch memory; null: they are not wanted. Those of a job that
// belongs to single images are [split][image].
template <typename Job>
cudaError_t launch_job(const Job& job, const ImageShape& shape, const Context& context, Partial* partial) {
  const ChannelGrid grid = make_channel_grid<Job>(shape, context.device);
  float* values = nullptr;
  if constexpr (!std::is_empty_v<typename Job::Totals>) {
    if (partial != nullptr) {
      const int64_t parts = grid.splits * grid.images;
      values = context.scratch.allocate_array<float>(Job::Totals::kPlanes * parts * grid.channels);
      *partial = {values, static_cast<int>(parts)};
    }
  }
  return launch(channel_kernel<Job>, grid.tiles * grid.splits * grid.images, kChannelThreads, DynamicShared{}, context.stream, job,
                grid, values);
}

template <int kVectorWidth, bool kVectorAcross>
struct VectorLayout {
  static constexpr int kWidth = kVectorWidth;
  static constexpr bool kAcross = kVectorAcross;
};

// Calls run(VectorLayout) with the widest vectors that fit the shape and the tensors' alignment.
template <typename T, bool kAlongChannels, typename Run>
cudaError_t with_layout(const ImageShape& shape, std::initializer_list<const void*> tensors, const Run& run) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool all_aligned =
      std::all_of(tensors.begin(), tensors.end(), [](const void* tensor) { return aligned(tensor, kVectorBytes); });
  if (all_aligned && shape.channels_last && shape.channels % kWidth == 0) {
    return run(VectorLayout<kWidth, true>());
  }
  if constexpr (kAlongChannels) {
    if (all_aligned && !shape.channels_last && shape.area() % kWidth == 0) {
      return run(VectorLayout<kWidth, false>());
    }
  }
  return run(VectorLayout<1, false>());
}

}  // namespace resnext::cuda
