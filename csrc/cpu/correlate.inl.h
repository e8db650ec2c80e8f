// Forward pass and input gradient: dst = correlation of src with the packed weights (see kernels.h for the phases).
//
// A task walks the rows of a band of one image, for a block of bundles. Source rows are read once into a ring of three
// panels per bundle whose borders are zero, so that no loop below knows an image border: missing rows are left out of
// the list of sources, missing columns are zeros. A row kernel then makes one destination row of one tile, `kPixels`
// pixels at a time in registers: every source value is loaded once for all taps of its row.
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
  float* out;
  int64_t out_stride;  // floats from one pixel to the next
  int64_t pixels;
  int64_t next_row;    // floats from a pixel to the same one a row further down, to be prefetched
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
  // Enough accumulators to hide the latency of multiply-adds: of few pixels, one for each tap.
  constexpr int kChains = kRegisters >= 32 && kPixels * kVectors < 12 ? 3 : 1;
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
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    float* out = args.out + (pixel + p) * args.out_stride;
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      RESNEXT_UNROLL
      for (int chain = 1; chain < kChains; ++chain) acc[0][p][v] += acc[chain][p][v];
      __builtin_prefetch(out + args.next_row + v * kLanes, kForWriting, kKeepInL2);
      store(out + v * kLanes, permute(acc[0][p][v], args.order));
    }
  }
}

// The last block of a row is moved back to end with it: some pixels are then computed twice, with the same result.
template <class Terms, int kStep, int kPhases, int kPixels, int kVectors, int kShared>
void correlate_pixels(const RowArgs& args) {
  const int64_t last = args.pixels > kPixels ? round_up(args.pixels - kPixels, kPhases) : 0;
  for (int64_t pixel = 0; pixel < args.pixels; pixel += kPixels) {
    correlate_block<Terms, kStep, kPhases, kPixels, kVectors, kShared>(args, min_of(pixel, last));
  }
}

constexpr int kMaxBlockPixels = 14;

template <class Terms, int kStep, int kPhases, int kShared>
RowKernel row_kernel(const Layout& layout, int64_t pixels) {
  constexpr int kWide = kRegisters >= 32 ? 14 : 6 + kPhases;
  constexpr int kNarrow = kRegisters >= 32 ? 6 + kPhases : 4;
  if constexpr (kShared == 1) {
    if (layout.tile_vectors == 2) return {correlate_pixels<Terms, kStep, kPhases, kNarrow, 2, 1>, kNarrow};
  }
  if (pixels >= kWide) return {correlate_pixels<Terms, kStep, kPhases, kWide, 1, kShared>, kWide};
  return {correlate_pixels<Terms, kStep, kPhases, kNarrow, 1, kShared>, kNarrow};
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

constexpr int kRingRows = 3;

// A panel starts with one column of zeros and ends with at least one; short rows get what a whole block reads.
RESNEXT_INLINE int64_t panel_columns(const Correlation& c) {
  const int64_t whole_block = 1 + (kMaxBlockPixels - 1) * c.cols.in_step + 3;
  return c.src.width + 2 > whole_block ? c.src.width + 2 : whole_block;
}
RESNEXT_INLINE int64_t panel_size(const Correlation& c) { return panel_columns(c) * c.layout.src_lanes; }
RESNEXT_INLINE int64_t ring_row_size(const Correlation& c) {
  return ceil_div(c.block, c.layout.panel_bundles) * panel_size(c);
}
RESNEXT_INLINE int64_t ring_size(const Correlation& c) { return kRingRows * ring_row_size(c); }

// Floats of a destination row of one tile.
RESNEXT_INLINE int64_t buffer_size(const Correlation& c) {
  return (c.dst.width + kMaxBlockPixels) * tile_lanes(c.layout);
}

// Floats of a source row before its channels become pairs.
RESNEXT_INLINE int64_t unpaired_size(const Correlation& c) {
  return c.layout.pairs ? c.src.width * 2 * c.layout.src_lanes : 0;
}

int64_t correlate_scratch(const Correlation& c) {
  int64_t size = ring_size(c) + buffer_size(c) + unpaired_size(c);
  if (c.packed.weight == nullptr) {
    size += c.block * (packed_weight_size(c.layout) + packed_bias_size(c.layout)) + weight_scratch(c.layout);
  }
  return size;
}

// What all destination rows of a call have in common, and where the tiles of one row find their sources.
struct RowPlan {
  RowKernel kernel;
  bool fits;  // blocks of pixels end with the row
  IntVec src_order, dst_order;
  int count;
  Source sources[3];  // of the block's first bundle
  const float* bias;  // likewise
};

// The source rows that destination row h sees inside the image, with the weights' rows they meet.
void find_sources(const Correlation& c, int64_t first_row, const Phase& phase, const float* ring, const float* weight,
                  RowPlan& plan) {
  plan.count = 0;
  for (int k = 0; k < phase.count; ++k) {
    const int64_t row = first_row + k;
    if (row < 0 || row >= c.src.height) continue;
    plan.sources[plan.count++] = {
        ring + row % kRingRows * ring_row_size(c) + (c.cols.phases == 2 ? c.layout.src_lanes : 0),
        weight + phase.taps[k] * packed_row_size(c.layout)};
  }
}

// One destination row of one tile. Whole vectors of float32 NHWC go straight to memory if they are stored as they are;
// everything else by the buffer.
void correlate_row(const Correlation& c, const RowPlan& plan, const WriteMap& write, int64_t n, int64_t h,
                   int64_t bundle, int64_t bundle_of_block, int64_t tile, float* buffer) {
  const Layout& layout = c.layout;
  const int64_t lanes = tile_lanes(layout);
  const int64_t packed_tile = bundle_of_block * layout.tiles + tile;
  const int64_t channel = bundle * layout.dst_channels + tile * lanes;
  const int64_t channels = min_of(lanes, bundle_dst_channels(layout, bundle) - tile * lanes);
  const bool mapped = write.kind != WriteMap::kNone && write.kind != WriteMap::kMoments;
  const bool direct =
      !mapped && c.dst.dtype == Dtype::kFloat32 && c.dst.channels_last && channels == lanes && plan.fits;
  const int64_t row_stride = c.dst.width * c.dst.channels;

  RowArgs args;
  args.count = plan.count;
  const int64_t panel = bundle_of_block / layout.panel_bundles;
  const int64_t first_lane = bundle_of_block % layout.panel_bundles * layout.src_channels;
  for (int k = 0; k < plan.count; ++k) {
    args.sources[k] = {plan.sources[k].x + panel * panel_size(c) + first_lane,
                       plan.sources[k].weight + packed_tile * 3 * packed_row_size(layout)};
  }
  args.depth = layout.group_src;
  args.src_lanes = layout.src_lanes;
  args.bias = plan.bias + packed_tile * lanes;
  args.out = direct ? static_cast<float*>(c.dst.data) + (n * c.dst.height + h) * row_stride + channel : buffer;
  args.out_stride = direct ? c.dst.channels : lanes;
  args.pixels = c.dst.width;
  args.next_row = direct ? row_stride : 0;
  args.order = plan.dst_order;
  plan.kernel.run(args);

  if (!direct) return write_row(c.dst, write, n, h, channel, channels, lanes, buffer);
  if (write.kind != WriteMap::kMoments) return;
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    add_moments<true>(args.out + lane, args.out_stride, args.pixels, {channel + lane, kLanes}, write);
  }
}

