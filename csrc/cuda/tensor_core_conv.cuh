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
  int splits;      // blocks that share the steps of a part
  int prefetch;    // groups of rows that copies run ahead
  bool weight_channels_last;
};

struct alignas(16) WeightTile {  // operands of two m16n8k16 for one lane
  uint32_t b[4];
};

constexpr int kStagedWeightBytes = kTile * kTile * kTapCount * 2;  // a warp's 16x16 weights

// Index in the weight of the scalar that joins source channel k and output channel o (same group).
template <Pass kPass>
__device__ __forceinline__ int64_t weight_index(const WeightOrder& order, int k, int o, int tap) {
  const int row = kPass == Pass::kDgrad ? k : o;
  return order.index(row, (kPass == Pass::kDgrad ? o : k) % order.columns, tap);
}

// Asynchronously copies the weights that join source channels k0 .. k0+15 with output channels o0 .. o0+15, by one
// warp: 16 rows of min(width, 16) x 9 scalars, dense in `shared` and in the weight's order.
template <typename T, Pass kPass>
__device__ __forceinline__ void stage_weights(const T* __restrict__ weight, const WeightOrder& order, int k0, int o0,
                                              int lane, uint32_t shared) {
  constexpr int kScalarsPerCopy = 8;
  constexpr int kCopiesPerWideRow = kTile * kTapCount / kScalarsPerCopy;
  const bool wide = order.columns > kTile;
  const int copies = kTile * (wide ? kTile : order.columns) * kTapCount / kScalarsPerCopy;
  const T* const first = weight + weight_index<kPass>(order, k0, o0, 0);
  for (int copy = lane; copy < copies; copy += kWarpSize) {
    int64_t offset = copy * kScalarsPerCopy;  // whole rows: one contiguous piece
    if (wide) {
      const int scalar = copy % kCopiesPerWideRow * kScalarsPerCopy;  // of a row's 16 columns
      offset = order.index(copy / kCopiesPerWideRow, 0, 0) +
               (order.column == 1 ? scalar / kTile * order.tap + scalar % kTile : scalar);
    }
    cp_async_16(shared + copy * 16, first + offset, true);
  }
}

// This lane's part of weight(tap)[k0 .. k0+15, o0 .. o0+15] from the staged scalars, zero between groups. Column n of
// the two 8-wide products holds channel 4*(n/2) + n%2, and 2 more in the second, so that a lane ends with 4
// neighbouring channels to store. k0 and o0 are multiples of 16, and so of every packed width.
template <typename T, Pass kPass>
__device__ __forceinline__ WeightTile weight_tile(const T* staged, const WeightOrder& order, int tap, int lane) {
  const int width = order.columns;
  WeightTile tile;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int o = 4 * (lane / 8) + lane / 4 % 2 + 2 * (r / 2);
    float pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = 2 * (lane % 4) + 8 * (r % 2) + e;
      pair[e] = k / width == o / width ? static_cast<float>(staged[weight_index<kPass>(order, k, o, tap)]) : 0.0f;
    }
    tile.b[r] = pack2<T>(pair[0], pair[1]);
  }
  return tile;
}

constexpr int kLaneChannels = 4;  // neighbours, of each result that a lane holds

template <typename T>
__device__ __forceinline__ Packed<T, kLaneChannels> round_channels(float (&values)[kLaneChannels]) {
  const Packed<T, kLaneChannels> packed{pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3])};
  packed.unpack(values);
  return packed;
}

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
// the input gradient at stride 2; and totals stay in registers, or what is loaded for the epilogue.
template <Pass kPass, int kStride, typename Fusion>
constexpr int kConvBlocksPerMultiprocessor =
    RowAxis<kPass, kStride>::outputs * ColAxis<kPass, kStride>::outputs == 1
        ? 4 - !std::is_empty_v<typename Fusion::template Totals<kLaneChannels>>
        : (RowAxis<kPass, kStride>::kParity ? 3 : 4) -
              !(std::is_empty_v<typename Fusion::template Totals<kLaneChannels>> &&
                std::is_empty_v<typename Fusion::template Epilogue<kLaneChannels>::Loaded>);

