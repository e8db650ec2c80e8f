// Forward pass and input gradient: dst = correlation of src with the packed weights (see kernels.h for the phases).
//
// A task walks the rows of a band of one image, for a block of bundles. Source rows are read once into a ring of three
// panels per bundle whose borders are zero, so that no loop below knows an image border: missing rows are left out of
// the list of sources, missing columns are zeros. A row kernel then makes one phase of one destination row, `kPixels`
// pixels at a time in registers.
//
// fp32 accumulation, in an order that depends on neither threads nor bands: rows, then source channels, then columns.

// One source row and the weights it meets; x points at the column of the first pixel's first tap.
struct Source {
  const float* x;
  const float* weight;
};

struct RowArgs {
  const Source* sources;
  int count;
  int64_t depth;
  int64_t src_lanes;
  const float* bias;
  float* out;
  int64_t out_stride;  // floats from one pixel to the next
  int64_t pixels;
  int64_t next_row;    // floats from a pixel to the same one a row further down, to be prefetched
};

// A row kernel writes whole blocks: with fewer pixels than that, it reads and writes past the end of the row.
struct RowKernel {
  void (*run)(const RowArgs&);
  int64_t block_pixels;
};

// Several groups to a vector: accumulator r sums x[j] * w[destination (j - r) mod width]; rotations come last.
template <int kTaps, int kStep, int kPixels, int... R>
RESNEXT_INLINE void rotating_block(const RowArgs& args, int64_t pixel, Indices<R...>) {
  constexpr int kWidth = sizeof...(R);
  constexpr int kColumns = (kPixels - 1) * kStep + kTaps;
  Vec acc[kPixels][kWidth] = {};
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) acc[p][0] = load(args.bias);
  for (int row = 0; row < args.count; ++row) {
    const float* x_row = args.sources[row].x + pixel * kStep * kLanes;
    const float* weight = args.sources[row].weight;
    Vec x[kColumns];
    RESNEXT_UNROLL
    for (int column = 0; column < kColumns; ++column) x[column] = load(x_row + column * kLanes);
    RESNEXT_UNROLL
    for (int k = 0; k < kTaps; ++k) {
      RESNEXT_UNROLL
      for (int r = 0; r < kWidth; ++r) {
        const Vec w = in_register(load(weight + (r * kTaps + k) * kLanes));
        RESNEXT_UNROLL
        for (int p = 0; p < kPixels; ++p) acc[p][r] += x[p * kStep + k] * w;
      }
    }
  }
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    Vec sum = acc[p][0];
    ((sum = R == 0 ? sum : sum + rotate<kWidth, R>(acc[p][R])), ...);
    float* out = args.out + (pixel + p) * args.out_stride;
    __builtin_prefetch(out + args.next_row, kForWriting, kKeepInL2);
    store(out, sum);
  }
}

// Any group: lanes are destination channels, every source value is broadcast once for all taps of its row.
template <int kTaps, int kStep, int kPixels, int kVectors>
RESNEXT_INLINE void broadcast_block(const RowArgs& args, int64_t pixel) {
  constexpr int kColumns = (kPixels - 1) * kStep + kTaps;
  Vec acc[kPixels][kVectors];
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[p][v] = load(args.bias + v * kLanes);
  }
  for (int row = 0; row < args.count; ++row) {
    const float* x_row = args.sources[row].x + pixel * kStep * args.src_lanes;
    const float* weight = args.sources[row].weight;
    for (int64_t i = 0; i < args.depth; ++i) {
      Vec w[kTaps][kVectors];
      RESNEXT_UNROLL
      for (int k = 0; k < kTaps; ++k) {
        RESNEXT_UNROLL
        for (int v = 0; v < kVectors; ++v) w[k][v] = load(weight + (k * kVectors + v) * kLanes);
      }
      weight += kTaps * kVectors * kLanes;
      const float* x = x_row + i;
      RESNEXT_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const Vec value = broadcast(*x);
        x += args.src_lanes;
        RESNEXT_UNROLL
        for (int k = 0; k < kTaps; ++k) {
          const int p = (column - k) / kStep;
          if (column < k || (column - k) % kStep != 0 || p >= kPixels) continue;
          RESNEXT_UNROLL
          for (int v = 0; v < kVectors; ++v) acc[p][v] += value * w[k][v];
        }
      }
    }
  }
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    float* out = args.out + (pixel + p) * args.out_stride;
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(out + args.next_row + v * kLanes, kForWriting, kKeepInL2);
      store(out + v * kLanes, acc[p][v]);
    }
  }
}

