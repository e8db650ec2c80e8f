// The 3x3 convolution with stride 1 by Winograd's minimal filtering, in NHWC (Lavin and Gray, "Fast algorithms for
// convolutional neural networks", 2016): 16 multiplications per 2 x 2 pixels and pair of channels instead of 36. With '
// for transposition, and * for products position by position,
//
//   results = A' [(G weight G') * (B' source B)] A       F(2 x 2, 3 x 3): forward, and input gradient
//   dw = C' [(H grad H') * (B' x B)] C                   F(3 x 3, 2 x 2): weight gradient, summed over tiles
//
// A tile is 2 x 2 pixels of the results (of grad), which see 4 x 4 of the source (of x), from one before on. For each
// of the 16 positions the sums over source channels (over tiles) are matrix products, by the inner loops of
// pointwise.inl.h. Tiles are transformed a panel at a time, which stays in the L2 cache.
//
// fp32 accumulation, in an order that depends on neither threads nor instruction sets. In root mean square rounding
// errors are of the size of direct sums', which have more terms; but neighbours' products cancel here, so that a value
// far larger than those beside it leaves its rounding error in results that should not see it (where its weight is
// zero). Infinity becomes NaN in sums and differences, and spreads over the taps of dw: `not_finite` tells that there
// was such a result, and that the call must be computed in another way.

constexpr int64_t kPositions = 16;
constexpr int64_t kApart = 16;  // floats: rows of positions would otherwise compete for a few sets of the caches

// --- tiles of an image ---

// Rows of tiles [first_row, first_row + rows) of a batch. Of the channels from c on, `count` times `width` are laid
// apart as [which][position][block of tiles][vector of channels][tile of the block][lane], zero in lanes and tiles that
// are not there.
struct TilePanel {
  const Image& image;
  const ReadMap& read;
  int64_t first_row, rows;
  int64_t c, width, count;
  int64_t lanes;  // `width` rounded up
  int64_t block;  // tiles
  int64_t step;   // floats from one position to the next
};

