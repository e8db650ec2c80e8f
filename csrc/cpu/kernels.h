// What the drivers (grouped_conv.cpp, batch_norm.cpp) and the kernels compiled for each instruction set say to each
// other.
//
// Both the forward pass and the input gradient are one operation here, a *correlation*: every destination row is a sum
// over up to three source rows, and along a row every destination pixel is a sum over one to three neighbouring source
// pixels. Stride 2 makes the input gradient a correlation per *phase* (even and odd rows and columns), without a single
// multiplication by zero.
#pragma once

#include <cstdint>

namespace resnext::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t tiles_of(int64_t pixels) { return ceil_div(pixels, 2); }  // of winograd.inl.h, along a side

constexpr int64_t kPanelLanes = 16;    // channels come in multiples of this: as many as the widest vector has
constexpr int64_t kTileChannels = 32;  // destination channels whose weights lie together
constexpr int64_t kMostRowsAtOnce = 16;

enum class Dtype { kFloat32, kFloat16, kBFloat16, kUint8 };  // uint8: the max pool's taps, small whole numbers

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kUint8 ? 1 : 2; }

// A dense activation tensor, in NHWC or NCHW order.
struct Image {
  void* data;  // the kernels only read sources
  Dtype dtype;
  bool channels_last;
  int64_t batch, channels, height, width;
};

// What is summed over an image or batch goes to partial sums first, [part][kPartialSums][channel], added up in order by
// the driver; it zeroes them before.
constexpr int64_t kPartialSums = 3;

// scale * (v - center) + shift, with one float of each per channel.
struct Affine {
  const float *center, *scale, *shift;
};

// What becomes of an image's values v as its rows are read. Zero padding comes after it.
struct ReadMap {
  enum Kind {
    kNone,
    kAffineRelu,  // relu(affine(v)), rounded to the image's dtype
    kAddAffine,   // v + affine(other), rounded to the image's dtype
  } kind;
  Affine affine;
  const void* other;  // laid out as the image
};

// What becomes of float32 sums v as they are written to an image.
struct WriteMap {
  enum Kind {
    kNone,
    kMoments,       // v; partial: shift, mean, m2 of what is written (moments.inl.h)
    kAffine,        // scale * v + shift
    kAffineAdd,     // scale * v + shift + other
    kReluGradient,  // scale * t, t = v where relu(affine(other)) is not zero; partial: sums of t, t * (other - center)
  } kind;
  Affine affine;
  const void* other;  // laid out as the image
  bool relu;          // after kAffine and kAffineAdd
  float* partial;     // null if there are no sums
  int64_t before;     // kMoments: pixels that are in these sums already
  int64_t channels;   // of the image
};