template <typename T, Pass kPass, int kStride, bool kPacked, typename Fusion>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kConvBlocksPerMultiprocessor<kPass, kStride, Fusion>)
    tensor_core_conv_kernel(const T* __restrict__ source, const T* __restrict__ weight, T* __restrict__ out,
                            Fusion fusion, TensorCoreConvShape shape) {
  using Totals = typename Fusion::template Totals<kLaneChannels>;
  using Prologue = typename Fusion::Prologue;
  using Epilogue = typename Fusion::template Epilogue<kLaneChannels>;
  using Rows = RowAxis<kPass, kStride>;
  using Cols = ColAxis<kPass, kStride>;
  constexpr int kTiles = kStripPositions / kTile;
  RESNEXT_DYNAMIC_SHARED(shared);
  __shared__ StripTables tables[kTables];

  const StripGrid& grid = shape.grid;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int part = static_cast<int>(blockIdx.x % shape.parts);
  const int slab_channel = static_cast<int>(blockIdx.x / shape.parts % shape.slabs) * shape.slab_channels;
  const int split = static_cast<int>(blockIdx.x / shape.parts / shape.slabs);
  const int tile = part * shape.part_tiles + warp;  // of the slab
  const int channel = slab_channel + tile * kTile;
  const bool active = tile * kTile < shape.slab_channels && channel < shape.channels;
  const int depth = kPacked ? 1 : shape.group_width / kTile;  // source tiles per result
  const int first_depth = tile / depth * depth;

  // Shared memory: weights of wide groups, prologues, the ring of rows, that of the companion's rows.
  const uint32_t weights_bytes = kPacked ? 0 : shape.part_tiles * depth * kTapCount * kWarpSize * sizeof(WeightTile);
  WeightTile* const warp_weights = reinterpret_cast<WeightTile*>(shared) + warp * depth * kTapCount * kWarpSize + lane;
  Prologue* const prologues = reinterpret_cast<Prologue*>(shared + weights_bytes);
  const uint32_t ring_offset = weights_bytes + shape.slab_channels * kPrologueBytes<Prologue>;
  const uint32_t shared_base = shared_address(shared);
  WeightTile weights[kTapCount];
  for (int d = 0; d < depth; ++d) {
    const WeightOrder order(shape.group_width, shape.weight_channels_last);
    const WeightOrder staged_order(shape.group_width < kTile ? shape.group_width : kTile, shape.weight_channels_last);
    const uint32_t staged = warp * kStagedWeightBytes;  // in the ring, which is not in use yet
    if (active) {
      stage_weights<T, kPass>(weight, order, slab_channel + (first_depth + d) * kTile, channel, lane,
                              shared_base + ring_offset + staged);
    }
    cp_async_commit();
    cp_async_wait_group<0>();
    __syncthreads();
#pragma unroll
    for (int tap = 0; tap < kTapCount && active; ++tap) {
      weights[tap] =
          weight_tile<T, kPass>(reinterpret_cast<const T*>(shared + ring_offset + staged), staged_order, tap, lane);
      if (!kPacked) {
        warp_weights[(d * kTapCount + tap) * kWarpSize] = weights[tap];
      }
    }
    __syncthreads();
  }

  const RowStager<T> stager(grid.source_height, grid.source_width, shape.channels, slab_channel, shape.slab_channels);
  const int pitch = stager.pitch;
  const uint32_t row_bytes = grid.pixels * pitch;
  const uint32_t group_bytes = Rows::advance * row_bytes;
  const uint32_t companion_offset = ring_offset + (shape.prefetch + 2) * group_bytes;
  bool with_prologue = false;
  if constexpr (!std::is_void_v<Prologue>) {
    with_prologue = fusion.prologue.given() && stager.channels_valid;
    if (fusion.prologue.given()) {
      make_prologues(fusion.prologue, slab_channel, shape.slab_channels, shape.channels, prologues);
    }
  }

  // The companion's ring has two slots less than the other: each of its pieces is read by the thread that has staged
  // it, and by no other.
  const auto companion_place = [&](int group) { return companion_offset + group % shape.prefetch * group_bytes; };
  const auto stage = [&](const Group<Rows>& group) {
    const StripTables& table = group.table;
    const int skipped = group.at.group == 0 ? Rows::skipped : 0;
    const T* const images = source + table.source_base;
    const uint32_t place = shared_base + ring_offset + group.slot * group_bytes;
    if constexpr (kHasCompanion<Prologue>) {
      if (with_prologue) {
        stager.template stage<Rows::advance, true>(images, place, row_bytes, table.source, grid.pixels, group.at.row,
                                                   skipped, bytes_between(source, fusion.prologue.z),
                                                   shared_base + companion_place(group.index) - place);
      } else {
        stager.template stage<Rows::advance>(images, place, row_bytes, table.source, grid.pixels, group.at.row,
                                             skipped);
      }
    } else {
      stager.template stage<Rows::advance>(images, place, row_bytes, table.source, grid.pixels, group.at.row, skipped);
    }
  };
  const auto prepare = [&](const Group<Rows>& group) {
    if constexpr (!std::is_void_v<Prologue>) {
      if (with_prologue) {
        const Prologue prologue = prologues[stager.local / kGranule];
        for (int i = group.at.group == 0 ? Rows::skipped : 0; i < Rows::advance; ++i) {
          stager.transform(shared + ring_offset + group.slot * group_bytes + i * row_bytes,
                           shared + companion_place(group.index) + i * row_bytes, group.table.source, grid.pixels,
                           group.at.row + i, prologue);
        }
      }
    }
  };

  const int lane_channel = channel + lane % 4 * kLaneChannels;
  Epilogue epilogue(fusion, active ? lane_channel : 0);
  Totals totals = {};
  const int row_stride = grid.out_width * shape.channels;
  // Of the unit: this lane's results (kNothing: idle), its rows for ldmatrix, and how many of its positions are not
  // idle.
  constexpr int kHalves = 2;
  int64_t output_base = 0;
  int output[kTiles][kHalves], output_cols[kTiles][kHalves], lane_positions = 0;
  uint32_t tile_address[kTiles];
  const auto lead = [&](const Group<Rows>& group) {
    const StripTables& table = group.table;
    output_base = table.output_base + lane_channel;
    lane_positions = 0;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int position = m * kTile + half * 8 + lane / 4;
        output[m][half] = table.output[position];
        output_cols[m][half] = Cols::outputs > 1 ? table.output_cols[position] : 1;
        lane_positions += output[m][half] >= 0 ? output_cols[m][half] : 0;
      }
      const int pixel = table.pixel[m * kTile + lane % kTile];
      tile_address[m] = shared_base + ring_offset + pixel * pitch + first_depth * kTile * 2 + lane / kTile * 16;
    }
  };
  const auto step = [&](const Group<Rows>& group) {
    if (!active) {
      return;
    }
    const StripTables& table = group.table;
    // Source row i of the step, from where a group is: in the older group, or in the newer.
    const auto row_offset = [&](int i) {
      const int slot = i + Rows::skipped < Rows::advance ? group.before : group.slot;
      return slot * group_bytes + (i + Rows::skipped) % Rows::advance * row_bytes;
    };
    const int first_output = group.at.step() * Rows::outputs;
    const int rows_left = grid.out_height - first_output;
    const int rows_inside = held(rows_left < Rows::outputs ? rows_left : Rows::outputs);
    const int64_t first_element = output_base + static_cast<int64_t>(first_output) * row_stride;
    epilogue.begin(first_element);
    // Calls each(m, half, v, h, elements, bytes) for those of this lane's results that are inside the image: where
    // they are from first_element.
    const auto for_results = [&](const auto& each) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (output[m][half] >= 0) {
#pragma unroll
            for (int v = 0; v < Rows::outputs; ++v) {
#pragma unroll
              for (int h = 0; h < Cols::outputs; ++h) {
                if ((v == 0 || v < rows_inside) && (h == 0 || h < output_cols[m][half])) {
                  each(m, half, v, h, v * row_stride + h * shape.channels, output[m][half]);
                }
              }
            }
          }
        }
      }
    };

    typename Epilogue::Loaded loaded[kTiles][kHalves][Rows::outputs][Cols::outputs];
    if (epilogue.loads()) {
      for_results([&](int m, int half, int v, int h, int elements, int bytes) {
        loaded[m][half][v][h] = epilogue.load_at(elements, bytes);
      });
    }

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
        const uint32_t row = row_offset(i) + d * kTile * 2;