// B' times a line of the source.
RESNEXT_INLINE void transform_line(const Vec (&d)[4], Vec (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}
// H times a line of grad.
RESNEXT_INLINE void transform_line(const Vec (&d)[2], Vec (&to)[4]) {
  to[0] = d[0];
  to[1] = (d[0] + d[1]) * 0.5f;
  to[2] = (d[0] - d[1]) * 0.5f;
  to[3] = d[1];
}

// Which pixels of a tile are inside the image.
struct TileBounds {
  bool rows[4], columns[4];
};

// kSide: pixels of a tile's side, 4 of a source or 2 of grad; `at`: element of its first pixel.
template <int kSide, bool kInside, bool kWhole, class T, template <class, class> class Map>
RESNEXT_INLINE void transform_vector(const T* data, const T* other, int64_t at, const ReadMap& read,
                                     ChannelLanes channels, int64_t row_stride, int64_t pixel_stride,
                                     const TileBounds& inside, float* to, int64_t step) {
  const Map<T, ChannelLanes> map(read, channels);
  Vec columns[kSide][4];
  RESNEXT_UNROLL
  for (int column = 0; column < kSide; ++column) {
    Vec d[kSide];
    RESNEXT_UNROLL
    for (int row = 0; row < kSide; ++row) {
      d[row] = Vec{};
      if (!kInside && !(inside.rows[row] && inside.columns[column])) continue;
      const int64_t offset = at + row * row_stride + column * pixel_stride;
      d[row] = mapped_lanes<kWhole>(map, data, other, offset, channels.count);
    }
    transform_line(d, columns[column]);
  }
  RESNEXT_UNROLL
  for (int row = 0; row < 4; ++row) {
    Vec line[kSide], made[4];
    RESNEXT_UNROLL
    for (int column = 0; column < kSide; ++column) line[column] = columns[column][row];
    transform_line(line, made);
    RESNEXT_UNROLL
    for (int column = 0; column < 4; ++column) store(to + (row * 4 + column) * step, made[column]);
  }
}

// The tile whose first pixel is (h, w) of image n, perhaps outside.
template <int kSide, bool kInside, class T, template <class, class> class Map>
void transform_tile(const TilePanel& p, int64_t n, int64_t h, int64_t w, const TileBounds& inside, float* to) {
  const Image& image = p.image;
  const ReadMap read = p.read;
  const T* data = static_cast<const T*>(image.data);
  const T* other = static_cast<const T*>(read.other);
  const int64_t pixel_stride = image.channels;
  const int64_t row_stride = image.width * pixel_stride;
  const int64_t offset = ((n * image.height + h) * image.width + w) * pixel_stride;
  const int64_t step = p.step;
  for (int64_t which = 0; which < p.count; ++which, to += kPositions * step) {
    const int64_t c = p.c + which * p.width;
    float* vector = to;
    for (int64_t i = 0; i < p.lanes; i += kLanes, vector += p.block * kLanes) {
      const ChannelLanes channels = {c + i, i < p.width ? min_of(kLanes, p.width - i) : 0};
      const int64_t at = offset + channels.c;
      if (channels.count == kLanes) {
        transform_vector<kSide, kInside, true, T, Map>(data, other, at, read, channels, row_stride, pixel_stride,
                                                       inside, vector, step);
      } else {
        transform_vector<kSide, kInside, false, T, Map>(data, other, at, read, channels, row_stride, pixel_stride,
                                                        inside, vector, step);
      }
    }
  }
}

RESNEXT_INLINE float* tile_of_panel(const TilePanel& p, int64_t tile, float* panel) {
  return panel + tile / p.block * p.block * p.lanes + tile % p.block * kLanes;
}

template <int kSide, class T, template <class, class> class Map>
void transform_panel_as(const TilePanel& p, float* panel) {
  constexpr int64_t kBefore = kSide == 4 ? 1 : 0;
  const Image& image = p.image;
  const int64_t tile_rows = tiles_of(image.height);
  int64_t tile = 0;
  for (int64_t row = p.first_row; row < p.first_row + p.rows; ++row) {
    const int64_t n = row / tile_rows;
    const int64_t h = row % tile_rows * 2 - kBefore;
    TileBounds inside;
    for (int i = 0; i < kSide; ++i) inside.rows[i] = h + i >= 0 && h + i < image.height;
    const bool all_rows = h >= 0 && h + kSide <= image.height;
    for (int64_t w = -kBefore; w < image.width - kBefore; w += 2, ++tile) {
      float* to = tile_of_panel(p, tile, panel);
      if (all_rows && w >= 0 && w + kSide <= image.width) {
        transform_tile<kSide, true, T, Map>(p, n, h, w, inside, to);
        continue;
      }
      for (int i = 0; i < kSide; ++i) inside.columns[i] = w + i >= 0 && w + i < image.width;
      transform_tile<kSide, false, T, Map>(p, n, h, w, inside, to);
    }
  }
  for (; tile % p.block != 0; ++tile) {
    float* to = tile_of_panel(p, tile, panel);
    for (int64_t position = 0; position < p.count * kPositions; ++position, to += p.step) {
      for (int64_t i = 0; i < p.lanes; i += kLanes) store(to + i * p.block, Vec{});
    }
  }
}

template <int kSide>
void transform_panel(const TilePanel& p, float* panel) {
  with_float_type(p.image.dtype, [&](auto value) {
    with_read_map(p.read,
                  [&](auto map) { transform_panel_as<kSide, decltype(value), decltype(map)::template Map>(p, panel); });
  });
}

// --- weights: [group][tile of kTileChannels][position][source channel][channel of the tile], whatever the instruction
// set ---

Layout make_tile_layout(int64_t groups, int64_t group_src, int64_t group_dst) {
  Layout layout{};
  layout.groups = layout.bundles = groups;
  layout.group_src = layout.packed_src = layout.src_channels = group_src;
  layout.group_dst = layout.dst_channels = group_dst;
  layout.all_src = groups * group_src;
  layout.all_dst = groups * group_dst;
  layout.shared = layout.merged = 1;
  layout.src_lanes = round_up(group_src, kLanes);
  layout.tile_vectors = kTileChannels / kLanes;
  layout.tiles = ceil_div(group_dst, kTileChannels);
  return layout;
}

RESNEXT_INLINE int64_t position_weights(const Layout& layout) { return layout.group_src * kTileChannels; }
int64_t tile_weight_size(const Layout& layout) { return kPositions * position_weights(layout); }

int64_t tile_weight_scratch(const Layout& layout) { return packed_weight_size(layout); }

// G times three weights.
RESNEXT_INLINE void transform_weights(const Vec (&w)[3], Vec (&to)[4]) {
  const Vec even = (w[0] + w[2]) * 0.5f;
  const Vec odd = w[1] * 0.5f;
  to[0] = w[0];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = w[2];
}

// Over groups * tiles. Biases, if wanted: kTileChannels of each tile.
void pack_tile_weights(const Layout& layout, const Filters& f, float* scratch, int64_t begin, int64_t end,
                       const PackedFilters& packed) {
  float* direct = scratch;
  const int64_t step = position_weights(layout);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / layout.tiles;
    const int64_t tile = task % layout.tiles;
    with_weight_type(f.dtype, f.images, [&](auto value) {
      pack_tiles<false, decltype(value)>(layout, f, nullptr, group, tile, tile + 1, direct);
    });
    float* to = packed.weight + task * tile_weight_size(layout);
    for (int64_t i = 0; i < layout.group_src; ++i) {
      for (int64_t lane = 0; lane < kTileChannels; lane += kLanes) {
        Vec rows[3][4];
        RESNEXT_UNROLL
        for (int r = 0; r < 3; ++r) {
          const int64_t row = f.transposed ? 2 - r : r;
          const float* from = direct + row * packed_row_size(layout) + i * 3 * kTileChannels + lane;
          Vec taps[3];
          RESNEXT_UNROLL
          for (int s = 0; s < 3; ++s) taps[s] = load(from + s * kTileChannels);
          transform_weights(taps, rows[r]);
        }
        RESNEXT_UNROLL
        for (int s = 0; s < 4; ++s) {
          const Vec column[3] = {rows[0][s], rows[1][s], rows[2][s]};
          Vec made[4];
          transform_weights(column, made);
          RESNEXT_UNROLL
          for (int r = 0; r < 4; ++r) store(to + (r * 4 + s) * step + i * kTileChannels + lane, made[r]);
        }
      }
    }
    if (packed.bias != nullptr) pack_bias(layout, f, group, tile, packed.bias + task * kTileChannels);
  }
}