// How an image's rows are cut: parts by the problem alone, as what is summed over a part must not depend on threads;
// bands, which tasks take, are whole numbers of parts.
struct RowCuts {
  int64_t part_rows, parts, bands;
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

// Along a row, tap k of three connects source pixel s with destination pixel d: s = in_step * d + k - 1 with one phase,
// d = 2 * s + k - 1 with two.
struct Columns {
  int in_step;
  int phases;
};

// How channels are laid on vectors. A *bundle* is a set of source and destination channels that only see each other:
//  - narrow groups: as many as share one vector, their channels interleaved: lane = channel of the group * shared +
//    group. A source channel of all of them, repeated over a vector, is then one load, and meets every destination
//    channel of its own group only;
//  - otherwise (shared is 1): one group, whose destination channels are cut into tiles of `tile_vectors` vectors.
// In a layout of pairs a source "channel" is two that follow each other, bfloat16, in one lane. For AMX `merged` narrow
// groups count as one, with weights of zero between them, and sums are over whole vectors of source channels.
struct Layout {
  bool pairs, amx;
  int64_t merged;
  int64_t groups, group_src, group_dst;
  int64_t all_src, all_dst;  // channels of an image
  int64_t packed_src;        // source channels of a group that have packed weights
  int64_t shared;  // groups of a bundle, a power of two (the last bundle may have fewer)
  int64_t bundles;
  int64_t src_channels, dst_channels;  // channels of a bundle
  int64_t src_lanes;                   // of a panel of them: whole vectors
  int64_t panel_bundles;               // whose source channels share a panel: 2 where one has half a vector of pairs
  int64_t tiles, tile_vectors;
};

// Where a filter keeps its weights: (C_in / groups, 3, 3) in memory, or (3, 3, C_in / groups) in channels_last.
struct FilterStrides {
  int64_t input, tap;
};

struct Filters {
  const void* weight;  // (C_out, C_in / groups, 3, 3)
  FilterStrides strides;
  const void* bias;  // (C_out) or null
  Dtype dtype;
  Dtype images;     // float32 weights are rounded to this one; else it is theirs
  bool transposed;  // the source channels of the correlation are the weight's output channels
  bool mirrored;    // the taps of a row in reverse
};

// Filters as the kernels read them. Weights: [bundle][tile][kernel row][source channel of the group][tap][tile lane];
// biases: [bundle][tile][tile lane].
struct PackedFilters {
  float *weight, *bias;  // no biases are packed where there is no place for them
};

struct Correlation {
  Image src, dst;
  ReadMap read;
  WriteMap write;
  Axis rows;
  Columns cols;
  Layout layout;
  Filters filters;
  PackedFilters packed;  // null where every block is one task's, which packs it for itself
  int64_t block;         // bundles worked on together: their source rows share the ring buffer
  int64_t tile_block;    // tiles of each bundle worked on together; all of them where a block has several bundles
  int64_t rows_at_once;  // destination rows (of a phase, with AMX) that a tile's weights meet before the next tile's
  int64_t images;        // of a task, which with AMX may have several whole ones
  RowCuts cuts;          // of a destination image
  int* not_finite;       // becomes 1 where a merged layout meets a source that is not
};

// A correlation with stride 1 of NHWC images by tiles of 2 x 2 destination pixels (winograd.inl.h). A unit, an image or
// the whole batch, has `unit_rows` rows of tiles, of which a panel takes `panel_rows`. Panels are parts of what is
// summed.
struct TileProduct {
  Image src, dst;
  ReadMap read;
  WriteMap write;
  Layout layout;         // of make_tile_layout
  PackedFilters packed;  // of pack_tile_weights
  int64_t block;         // groups whose source is transformed together
  int64_t units, unit_rows, panel_rows;
  int* not_finite;  // becomes 1 where a result is not
};

// Its weight gradient. Tasks take blocks of both images' channels of a group, chunks of the rows of tiles. Each has a
// slice of partial results, [chunk][block], of the size that a function of that name tells, to be reduced afterwards.
struct TileGradient {
  Image grad, x;
  ReadMap read_grad, read_x;
  void* dw;  // (C_out, C_in / groups, 3, 3)
  FilterStrides strides;
  Dtype dtype;
  int64_t group_in, group_out;
  int64_t grad_block, x_block;  // channels
  int64_t chunks, panel_rows;
  float* partial;
  int* not_finite;
};

// With `pairs`, lanes hold two pixels of a row, bfloat16, that follow each other in grad.
//
// A unit is a bundle, or where the groups are wide some of the channels of both images: [bundle][part of x][part of
// grad]. Chunks cut the batch * out_height rows of grad. Of several chunks each has partial results, a slice of
// `slice_size` floats per unit, to be reduced afterwards; a single one is stored where it was made.
struct WeightGradient {
  Image grad, x;
  ReadMap read_grad, read_x;
  int64_t stride_h, stride_w;
  Layout layout;  // source: x, destination: grad
  bool pairs;
  int64_t x_part, grad_part;  // channels of a unit
  int64_t block;              // units worked on together: of whole bundles, if several
  int64_t rows_at_once;       // of grad, with AMX of stacked images: sums are loaded and stored once for so many
  int64_t chunks;
  float* partial;  // null with a single chunk
  void* dw;        // (C_out, C_in / groups, 3, 3)
  FilterStrides strides;
  Dtype dtype;
  int* not_finite;  // becomes 1 where a result of AMX is not
};

constexpr int64_t units_of(const WeightGradient& g) {
  return g.layout.bundles * ceil_div(g.layout.src_channels, g.x_part) * ceil_div(g.layout.dst_channels, g.grad_part);
}

// Pixels of a grad row, or pairs of them.
constexpr int64_t steps_of(const WeightGradient& g) { return g.pairs ? ceil_div(g.grad.width, 2) : g.grad.width; }

// The pixels that the two images of a 1x1 convolution have in common: those of the smaller one.
struct PixelGrid {
  int64_t batch, height, width;
};

// An image, NHWC, of whose rows and columns a grid takes every step-th.
struct GridImage {
  Image image;
  int64_t step_h, step_w;
};

// The weight of a 1x1 convolution, (C_out, C_in): of a forward pass (destination, source channel), or transposed.
struct WeightMatrix {
  const void* data;
  Dtype dtype, images;  // as of Filters
  bool transposed;
  int64_t src_channels, dst_channels;
};

// A panel's pixels share what is read of them, and are a part of what is summed over the images. Without packed weights
// every tile is packed where it is used. With `pairs`, lanes hold two source channels that follow each other, bfloat16;
// with `amx` too, they are multiplied by the matrix unit.
struct PixelProduct {
  GridImage src, dst;
  PixelGrid grid;
  ReadMap read;
  WriteMap write;
  WeightMatrix weight;
  const float* packed;
  bool pairs, amx;
  int64_t panel_pixels;
};

// Tasks take blocks of both images' channels, chunks of the pixels. Of several chunks each has a slice of partial
// results, [chunk][block of grad][block of x], of the size that a function of that name tells, to be reduced
// afterwards; a single one is stored where it was made. With `pairs`, lanes hold two pixels that follow each other in
// the grid, bfloat16; with `amx` too, they are multiplied by the matrix unit.
struct PixelGradient {
  GridImage grad, x;
  PixelGrid grid;
  ReadMap read_grad, read_x;
  bool pairs, amx;
  int64_t grad_block, x_block;  // channels
  int64_t chunks, panel_pixels;
  float* partial;  // null with a single chunk
  void* dw;        // (C_out, C_in)
  Dtype dtype;
};

// Operations without a convolution, element by element; images that an operation does not use, or that are not wanted,
// are null. Parts: of part_pixels pixels of an image. In NHWC the whole batch counts as one image where no operand or
// result belongs to a single one.
//
// Of channel attention: act is relu where `relu` says so, else the identity; gate and added have a float for each
// channel of each image.
struct Elementwise {
  enum Kind {
    kMoments,                // partial: shift, mean, m2 of z
    kAddAffine,              // result = dout + affine(z)
    kAffineAddRelu,          // result = relu(affine(z) + residual_affine(residual))
    kAffineAddReluGradient,  // t = dout where out is not zero; result = scale * t, dresidual = residual's scale * t;
                             // partial: sums of t, t * (z - center), t * (residual - its center)
    kMean,                   // partial: sums of act(affine(z))
    kGate,                   // result = gate * act(affine(z)), with a residual relu(that + residual_affine(residual))
    kGateSums,               // t = dout where out, if there is one, is not zero; dresidual = residual's scale * t;
                             // partial: sums of t * act(affine(z)), t, t * (residual - its center)
    kGateGradient,           // t = gate * (dout as above, or 0) + added, where act passes it; result = scale * t;
                             // partial: sums of t, t * (z - center)
  } kind;
  Dtype dtype;
  bool channels_last;
  int64_t batch, channels, pixels;  // pixels of one plane
  int64_t part_pixels;
  const void *dout, *out, *z, *residual;
  Affine affine, residual_affine;
  bool relu;
  const float *gate, *added;
  void *result, *dresidual;
  float* partial;
};

// The 3x3 max pool, stride 2, padding 1, of relu(affine(z)); lanes: channels worked on together.
struct MaxPool {
  Image z, pooled, taps;  // in the backward pass the gradients: z's is written, z itself being the map's `other`
  ReadMap read;
  WriteMap write;
  RowCuts cuts;  // of the rows that are written
  int64_t lanes;
};

// An image and a copy of it in the other layout.
struct LayoutChange {
  Image src, dst;
  int64_t lanes;  // channels worked on together
};

// Scratch memory, in floats, the first of which are zero when a thread begins.
struct Scratch {
  int64_t size, zeros;
  Scratch(int64_t size, int64_t zeros = 0) : size(size), zeros(zeros) {}
};

// Entry points of one instruction set. `run_tasks` of driver.h gives out ranges of tasks; each thread gets scratch
// memory of its own, as the function of that name tells (weight_scratch for packing and reducing).
struct Kernels {
  const char* name;
  bool multiplies_pairs;  // of bfloat16
  bool amx;               // which multiplies matrices of them

