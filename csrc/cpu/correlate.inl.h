// Forward pass and input gradient: dst = correlation of src with the packed weights (see kernels.h for the phases).
//
// A task walks the rows of a band of one image, for a block of bundles, or some tiles of a bundle. Source rows are read
// once into a ring of panels per bundle whose borders are zero, so that no loop below knows an image border: missing
// rows are left out of the list of sources, missing columns are zeros. A row kernel then makes one destination row of
// one tile, `kPixels` pixels at a time in registers: every source value is loaded once for all taps of its row. Weights
// that the caches nearby do not hold meet several rows before the next tile's come.
//
// fp32 accumulation, in an order that depends on neither threads nor bands: rows, then source channels, then columns;
// in narrow images every column's products by themselves first.

// One source row and the weights it meets; x points at the column of the first pixel's first tap.
struct Source {
  const float* x;
  const float* weight;
};

struct RowArgs {
  Source sources[3];
  int count;
  int64_t depth;  // source channels of a group, or pairs of them
  int64_t src_lanes;
  const float* bias;
  void* out;           // floats, or bfloat16
  bool narrow;         // the latter
  int64_t out_stride;  // elements from one pixel to the next
  int64_t pixels;
  int64_t next_row;    // elements from a pixel to the same one a row further down, to be prefetched
  IntVec order;        // of the lanes that are stored
};

// A row kernel writes whole blocks: unless they fit the row, it reads and writes past its end.
struct RowKernel {
  void (*run)(const RowArgs&);
  int64_t block_pixels;
};

// The pixel of a block that tap k of source column `column` gives to, or a negative number.
template <int kStep, int kPhases>
constexpr int pixel_of(int column, int k) {
  if (kPhases == 2) return 2 * column + k - 1;
  return column >= k && (column - k) % kStep == 0 ? (column - k) / kStep : -1;
}

template <class Terms, int kStep, int kPhases, int kPixels, int kVectors, int kShared>
RESNEXT_INLINE void correlate_block(const RowArgs& args, int64_t pixel) {
  constexpr int kColumns = kPhases == 2 ? kPixels / 2 + 1 : (kPixels - 1) * kStep + 3;
  // Enough accumulators to hide the latency of multiply-adds: of few pixels, one for each tap, or for every other.
  constexpr int kSums = kPixels * kVectors;
  constexpr int kChains = kRegisters < 32 || kSums >= 12 ? 1 : kSums > 8 ? 2 : 3;
  Vec acc[kChains][kPixels][kVectors] = {};
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[0][p][v] = load(args.bias + v * kLanes);
  }
  for (int row = 0; row < args.count; ++row) {
    const float* x_row = args.sources[row].x + pixel / kPhases * kStep * args.src_lanes;
    const float* weight = args.sources[row].weight;
    for (int64_t i = 0; i < args.depth; ++i) {
      Vec w[3][kVectors];
      RESNEXT_UNROLL
      for (int k = 0; k < 3; ++k) {
        RESNEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) w[k][v] = load(weight + (k * kVectors + v) * kLanes);
      }
      weight += 3 * kVectors * kLanes;
      const float* x = x_row + i * kShared;
      RESNEXT_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const Vec value = repeat<kShared>(x);
        x += args.src_lanes;
        RESNEXT_UNROLL
        for (int k = 0; k < 3; ++k) {
          const int p = pixel_of<kStep, kPhases>(column, k);
          if (p < 0 || p >= kPixels) continue;
          RESNEXT_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            acc[k % kChains][p][v] = Terms::add(acc[k % kChains][p][v], value, w[k][v]);
          }
        }
      }
    }
  }
  const auto write = [&](auto* out) RESNEXT_ALWAYS {
    out += pixel * args.out_stride;
    RESNEXT_UNROLL
    for (int p = 0; p < kPixels; ++p, out += args.out_stride) {
      RESNEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        RESNEXT_UNROLL
        for (int chain = 1; chain < kChains; ++chain) acc[0][p][v] += acc[chain][p][v];
        __builtin_prefetch(out + args.next_row + v * kLanes, kForWriting, kKeepInL2);
        store(out + v * kLanes, permute(acc[0][p][v], args.order));
      }
    }
  };
  if (args.narrow) return write(static_cast<BFloat16*>(args.out));
  write(static_cast<float*>(args.out));
}

// The last block of a row is moved back to end with it: some pixels are then computed twice, with the same result.
template <class Terms, int kStep, int kPhases, int kPixels, int kVectors, int kShared>
void correlate_pixels(const RowArgs& args) {
  const int64_t last = args.pixels > kPixels ? round_up(args.pixels - kPixels, kPhases) : 0;
  for (int64_t pixel = 0; pixel < args.pixels; pixel += kPixels) {
    correlate_block<Terms, kStep, kPhases, kPixels, kVectors, kShared>(args, min_of(pixel, last));
  }
}

