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

// Resident at once, by registers (up to 168) and shared memory (47 kB at 32 positions x 64 channels).
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
};

struct WgradPrologues {
  StatisticsGradients grad;
  Affine x;
};

// partial (splits, C_out, C_in/groups, 3, 3)
template <typename T, int kStride, bool kFused>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kWgradBlocksPerMultiprocessor)
    tensor_core_wgrad_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partial,
                             WgradPrologues prologues, TensorCoreWgradShape shape) {
  using Rows = RowAxis<Pass::kForward, kStride>;
  using Cols = ColAxis<Pass::kForward, kStride>;
  constexpr int kRing = Rows::inputs + Rows::advance;
  RESNEXT_DYNAMIC_SHARED(shared);
  __shared__ StripTables tables;

  const StripGrid& grid = shape.grid;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int blocks_per_slab = shape.slab_tiles * shape.slab_tiles;
  const int slab_block = static_cast<int>(blockIdx.x % blocks_per_slab);
  const int slab = static_cast<int>(blockIdx.x / blocks_per_slab % shape.slabs);
  const int64_t split = blockIdx.x / blocks_per_slab / shape.slabs;

  const bool packed = shape.group_width <= kTile;
  const int out_block = slab_block / shape.slab_tiles * shape.tile_channels;  // within the slab
  const int in_block = slab_block % shape.slab_tiles * shape.tile_channels;
  const int out_tile = (packed ? warp : warp / 2) * kTile;  // within the block
  const int in_tile = (packed ? warp : warp % 2) * kTile;
  const int slab_channel = slab * shape.slab_channels;
  const int next_slab = slab_channel + shape.slab_channels;
  const int slab_end = next_slab < shape.channels ? next_slab : shape.channels;
  const bool active = slab_channel + out_block + out_tile < slab_end && slab_channel + in_block + in_tile < slab_end;

  const RowStager<T> x_stager(x, grid.source_height, grid.source_width, shape.channels, slab_channel + in_block,
                              shape.tile_channels);
  const RowStager<T> grad_stager(grad, grid.out_height, grid.out_width, shape.channels, slab_channel + out_block,
                                 shape.tile_channels);
  const int pitch = x_stager.pitch;
  const uint32_t x_row_bytes = grid.pixels * pitch;
  const uint32_t grad_row_bytes = kStripPositions * pitch;
  const uint32_t x_ring = shared_address(shared);
  const uint32_t grad_buffers = x_ring + kRing * x_row_bytes;  // two, of Rows::outputs rows each

  float acc[9][2][4] = {};
  const int64_t last_unit = grid.units * (split + 1) / shape.splits;
  for (int64_t index = grid.units * split / shape.splits; index < last_unit; ++index) {
    const Unit unit(grid, index);
    __syncthreads();  // the last unit's tables and rows are no longer read
    tables.fill<Cols>(grid, unit, shape.channels, shape.channels);
    __syncthreads();
    const int first_row = unit.first_step * Rows::advance + Rows::origin;
    const int first_output = unit.first_step * Rows::outputs;
    uint32_t first_x_rows[Rows::inputs], first_grad_rows[Rows::outputs];
#pragma unroll
    for (int i = 0; i < Rows::inputs; ++i) {
      first_x_rows[i] = x_ring + i * x_row_bytes;
    }
#pragma unroll
    for (int v = 0; v < Rows::outputs; ++v) {
      first_grad_rows[v] = grad_buffers + v * grad_row_bytes;
    }
    x_stager.stage(first_x_rows, tables.source, grid.pixels, first_row);
    grad_stager.stage(first_grad_rows, tables.output, kStripPositions, first_output);

    int head = 0;  // ring slot of the step's first row of x
    for (int step = 0; step < unit.steps; ++step) {
      cp_async_wait_all();
      if constexpr (kFused) {
        if (prologues.x.given() && x_stager.channels_valid) {
          const ActivationPrologue<T> prologue(prologues.x, x_stager.channel);
          for (int i = step == 0 ? 0 : Rows::inputs - Rows::advance; i < Rows::inputs; ++i) {
            const int slot = head + i < kRing ? head + i : head + i - kRing;
            x_stager.transform(shared + slot * x_row_bytes, tables.source, grid.pixels,
                               first_row + step * Rows::advance + i, prologue);
          }
        }
        if (prologues.grad.given() && grad_stager.channels_valid) {
          const StatisticsPrologue<T> prologue(prologues.grad, grad_stager.channel);
          for (int v = 0; v < Rows::outputs; ++v) {
            grad_stager.transform(
                shared + kRing * x_row_bytes + (step % 2 * Rows::outputs + v) * grad_row_bytes, tables.output,
                kStripPositions, first_output + step * Rows::outputs + v, prologue);
          }
        }
      }
      __syncthreads();  // this step's rows are in place, and nobody reads the last step's any more
      uint32_t x_rows[kRing], grad_rows[2][Rows::outputs];  // this step's, then the next one's
#pragma unroll
      for (int i = 0; i < kRing; ++i) {
        x_rows[i] = x_ring + (head + i < kRing ? head + i : head + i - kRing) * x_row_bytes;
      }
#pragma unroll
      for (int v = 0; v < Rows::outputs; ++v) {
        grad_rows[0][v] = grad_buffers + (step % 2 * Rows::outputs + v) * grad_row_bytes;
        grad_rows[1][v] = grad_buffers + ((step + 1) % 2 * Rows::outputs + v) * grad_row_bytes;
      }
      if (step + 1 < unit.steps) {
        uint32_t next_x_rows[Rows::advance];
#pragma unroll
        for (int i = 0; i < Rows::advance; ++i) {
          next_x_rows[i] = x_rows[Rows::inputs + i];
        }
        x_stager.stage(next_x_rows, tables.source, grid.pixels, first_row + step * Rows::advance + Rows::inputs);
        grad_stager.stage(grad_rows[1], tables.output, kStripPositions, first_output + (step + 1) * Rows::outputs);
      }

      // One branch on the rows that exist, not one per product: mma wants the warp converged.
      const auto accumulate = [&](auto valid_rows) {
        constexpr int kRows = decltype(valid_rows)::value;
#pragma unroll
        for (int m = 0; m < kStripPositions / kTile; ++m) {
          uint32_t grad_tile[kRows][4];
          const int grad_position = m * kTile + lane % 8 + lane / 16 * 8;
#pragma unroll
          for (int v = 0; v < kRows; ++v) {
            ldmatrix_x4<true>(grad_tile[v],
                              grad_rows[0][v] + grad_position * pitch + out_tile * 2 + lane / 8 % 2 * 16);
          }
          const int pixel = tables.pixel[m * kTile + lane % kTile];
          const uint32_t x_offset = pixel * pitch + in_tile * 2 + lane / kTile * 16;
#pragma unroll
          for (int i = 0; i < Rows::inputs; ++i) {
#pragma unroll
            for (int j = 0; j < Cols::inputs; ++j) {
              uint32_t x_tile[4];
              ldmatrix_x4<true>(x_tile, x_rows[i] + x_offset + j * pitch);
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
      const bool odd_row = Rows::outputs > 1 && first_output + (step + 1) * Rows::outputs > grid.out_height;
      if (active && !odd_row) {
        accumulate(std::integral_constant<int, Rows::outputs>());
      } else if (active) {
        accumulate(std::integral_constant<int, 1>());
      }
      head = head + Rows::advance < kRing ? head + Rows::advance : head + Rows::advance - kRing;
    }
  }

  if (!active) {
    return;
  }
  float* const split_partial = partial + split * shape.channels * shape.group_width * 9;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int o = slab_channel + out_block + out_tile + lane / 4 + e / 2 % 2 * 8;
    const int i = slab_channel + in_block + in_tile + lane % 4 * 2 + e % 2 + e / 4 * 8;
    if (o / shape.group_width != i / shape.group_width) {
      continue;
    }
    float* const taps = split_partial + (static_cast<int64_t>(o) * shape.group_width + i % shape.group_width) * 9;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      taps[tap] = acc[tap][e / 4][e % 4];
    }
  }
}

}  // namespace resnext::cuda
