// Host side of strip.cuh: which problems the tensor-core kernels take, and how they cut the image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "launch.h"
#include "strip.cuh"

namespace resnext::cuda {

constexpr int kPackedSlabChannels = 64;
constexpr int kStaticSharedBytes = 2048;  // StripTables, rounded up
static_assert(sizeof(StripTables) <= kStaticSharedBytes);

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

// Cuts bands until each of `wave` blocks, `blocks_per_unit` of which share a unit, gets a few units, so that the odd
// ones even out; but no band below four steps, as it repeats up to two source rows of its neighbour.
template <typename Rows, typename Cols>
StripGrid make_strip_grid(const GroupedConvShape& shape, bool dgrad, int64_t blocks_per_unit, int64_t wave) {
  constexpr int kMinBandSteps = 4;
  constexpr int kUnitsPerBlock = 4;
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
  grid.images = static_cast<int>(std::min<int64_t>({kStripPositions / grid.cols, kMaxStripImages, shape.batch}));
  grid.pixels_per_image = (grid.cols - 1) * Cols::advance + Cols::inputs;
  grid.pixels = grid.images * grid.pixels_per_image + Cols::inputs;

  const int64_t strips = ceil_div(shape.batch, grid.images) * grid.col_strips;
  const int64_t bands = std::clamp<int64_t>(ceil_div(kUnitsPerBlock * wave, strips * blocks_per_unit), 1,
                                            std::max(1, grid.steps / kMinBandSteps));
  grid.band_steps = static_cast<int>(ceil_div(grid.steps, bands));
  grid.bands = static_cast<int>(ceil_div(grid.steps, grid.band_steps));
  grid.units = strips * grid.bands;
  return grid;
}

}  // namespace resnext::cuda