// The last block of a row is moved back to end with it: some pixels are then computed twice, with the same result.
template <int kTaps, int kStep, int kPixels, int kWidth>
void rotating_row(const RowArgs& args) {
  for (int64_t pixel = 0; pixel < args.pixels; pixel += kPixels) {
    const int64_t last = args.pixels > kPixels ? args.pixels - kPixels : 0;
    rotating_block<kTaps, kStep, kPixels>(args, min_of(pixel, last),
                                          typename FromStd<std::make_integer_sequence<int, kWidth>>::Type{});
  }
}
template <int kTaps, int kStep, int kPixels, int kVectors>
void broadcast_row(const RowArgs& args) {
  for (int64_t pixel = 0; pixel < args.pixels; pixel += kPixels) {
    const int64_t last = args.pixels > kPixels ? args.pixels - kPixels : 0;
    broadcast_block<kTaps, kStep, kPixels, kVectors>(args, min_of(pixel, last));
  }
}

constexpr int kMaxBlockPixels = 14;

// The largest block whose accumulators, source columns and one weight fit the registers.
constexpr int rotating_pixels(int width, int step) {
  for (int pixels : {7, 4, 3, 2}) {
    if (pixels * width + (pixels - 1) * step + 3 + 1 <= kRegisters) return pixels;
  }
  return 1;
}

template <int kTaps, int kStep, int kWidth>
RowKernel rotating_kernel() {
  if constexpr (rotates(kWidth)) {
    constexpr int kPixels = rotating_pixels(kWidth, kStep);
    return {rotating_row<kTaps, kStep, kPixels, kWidth>, kPixels};
  } else {
    return {};  // make_layout never asks for it
  }
}

template <int kTaps, int kStep>
RowKernel row_kernel(const Layout& layout, int64_t pixels) {
  if (layout.rotating) {
    switch (layout.group_src) {
      case 1:
        return rotating_kernel<kTaps, kStep, 1>();
      case 2:
        return rotating_kernel<kTaps, kStep, 2>();
      case 3:
        return rotating_kernel<kTaps, kStep, 3>();
      case 4:
        return rotating_kernel<kTaps, kStep, 4>();
      case 6:
        return rotating_kernel<kTaps, kStep, 6>();
      default:
        return rotating_kernel<kTaps, kStep, 8>();
    }
  }
  constexpr int kWide = kRegisters >= 32 ? 14 : 7;
  constexpr int kNarrow = kRegisters >= 32 ? 7 : 4;
  if (layout.tile_vectors == 2) return {broadcast_row<kTaps, kStep, kNarrow, 2>, kNarrow};
  if (pixels >= kWide) return {broadcast_row<kTaps, kStep, kWide, 1>, kWide};
  return {broadcast_row<kTaps, kStep, kNarrow, 1>, kNarrow};
}

RowKernel row_kernel(const Layout& layout, const Axis& cols, const Phase& phase, int64_t pixels) {
  if (cols.in_step == 2) return row_kernel<3, 2>(layout, pixels);
  if (phase.count == 3) return row_kernel<3, 1>(layout, pixels);
  return phase.count == 2 ? row_kernel<2, 1>(layout, pixels) : row_kernel<1, 1>(layout, pixels);
}

constexpr int kRingRows = 3;

// A panel starts with one column of zeros and ends with at least one; short rows get what a whole block reads.
RESNEXT_INLINE int64_t panel_columns(const Correlation& c) {
  const int64_t whole_block = 1 + (kMaxBlockPixels - 1) * c.cols.in_step + 3;
  return (c.src.width + 2 > whole_block ? c.src.width + 2 : whole_block);
}
RESNEXT_INLINE int64_t panel_size(const Correlation& c) { return panel_columns(c) * c.layout.src_lanes; }
RESNEXT_INLINE int64_t ring_size(const Correlation& c) { return kRingRows * c.block * panel_size(c); }

int64_t correlate_scratch(const Correlation& c) {
  return ring_size(c) + (c.dst.width + kMaxBlockPixels * c.cols.phases) * tile_lanes(c.layout);
}

// Pixels of a destination row that belong to column phase f.
RESNEXT_INLINE int64_t phase_pixels(const Correlation& c, int f) {
  return ceil_div(c.dst.width - f, c.cols.phases);
}

// The source rows that destination row h sees inside the image, with the weights' rows they meet. Returns their number.
int row_sources(const Correlation& c, int64_t h, const float* ring, const float* weight, Source (&sources)[3]) {
  const Phase& phase = c.rows.phase[h % c.rows.phases];
  const int64_t first_row = h / c.rows.phases * c.rows.in_step + phase.first;
  int count = 0;
  for (int k = 0; k < phase.count; ++k) {
    const int64_t row = first_row + k;
    if (row < 0 || row >= c.src.height) continue;
    sources[count++] = {ring + row % kRingRows * c.block * panel_size(c),
                        weight + phase.taps[k] * packed_row_size(c.layout)};
  }
  return count;
}