  Layout (*make_layout)(int64_t groups, int64_t group_src, int64_t group_dst, bool pairs, bool amx);
  int64_t (*packed_weight_size)(const Layout&);  // of a tile
  int64_t (*packed_bias_size)(const Layout&);
  int64_t (*weight_scratch)(const Layout&);
  void (*pack_weight)(const Layout&, const Filters&, float* scratch, int64_t begin, int64_t end,
                      const PackedFilters& first);  // over bundles * tiles; `first`: of begin

  Scratch (*correlate_scratch)(const Correlation&);
  // over batch / images * bands * blocks * blocks of tiles
  void (*correlate)(const Correlation&, float* scratch, int64_t begin, int64_t end);

  int64_t (*wgrad_slice_size)(const WeightGradient&);  // of a unit
  Scratch (*wgrad_scratch)(const WeightGradient&);
  void (*wgrad)(const WeightGradient&, float* scratch, int64_t begin, int64_t end);         // over blocks * chunks
  void (*reduce_wgrad)(const WeightGradient&, float* scratch, int64_t begin, int64_t end);  // over units

  void (*pack_matrix)(const WeightMatrix&, bool pairs, float* packed, int64_t begin_tile, int64_t end_tile);
  int64_t (*product_scratch)(const PixelProduct&);
  void (*multiply)(const PixelProduct&, float* scratch, int64_t begin, int64_t end);  // over panels * tiles
  int64_t (*gradient_slice_size)(const PixelGradient&);
  int64_t (*gradient_scratch)(const PixelGradient&);
  void (*pixel_gradient)(const PixelGradient&, float* scratch, int64_t begin, int64_t end);  // over slices
  void (*reduce_gradient)(const PixelGradient&, int64_t begin, int64_t end);                 // over blocks * tiles of x