// --- forward, and input gradient ---

RESNEXT_INLINE int64_t tile_columns(const TileProduct& p) { return tiles_of(p.dst.width); }
RESNEXT_INLINE int64_t panel_tiles(const TileProduct& p) {
  return round_up(p.panel_rows * tile_columns(p), kProductPixels);
}
// Floats from one position to the next.
RESNEXT_INLINE int64_t source_step(const TileProduct& p) { return panel_tiles(p) * p.layout.src_lanes + kApart; }
RESNEXT_INLINE int64_t sums_step(const TileProduct& p) { return panel_tiles(p) * kTileChannels + kApart; }

int64_t tile_product_scratch(const TileProduct& p) {
  return kPositions * (p.block * source_step(p) + sums_step(p)) + 2 * p.dst.width * kTileChannels;
}

// A' times a line of sums.
RESNEXT_INLINE void transform_sums(const Vec (&m)[4], Vec (&to)[2]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}

// One vector of channels of the results of a row of tiles, as [row][column of the image][channel of the tile]; `sums`
// are those of the first tile. Returns NaN in lanes where one is not finite.
RESNEXT_INLINE Vec transform_results(const float* sums, int64_t step, int64_t rows, int64_t width, Vec bias,
                                     float* to) {
  Vec check{};
  for (int64_t w = 0; w < width; w += 2, sums += kTileChannels) {
    Vec columns[4][2];
    RESNEXT_UNROLL
    for (int column = 0; column < 4; ++column) {
      Vec m[4];
      RESNEXT_UNROLL
      for (int row = 0; row < 4; ++row) m[row] = load(sums + (row * 4 + column) * step);
      transform_sums(m, columns[column]);
    }
    RESNEXT_UNROLL
    for (int row = 0; row < 2; ++row) {
      if (row >= rows) continue;
      const Vec m[4] = {columns[0][row], columns[1][row], columns[2][row], columns[3][row]};
      Vec made[2];
      transform_sums(m, made);
      RESNEXT_UNROLL
      for (int column = 0; column < 2; ++column) {
        if (w + column >= width) continue;
        const Vec result = made[column] + bias;
        check += result * 0.0f;
        store(to + (row * width + w + column) * kTileChannels, result);
      }
    }
  }
  return check;
}

