// How channels are laid on vectors, and the packing of weights that follows from it.

// Widths with rotating kernels. Rotating pays where at least two groups share a vector.
constexpr bool rotates(int64_t width) {
  return 2 * width <= kLanes && (width <= 4 || width == 6 || width == 8);
}

Layout make_layout(int64_t groups, int64_t group_src, int64_t group_dst) {
  Layout layout{};
  layout.groups = groups;
  layout.group_src = group_src;
  layout.group_dst = group_dst;
  layout.depth = group_src;
  layout.rotating = group_src == group_dst && rotates(group_src);
  if (layout.rotating) {
    layout.src_channels = layout.dst_channels = kLanes / group_src * group_src;
    layout.bundles = ceil_div(groups * group_src, layout.src_channels);
    layout.tiles = layout.tile_vectors = 1;
  } else {
    const int64_t vectors = ceil_div(group_dst, kLanes);
    layout.bundles = groups;
    layout.src_channels = group_src;
    layout.dst_channels = group_dst;
    layout.tile_vectors = vectors % 2 == 0 ? 2 : 1;
    layout.tiles = vectors / layout.tile_vectors;
  }
  layout.src_lanes = round_up(layout.src_channels, kLanes);
  return layout;
}

RESNEXT_INLINE int64_t tile_lanes(const Layout& layout) { return layout.tile_vectors * kLanes; }
RESNEXT_INLINE int64_t bundle_src_channels(const Layout& layout, int64_t bundle) {
  return min_of(layout.src_channels, layout.groups * layout.group_src - bundle * layout.src_channels);
}
RESNEXT_INLINE int64_t bundle_dst_channels(const Layout& layout, int64_t bundle) {
  return min_of(layout.dst_channels, layout.groups * layout.group_dst - bundle * layout.dst_channels);
}

// Floats of one kernel row of one tile: its column phases follow each other.
RESNEXT_INLINE int64_t packed_row_size(const Layout& layout) { return layout.depth * 3 * tile_lanes(layout); }

int64_t packed_weight_size(const Layout& layout) { return layout.bundles * layout.tiles * 3 * packed_row_size(layout); }

int64_t packed_bias_size(const Layout& layout) { return layout.bundles * layout.tiles * tile_lanes(layout); }

// Floats of a bundle's weights before packing, in whole vectors; also room for one bundle's biases.
int64_t weight_scratch(const Layout& layout) {
  const int64_t filters = layout.src_channels * layout.group_dst;  // = dst_channels * group_src
  return round_up(filters * 9 > layout.dst_channels ? filters * 9 : layout.dst_channels, kLanes);
}

// Where the packed tile keeps each of the nine taps: at offset[tap] + i * stride[tap], for term i of the reduction.
struct PackedTaps {
  int64_t offset[9];
  int64_t stride[9];
};
PackedTaps packed_taps(const Layout& layout, const Axis& cols) {
  PackedTaps taps{};
  const int64_t lanes = tile_lanes(layout);
  for (int64_t row = 0; row < 3; ++row) {
    int64_t phase_offset = row * packed_row_size(layout);
    for (int f = 0; f < cols.phases; ++f) {
      const Phase& phase = cols.phase[f];
      for (int k = 0; k < phase.count; ++k) {
        taps.offset[row * 3 + phase.taps[k]] = phase_offset + k * lanes;
        taps.stride[row * 3 + phase.taps[k]] = phase.count * lanes;
      }
      phase_offset += layout.depth * phase.count * lanes;
    }
  }
  return taps;
}

// Lane j of accumulator r collects what source channel j gives to destination channel (j - r) mod width of its group:
// rotating the accumulator by r then brings every sum to its own lane.
void pack_rotating_tile(const Layout& layout, bool transposed, const PackedTaps& taps, const float* filters,
                        const FilterStrides& strides, int64_t channels, float* packed) {
  const int64_t width = layout.group_src;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t r = 0; r < width; ++r) {
      const int64_t src = lane % width;
      const int64_t dst = (src - r + width) % width;
      const int64_t output = lane - src + (transposed ? src : dst);
      const float* filter = filters + output * width * 9 + (transposed ? dst : src) * strides.input;
      for (int64_t tap = 0; tap < 9; ++tap) {
        packed[taps.offset[tap] + r * taps.stride[tap] + lane] = lane < channels ? filter[tap * strides.tap] : 0.0f;
      }
    }
  }
}

