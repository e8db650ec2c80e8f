// Host side of strip.cuh: which problems the tensor-core kernels take, and how they cut the image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.h"
#include "strip.cuh"

namespace resnext::cuda {

constexpr int kPackedSlabChannels = 64;
constexpr int kStaticSharedBytes = 4 * 1024;  // StripTables and the kilobyte that CUDA adds to each block, rounded up
static_assert(kTables * sizeof(StripTables) + 1024 <= kStaticSharedBytes);

// Kernels count along one axis in 32 bits; offsets over several axes are 64 bits wide.
inline bool axes_fit_int(const GroupedConvShape& shape) {
  return std::max({shape.height, shape.width, shape.in_channels, shape.out_channels}) < INT32_MAX / 2;
}

// What the tensor-core kernels need, besides enough shared memory.
inline bool tensor_cores_serve(const GroupedConvShape& shape, Dtype dtype, const Device& device) {
  constexpr int64_t kMaxRow = int64_t{1} << 30;
  const int64_t width = shape.group_in();
  const bool tiles = width <= kTile ? kTile % width == 0 && shape.in_channels % kTile == 0 : width % kTile == 0;
  return device.tensor_cores && dtype != Dtype::kFloat && width == shape.group_out() && tiles &&
         shape.stride_h == shape.stride_w && shape.height < kMaxRow && shape.width < kMaxRow / shape.in_channels;
}

inline DynamicShared dynamic_shared(const Device& device, int64_t bytes) {
  return {bytes, device.shared_memory - kStaticSharedBytes};
}

// Blocks a multiprocessor holds at once, where registers allow `most`; 0 if not even one fits.
inline int64_t resident_blocks(const Device& device, int64_t dynamic_shared_bytes, int64_t most) {
  return std::min<int64_t>(device.shared_memory / (dynamic_shared_bytes + kStaticSharedBytes), most);
}

// How many groups of rows copies run ahead, the dynamic shared memory that this takes, shared_bytes(prefetch), and how
// many blocks are then resident: as far ahead as costs no resident block.
template <typename SharedBytes>
std::tuple<int, int64_t, int64_t> deepest_prefetch(const Device& device, int64_t most,
                                                   const SharedBytes& shared_bytes) {
  const int64_t least_resident = resident_blocks(device, shared_bytes(1), most);
  int prefetch = kMaxPrefetch;
  while (prefetch > 1 && resident_blocks(device, shared_bytes(prefetch), most) < least_resident) {
    --prefetch;
  }
  return {prefetch, shared_bytes(prefetch), least_resident};
}

template <typename Rows, typename Cols>
StripGrid make_strip_grid(const GroupedConvShape& shape, bool dgrad) {
  StripGrid grid{};
  grid.batch = shape.batch;
  grid.source_height = static_cast<int>(dgrad ? shape.out_height : shape.height);
  grid.source_width = static_cast<int>(dgrad ? shape.out_width : shape.width);
  grid.out_height = static_cast<int>(dgrad ? shape.height : shape.out_height);
  grid.out_width = static_cast<int>(dgrad ? shape.width : shape.out_width);
  grid.position_cols = static_cast<int>(ceil_div(grid.out_width, Cols::outputs));
  grid.steps = static_cast<int>(ceil_div(grid.out_height, Rows::outputs));

  grid.col_strips = static_cast<int>(ceil_div(grid.position_cols, kStripPositions));
  grid.cols = static_cast<int>(ceil_div(grid.position_cols, grid.col_strips));
  // Offsets within a strip are 32 bits wide.
  const int64_t largest_image =
      shape.in_channels * std::max(shape.height * shape.width, shape.out_height * shape.out_width);
  grid.images = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({kStripPositions / grid.cols, kMaxStripImages, shape.batch,
                                              INT32_MAX / kElementBytes / largest_image})));
  grid.pixels_per_image = (grid.cols - 1) * Cols::advance + Cols::inputs;
  grid.pixels = grid.images * grid.pixels_per_image + Cols::inputs;
  const int64_t strips = ceil_div(shape.batch, grid.images) * grid.col_strips;
  grid.all_steps = strips * grid.steps;
  return grid;
}

// Blocks that share all steps: one wave, so that each lays out its weights, or adds to partial sums, once. A share of
// a single step would copy as many rows for its lead as for the step.
inline int64_t splits_of(const StripGrid& grid, int64_t blocks_per_split, int64_t wave) {
  constexpr int kMinShare = 2;
  return std::clamp<int64_t>(wave / blocks_per_split, 1, std::max<int64_t>(1, grid.all_steps / kMinShare));
}

}  // namespace resnext::cuda