// Tile number `task` of all groups' channels, of a panel whose source is transformed.
void multiply_tile(const TileProduct& p, const float* panel, int64_t first_row, int64_t rows, int64_t task,
                   WriteMap write, float* sums, float* results) {
  const Layout& layout = p.layout;
  const Image& dst = p.dst;
  const int64_t lanes = task % layout.tiles * kTileChannels;
  const int64_t channels = min_of(kTileChannels, layout.group_dst - lanes);
  const int64_t tiles = rows * tile_columns(p);
  for (int64_t position = 0; position < kPositions; ++position) {
    const float* weight = p.packed.weight + task * tile_weight_size(layout) + position * position_weights(layout);
    for (int64_t tile = 0; tile < tiles; tile += kProductPixels) {
      const float* source = panel + position * source_step(p) + tile * layout.src_lanes;
      float* to = sums + position * sums_step(p) + tile * kTileChannels;
      for (int64_t lane = 0; lane < channels; lane += kProductLanes) {
        if (channels - lane > kLanes) {
          product_pixels<FloatTerms, kProductVectors>(source, weight + lane, layout.group_src, kTileChannels,
                                                      tiles - tile, to + lane);
        } else {
          product_pixels<FloatTerms, 1>(source, weight + lane, layout.group_src, kTileChannels, tiles - tile,
                                        to + lane);
        }
      }
    }
  }
  const int64_t tile_rows = tiles_of(dst.height);
  Vec check{};
  for (int64_t row = first_row; row < first_row + rows; ++row, sums += tile_columns(p) * kTileChannels) {
    const int64_t n = row / tile_rows;
    const int64_t h = row % tile_rows * 2;
    const int64_t image_rows = min_of(2, dst.height - h);
    for (int64_t lane = 0; lane < channels; lane += kLanes) {
      const Vec bias = load(p.packed.bias + task * kTileChannels + lane);
      check += transform_results(sums + lane, sums_step(p), image_rows, dst.width, bias, results + lane);
    }
    const PanelPart part = {(n * dst.height + h) * dst.width, image_rows * dst.width,
                            task / layout.tiles * layout.group_dst + lanes, channels};
    write_run(dst, write, part, kTileChannels, results);
    write.before += part.pixels;
  }
  tell_not_finite(check, p.not_finite);
}