void correlate(const Correlation& c, float* scratch, int64_t begin, int64_t end) {
  const Layout& layout = c.layout;
  const int64_t blocks = ceil_div(layout.bundles, c.block);
  float* ring = scratch;
  float* buffer = ring + ring_size(c);
  float* unpaired = buffer + buffer_size(c);
  float* own_weight = unpaired + unpaired_size(c);
  float* own_bias = own_weight + c.block * packed_weight_size(layout);
  float* pack_scratch = own_bias + c.block * packed_bias_size(layout);
  __builtin_memset(ring, 0, ring_size(c) * sizeof(float));
  RowPlan plan;
  plan.kernel = with_terms(layout.pairs, [&](auto terms) { return row_kernel<decltype(terms)>(c); });
  plan.fits = c.dst.width >= plan.kernel.block_pixels && c.dst.width % c.cols.phases == 0;
  plan.src_order = channels_of_lanes(layout, layout.group_src);
  plan.dst_order = lanes_of_channels(layout, layout.group_dst);
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(c.cuts, c.dst, blocks, task);
    const int64_t first_bundle = t.block * c.block;
    const int64_t bundles = min_of(c.block, layout.bundles - first_bundle);
    PackedFilters packed = {own_weight, own_bias};
    if (c.packed.weight == nullptr) {
      pack_weight(layout, c.filters, pack_scratch, first_bundle, first_bundle + bundles, packed);
    } else {
      packed = {c.packed.weight + first_bundle * packed_weight_size(layout),
                c.packed.bias + first_bundle * packed_bias_size(layout)};
    }
    plan.bias = packed.bias;
    int64_t next_row = 0;
    for (int64_t h = t.first_row; h < t.last_row; ++h) {
      const Phase& phase = c.rows.phase[h % c.rows.phases];
      const int64_t first_row = h / c.rows.phases * c.rows.in_step + phase.first;
      if (next_row < first_row) next_row = first_row;
      for (; next_row < min_of(first_row + phase.count, c.src.height); ++next_row) {
        float* panel = ring + next_row % kRingRows * ring_row_size(c) + layout.src_lanes;
        for (int64_t b = 0; b < bundles; b += layout.panel_bundles, panel += panel_size(c)) {
          const int64_t channel = (first_bundle + b) * layout.src_channels;
          const int64_t panel_bundles = min_of(bundles - b, layout.panel_bundles);
          const int64_t channels = bundle_src_channels(layout, first_bundle + b, panel_bundles);
          if (layout.pairs) {
            read_row_pairs(c.src, c.read, t.n, next_row, channel, channels, layout.src_lanes, plan.src_order, unpaired,
                           panel);
          } else {
            read_row(c.src, c.read, t.n, next_row, channel, channels, layout.src_lanes, plan.src_order, panel);
          }
        }
      }
      find_sources(c, first_row, phase, ring, packed.weight, plan);
      const WriteMap write = map_of_row(c.write, c.cuts, c.dst, t.n, h);
      for (int64_t b = 0; b < bundles; ++b) {
        for (int64_t tile = 0; tile < layout.tiles; ++tile) {
          correlate_row(c, plan, write, t.n, h, first_bundle + b, b, tile, buffer);
        }
      }
    }
  }
}