constexpr int kMaxBlockPixels = 16;

// Of the kernels for blocks of these sizes the one that takes least time for a row: each block reads the weights again,
// which takes as long as about two pixels.
template <class Terms, int kStep, int kPhases, int kVectors, int kShared, int... kPixels>
RowKernel row_kernel_of(int64_t pixels) {
  RowKernel best{};
  int64_t least = 0;
  const auto consider = [&](RowKernel kernel) {
    const int64_t cost = ceil_div(pixels, kernel.block_pixels) * (kernel.block_pixels + 2);
    if (best.run != nullptr && cost >= least) return;
    best = kernel;
    least = cost;
  };
  (consider({correlate_pixels<Terms, kStep, kPhases, kPixels, kVectors, kShared>, kPixels}), ...);
  return best;
}

// 7, 14, 28 and 56 pixels are the rows of images of 224, and powers of two those of others. With phases blocks are even.
template <class Terms, int kStep, int kPhases, int kShared>
RowKernel row_kernel(const Layout& layout, int64_t pixels) {
  constexpr bool kManyRegisters = kRegisters >= 32;
  if constexpr (kShared == 1) {
    if (layout.tile_vectors == 2) {
      if constexpr (!kManyRegisters) {
        return row_kernel_of<Terms, kStep, kPhases, 2, 1, 4>(pixels);
      } else if constexpr (kPhases == 2) {
        return row_kernel_of<Terms, kStep, kPhases, 2, 1, 8, 4>(pixels);
      } else {
        return row_kernel_of<Terms, kStep, kPhases, 2, 1, 7, 8, 4, 5>(pixels);
      }
    }
  }
  if constexpr (!kManyRegisters && kPhases == 2) {
    return row_kernel_of<Terms, kStep, kPhases, 1, kShared, 8, 4>(pixels);
  } else if constexpr (!kManyRegisters) {
    return row_kernel_of<Terms, kStep, kPhases, 1, kShared, 7, 8, 4>(pixels);
  } else if constexpr (kPhases == 2) {
    return row_kernel_of<Terms, kStep, kPhases, 1, kShared, 14, 16, 8, 4>(pixels);
  } else {
    return row_kernel_of<Terms, kStep, kPhases, 1, kShared, 14, 16, 7, 8, 4>(pixels);
  }
}

template <class Terms, int kShared>
RowKernel row_kernel(const Layout& layout, const Columns& cols, int64_t pixels) {
  if (cols.in_step == 2) return row_kernel<Terms, 2, 1, kShared>(layout, pixels);
  return cols.phases == 2 ? row_kernel<Terms, 1, 2, kShared>(layout, pixels)
                          : row_kernel<Terms, 1, 1, kShared>(layout, pixels);
}

template <class Terms, int kShared = kLanes>
RowKernel row_kernel(const Correlation& c) {
  if constexpr (kShared > 1) {
    if (c.layout.shared != kShared) return row_kernel<Terms, kShared / 2>(c);
  }
  return row_kernel<Terms, kShared>(c.layout, c.cols, c.dst.width);
}

// As many source rows as so many destination rows see, or more.
RESNEXT_INLINE int64_t ring_rows(const Correlation& c) { return (c.rows_at_once - 1) * c.rows.in_step + 3; }

// A panel starts with one column of zeros and ends with at least one; short rows get what a whole block reads.
RESNEXT_INLINE int64_t panel_columns(const Correlation& c) {
  const int64_t whole_block = 1 + (kMaxBlockPixels - 1) * c.cols.in_step + 3;
  return c.src.width + 2 > whole_block ? c.src.width + 2 : whole_block;
}
RESNEXT_INLINE int64_t panel_size(const Correlation& c) { return panel_columns(c) * c.layout.src_lanes; }
RESNEXT_INLINE int64_t ring_row_size(const Correlation& c) {
  return ceil_div(c.block, c.layout.panel_bundles) * panel_size(c);
}
RESNEXT_INLINE int64_t ring_size(const Correlation& c) { return ring_rows(c) * ring_row_size(c); }

// Floats of a destination row of one tile.
RESNEXT_INLINE int64_t buffer_size(const Correlation& c) {
  return (c.dst.width + kMaxBlockPixels) * tile_lanes(c.layout);
}

// Floats of a source row before its channels become pairs.
RESNEXT_INLINE int64_t unpaired_size(const Correlation& c) {
  return c.layout.pairs ? c.src.width * 2 * c.layout.src_lanes : 0;
}

