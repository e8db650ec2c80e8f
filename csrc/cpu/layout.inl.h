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

// The (destination, source) channels that lane `lane` of a tile multiplies at term `i` of the reduction. When rotating,
// lane j of accumulator r collects what source channel j gives to destination channel (j - r) mod width of its group;
// rotating the accumulator by r brings every sum to its own lane.
struct ChannelPair {
  int64_t dst, src;
  bool exists;
};
RESNEXT_INLINE ChannelPair channel_pair(const Layout& layout, int64_t bundle, int64_t tile, int64_t lane, int64_t i) {
  if (layout.rotating) {
    const int64_t src = bundle * kLanes + lane;
    const int64_t mask = layout.group_src - 1;
    return {(src & ~mask) | ((src - i) & mask), src, src < layout.groups * layout.group_src};
  }
  const int64_t dst = tile * tile_lanes(layout) + lane;
  return {bundle * layout.group_dst + dst, bundle * layout.group_src + i, dst < layout.group_dst};
}

void pack_weight(const WeightPacking& p, int64_t begin_bundle, int64_t end_bundle) {
  const Layout& layout = p.layout;
  const int64_t lanes = tile_lanes(layout);
  for (int64_t bundle = begin_bundle; bundle < end_bundle; ++bundle) {
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      float* packed_tile = p.packed_weight + (bundle * layout.tiles + tile) * 3 * packed_row_size(layout);
      float* packed_bias = p.packed_bias + (bundle * layout.tiles + tile) * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t i = 0; i < layout.depth; ++i) {
          const ChannelPair pair = channel_pair(layout, bundle, tile, lane, i);
          const int64_t filter = p.transposed ? pair.src * layout.group_dst + pair.dst % layout.group_dst
                                              : pair.dst * layout.group_src + pair.src % layout.group_src;
          for (int64_t row = 0; row < 3; ++row) {
            float* packed = packed_tile + row * packed_row_size(layout) + lane;
            for (int f = 0; f < p.cols.phases; ++f) {
              const Phase& phase = p.cols.phase[f];
              for (int k = 0; k < phase.count; ++k) {
                packed[(i * phase.count + k) * lanes] =
                    pair.exists ? read_scalar(p.weight, p.dtype, filter * 9 + row * 3 + phase.taps[k]) : 0.0f;
              }
              packed += layout.depth * phase.count * lanes;
            }
          }
        }
        const ChannelPair pair = channel_pair(layout, bundle, tile, lane, 0);
        packed_bias[lane] = p.bias != nullptr && pair.exists ? read_scalar(p.bias, p.dtype, pair.dst) : 0.0f;
      }
    }
  }
}
