// Forward and input gradient on tensor cores, 16-bit types, C_in/groups == C_out/groups.
//
// out[position, o] = sum over taps and k of source[pixel(position, tap), k] * weight(tap)[k, o]: for each tap a
// product of a (32 positions x 16 source channels) tile and a (16 x 16) weight tile by mma.m16n8k16. The source tile
// of every tap is the same staged row in shared memory, read by ldmatrix at a shifted address, and is used for all
// results (two output rows at stride 1, up to four parities in the input gradient at stride 2) before the next one is
// read.
//
// kPacked, group width <= 16: 16 / width groups share a tile; the weight tiles are block-diagonal and stay in 36
// registers. Otherwise a result sums over width / 16 source tiles whose weights wait in shared memory. Either way the
// weights are laid out in the order in which lanes want them once per block, and a block then takes its share of all
// strips. Warp w of a block owns 16 output channels; its block stages the source channels that they need (64
// channels, or one whole group where that is wider).
//
// Bytes per output element (16-bit, stride 1): DRAM 2 read + 2 written; shared memory 2 written by cp.async, 12 read;
// nothing is ever stored twice. Blocks of neighbouring channels are neighbours in the grid and meet in L2.
//
// A fusion (conv_fusion.cuh) may change the source, in shared memory, once per staged piece, and the results before
// they are stored; the totals of a lane's 4 channels stay in its registers until the block has done its share.
//
// Packing multiplies other groups' values by zero, which keeps them out unless they are NaN or Inf. Every such leak
// makes an accumulator NaN; the warp then recomputes its tile group by group. Positions outside the image are zeros,
// so a weight of Inf turns border results into NaN, as in every implicit-GEMM convolution.
#pragma once

#include <type_traits>

#include "conv_fusion.cuh"
#include "strip.cuh"

namespace resnext::cuda {

struct TensorCoreConvShape {
  StripGrid grid;
  int channels;       // of source and of out
  int group_width;    // channels per group
  int slab_channels;  // source channels a block stages: whole groups, or 64 channels of packed groups
  int slabs;
  int parts;       // blocks that share a slab
  int part_tiles;  // 16-channel output tiles per block = its warps
  int splits;      // blocks that share the units of a part
};

struct alignas(16) WeightTile {  // operands of two m16n8k16 for one lane
  uint32_t b[4];
};

constexpr int kTapCount = 9;
constexpr int kStagedWeightBytes = kTile * kTile * kTapCount * 2;  // a warp's 16x16 weights in OIHW order

// Index in the OIHW weight of the scalar that joins source channel k and output channel o (same group), tap 0.
template <Pass kPass>
__device__ __forceinline__ int64_t weight_index(int k, int o, int group_width) {
  const int64_t row = kPass == Pass::kDgrad ? k : o;
  const int col = (kPass == Pass::kDgrad ? o : k) % group_width;
  return (row * group_width + col) * kTapCount;
}

// Asynchronously copies the weights that join source channels k0 .. k0+15 with output channels o0 .. o0+15, by one
// warp: 16 rows of min(width, 16) x 9 scalars, dense in `shared`.
template <typename T, Pass kPass>
__device__ __forceinline__ void stage_weights(const T* __restrict__ weight, int k0, int o0, int group_width, int lane,
                                              uint32_t shared) {
  constexpr int kScalarsPerCopy = 8;
  const int copies = kTile * (group_width < kTile ? group_width : kTile) * kTapCount / kScalarsPerCopy;
  const T* const first = weight + weight_index<kPass>(k0, o0, group_width);
  for (int copy = lane; copy < copies; copy += kWarpSize) {
    constexpr int kCopiesPerWideRow = kTile * kTapCount / kScalarsPerCopy;
    const int64_t offset = group_width <= kTile
                               ? copy * kScalarsPerCopy  // whole rows: one contiguous piece
                               : static_cast<int64_t>(copy / kCopiesPerWideRow) * group_width * kTapCount +
                                     copy % kCopiesPerWideRow * kScalarsPerCopy;
    cp_async_16(shared + copy * 16, first + offset, true);
  }
}

// This lane's part of weight(tap)[k0 .. k0+15, o0 .. o0+15] from the staged scalars, zero between groups. Column n of
// the two 8-wide products holds channel 4*(n/2) + n%2, and 2 more in the second, so that a lane ends with 4
// neighbouring channels to store. k0 and o0 are multiples of 16, and so of every packed width.
template <typename T, Pass kPass>
__device__ __forceinline__ WeightTile weight_tile(const T* staged, int tap, int group_width, int lane) {
  const int width = group_width < kTile ? group_width : kTile;
  WeightTile tile;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int o = 4 * (lane / 8) + lane / 4 % 2 + 2 * (r / 2);
    float pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = 2 * (lane % 4) + 8 * (r % 2) + e;
      pair[e] = k / width == o / width ? static_cast<float>(staged[weight_index<kPass>(k, o, width) + tap]) : 0.0f;
    }
    tile.b[r] = pack2<T>(pair[0], pair[1]);
  }
  return tile;
}

