// 3x3 convolutions by Winograd's algorithm: plan, transform the weights, run the kernels of the active instruction set.
#include "winograd_conv.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "capability.h"

namespace resnext::cpu {
namespace {

// Tiles that the widest kernel computes for so many: whole blocks, and a rest in pieces.
int64_t computed_tiles(int64_t tiles) {
  constexpr int64_t kBlock = 14;
  constexpr int64_t kPiece = 4;
  return tiles / kBlock * kBlock + std::min(kBlock, round_up(tiles % kBlock, kPiece));
}

// Rows of tiles of a panel: about as many tiles as leave room in the L2 cache, or as read weights seldom enough that
// come from memory (both measured), with little computed in vain. Panels of an odd height are whole images or end with
// one: a part of what is summed has a known number of pixels.
void cut_tiles(TileProduct& p) {
  constexpr int64_t kLargeWeight = 200000;  // of a group
  constexpr int64_t kMost = 112;
  const int64_t wanted = p.layout.group_src * p.layout.group_dst < kLargeWeight ? 28 : 84;
  const int64_t rows = tiles_of(p.dst.height);
  const int64_t columns = tiles_of(p.dst.width);
  const bool even = p.dst.height % 2 == 0;  // panels may then cross from one image to the next
  const bool small = rows * columns <= wanted;
  p.units = even || small ? 1 : p.dst.batch;
  p.unit_rows = p.dst.batch * rows / p.units;
  const int64_t step = even || !small ? 1 : rows;
  double least = 0;
  for (int64_t panel_rows = step; panel_rows <= p.unit_rows; panel_rows += step) {
    const int64_t tiles = panel_rows * columns;
    if (panel_rows > step && tiles > kMost) break;
    const int64_t rest = p.unit_rows % panel_rows * columns;
    const int64_t computed = p.unit_rows / panel_rows * computed_tiles(tiles) + computed_tiles(rest);
    const double cost = static_cast<double>(computed) * (1 + 0.002 * static_cast<double>(std::abs(tiles - wanted)));
    if (panel_rows == step || cost < least) {
      least = cost;
      p.panel_rows = panel_rows;
    }
  }
}

Parts parts_of(const TileProduct& p) {
  const int64_t rows = tiles_of(p.dst.height);
  const int64_t image_pixels = p.dst.height * p.dst.width;
  const int64_t panel_pixels =
      p.panel_rows % rows == 0 ? p.panel_rows / rows * image_pixels : 2 * p.panel_rows * p.dst.width;
  return {p.units, ceil_div(p.unit_rows, p.panel_rows), p.dst.batch * image_pixels / p.units, panel_pixels};
}

void pack(const Kernels& kernels, const Layout& layout, const Filters& filters, const PackedFilters& packed) {
  run_tasks(layout.groups * layout.tiles, copies_at_once(kernels.tile_weight_size(layout)),
            kernels.tile_weight_scratch(layout), [&](int64_t begin, int64_t end, float* scratch) {
              kernels.pack_tile_weights(layout, filters, scratch, begin, end, packed);
            });
}

}  // namespace

TileUse tile_use(const std::string& name) {
  if (name == "product") return TileUse::kProduct;
  if (name == "packed_product") return TileUse::kPackedProduct;
  STD_TORCH_CHECK(name == "gradient", "winograd_serves: expected product, packed_product or gradient, got ", name);
  return TileUse::kGradient;
}

// Against direct sums of ours, or in dense convolutions against oneDNN's, with operands that are not in the caches.
bool winograd_serves(const GroupedConvShape& shape, TileUse use) {
  if (shape.kernel != 3 || !shape.channels_last || shape.stride_h != 1 || shape.stride_w != 1) return false;
  const int64_t width = std::min(shape.group_in(), shape.group_out());
  const int64_t tiles = shape.batch * tiles_of(shape.out_height) * tiles_of(shape.out_width);
  const int64_t pixels = shape.batch * shape.out_height * shape.out_width;
  if (width < 40 || tiles < 16) return false;
  // Tiles whose pixels are all in the image save 20 of 36 multiplications.
  const double whole_tiles = static_cast<double>(9 * pixels - 16 * tiles) / 20;
  if (whole_tiles < 9) return false;
  if (shape.groups == 1) {
    switch (use) {
      case TileUse::kPackedProduct:
        return true;
      case TileUse::kProduct:  // packing weights takes as long as some tiles save
        return whole_tiles * 1000 >= static_cast<double>(shape.out_channels * shape.in_channels);
      case TileUse::kGradient:
        return whole_tiles >= 12;
    }
  }
  // What a tile and 16 x 16 channels save, in cycles: less in narrow groups, where transforms serve few channels.
  const double saved = whole_tiles * (160 - 5280 / static_cast<double>(width));
  return saved >= (use == TileUse::kGradient ? 7000 : 15000);
}

bool run_winograd(const TileOperands& operands, const ReadMap& read, WriteMap write, const GroupedConvShape& shape,
                  std::array<float*, 2> results) {
  constexpr int64_t kBlockChannels = 128;  // long pieces of pixels come faster
  const Kernels& kernels = active_kernels();
  TileProduct p{};
  p.src = operands.src;
  p.dst = operands.dst;
  p.read = read;
  p.write = write;
  p.layout = kernels.make_tile_layout(shape.groups, p.src.channels / shape.groups, p.dst.channels / shape.groups);
  p.block = std::clamp<int64_t>(kBlockChannels / p.layout.group_src, 1, shape.groups);
  cut_tiles(p);
  const Parts parts = parts_of(p);
  const Buffer partial = takes_sums(write) ? allocate_partial(parts, p.dst.channels) : nullptr;
  p.write.partial = partial.get();
  p.write.channels = p.dst.channels;

  const int64_t tiles = shape.groups * p.layout.tiles;
  const bool packs = operands.packed == nullptr;
  const Buffer weight = packs ? allocate(tiles * kernels.tile_weight_size(p.layout)) : nullptr;
  const Buffer bias = allocate_zeros(tiles * kTileChannels);
  p.packed = {packs ? weight.get() : const_cast<float*>(operands.packed), bias.get()};
  if (packs) pack(kernels, p.layout, operands.filters, p.packed);
  int not_finite = 0;
  p.not_finite = &not_finite;
  // A source is transformed again by every piece of its block: few pieces.
  const int64_t panels = parts.count();
  const int64_t block_tiles = p.block * p.layout.tiles;
  const int64_t at_once = std::clamp<int64_t>(panels * tiles / (2 * wanted_tasks()), 1, block_tiles);
  run_tasks(panels * tiles, ceil_div(block_tiles, ceil_div(block_tiles, at_once)), kernels.tile_product_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.multiply_tiles(p, scratch, begin, end); });
  if (not_finite != 0) return false;
  merge_results(p.write, parts, results);
  return true;
}