Scratch correlate_scratch(const Correlation& c) {
#if RESNEXT_LANES == 16
  if (c.layout.amx) return amx_correlate_scratch(c);
#endif
  int64_t size = ring_size(c) + buffer_size(c) + unpaired_size(c);
  if (c.packed.weight == nullptr) {
    const int64_t tiles = c.block * c.tile_block;
    size += tiles * (packed_weight_size(c.layout) + packed_bias_size(c.layout)) + weight_scratch(c.layout);
  }
  return {size, ring_size(c)};
}

// What all destination rows of a call have in common.
struct RowPlan {
  RowKernel kernel;
  bool direct;  // whole vectors in NHWC go straight to memory if they are stored as they are
  int64_t tile_size, row_stride;  // floats of a tile's weights; elements of a destination row
  IntVec src_order, dst_order;
};

// The source rows that destination row h sees inside the image, with the weights' rows they meet, for the first tile of
// a block; and what becomes of the row.
struct DstRow {
  int64_t h;
  int count;
  Source sources[3];
  WriteMap write;
};

// The source rows [first, first + phase.count) that destination row h sees, perhaps outside the image.
struct RowWindow {
  Phase phase;
  int64_t first;
};
RESNEXT_INLINE RowWindow row_window(const Correlation& c, int64_t h) {
  const Phase& phase = c.rows.phase[h % c.rows.phases];
  return {phase, h / c.rows.phases * c.rows.in_step + phase.first};
}

DstRow dst_row(const Correlation& c, int64_t n, int64_t h, const RowWindow& window, const float* ring,
               const float* weight) {
  DstRow found{h, 0, {}, map_of_row(c.write, c.cuts, c.dst, n, h)};
  for (int k = 0; k < window.phase.count; ++k) {
    const int64_t row = window.first + k;
    if (row < 0 || row >= c.src.height) continue;
    found.sources[found.count++] = {
        ring + row % ring_rows(c) * ring_row_size(c) + (c.cols.phases == 2 ? c.layout.src_lanes : 0),
        weight + window.phase.taps[k] * packed_row_size(c.layout)};
  }
  return found;
}

// The tiles a task works on: some of each bundle of its block.
struct TileBlock {
  int64_t first_bundle, bundles;
  int64_t first_tile, tiles;
  PackedFilters packed;  // of its first tile
};

// One destination row of one tile, straight to memory or by the buffer.
RESNEXT_INLINE void correlate_row(const Correlation& c, const RowPlan& plan, const TileBlock& block,
                                  const DstRow& row, int64_t n, int64_t bundle_of_block, int64_t tile_of_block,
                                  float* buffer) {
  const Layout& layout = c.layout;
  const int64_t lanes = tile_lanes(layout);
  const int64_t packed_tile = bundle_of_block * block.tiles + tile_of_block;
  const int64_t bundle = block.first_bundle + bundle_of_block;
  const int64_t tile = block.first_tile + tile_of_block;
  const int64_t h = row.h;
  const WriteMap& write = row.write;
  const int64_t channel = bundle * layout.dst_channels + tile * lanes;
  const int64_t channels = min_of(lanes, bundle_dst_channels(layout, bundle) - tile * lanes);
  const bool direct = plan.direct && channels == lanes;

  RowArgs args;
  args.count = row.count;
  const bool shares = layout.panel_bundles == 2;
  const int64_t panel = shares ? bundle_of_block / 2 : bundle_of_block;
  const int64_t first_lane = shares ? bundle_of_block % 2 * layout.src_channels : 0;
  for (int k = 0; k < row.count; ++k) {
    args.sources[k] = {row.sources[k].x + panel * panel_size(c) + first_lane,
                       row.sources[k].weight + packed_tile * plan.tile_size};
  }
  args.depth = layout.group_src;
  args.src_lanes = layout.src_lanes;
  args.bias = block.packed.bias + packed_tile * lanes;
  const int64_t offset = (n * c.dst.height + h) * plan.row_stride + channel;
  args.out = direct ? static_cast<char*>(c.dst.data) + offset * size_of(c.dst.dtype) : static_cast<void*>(buffer);
  args.narrow = direct && c.dst.dtype == Dtype::kBFloat16;
  args.out_stride = direct ? c.dst.channels : lanes;
  args.pixels = c.dst.width;
  args.next_row = direct ? plan.row_stride : 0;
  args.order = plan.dst_order;
  plan.kernel.run(args);

  if (!direct) return write_row(c.dst, write, n, h, channel, channels, lanes, buffer);
  if (write.kind != WriteMap::kMoments) return;
  const auto* written = static_cast<const float*>(args.out);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    add_moments<true>(written + lane, args.out_stride, args.pixels, {channel + lane, kLanes}, write);
  }
}

