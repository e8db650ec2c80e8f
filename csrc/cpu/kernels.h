// What the driver (grouped_conv.cpp) and the kernels compiled for each instruction set say to each other.
//
// Both the forward pass and the input gradient are one operation here, a *correlation*: every destination row is a sum
// over up to three source rows, and along a row every destination pixel is a sum over one to three neighbouring source
// pixels. Stride 2 makes the input gradient a correlation per *phase* (even and odd rows or columns), without a single
// multiplication by zero.
#pragma once

#include <cstdint>

namespace resnext::cpu {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// A dense activation tensor, in NHWC or NCHW order.
struct Image {
  void* data;  // the kernels only read sources
  Dtype dtype;
  bool channels_last;
  int64_t batch, channels, height, width;
};

// The destination positions out = phases * q + f, for phase f, take
//   dst[out] += src[in_step * q + first + k] * weight[taps[k]],  k < count.
struct Phase {
  int count;
  int first;
  int taps[3];
};

struct Axis {
  int in_step;
  int phases;
  Phase phase[2];
};

// How channels are laid on vectors. A *bundle* is a set of source and destination channels that only see each other:
//  - rotating: as many whole groups as one vector holds (narrow groups with as many inputs as outputs);
//  - otherwise: one group, whose destination channels are cut into tiles of `tile_vectors` vectors.
struct Layout {
  bool rotating;
  int64_t groups, group_src, group_dst;
  int64_t bundles;
  int64_t src_channels, dst_channels;  // channels of a bundle (the last one may have fewer when rotating)
  int64_t src_lanes;                   // src_channels rounded up to whole vectors
  int64_t depth;                       // terms per tap: the group's source channels
  int64_t tiles, tile_vectors;
};

// Packed weights: [bundle][tile][kernel row][column phase][depth][tap of the phase][tile lane]; packed bias:
// [bundle][tile][tile lane].
struct Correlation {
  Image src, dst;
  Axis rows, cols;
  Layout layout;
  const float* weight;
  const float* bias;
  int64_t block;  // bundles worked on together: their source rows share the ring buffer
  int64_t bands;  // parts a destination image's rows are cut into
};

// Where a filter keeps its weights: (C_in / groups, 3, 3) in memory, or (3, 3, C_in / groups) in channels_last.
struct FilterStrides {
  int64_t input, tap;
};

struct WeightPacking {
  const void* weight;  // (C_out, C_in / groups, 3, 3)
  FilterStrides strides;
  const void* bias;  // (C_out) or null
  Dtype dtype;
  bool transposed;  // the source channels of the correlation are the weight's output channels
  Axis cols;
  Layout layout;
  float* packed_weight;
  float* packed_bias;
};

// dw partials: one slice of `slice_size` floats per (chunk, bundle); chunks cut the batch * out_height rows of grad.
struct WeightGradient {
  Image grad, x;
  int64_t stride_h, stride_w;
  Layout layout;  // source: x, destination: grad
  int64_t block, chunks;
  float* partial;
  void* dw;  // (C_out, C_in / groups, 3, 3)
  FilterStrides strides;
  Dtype dtype;
};

// Entry points of one instruction set. The driver's parallel_for gives out ranges of tasks; each range gets scratch
// memory of its own, as many floats as the function of that name tells (weight_scratch for packing and reducing).
struct Kernels {
  const char* name;

  Layout (*make_layout)(int64_t groups, int64_t group_src, int64_t group_dst);
  int64_t (*packed_weight_size)(const Layout&);
  int64_t (*packed_bias_size)(const Layout&);
  int64_t (*weight_scratch)(const Layout&);
  void (*pack_weight)(const WeightPacking&, float* scratch, int64_t begin_bundle, int64_t end_bundle);

  int64_t (*correlate_scratch)(const Correlation&);
  void (*correlate)(const Correlation&, float* scratch, int64_t begin, int64_t end);  // over batch * bands * blocks

  int64_t (*wgrad_slice_size)(const Layout&);
  int64_t (*wgrad_scratch)(const WeightGradient&);
  void (*wgrad)(const WeightGradient&, float* scratch, int64_t begin, int64_t end);  // over blocks * chunks
  void (*reduce_wgrad)(const WeightGradient&, float* scratch, int64_t begin_bundle, int64_t end_bundle);
};

const Kernels* avx512_kernels();  // null where the binary does not hold them
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace resnext::cpu