// One destination row of one tile. Whole vectors of float32 NHWC go straight to memory, where they are mapped in place;
// everything else by the buffer.
void correlate_row(const Correlation& c, int64_t n, int64_t h, int64_t bundle, int64_t tile, const float* ring,
                   float* buffer) {
  const Layout& layout = c.layout;
  const int64_t lanes = tile_lanes(layout);
  const int64_t packed_tile = bundle * layout.tiles + tile;
  const int64_t channel = bundle * layout.dst_channels + tile * lanes;
  const int64_t channels = min_of(lanes, bundle_dst_channels(layout, bundle) - tile * lanes);

  RowKernel kernels[2];
  bool direct = c.dst.dtype == Dtype::kFloat32 && c.dst.channels_last && channels == lanes;
  for (int f = 0; f < c.cols.phases; ++f) {
    kernels[f] = row_kernel(layout, c.cols, c.cols.phase[f], phase_pixels(c, f));
    direct = direct && phase_pixels(c, f) >= kernels[f].block_pixels;
  }
  const int64_t row_stride = c.dst.width * c.dst.channels;
  const int64_t pixel_stride = direct ? c.dst.channels : lanes;
  float* out = direct ? static_cast<float*>(c.dst.data) + (n * c.dst.height + h) * row_stride + channel : buffer;

  Source sources[3];
  const int count = row_sources(c, h, ring, c.weight + packed_tile * 3 * packed_row_size(layout), sources);
  for (int f = 0; f < c.cols.phases; ++f) {
    const Phase& phase = c.cols.phase[f];
    Source phase_sources[3];
    for (int k = 0; k < count; ++k) {
      phase_sources[k] = {sources[k].x + (1 + phase.first) * layout.src_lanes, sources[k].weight};
      sources[k].weight += layout.depth * phase.count * lanes;
    }
    RowArgs args{};
    args.sources = phase_sources;
    args.count = count;
    args.depth = layout.depth;
    args.src_lanes = layout.src_lanes;
    args.bias = c.bias + packed_tile * lanes;
    args.out = out + f * pixel_stride;
    args.out_stride = c.cols.phases * pixel_stride;
    args.pixels = phase_pixels(c, f);
    args.next_row = direct ? row_stride : 0;
    kernels[f].run(args);
  }
  const WriteMap write = map_of_row(c.write, c.cuts, c.dst, n, h);
  const bool mapped = write.kind != WriteMap::kNone && write.kind != WriteMap::kMoments;
  if (!direct || mapped) write_row(c.dst, write, n, h, channel, channels, pixel_stride, out);
  if (write.kind != WriteMap::kMoments) return;
  if (c.dst.dtype != Dtype::kFloat32) read_row(c.dst, {}, n, h, channel, channels, lanes, buffer);  // as it is stored
  for (int64_t lane = 0; lane < channels; lane += kLanes) {
    add_moments(out + lane, pixel_stride, c.dst.width, {channel + lane, min_of(kLanes, channels - lane)},
                h % c.cuts.part_rows * c.dst.width, write.partial, c.dst.channels);
  }
}

void correlate(const Correlation& c, float* scratch, int64_t begin, int64_t end) {
  const Layout& layout = c.layout;
  const int64_t blocks = ceil_div(layout.bundles, c.block);
  float* ring = scratch;
  float* buffer = scratch + ring_size(c);
  __builtin_memset(ring, 0, ring_size(c) * sizeof(float));
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(c.cuts, c.dst, blocks, task);
    const int64_t first_bundle = t.block * c.block;
    const int64_t bundles = min_of(c.block, layout.bundles - first_bundle);
    int64_t next_row = 0;
    for (int64_t h = t.first_row; h < t.last_row; ++h) {
      const Phase& phase = c.rows.phase[h % c.rows.phases];
      const int64_t first_row = h / c.rows.phases * c.rows.in_step + phase.first;
      if (next_row < first_row) next_row = first_row;
      for (; next_row < min_of(first_row + phase.count, c.src.height); ++next_row) {
        for (int64_t b = 0; b < bundles; ++b) {
          float* panel = ring + (next_row % kRingRows * c.block + b) * panel_size(c);
          read_row(c.src, c.read, t.n, next_row, (first_bundle + b) * layout.src_channels,
                   bundle_src_channels(layout, first_bundle + b), layout.src_lanes, panel + layout.src_lanes);
        }
      }
      for (int64_t b = 0; b < bundles; ++b) {
        for (int64_t tile = 0; tile < layout.tiles; ++tile) {
          correlate_row(c, t.n, h, first_bundle + b, tile, ring + b * panel_size(c), buffer);
        }
      }
    }
  }
}