// Reads row h of image n, of the channels of a block, into its place in the ring.
void read_source_row(const Correlation& c, const RowPlan& plan, const TileBlock& block, int64_t n, int64_t h,
                     float* unpaired, float* ring) {
  const Layout& layout = c.layout;
  float* panel = ring + h % ring_rows(c) * ring_row_size(c) + layout.src_lanes;
  for (int64_t b = 0; b < block.bundles; b += layout.panel_bundles, panel += panel_size(c)) {
    const int64_t channel = (block.first_bundle + b) * layout.src_channels;
    const int64_t panel_bundles = min_of(block.bundles - b, layout.panel_bundles);
    const int64_t channels = bundle_src_channels(layout, block.first_bundle + b, panel_bundles);
    if (layout.pairs) {
      read_row_pairs(c.src, c.read, n, h, channel, channels, layout.src_lanes, plan.src_order, unpaired, panel);
    } else {
      read_row(c.src, c.read, n, h, channel, channels, layout.src_lanes, plan.src_order, panel);
    }
  }
}

void correlate(const Correlation& c, float* scratch, int64_t begin, int64_t end) {
#if RESNEXT_LANES == 16
  if (c.layout.amx) return amx_correlate(c, scratch, begin, end);
#endif
  const Layout& layout = c.layout;
  const int64_t tile_blocks = ceil_div(layout.tiles, c.tile_block);
  const int64_t blocks = ceil_div(layout.bundles, c.block) * tile_blocks;
  const int64_t own_tiles = c.block * c.tile_block;
  float* ring = scratch;
  float* buffer = ring + ring_size(c);
  float* unpaired = buffer + buffer_size(c);
  float* own_weight = unpaired + unpaired_size(c);
  float* own_bias = own_weight + own_tiles * packed_weight_size(layout);
  float* pack_scratch = own_bias + own_tiles * packed_bias_size(layout);
  RowPlan plan;
  plan.kernel = with_terms(layout.pairs, [&](auto terms) { return row_kernel<decltype(terms)>(c); });
  const bool fits = c.dst.width >= plan.kernel.block_pixels && c.dst.width % c.cols.phases == 0;
  const bool plain = c.write.kind == WriteMap::kNone;
  const bool as_floats = c.dst.dtype == Dtype::kFloat32 && (plain || c.write.kind == WriteMap::kMoments);
  plan.direct = fits && c.dst.channels_last && (as_floats || (plain && c.dst.dtype == Dtype::kBFloat16));
  plan.tile_size = packed_weight_size(layout);
  plan.row_stride = c.dst.width * c.dst.channels;
  plan.src_order = channels_of_lanes(layout, layout.group_src);
  plan.dst_order = lanes_of_channels(layout, layout.group_dst);
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(c.cuts, c.dst, blocks, task);
    TileBlock block;
    block.first_bundle = t.block / tile_blocks * c.block;
    block.bundles = min_of(c.block, layout.bundles - block.first_bundle);
    block.first_tile = t.block % tile_blocks * c.tile_block;
    block.tiles = min_of(c.tile_block, layout.tiles - block.first_tile);
    const int64_t first = block.first_bundle * layout.tiles + block.first_tile;
    if (c.packed.weight == nullptr) {
      block.packed = {own_weight, own_bias};
      pack_weight(layout, c.filters, pack_scratch, first, first + block.bundles * block.tiles, block.packed);
    } else {
      block.packed = {c.packed.weight + first * packed_weight_size(layout),
                      c.packed.bias + first * packed_bias_size(layout)};
    }
    int64_t next_row = 0;
    for (int64_t h = t.first_row; h < t.last_row; h += c.rows_at_once) {
      DstRow rows[kMostRowsAtOnce];
      const int64_t count = min_of(c.rows_at_once, t.last_row - h);
      for (int64_t i = 0; i < count; ++i) {
        const RowWindow window = row_window(c, h + i);
        if (next_row < window.first) next_row = window.first;
        for (; next_row < min_of(window.first + window.phase.count, c.src.height); ++next_row) {
          read_source_row(c, plan, block, t.n, next_row, unpaired, ring);
        }
        rows[i] = dst_row(c, t.n, h + i, window, ring, block.packed.weight);
      }
      for (int64_t b = 0; b < block.bundles; ++b) {
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
          for (int64_t i = 0; i < count; ++i) correlate_row(c, plan, block, rows[i], t.n, b, tile, buffer);
        }
      }
    }
  }
}
