// Weight gradient on tensor cores, 16-bit types, C_in/groups == C_out/groups.
//
// dw(tap)[o, i] = sum over positions of grad[position, o] * x[pixel(position, tap), i]: for each tap a product of a
// (16 output channels x 16 positions) tile of grad, transposed on its way out of shared memory by ldmatrix, and a (16
// positions x 16 input channels) tile of x. A warp keeps the 9 x 16 x 16 sums of one pair of channel tiles in 72
// registers over all units of its split. Group width <= 16: 64 channels per block, each warp one diagonal pair, of
// which only the entries inside groups are stored (nothing leaks between groups). Wider: 32 x 32 channels of one
// group per block, four pairs, so that grad and x are staged width / 32 times.
//
// Fused, grad and x are changed in shared memory once per staged piece (conv_fusion.cuh).
//
// Bytes per element of grad (16-bit, stride 1): DRAM 2 of grad + 2 of x; shared memory 4 written, 14 read; plus one
// fp32 copy of dw per split, written and read once. Results that do not exist (idle positions, a last odd row) are
// not multiplied, or multiply zeros; the zero border of x turns a grad of Inf there into NaN, as in every implicit
// GEMM.
#pragma once

#include <type_traits>

#include "conv_fusion.cuh"
#include "strip.cuh"

