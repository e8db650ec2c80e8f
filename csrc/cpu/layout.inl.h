// How channels are laid on vectors, and the packing of weights that follows from it.

Layout make_layout(int64_t groups, int64_t group_src, int64_t group_dst) {
  Layout layout{};
  layout.groups = groups;
  layout.group_src = group_src;
  layout.group_dst = group_dst;
  layout.depth = group_src;
  const bool power_of_two = (group_src & (group_src - 1)) == 0;
  layout.rotating = group_src == group_dst && power_of_two && group_src < kLanes;
  if (layout.rotating) {
    layout.bundles = ceil_div(groups * group_src, kLanes);
    layout.src_channels = layout.dst_channels = kLanes;
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

// Where, among the bundle's filters, lane `lane` of a tile finds what it multiplies at term `i` of the reduction, or -1.
// When rotating, lane j of accumulator r collects what source channel j gives to destination channel (j - r) mod width
// of its group; rotating the accumulator by r then brings every sum to its own lane.
RESNEXT_INLINE int64_t filter_of(const Layout& layout, bool transposed, int64_t bundle, int64_t tile, int64_t lane,
                                 int64_t i) {
  int64_t dst = tile * tile_lanes(layout) + lane;
  int64_t src = i;
  if (layout.rotating) {
    const int64_t mask = layout.group_src - 1;
    src = lane;
    dst = (lane & ~mask) | ((lane - i) & mask);
  }
  if (dst >= bundle_dst_channels(layout, bundle)) return -1;
  return transposed ? src * layout.group_dst + dst % layout.group_dst : dst * layout.group_src + src % layout.group_src;
}

void pack_tile(const WeightPacking& p, int64_t bundle, int64_t tile, const float* filters, float* packed) {
  const Layout& layout = p.layout;
  const int64_t lanes = tile_lanes(layout);
  for (int64_t i = 0; i < layout.depth; ++i) {
    int64_t offsets[2 * kLanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      offsets[lane] = 9 * filter_of(layout, p.transposed, bundle, tile, lane, i);
    }
    for (int64_t row = 0; row < 3; ++row) {
      float* packed_phase = packed + row * packed_row_size(layout);
      for (int f = 0; f < p.cols.phases; ++f) {
        const Phase& phase = p.cols.phase[f];
        for (int k = 0; k < phase.count; ++k) {
          const int64_t tap = row * 3 + phase.taps[k];
          float* to = packed_phase + (i * phase.count + k) * lanes;
          for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = offsets[lane] < 0 ? 0.0f : filters[offsets[lane] + tap];
        }
        packed_phase += layout.depth * phase.count * lanes;
      }
    }
  }
}

void pack_weight(const WeightPacking& p, float* scratch, int64_t begin_bundle, int64_t end_bundle) {
  const Layout& layout = p.layout;
  const int64_t lanes = tile_lanes(layout);
  for (int64_t bundle = begin_bundle; bundle < end_bundle; ++bundle) {
    const int64_t first_dst = bundle * layout.dst_channels;
    const int64_t dst_channels = bundle_dst_channels(layout, bundle);
    const int64_t first_filter =
        p.transposed ? bundle * layout.src_channels * layout.group_dst : first_dst * layout.group_src;
    const float* filters =
        read_floats(p.weight, p.dtype, first_filter * 9, dst_channels * layout.group_src * 9, scratch);
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      pack_tile(p, bundle, tile, filters, p.packed_weight + (bundle * layout.tiles + tile) * 3 * packed_row_size(layout));
    }
    float* packed_bias = p.packed_bias + bundle * layout.tiles * lanes;
    __builtin_memset(packed_bias, 0, layout.tiles * lanes * sizeof(float));
    if (p.bias != nullptr) {
      const float* bias = read_floats(p.bias, p.dtype, first_dst, dst_channels, scratch);
      __builtin_memcpy(packed_bias, bias, dst_channels * sizeof(float));
    }
  }
}
