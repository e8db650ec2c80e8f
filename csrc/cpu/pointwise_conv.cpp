// The 1x1 convolutions of the CPU operators: plan, pack the weights, run the kernels of the active instruction set.
#include "pointwise_conv.h"

#include <algorithm>
#include <cstring>

#include "capability.h"

namespace resnext::cpu {
namespace {

constexpr int64_t kPanelFloats = 88 * 1024;  // of a source: a third of an L2 cache of 1 MiB

// Pixels of a panel of `lanes` channels: many enough that weights are not read too often, few enough for the cache, and
// whole blocks of the widest kernel. All panels are of about one size.
int64_t pixels_of_panel(int64_t pixels, int64_t lanes, bool amx) {
  const int64_t block = amx ? 32 : 14;
  const int64_t most = std::clamp<int64_t>(kPanelFloats / lanes, 4 * block, 6 * block) / block * block;
  return round_up(ceil_div(pixels, ceil_div(pixels, most)), block);
}

GridImage grid_image(const Tensor& tensor, bool strided, const GroupedConvShape& shape) {
  const Image image = image_of(tensor, /*channels_last=*/true);
  return strided ? GridImage{image, shape.stride_h, shape.stride_w} : GridImage{image, 1, 1};
}

// The input gradient of a strided convolution is zero where no output looked.
void clear(const Tensor& tensor) {
  constexpr int64_t kGrain = 1 << 18;
  char* data = static_cast<char*>(tensor.data_ptr());
  torch::stable::parallel_for(0, tensor.numel() * size_of(dtype_of(tensor)), kGrain,
                              [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
}

std::array<int64_t, 3> packed_sizes(int64_t src_channels, int64_t dst_channels, bool pairs) {
  const int64_t lanes = pairs ? src_channels / 2 : src_channels;
  return {ceil_div(dst_channels, kTileChannels), round_up(lanes, kPanelLanes), kTileChannels};
}

void pack(const Kernels& kernels, const WeightMatrix& weight, bool pairs, float* packed) {
  const auto [tiles, lanes, tile_channels] = packed_sizes(weight.src_channels, weight.dst_channels, pairs);
  torch::stable::parallel_for(
      0, tiles, copies_at_once(lanes * tile_channels),
      [&](int64_t begin, int64_t end) { kernels.pack_matrix(weight, pairs, packed, begin, end); });
}

}  // namespace

void run_pointwise(const PointwiseOperands& operands, const ReadMap& read, WriteMap write,
                   const GroupedConvShape& shape, std::array<float*, 2> results) {
  const Kernels& kernels = active_kernels();
  PixelProduct p{};
  p.src = grid_image(operands.src, !operands.transposed, shape);
  p.dst = grid_image(operands.dst, operands.transposed, shape);
  p.grid = {shape.batch, shape.out_height, shape.out_width};
  p.read = read;
  p.write = write;
  const int64_t channels = p.dst.image.channels;
  p.weight = {operands.weight.data_ptr(), dtype_of(operands.weight), p.src.image.dtype,
              operands.transposed,        p.src.image.channels,      channels};
  const int64_t pixels = shape.batch * shape.out_height * shape.out_width;
  p.pairs = channels_by_pairs(kernels, p.src.image.dtype, p.src.image.channels);
  p.amx = p.pairs && kernels.amx;
  const auto [tiles, lanes, tile_channels] = packed_sizes(p.src.image.channels, channels, p.pairs);
  p.panel_pixels = pixels_of_panel(pixels, lanes, p.amx);
  const int64_t panels = ceil_div(pixels, p.panel_pixels);

  Buffer packed;
  p.packed = operands.packed;
  // A single panel's tiles are packed where they are used; not so transposed ones, which are quicker to read together.
  if (p.packed == nullptr && (panels > 1 || operands.transposed)) {
    packed = allocate(tiles * lanes * tile_channels);
    pack(kernels, p.weight, p.pairs, packed.get());
    p.packed = packed.get();
  }
  const bool sparse = p.dst.step_h != 1 || p.dst.step_w != 1;
  if (sparse && write.kind != WriteMap::kAffineAdd) clear(operands.dst);  // else added to what is there

  const Parts parts = {1, panels, pixels, p.panel_pixels};
  const Buffer partial = takes_sums(write) ? allocate_partial(parts, channels) : nullptr;
  p.write.partial = partial.get();
  p.write.channels = channels;
  // A panel is read again by every piece of its tiles: few pieces.
  const int64_t at_once = std::clamp<int64_t>(panels * tiles / (2 * wanted_tasks()), 1, tiles);
  run_tasks(panels * tiles, at_once, kernels.product_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.multiply(p, scratch, begin, end); });
  merge_results(p.write, parts, results);
}

void run_pointwise_gradient(const Tensor& grad, const ReadMap& read_grad, const Tensor& x, const ReadMap& read_x,
                            const Tensor& dw, const GroupedConvShape& shape) {
  // By the problem alone, so that the result does not depend on the number of threads. A task's partial results and
  // panels stay in the L2 cache; chunks have enough pixels to be worth adding up.
  constexpr int64_t kWantedTasks = 16;
  constexpr int64_t kGradBlock = 256;
  constexpr int64_t kXBlock = 512;
  constexpr int64_t kPanelPixels = 64;
  constexpr int64_t kAmxPanelPixels = 256;  // sums, which are in memory, are loaded and stored once for so many
  constexpr int64_t kPixelsPerChunk = 8 * kPanelPixels;
  const Kernels& kernels = active_kernels();
  PixelGradient g{};
  g.grad = grid_image(grad, /*strided=*/false, shape);
  g.x = grid_image(x, /*strided=*/true, shape);
  g.grid = {shape.batch, shape.out_height, shape.out_width};
  g.read_grad = read_grad;
  g.read_x = read_x;
  g.grad_block = std::min(shape.out_channels, kGradBlock);
  g.x_block = std::min(shape.in_channels, kXBlock);
  g.pairs = by_pairs(kernels, g.x.image.dtype);
  g.amx = g.pairs && kernels.amx;
  g.panel_pixels = g.amx ? kAmxPanelPixels : kPanelPixels;
  g.dw = dw.data_ptr();
  g.dtype = dtype_of(dw);
  const int64_t blocks = ceil_div(shape.out_channels, g.grad_block) * ceil_div(shape.in_channels, g.x_block);
  const int64_t pixels = shape.batch * shape.out_height * shape.out_width;
  g.chunks = std::clamp<int64_t>(pixels / kPixelsPerChunk, 1, ceil_div(kWantedTasks, blocks));
  const Buffer partial = g.chunks > 1 ? allocate(g.chunks * blocks * kernels.gradient_slice_size(g)) : nullptr;
  g.partial = partial.get();
  run_tasks(g.chunks * blocks, 1, kernels.gradient_scratch(g),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.pixel_gradient(g, scratch, begin, end); });
  if (g.chunks == 1) return;
  torch::stable::parallel_for(0, blocks * ceil_div(g.x_block, kTileChannels), 1,
                              [&](int64_t begin, int64_t end) { kernels.reduce_gradient(g, begin, end); });
}

const float* packed_data(const OptionalTensor& packed, const Tensor& weight, Dtype images, const char* op) {
  const bool pairs = channels_by_pairs(active_kernels(), images, weight.size(1));
  const auto sizes = packed_sizes(weight.size(1), weight.size(0), pairs);
  if (!pairs) return packed_weight(packed, ScalarType::Float, sizes, op);
  const std::array<int64_t, 4> pair_sizes = {sizes[0], sizes[1], sizes[2], 2};
  return packed_weight(packed, ScalarType::BFloat16, pair_sizes, op);
}

void pack_pointwise(const Tensor& weight, const Tensor& packed) {
  constexpr const char* kOp = "pack_pointwise";
  const Checks check(kOp);
  check.dtype(weight, "weight");
  const Sizes4 sizes = check.sizes4(weight, "weight", "(C_out, C_in, 1, 1)");
  check.sizes(weight, "weight", {sizes[0], sizes[1], 1, 1});
  check.dense(weight, "weight", /*channels_last=*/true);
  const Dtype dtype = dtype_of(weight);
  float* data = const_cast<float*>(packed_data(packed, weight, dtype, kOp));
  const Kernels& kernels = active_kernels();
  const WeightMatrix matrix = {weight.data_ptr(), dtype, dtype, /*transposed=*/false, sizes[1], sizes[0]};
  pack(kernels, matrix, channels_by_pairs(kernels, matrix.dtype, sizes[1]), data);
}

}  // namespace resnext::cpu