namespace resnext::cuda {

// Resident at once, by registers (up to 168).
constexpr int kWgradBlocksPerMultiprocessor = 3;

struct TensorCoreWgradShape {
  StripGrid grid;
  int channels;       // of grad and of x
  int group_width;    // channels per group
  int tile_channels;  // of grad and of x that a block stages: 64 (packed) or 32
  int slabs;          // packed: blocks of 64 channels; otherwise groups
  int slab_channels;
  int slab_tiles;  // blocks per slab along one axis; a slab has slab_tiles^2 blocks
  int splits;
  int prefetch;  // groups of rows that copies run ahead
};

struct WgradPrologues {
  StatisticsGradients grad;
  Affine x;
};

// partial (splits, 3, 3, C_out, C_in/groups)
template <typename T, int kStride, bool kFused>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kWgradBlocksPerMultiprocessor)
    tensor_core_wgrad_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partial,
                             WgradPrologues prologues, TensorCoreWgradShape shape) {
  using Rows = RowAxis<Pass::kForward, kStride>;
  using Cols = ColAxis<Pass::kForward, kStride>;
  constexpr int kTiles = kStripPositions / kTile;
  using XPrologue = ActivationPrologue<T>;
  using GradPrologue = StatisticsPrologue<T>;
  RESNEXT_DYNAMIC_SHARED(shared);
  __shared__ StripTables tables[kTables];

  const StripGrid& grid = shape.grid;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int blocks_per_slab = shape.slab_tiles * shape.slab_tiles;
  const int slab_block = static_cast<int>(blockIdx.x % blocks_per_slab);
  const int slab = static_cast<int>(blockIdx.x / blocks_per_slab % shape.slabs);
  const int split = static_cast<int>(blockIdx.x / blocks_per_slab / shape.slabs);

  const bool packed = shape.group_width <= kTile;
  const int out_block = slab_block / shape.slab_tiles * shape.tile_channels;  // within the slab
  const int in_block = slab_block % shape.slab_tiles * shape.tile_channels;
  const int out_tile = (packed ? warp : warp / 2) * kTile;  // within the block
  const int in_tile = (packed ? warp : warp % 2) * kTile;
  const int slab_channel = slab * shape.slab_channels;
  const int next_slab = slab_channel + shape.slab_channels;
  const int slab_end = next_slab < shape.channels ? next_slab : shape.channels;
  const bool active = slab_channel + out_block + out_tile < slab_end && slab_channel + in_block + in_tile < slab_end;

  // Shared memory: the prologues of x and of grad, then rings of the rows of x, of grad, and of grad's companion.
  const RowStager<T> x_stager(grid.source_height, grid.source_width, shape.channels, slab_channel + in_block,
                              shape.tile_channels);
  const RowStager<T> grad_stager(grid.out_height, grid.out_width, shape.channels, slab_channel + out_block,
                                 shape.tile_channels);
  const int pitch = x_stager.pitch;
  const uint32_t x_row_bytes = grid.pixels * pitch;
  const uint32_t x_group_bytes = Rows::advance * x_row_bytes;
  const uint32_t grad_row_bytes = kStripPositions * pitch;
  const uint32_t grad_group_bytes = Rows::outputs * grad_row_bytes;
  XPrologue* const x_prologues = reinterpret_cast<XPrologue*>(shared);
  GradPrologue* const grad_prologues = reinterpret_cast<GradPrologue*>(x_prologues + shape.tile_channels / kGranule);
  const uint32_t x_ring = kFused ? shape.tile_channels * (kPrologueBytes<XPrologue> + kPrologueBytes<GradPrologue>) : 0;
  const uint32_t grad_ring = x_ring + (shape.prefetch + 2) * x_group_bytes;
  const uint32_t companion_ring = grad_ring + (shape.prefetch + 1) * grad_group_bytes;
  const uint32_t shared_base = shared_address(shared);
  const bool with_x_prologue = kFused && prologues.x.given() && x_stager.channels_valid;
  const bool with_grad_prologue = kFused && prologues.grad.given() && grad_stager.channels_valid;
  if constexpr (kFused) {
    if (prologues.x.given()) {
      make_prologues(prologues.x, slab_channel + in_block, shape.tile_channels, shape.channels, x_prologues);
    }
    if (prologues.grad.given()) {
      make_prologues(prologues.grad, slab_channel + out_block, shape.tile_channels, shape.channels, grad_prologues);
    }
  }

  // As in tensor_core_conv_kernel; a group that completes a step brings the step's rows of grad.
  const auto grad_place = [&](int group) { return grad_ring + group % (shape.prefetch + 1) * grad_group_bytes; };
  const auto companion_place = [&](int group) { return companion_ring + group % shape.prefetch * grad_group_bytes; };
  const auto stage = [&](const Group<Rows>& group) {
    const StripTables& table = group.table;
    x_stager.template stage<Rows::advance>(x + table.source_base, shared_base + x_ring + group.slot * x_group_bytes,
                                           x_row_bytes, table.source, grid.pixels, group.at.row,
                                           group.at.group == 0 ? Rows::skipped : 0);
    if (group.at.group > 0) {
      const int row = group.at.step() * Rows::outputs;
      const T* const images = grad + table.output_base;
      const uint32_t place = shared_base + grad_place(group.index);
      if (with_grad_prologue) {
        grad_stager.template stage<Rows::outputs, true>(images, place, grad_row_bytes, table.output, kStripPositions,
                                                        row, 0, bytes_between(grad, prologues.grad.z),
                                                        shared_base + companion_place(group.index) - place);
      } else {
        grad_stager.template stage<Rows::outputs>(images, place, grad_row_bytes, table.output, kStripPositions, row, 0);
      }
    }
  };

  float acc[kTapCount][2][4] = {};
  uint32_t x_address[kTiles];  // of this lane's rows for ldmatrix, in the unit
  const auto prepare = [&](const Group<Rows>& group) {
    if (with_x_prologue) {
      const XPrologue prologue = x_prologues[x_stager.local / kGranule];
      for (int i = group.at.group == 0 ? Rows::skipped : 0; i < Rows::advance; ++i) {
        x_stager.transform(shared + x_ring + group.slot * x_group_bytes + i * x_row_bytes, nullptr, group.table.source,
                           grid.pixels, group.at.row + i, prologue);
      }
    }
    if (with_grad_prologue && group.at.group > 0) {
      const GradPrologue prologue = grad_prologues[grad_stager.local / kGranule];
      for (int v = 0; v < Rows::outputs; ++v) {
        grad_stager.transform(shared + grad_place(group.index) + v * grad_row_bytes,
                              shared + companion_place(group.index) + v * grad_row_bytes, group.table.output,
                              kStripPositions, group.at.step() * Rows::outputs + v, prologue);
      }
    }
  };
  const auto lead = [&](const Group<Rows>& group) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int pixel = group.table.pixel[m * kTile + lane % kTile];
      x_address[m] = shared_base + x_ring + pixel * pitch + in_tile * 2 + lane / kTile * 16;
    }
  };
  const auto step = [&](const Group<Rows>& group) {
    if (!active) {
      return;
    }
    // One branch on the rows that exist, not one per product: mma wants the warp converged.
    const auto accumulate = [&](auto valid_rows) {
      constexpr int kRows = decltype(valid_rows)::value;
      const uint32_t grad_rows = shared_base + grad_place(group.index);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t grad_tile[kRows][4];
        const int grad_position = m * kTile + lane % 8 + lane / 16 * 8;
#pragma unroll
        for (int v = 0; v < kRows; ++v) {
          ldmatrix_x4<true>(grad_tile[v],
                            grad_rows + v * grad_row_bytes + grad_position * pitch + out_tile * 2 + lane / 8 % 2 * 16);
        }
        const uint32_t x_offset = x_address[m];
#pragma unroll
        for (int i = 0; i < Rows::inputs; ++i) {
          // Row i of the step: in the older group, or in the newer.
          const int slot = i + Rows::skipped < Rows::advance ? group.before : group.slot;
          const uint32_t row = x_offset + slot * x_group_bytes + (i + Rows::skipped) % Rows::advance * x_row_bytes;
#pragma unroll
          for (int j = 0; j < Cols::inputs; ++j) {
            uint32_t x_tile[4];
            ldmatrix_x4<true>(x_tile, row + j * pitch);
#pragma unroll
            for (int v = 0; v < kRows; ++v) {
              if (Rows::tap(v, i) < 0) {
                continue;
              }
              const int tap = Rows::tap(v, i) * 3 + Cols::tap(0, j);
              mma_m16n8k16<T>(acc[tap][0], grad_tile[v], x_tile[0], x_tile[1]);
              mma_m16n8k16<T>(acc[tap][1], grad_tile[v], x_tile[2], x_tile[3]);
            }
          }
        }
      }
    };
    const bool odd_row = Rows::outputs > 1 && (group.at.step() + 1) * Rows::outputs > grid.out_height;
    if (!odd_row) {
      accumulate(std::integral_constant<int, Rows::outputs>());
    } else {
      accumulate(std::integral_constant<int, 1>());
    }
  };
  walk<Rows, Cols>(grid, split, shape.splits, shape.channels, shape.prefetch, tables, stage, prepare, lead, step);

  if (!active) {
    return;
  }
  // A lane's pairs are neighbours in a row of input channels; groups of one channel have no pairs.
  float* const split_partial = partial + static_cast<int64_t>(split) * kTapCount * shape.channels * shape.group_width;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const int o = slab_channel + out_block + out_tile + lane / 4 + pair % 2 * 8;
    const int i = slab_channel + in_block + in_tile + lane % 4 * 2 + pair / 2 * 8;
#pragma unroll
    for (int tap = 0; tap < kTapCount; ++tap) {
      const float* const values = acc[tap][pair / 2] + pair % 2 * 2;
      float* const row = split_partial + (static_cast<int64_t>(tap) * shape.channels + o) * shape.group_width;
      if (shape.group_width > 1) {
        if (o / shape.group_width == i / shape.group_width) {
          store(row + i % shape.group_width, Vector<float, 2>{values[0], values[1]});
        }
      } else if (o == i || o == i + 1) {
        row[0] = o == i ? values[0] : values[1];
      }
    }
  }
}

}  // namespace resnext::cuda