void multiply_tiles(const TileProduct& p, float* scratch, int64_t begin, int64_t end) {
  const Layout& layout = p.layout;
  const int64_t tasks = layout.groups * layout.tiles;  // of a panel
  const int64_t panels = ceil_div(p.unit_rows, p.panel_rows);
  const int64_t panel_size = kPositions * source_step(p);  // of a group
  float* sums = scratch + p.block * panel_size;
  float* results = sums + kPositions * sums_step(p);
  int64_t read_panel = -1, read_block = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / tasks;
    const int64_t group = task % tasks / layout.tiles;
    const int64_t block = group / p.block;
    const int64_t in_unit = panel % panels * p.panel_rows;
    const int64_t first_row = panel / panels * p.unit_rows + in_unit;
    const int64_t rows = min_of(p.panel_rows, p.unit_rows - in_unit);
    if (panel != read_panel || block != read_block) {
      read_panel = panel;
      read_block = block;
      const int64_t groups = min_of(p.block, layout.groups - block * p.block);
      transform_panel<4>({p.src, p.read, first_row, rows, block * p.block * layout.group_src, layout.group_src, groups,
                          layout.src_lanes, kProductPixels, source_step(p)},
                         scratch);
    }
    WriteMap write = p.write;
    if (write.partial != nullptr) write.partial += panel * kPartialSums * p.dst.channels;
    multiply_tile(p, scratch + group % p.block * panel_size, first_row, rows, task % tasks, write, sums, results);
  }
}

// --- weight gradient ---

constexpr int64_t kGradientTiles = 56;  // summed together, of a panel; a multiple of kGradientPixels

RESNEXT_INLINE int64_t tile_grad_lanes(const TileGradient& g) { return round_up(g.grad_block, kPanelLanes); }
RESNEXT_INLINE int64_t tile_x_lanes(const TileGradient& g) { return round_up(g.x_block, kTileChannels); }
RESNEXT_INLINE int64_t gradient_tiles(const TileGradient& g) {
  return round_up(g.panel_rows * tiles_of(g.grad.width), kGradientPixels);
}

// A slice: [position], then as of pixel_gradient.
RESNEXT_INLINE int64_t position_slice(const TileGradient& g) { return tile_grad_lanes(g) * tile_x_lanes(g) + kApart; }
int64_t tile_gradient_slice(const TileGradient& g) { return kPositions * position_slice(g); }

RESNEXT_INLINE int64_t tile_panel_size(const TileGradient& g, int64_t lanes) {
  return kPositions * (gradient_tiles(g) * lanes + kApart);
}
int64_t tile_gradient_scratch(const TileGradient& g) {
  return tile_panel_size(g, tile_x_lanes(g)) + tile_panel_size(g, tile_grad_lanes(g));
}

// Which channels a block has, of a group.
struct GradientBlock {
  int64_t group, grad_c, grad_channels, x_c, x_channels;
};
RESNEXT_INLINE GradientBlock gradient_block(const TileGradient& g, int64_t block) {
  const int64_t x_blocks = ceil_div(g.group_in, g.x_block);
  const int64_t grad_blocks = ceil_div(g.group_out, g.grad_block);
  const int64_t x_c = block % x_blocks * g.x_block;
  const int64_t grad_c = block / x_blocks % grad_blocks * g.grad_block;
  return {block / x_blocks / grad_blocks, grad_c, min_of(g.grad_block, g.group_out - grad_c), x_c,
          min_of(g.x_block, g.group_in - x_c)};
}
RESNEXT_INLINE int64_t gradient_blocks(const TileGradient& g) {
  return g.x.channels / g.group_in * ceil_div(g.group_in, g.x_block) * ceil_div(g.group_out, g.grad_block);
}