#pragma unroll
        for (int j = 0; j < Cols::inputs; ++j) {
          uint32_t a[kTiles][4];
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            ldmatrix_x4<false>(a[m], tile_address[m] + row + j * pitch);
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

    const auto results = [&](int m, int half, int v, int h, float (&values)[kLaneChannels]) {
      const float* const low = acc[m][v][h][0] + half * 2;
      const float* const high = acc[m][v][h][1] + half * 2;
      values[0] = low[0];
      values[1] = low[1];
      values[2] = high[0];
      values[3] = high[1];
    };
    if (totals.empty() && !mixed) {
      for_results([&](int m, int half, int v, int h, int, int) {
        float values[kLaneChannels];
        results(m, half, v, h, values);
        round_channels<T>(values);
        totals.begin(values);
      });
    }
    T* const first_out = held(out + first_element);
    typename Totals::Step taken{};
    const auto finish = [&](float (&values)[kLaneChannels], const typename Epilogue::Loaded& added, int elements,
                            int bytes) {
      epilogue(values, added, elements, bytes, totals);
      *reinterpret_cast<Packed<T, kLaneChannels>*>(from(first_out + elements, bytes)) = round_channels<T>(values);
      epilogue.stored(values, totals, taken);
    };
    if (!mixed) {
      for_results([&](int m, int half, int v, int h, int elements, int bytes) {
        float values[kLaneChannels];
        results(m, half, v, h, values);
        finish(values, loaded[m][half][v][h], elements, bytes);
      });
    } else {
      // Rare: each result again, from the products of its own group only.
      bool begun = false;
#pragma unroll 1
      for (int e = lane / 4; e < kStripPositions * Rows::outputs * Cols::outputs; e += kWarpSize / 4) {
        const int position = e % kStripPositions;
        const int v = e / kStripPositions / Cols::outputs, h = e / kStripPositions % Cols::outputs;
        const int bytes = table.output[position];
        if (bytes < 0 || v >= rows_inside || h >= table.output_cols[position]) {
          continue;
        }
        const WeightOrder order(shape.group_width, shape.weight_channels_last);
        float values[kLaneChannels] = {};
#pragma unroll 1
        for (int ij = 0; ij < Rows::inputs * Cols::inputs; ++ij) {
          const int i = ij / Cols::inputs, j = ij % Cols::inputs;
          const int r = Rows::tap(v, i), s = Cols::tap(h, j);
          const T* const pixel =
              reinterpret_cast<const T*>(shared + ring_offset + row_offset(i) + (table.pixel[position] + j) * pitch);
#pragma unroll 1
          for (int k = 0; r >= 0 && s >= 0 && k < shape.group_width; ++k) {
#pragma unroll
            for (int c = 0; c < kLaneChannels; ++c) {
              const int o = lane_channel + c;
              const int group_k = o / shape.group_width * shape.group_width + k;
              const int64_t scalar = weight_index<kPass>(order, group_k, o, r * 3 + s);
              values[c] += static_cast<float>(pixel[group_k - slab_channel]) * static_cast<float>(weight[scalar]);
            }
          }
        }
        if (totals.empty() && !begun) {
          float first[kLaneChannels] = {values[0], values[1], values[2], values[3]};
          round_channels<T>(first);
          totals.begin(first);
          begun = true;
        }
        const int elements = v * row_stride + h * shape.channels;
        finish(values, epilogue.loads() ? epilogue.load_at(elements, bytes) : typename Epilogue::Loaded{}, elements,
               bytes);
      }
    }
    totals.close(taken, lane_positions * rows_inside);
  };
  walk<Rows, Cols>(grid, split, shape.splits, shape.channels, shape.prefetch, tables, stage, prepare, lead, step);

  if constexpr (!std::is_empty_v<Totals>) {
    if (active && fusion.partial != nullptr) {
      merge_lanes(totals, 4);
      if (lane < 4) {
        totals.store(fusion.partial, split, shape.channels, lane_channel);
      }
    }
  }
}

}  // namespace resnext::cuda