constexpr int kLaneChannels = 4;  // neighbours, of each result that a lane holds

struct alignas(8) PackedChannels {
  uint32_t pairs[2];
};

template <typename Values>
__device__ __forceinline__ bool any_nan(const Values& values) {
  if constexpr (std::is_array_v<Values>) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < static_cast<int>(std::extent_v<Values>); ++i) {
      any |= any_nan(values[i]);
    }
    return any;
  } else {
    return values != values;
  }
}

// Blocks resident at once, by registers: a position has one result in the forward at stride 2, two at stride 1, four in
// the input gradient at stride 2; and totals stay in registers.
template <Pass kPass, int kStride, typename Fusion>
constexpr int kConvBlocksPerMultiprocessor =
    RowAxis<kPass, kStride>::outputs * ColAxis<kPass, kStride>::outputs == 1
        ? 4
        : (RowAxis<kPass, kStride>::kParity ? 3 : 4) -
              !std::is_empty_v<typename Fusion::template Totals<kLaneChannels>>;

template <typename T, Pass kPass, int kStride, bool kPacked, typename Fusion>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kConvBlocksPerMultiprocessor<kPass, kStride, Fusion>)
    tensor_core_conv_kernel(const T* __restrict__ source, const T* __restrict__ weight, T* __restrict__ out,
                            Fusion fusion, TensorCoreConvShape shape) {
  using Totals = typename Fusion::template Totals<kLaneChannels>;
  using Rows = RowAxis<kPass, kStride>;
  using Cols = ColAxis<kPass, kStride>;
  constexpr int kTiles = kStripPositions / kTile;
  constexpr int kRing = Rows::inputs + Rows::advance;
  RESNEXT_DYNAMIC_SHARED(shared);
  __shared__ StripTables tables;

  const StripGrid& grid = shape.grid;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int part = static_cast<int>(blockIdx.x % shape.parts);
  const int slab_channel = static_cast<int>(blockIdx.x / shape.parts % shape.slabs) * shape.slab_channels;
  const int64_t split = blockIdx.x / shape.parts / shape.slabs;
  const int tile = part * shape.part_tiles + warp;  // of the slab
  const int channel = slab_channel + tile * kTile;
  const bool active = tile * kTile < shape.slab_channels && channel < shape.channels;
  const int depth = kPacked ? 1 : shape.group_width / kTile;  // source tiles per result
  const int first_depth = tile / depth * depth;

  const uint32_t weights_bytes = kPacked ? 0 : shape.part_tiles * depth * kTapCount * kWarpSize * sizeof(WeightTile);
  WeightTile* const warp_weights = reinterpret_cast<WeightTile*>(shared) + warp * depth * kTapCount * kWarpSize + lane;
  const uint32_t ring = shared_address(shared) + weights_bytes;
  WeightTile weights[kTapCount];
  for (int d = 0; d < depth; ++d) {
    const uint32_t staged = warp * kStagedWeightBytes;  // in the ring, which is not in use yet
    if (active) {
      stage_weights<T, kPass>(weight, slab_channel + (first_depth + d) * kTile, channel, shape.group_width, lane,
                              ring + staged);
    }
    cp_async_wait_all();
    __syncthreads();
#pragma unroll
    for (int tap = 0; tap < kTapCount && active; ++tap) {
      weights[tap] = weight_tile<T, kPass>(reinterpret_cast<const T*>(shared + weights_bytes + staged), tap,
                                           shape.group_width, lane);
      if (!kPacked) {
        warp_weights[(d * kTapCount + tap) * kWarpSize] = weights[tap];
      }
    }
    __syncthreads();
  }

  const RowStager<T> stager(source, grid.source_height, grid.source_width, shape.channels, slab_channel,
                            shape.slab_channels);
  const int pitch = stager.pitch;
  const uint32_t row_bytes = grid.pixels * pitch;
  const int lane_channel = channel + lane % 4 * kLaneChannels;
  Totals totals = {};

  const int last_unit = static_cast<int>(grid.units * (split + 1) / shape.splits);
  for (int index = static_cast<int>(grid.units * split / shape.splits); index < last_unit; ++index) {
    const Unit unit(grid, index);
    __syncthreads();  // the last unit's tables and rows are no longer read
    tables.fill<Cols>(grid, unit, shape.channels, shape.channels);
    __syncthreads();
    const int first_row = unit.first_step * Rows::advance + Rows::origin;
    uint32_t first_rows[Rows::inputs];
#pragma unroll
    for (int i = 0; i < Rows::inputs; ++i) {
      first_rows[i] = ring + i * row_bytes;
    }
    stager.stage(first_rows, tables.source, grid.pixels, first_row);

    uint32_t tile_address[kTiles];  // of this lane's ldmatrix row, relative to a staged row
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int pixel = tables.pixel[m * kTile + lane % kTile];
      tile_address[m] = pixel * pitch + first_depth * kTile * 2 + lane / kTile * 16;
    }
    int head = 0;  // ring slot of the step's first source row
    for (int step = 0; step < unit.steps; ++step) {
      const auto slot = [head](int i) { return head + i < kRing ? head + i : head + i - kRing; };
      cp_async_wait_all();
      if constexpr (!std::is_void_v<typename Fusion::Prologue>) {
        if (fusion.prologue.given() && stager.channels_valid) {
          const typename Fusion::Prologue prologue(fusion.prologue, stager.channel);
          for (int i = step == 0 ? 0 : Rows::inputs - Rows::advance; i < Rows::inputs; ++i) {
            stager.transform(shared + weights_bytes + slot(i) * row_bytes, tables.source, grid.pixels,
                             first_row + step * Rows::advance + i, prologue);
          }
        }
      }
      __syncthreads();  // this step's rows are in place, and nobody reads the last step's any more
      if (step + 1 < unit.steps) {
        uint32_t next_rows[Rows::advance];
#pragma unroll
        for (int i = 0; i < Rows::advance; ++i) {
          next_rows[i] = ring + slot(Rows::inputs + i) * row_bytes;
        }
        stager.stage(next_rows, tables.source, grid.pixels, first_row + step * Rows::advance + Rows::inputs);
      }
      if (active) {
        float acc[kTiles][Rows::outputs][Cols::outputs][2][4] = {};
        for (int d = 0; d < depth; ++d) {
          if (!kPacked) {
#pragma unroll
            for (int tap = 0; tap < kTapCount; ++tap) {
              weights[tap] = warp_weights[(d * kTapCount + tap) * kWarpSize];
            }
          }
#pragma unroll
          for (int i = 0; i < Rows::inputs; ++i) {
            const uint32_t row = ring + slot(i) * row_bytes + d * kTile * 2;
#pragma unroll
            for (int j = 0; j < Cols::inputs; ++j) {
              uint32_t a[kTiles][4];
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                ldmatrix_x4<false>(a[m], row + tile_address[m] + j * pitch);
              }
#pragma unroll
              for (int v = 0; v < Rows::outputs; ++v) {
#pragma unroll
                for (int h = 0; h < Cols::outputs; ++h) {
                  const int r = Rows::tap(v, i), s = Cols::tap(h, j);
                  if (r < 0 || s < 0) {
                    continue;
                  }
#pragma unroll
                  for (int m = 0; m < kTiles; ++m) {
                    mma_m16n8k16<T>(acc[m][v][h][0], a[m], weights[r * 3 + s].b[0], weights[r * 3 + s].b[1]);
                    mma_m16n8k16<T>(acc[m][v][h][1], a[m], weights[r * 3 + s].b[2], weights[r * 3 + s].b[3]);
                  }
                }
              }
            }
          }
        }

        bool mixed = false;  // a NaN may have come from another group of the tile
        if (kPacked && shape.group_width < kTile) {
          mixed = any_in_warp(any_nan(acc));
        }

        const int first_output = (unit.first_step + step) * Rows::outputs;
        const int row_stride = grid.out_width * shape.channels;
        const int64_t out_row = static_cast<int64_t>(first_output) * row_stride + lane_channel;
        const typename Fusion::template Epilogue<kLaneChannels> epilogue(fusion, lane_channel);
        const auto finish = [&](float (&values)[kLaneChannels], int64_t element) {
          epilogue(values, element, totals);
          *reinterpret_cast<PackedChannels*>(out + element) = {pack2<T>(values[0], values[1]),
                                                              pack2<T>(values[2], values[3])};
        };
        if (!mixed) {
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int position = m * kTile + half * 8 + lane / 4;
              const int64_t offset = tables.output[position];
              const int64_t first = out_row + offset;
#pragma unroll
              for (int v = 0; v < Rows::outputs; ++v) {
#pragma unroll
                for (int h = 0; h < Cols::outputs; ++h) {
                  const bool inside = offset >= 0 && first_output + v < grid.out_height &&
                                      (h == 0 || h < tables.output_cols[position]);
                  const float* const low = acc[m][v][h][0] + half * 2;
                  const float* const high = acc[m][v][h][1] + half * 2;
                  if (inside) {
                    float values[kLaneChannels] = {low[0], low[1], high[0], high[1]};
                    finish(values, first + v * row_stride + h * shape.channels);
                  }
                }
              }
            }
          }
        } else {
          // Rare: each result again, from the products of its own group only.
#pragma unroll 1
          for (int e = lane / 4; e < kStripPositions * Rows::outputs * Cols::outputs; e += kWarpSize / 4) {
            const int position = e % kStripPositions;
            const int v = e / kStripPositions / Cols::outputs, h = e / kStripPositions % Cols::outputs;
            const int64_t offset = tables.output[position];
            if (offset < 0 || first_output + v >= grid.out_height || h >= tables.output_cols[position]) {
              continue;
            }
            float values[kLaneChannels] = {};
#pragma unroll 1
            for (int ij = 0; ij < Rows::inputs * Cols::inputs; ++ij) {
              const int i = ij / Cols::inputs, j = ij % Cols::inputs;
              const int r = Rows::tap(v, i), s = Cols::tap(h, j);
              const T* const pixel = reinterpret_cast<const T*>(
                  shared + weights_bytes + slot(i) * row_bytes + (tables.pixel[position] + j) * pitch);
#pragma unroll 1
              for (int k = 0; r >= 0 && s >= 0 && k < shape.group_width; ++k) {
#pragma unroll
                for (int c = 0; c < kLaneChannels; ++c) {
                  const int o = lane_channel + c;
                  const int group_k = o / shape.group_width * shape.group_width + k;
                  const int64_t scalar = weight_index<kPass>(group_k, o, shape.group_width) + r * 3 + s;
                  values[c] += static_cast<float>(pixel[group_k - slab_channel]) * static_cast<float>(weight[scalar]);
                }
              }
            }
            finish(values, out_row + offset + v * row_stride + h * shape.channels);
          }
        }
      }
      head = head + Rows::advance < kRing ? head + Rows::advance : head + Rows::advance - kRing;
    }
  }

  if constexpr (!std::is_empty_v<Totals>) {
    if (active && fusion.partial != nullptr) {
      merge_lanes(totals, 4);
      if (lane < 4) {
        totals.store(fusion.partial, static_cast<int64_t>(shape.splits) * shape.channels,
                     split * shape.channels + lane_channel);
      }
    }
  }
}

}  // namespace resnext::cuda