// Lanes are destination channels: `rows` of them, `row_stride` floats apart. Each row holds the weights of the terms
// i, i + 1, ..., with all taps of a term together or (taps_outside) all terms of a tap.
void pack_lanes(const PackedTaps& taps, const float* filters, int64_t row_stride, int64_t rows, int64_t i,
                int64_t terms, bool taps_outside, float* packed) {
  for (int64_t column = 0; column < terms * 9; column += kLanes) {
    const int64_t columns = min_of(kLanes, terms * 9 - column);
    Vec square[kLanes];
    RESNEXT_UNROLL
    for (int row = 0; row < kLanes; ++row) {
      square[row] = row < rows ? load_first(filters + row * row_stride + column, columns) : Vec{};
    }
    transpose(square);
    RESNEXT_UNROLL
    for (int c = 0; c < kLanes; ++c) {
      if (c >= columns) break;
      const int64_t tap = taps_outside ? (column + c) / terms : (column + c) % 9;
      const int64_t term = taps_outside ? (column + c) % terms : (column + c) / 9;
      store(packed + taps.offset[tap] + (i + term) * taps.stride[tap], square[c]);
    }
  }
}

void pack_broadcast_tile(const Layout& layout, bool transposed, const PackedTaps& taps, const float* filters,
                         const FilterStrides& strides, int64_t tile, float* packed_tile) {
  const bool taps_outside = strides.tap != 1;
  for (int64_t v = 0; v < layout.tile_vectors; ++v) {
    const int64_t dst = tile * tile_lanes(layout) + v * kLanes;
    const int64_t rows = layout.group_dst - dst;  // may be more than a vector holds, or none
    float* packed = packed_tile + v * kLanes;
    if (!transposed) {  // filters (destination channel, source channel)
      const int64_t row_stride = layout.group_src * 9;
      pack_lanes(taps, filters + dst * row_stride, row_stride, rows, 0, layout.depth, taps_outside, packed);
      continue;
    }
    for (int64_t i = 0; i < layout.depth; ++i) {  // filters (source channel, destination channel)
      const float* filter = filters + i * layout.group_dst * 9 + dst * strides.input;
      if (!taps_outside) {
        pack_lanes(taps, filter, 9, rows, i, 1, false, packed);
        continue;
      }
      for (int64_t tap = 0; tap < 9; ++tap) {
        const Vec lanes = rows > 0 ? load_first(filter + tap * strides.tap, min_of(kLanes, rows)) : Vec{};
        store(packed + taps.offset[tap] + i * taps.stride[tap], lanes);
      }
    }
  }
}

void pack_weight(const WeightPacking& p, float* scratch, int64_t begin_bundle, int64_t end_bundle) {
  const Layout& layout = p.layout;
  const int64_t lanes = tile_lanes(layout);
  const PackedTaps taps = packed_taps(layout, p.cols);
  for (int64_t bundle = begin_bundle; bundle < end_bundle; ++bundle) {
    const int64_t first_dst = bundle * layout.dst_channels;
    const int64_t dst_channels = bundle_dst_channels(layout, bundle);
    const int64_t first_filter =
        p.transposed ? bundle * layout.src_channels * layout.group_dst : first_dst * layout.group_src;
    const float* filters =
        read_floats(p.weight, p.dtype, first_filter * 9, dst_channels * layout.group_src * 9, scratch);
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      float* packed = p.packed_weight + (bundle * layout.tiles + tile) * 3 * packed_row_size(layout);
      if (layout.rotating) {
        pack_rotating_tile(layout, p.transposed, taps, filters, p.strides, dst_channels, packed);
      } else {
        pack_broadcast_tile(layout, p.transposed, taps, filters, p.strides, tile, packed);
      }
    }
    float* packed_bias = p.packed_bias + bundle * layout.tiles * lanes;
    __builtin_memset(packed_bias, 0, layout.tiles * lanes * sizeof(float));
    if (p.bias != nullptr) {
      const float* bias = read_floats(p.bias, p.dtype, first_dst, dst_channels, scratch);
      __builtin_memcpy(packed_bias, bias, dst_channels * sizeof(float));
    }
  }
}