  Layout (*make_tile_layout)(int64_t groups, int64_t group_src, int64_t group_dst);
  int64_t (*tile_weight_size)(const Layout&);  // of a tile
  int64_t (*tile_weight_scratch)(const Layout&);
  void (*pack_tile_weights)(const Layout&, const Filters&, float* scratch, int64_t begin, int64_t end,
                            const PackedFilters&);  // over groups * tiles
  int64_t (*tile_product_scratch)(const TileProduct&);
  void (*multiply_tiles)(const TileProduct&, float* scratch, int64_t begin,
                         int64_t end);  // over panels * groups * tiles
  int64_t (*tile_gradient_slice)(const TileGradient&);
  int64_t (*tile_gradient_scratch)(const TileGradient&);
  void (*tile_gradient)(const TileGradient&, float* scratch, int64_t begin, int64_t end);  // over slices
  void (*store_tile_gradient)(const TileGradient&, int64_t begin, int64_t end);            // over blocks * grad_block

  void (*elementwise)(const Elementwise&, int64_t begin, int64_t end);  // over parts (NHWC), batch * channels (NCHW)

  int64_t (*max_pool_scratch)(const MaxPool&);
  void (*max_pool)(const MaxPool&, float* scratch, int64_t begin, int64_t end);  // over batch * bands * blocks
  int64_t (*max_pool_gradient_scratch)(const MaxPool&);
  void (*max_pool_gradient)(const MaxPool&, float* scratch, int64_t begin, int64_t end);  // likewise

  int64_t (*layout_change_scratch)(const LayoutChange&);
  void (*change_layout)(const LayoutChange&, float* scratch, int64_t begin, int64_t end);  // over rows * blocks
};

const Kernels* amx_bf16_kernels();  // null where the binary does not hold them
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace resnext::cpu