bool run_winograd_gradient(TileGradient g, const GroupedConvShape& shape) {
  // By the problem alone, so that the result does not depend on the number of threads. A task's partial results and
  // panels stay in the L2 cache; chunks have enough tiles to be worth adding up.
  constexpr int64_t kWantedTasks = 16;
  constexpr int64_t kGradBlock = 128;
  constexpr int64_t kXBlock = 64;
  constexpr int64_t kPanelTiles = 28;
  constexpr int64_t kTilesPerChunk = 4 * kPanelTiles;
  const Kernels& kernels = active_kernels();
  g.group_in = shape.group_in();
  g.group_out = shape.group_out();
  g.grad_block = std::min(g.group_out, kGradBlock);
  g.x_block = std::min(g.group_in, kXBlock);
  const int64_t columns = tiles_of(shape.out_width);
  const int64_t rows = shape.batch * tiles_of(shape.out_height);
  g.panel_rows = std::clamp<int64_t>(kPanelTiles / columns, 1, rows);
  const int64_t blocks = shape.groups * ceil_div(g.group_out, g.grad_block) * ceil_div(g.group_in, g.x_block);
  g.chunks = std::clamp<int64_t>(std::min(rows, rows * columns / kTilesPerChunk), 1, ceil_div(kWantedTasks, blocks));
  const Buffer partial = allocate(g.chunks * blocks * kernels.tile_gradient_slice(g));
  g.partial = partial.get();
  int not_finite = 0;
  g.not_finite = &not_finite;
  run_tasks(g.chunks * blocks, 1, kernels.tile_gradient_scratch(g),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.tile_gradient(g, scratch, begin, end); });
  torch::stable::parallel_for(0, blocks * g.grad_block, copies_at_once(g.x_block * 16 * g.chunks),
                              [&](int64_t begin, int64_t end) { kernels.store_tile_gradient(g, begin, end); });
  return not_finite == 0;
}

const float* packed_tile_data(const OptionalTensor& packed, int64_t in_channels, int64_t out_channels, const char* op) {
  const Kernels& kernels = active_kernels();
  const Layout layout = kernels.make_tile_layout(1, in_channels, out_channels);
  const std::array<int64_t, 2> sizes = {layout.tiles, kernels.tile_weight_size(layout)};
  return packed_weight(packed, ScalarType::Float, sizes, op);
}

void pack_winograd(const Tensor& weight, const Tensor& packed) {
  constexpr const char* kOp = "pack_winograd";
  const Filters filters = filters_to_pack(weight, kOp);
  float* data = const_cast<float*>(packed_tile_data(packed, weight.size(1), weight.size(0), kOp));
  const Kernels& kernels = active_kernels();
  pack(kernels, kernels.make_tile_layout(1, weight.size(1), weight.size(0)), filters, {data, nullptr});
}

}  // namespace resnext::cpu