void tile_gradient(const TileGradient& g, float* scratch, int64_t begin, int64_t end) {
  float* x = scratch;
  float* grad = scratch + tile_panel_size(g, tile_x_lanes(g));
  const int64_t rows = g.grad.batch * tiles_of(g.grad.height);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / gradient_blocks(g);
    const GradientBlock b = gradient_block(g, task % gradient_blocks(g));
    float* slice = g.partial + task * tile_gradient_slice(g);
    const int64_t chunk_first = rows * chunk / g.chunks;
    const int64_t chunk_end = rows * (chunk + 1) / g.chunks;
    for (int64_t first = chunk_first; first < chunk_end; first += g.panel_rows) {
      const int64_t panel_rows = min_of(g.panel_rows, chunk_end - first);
      const int64_t tiles = round_up(panel_rows * tiles_of(g.grad.width), kGradientPixels);
      const int64_t x_step = tiles * tile_x_lanes(g) + kApart;
      const int64_t grad_step = tiles * tile_grad_lanes(g) + kApart;
      transform_panel<4>({g.x, g.read_x, first, panel_rows, b.group * g.group_in + b.x_c, b.x_channels, 1,
                          tile_x_lanes(g), tiles, x_step},
                         x);
      transform_panel<2>({g.grad, g.read_grad, first, panel_rows, b.group * g.group_out + b.grad_c, b.grad_channels, 1,
                          tile_grad_lanes(g), tiles, grad_step},
                         grad);
      for (int64_t position = 0; position < kPositions; ++position) {
        float* to = slice + position * position_slice(g);
        for (int64_t tile = 0; tile < tiles; tile += kGradientTiles) {
          const float* grads = grad + position * grad_step + tile * kLanes;
          const float* xs = x + position * x_step + tile * kLanes;
          for (int64_t i = 0; i < b.x_channels; i += kProductLanes) {
            for (int64_t o = 0; o < b.grad_channels; o += kGradientChannels) {
              gradient_tile<FloatTerms>(grads + o / kLanes * kLanes * tiles + o % kLanes, xs + i * tiles,
                                        min_of(kGradientTiles, tiles - tile), tiles * kLanes,
                                        /*adds=*/first != chunk_first || tile > 0,
                                        to + i * tile_grad_lanes(g) + o * kProductLanes);
            }
          }
        }
      }
    }
  }
}

// C' times a line of sums.
RESNEXT_INLINE void transform_gradient(const Vec (&m)[4], Vec (&to)[3]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2];
  to[2] = m[1] + m[2] - m[3];
}

// Sums the chunks of some rows of blocks, in order, and stores them as (C_out, C_in / groups, 3, 3). Over blocks *
// grad_block.
template <class T>
void store_tile_gradient_as(const TileGradient& g, int64_t begin, int64_t end) {
  const int64_t chunk_size = gradient_blocks(g) * tile_gradient_slice(g);
  Vec check{};
  for (int64_t task = begin; task < end; ++task) {
    const GradientBlock b = gradient_block(g, task / g.grad_block);
    const int64_t o = task % g.grad_block;
    if (o >= b.grad_channels) continue;
    const float* slice = g.partial + task / g.grad_block * tile_gradient_slice(g);
    T* filter = static_cast<T*>(g.dw) + (b.group * g.group_out + b.grad_c + o) * g.group_in * 9;
    for (int64_t i = 0; i < b.x_channels; i += kLanes) {
      const float* from =
          slice + i / kProductLanes * kProductLanes * tile_grad_lanes(g) + o * kProductLanes + i % kProductLanes;
      Vec columns[4][3];
      RESNEXT_UNROLL
      for (int column = 0; column < 4; ++column) {
        Vec m[4];
        RESNEXT_UNROLL
        for (int row = 0; row < 4; ++row) {
          const float* sums = from + (row * 4 + column) * position_slice(g);
          m[row] = load(sums);
          for (int64_t chunk = 1; chunk < g.chunks; ++chunk) m[row] += load(sums + chunk * chunk_size);
        }
        transform_gradient(m, columns[column]);
      }
      Vec taps[9];
      RESNEXT_UNROLL
      for (int row = 0; row < 3; ++row) {
        const Vec m[4] = {columns[0][row], columns[1][row], columns[2][row], columns[3][row]};
        Vec made[3];
        transform_gradient(m, made);
        RESNEXT_UNROLL
        for (int s = 0; s < 3; ++s) {
          taps[row * 3 + s] = made[s];
          check += made[s] * 0.0f;
        }
      }
      store_taps(taps, g.strides, filter, b.x_c + i, min_of(kLanes, b.x_channels - i));
    }
  }
  tell_not_finite(check, g.not_finite);
}

void store_tile_gradient(const TileGradient& g, int64_t begin, int64_t end) {
  with_float_type(g.dtype, [&](auto value) { store_tile_gradient_as<decltype(value)>(g, begin, end); });
}
