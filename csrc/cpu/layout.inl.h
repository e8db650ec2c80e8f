// How channels are laid on vectors, and the packing of weights that follows from it.

// Lanes of a group, if there is room for several.
RESNEXT_INLINE int64_t group_width(int64_t group_src, int64_t group_dst) {
  int64_t width = 1;
  while (width < group_src || width < group_dst) width *= 2;
  return width;
}

Layout make_layout(int64_t groups, int64_t group_src, int64_t group_dst, bool pairs, bool amx) {
  Layout layout{};
  layout.pairs = pairs;
  layout.amx = amx;
  const int64_t terms = pairs ? 2 : 1;  // source channels of a lane
  layout.all_src = groups * group_src / terms;
  layout.all_dst = groups * group_dst;
  if (amx) {
    const int64_t width = group_width(group_src, group_dst);
    layout.merged = width < 2 * kLanes ? 2 * kLanes / width : 1;
    layout.shared = 1;
    groups = ceil_div(groups, layout.merged);
    group_src *= layout.merged;
    group_dst *= layout.merged;
  } else {
    const int64_t width = group_width(group_src / terms, group_dst);
    layout.merged = 1;
    layout.shared = width < kLanes ? kLanes / width : 1;
  }
  group_src /= terms;
  layout.groups = groups;
  layout.group_src = group_src;
  layout.group_dst = group_dst;
  layout.packed_src = amx ? round_up(group_src, kLanes) : group_src;
  layout.bundles = ceil_div(groups, layout.shared);
  layout.src_channels = layout.shared * group_src;
  layout.dst_channels = layout.shared * group_dst;
  const int64_t vectors = ceil_div(layout.dst_channels, kLanes);
  layout.tile_vectors = vectors % 2 == 0 ? 2 : 1;
  layout.tiles = vectors / layout.tile_vectors;
  layout.src_lanes = round_up(layout.src_channels, kLanes);
  layout.panel_bundles = !amx && pairs && 2 * layout.src_channels == kLanes ? 2 : 1;
  return layout;
}

// The lane of channel `member` of a group that is number `group` among those that share a vector.
RESNEXT_INLINE int64_t lane_of(const Layout& layout, int64_t group, int64_t member) {
  return member * layout.shared + group;
}

// Which channel of its vector in memory each lane of a panel's vectors holds, for `width` channels per group. (Lanes
// that hold no channel may get anything.)
IntVec channels_of_lanes(const Layout& layout, int64_t width) {
  IntVec channels = in_order();
  if (layout.shared == 1) return channels;
  const int64_t bundle_channels = layout.shared * width;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t in_bundle = lane % bundle_channels;
    const int64_t channel = in_bundle % layout.shared * width + in_bundle / layout.shared;
    channels[lane] = static_cast<int32_t>(min_of(lane - in_bundle + channel, kLanes - 1));
  }
  return channels;
}

// And the way back.
IntVec lanes_of_channels(const Layout& layout, int64_t width) {
  IntVec lanes = in_order();
  if (layout.shared == 1) return lanes;
  for (int channel = 0; channel < layout.shared * width; ++channel) {
    lanes[channel] = static_cast<int32_t>(lane_of(layout, channel / width, channel % width));
  }
  return lanes;
}

RESNEXT_INLINE int64_t tile_lanes(const Layout& layout) { return layout.tile_vectors * kLanes; }
// Source channels of `bundles` bundles.
RESNEXT_INLINE int64_t bundle_src_channels(const Layout& layout, int64_t first_bundle, int64_t bundles = 1) {
  return min_of(bundles * layout.src_channels, layout.all_src - first_bundle * layout.src_channels);
}
RESNEXT_INLINE int64_t bundle_dst_channels(const Layout& layout, int64_t bundle) {
  return min_of(layout.dst_channels, layout.all_dst - bundle * layout.dst_channels);
}

// Floats of one kernel row of one tile, of a tile, and of its biases.
RESNEXT_INLINE int64_t packed_row_size(const Layout& layout) { return layout.packed_src * 3 * tile_lanes(layout); }
int64_t packed_weight_size(const Layout& layout) { return 3 * packed_row_size(layout); }
int64_t packed_bias_size(const Layout& layout) { return tile_lanes(layout); }

// The layout as it would be with one channel in a lane, but with the same lanes.
RESNEXT_INLINE Layout without_pairs(Layout layout) {
  if (!layout.pairs) return layout;
  layout.pairs = false;
  layout.group_src *= 2;
  layout.packed_src *= 2;
  layout.src_channels *= 2;
  return layout;
}

// Floats of a bundle's weights in whole vectors, of groups that share a vector: others are read where they are.
RESNEXT_INLINE int64_t filters_size(const Layout& layout) {
  return round_up(layout.src_channels * layout.group_dst * 9, kLanes);
}

// With pairs, also room for a packed tile without.
int64_t weight_scratch(const Layout& layout) {
  if (layout.shared == 1) return 0;
  const Layout whole = without_pairs(layout);
  return filters_size(whole) + (layout.pairs ? packed_weight_size(whole) : 0);
}

// Where a packed tile keeps tap number `tap` of the reduction's term 0; that of term i 3 * i * tile_lanes further on.
RESNEXT_INLINE int64_t packed_tap(const Layout& layout, const Filters& f, int64_t tap) {
  const int64_t column = f.mirrored ? 2 - tap % 3 : tap % 3;
  return tap / 3 * packed_row_size(layout) + column * tile_lanes(layout);
}

// Vectors of lanes of a tile that a group has weights for.
RESNEXT_INLINE int64_t packed_vectors(const Layout& layout) { return layout.merged > 1 ? 1 : layout.tile_vectors; }

// Stores such a vector, of which merged groups have a part each.
RESNEXT_INLINE void store_packed(const Layout& layout, float* to, Vec value) {
  layout.merged > 1 ? store_first(to, value, layout.group_dst) : store(to, value);
}

// Groups that share a vector: `groups` of them.
void pack_shared_tile(const Layout& layout, const Filters& f, const float* filters, int64_t groups, float* packed) {
  const int64_t filter_size = (f.transposed ? layout.group_dst : layout.group_src) * 9;
  const int64_t src_step = f.transposed ? filter_size : f.strides.input;
  const int64_t dst_step = f.transposed ? f.strides.input : filter_size;
  const int64_t group_size = layout.group_src * layout.group_dst * 9;
  __builtin_memset(packed, 0, 3 * packed_row_size(layout) * sizeof(float));
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t i = 0; i < layout.group_src; ++i) {
      float* to = packed + packed_tap(layout, f, tap) + i * 3 * kLanes;
      const float* from = filters + tap * f.strides.tap + i * src_step;
      for (int64_t o = 0; o < layout.group_dst; ++o) {
        for (int64_t g = 0; g < groups; ++g) to[o * layout.shared + g] = from[o * dst_step + g * group_size];
      }
    }
  }
}

// --- weights in OIHW: a filter's taps of one input lie together ---

// A square whose rows are filters or inputs, the first `rows` of them, `stride` weights apart, and whose columns are
// `count` weights of each, or with kPairs pairs of these and the weights that are `partner` further on; transposed.
template <bool kPairs, class T>
RESNEXT_INLINE void load_transposed(const T* from, int64_t stride, int64_t rows, int64_t count, int64_t partner,
                                    Vec (&square)[kLanes]) {
  RESNEXT_UNROLL
  for (int row = 0; row < kLanes; ++row) {
    square[row] = row < rows ? load_row_terms<kPairs>(from + row * stride, partner, count) : Vec{};
  }
  transpose(square);
}

// One term of the reduction: nine taps, whose lanes are filters or inputs, as of load_transposed.
template <bool kPairs, class T>
RESNEXT_INLINE void pack_term(const Layout& layout, const Filters& f, const T* from, int64_t stride, int64_t rows,
                              int64_t partner, float* packed) {
  for (int64_t first = 0; first < 9; first += kLanes) {
    const int64_t count = min_of(kLanes, 9 - first);
    Vec square[kLanes];
    load_transposed<kPairs>(from + first, stride, rows, count, partner, square);
    for (int64_t tap = 0; tap < count; ++tap) {
      store_packed(layout, packed + packed_tap(layout, f, first + tap), square[tap]);
    }
  }
}

// Lanes are filters, up to `rows` of them; the reduction is over inputs, whose taps follow each other in a filter.
template <class T>
void pack_filters(const Layout& layout, const Filters& f, const T* filters, int64_t rows, float* packed) {
  const int64_t filter_size = layout.group_src * 9;
  Vec square[kLanes];
  int64_t tap = 0;
  for (int64_t column = 0; column < filter_size; column += kLanes) {
    const int64_t count = min_of(kLanes, filter_size - column);
    load_transposed<false>(filters + column, filter_size, rows, count, 0, square);
    for (int64_t k = 0; k < count; ++k) {
      store(packed + packed_tap(layout, f, tap), square[k]);
      if (++tap < 9) continue;
      tap = 0;
      packed += 3 * tile_lanes(layout);
    }
  }
}

// A tile of one group, whose weights begin at `filters`.
template <bool kPairs, class T>
void pack_oihw(const Layout& layout, const Filters& f, const T* filters, int64_t tile, float* packed_tile) {
  constexpr int kTerms = kPairs ? 2 : 1;  // source channels of a lane
  const int64_t term_size = 3 * tile_lanes(layout);
  for (int64_t v = 0; v < packed_vectors(layout); ++v) {
    const int64_t dst = tile * tile_lanes(layout) + v * kLanes;
    const int64_t rows = layout.group_dst - dst;  // may be more than a vector holds, or none
    float* packed = packed_tile + v * kLanes;
    const int64_t filter_size = (f.transposed ? layout.group_dst : layout.group_src * kTerms) * 9;
    if (!f.transposed && !kPairs) {
      pack_filters(layout, f, filters + dst * filter_size, rows, packed);
      continue;
    }
    for (int64_t i = 0; i < layout.group_src; ++i, packed += term_size) {
      if (f.transposed) {  // lanes are inputs
        pack_term<kPairs>(layout, f, filters + i * kTerms * filter_size + dst * 9, 9, rows, filter_size, packed);
      } else {
        pack_term<kPairs>(layout, f, filters + dst * filter_size + i * kTerms * 9, filter_size, rows, 9, packed);
      }
    }
  }
}

// --- weights in OHWI: a filter's inputs of one tap lie together, so that they can be read as pairs ---

// Lanes are filters.
template <bool kPairs, class T>
void pack_filters_ohwi(const Layout& layout, const Filters& f, const T* filters, int64_t tile, float* packed) {
  constexpr int kTerms = kPairs ? 2 : 1;  // inputs of a lane
  const int64_t inputs = layout.group_src * kTerms;
  const int64_t term_size = 3 * tile_lanes(layout);
  for (int64_t v = 0; v < packed_vectors(layout); ++v) {
    const int64_t dst = tile * tile_lanes(layout) + v * kLanes;
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* to = packed + packed_tap(layout, f, tap) + v * kLanes;
      for (int64_t i = 0; i < inputs; i += kTerms * kLanes) {
        Vec square[kLanes];
        RESNEXT_UNROLL
        for (int row = 0; row < kLanes; ++row) {
          square[row] = Vec{};
          if (dst + row >= layout.group_dst) continue;
          square[row] = load_terms<kPairs>(filters + ((dst + row) * 9 + tap) * inputs + i, inputs - i);
        }
        transpose(square);
        const int64_t terms = min_of(kLanes, layout.group_src - i / kTerms);
        for (int64_t k = 0; k < terms; ++k, to += term_size) store_packed(layout, to, square[k]);
      }
    }
  }
}

// Lanes are inputs; the reduction is over filters. (One vector of lanes after the other, which is faster than to read
// whole lines, or all tiles, in the order of memory: what is written lies far apart then.)
template <bool kPairs, class T>
void pack_inputs_ohwi(const Layout& layout, const Filters& f, const T* filters, int64_t tile, float* packed) {
  const int64_t filter_size = 9 * layout.group_dst;
  const int64_t term_size = 3 * tile_lanes(layout);
  for (int64_t v = 0; v < packed_vectors(layout); ++v, packed += kLanes) {
    const int64_t dst = tile * tile_lanes(layout) + v * kLanes;
    const int64_t count = dst < layout.group_dst ? layout.group_dst - dst : 0;
    const T* filter = filters + dst;
    for (int64_t i = 0; i < layout.group_src; ++i, filter += (kPairs ? 2 : 1) * filter_size) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        float* to = packed + packed_tap(layout, f, tap) + i * term_size;
        store_packed(layout, to, load_row_terms<kPairs>(filter + tap * layout.group_dst, filter_size, count));
      }
    }
  }
}

// Clears the weights of source channels that only the packed tile has.
void clear_rest(const Layout& layout, float* packed) {
  const int64_t used = layout.group_src * 3 * tile_lanes(layout);
  if (layout.packed_src == layout.group_src) return;
  for (int row = 0; row < 3; ++row, packed += packed_row_size(layout)) {
    __builtin_memset(packed + used, 0, (packed_row_size(layout) - used) * sizeof(float));
  }
}

// The bias of tile number `tile` of a bundle.
void pack_bias(const Layout& layout, const Filters& f, int64_t bundle, int64_t tile, float* packed) {
  const int64_t first = tile * tile_lanes(layout);
  const int64_t channels = min_of(tile_lanes(layout), bundle_dst_channels(layout, bundle) - first);
  __builtin_memset(packed, 0, packed_bias_size(layout) * sizeof(float));
  if (f.bias == nullptr) return;
  with_float_type(f.images, [&](auto value) {
    const auto* bias = static_cast<const decltype(value)*>(f.bias) + bundle * layout.dst_channels + first;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t lane = layout.shared > 1 ? lane_of(layout, c / layout.group_dst, c % layout.group_dst) : c;
      packed[lane] = load_first(bias + c, 1)[0];
    }
  });
}

// --- narrow groups merged to a wide one, for AMX ---

RESNEXT_INLINE uint32_t rounded_bits(BFloat16 value) { return value.bits; }
RESNEXT_INLINE uint32_t rounded_bits(Rounded<BFloat16> value) {
  if (value.value != value.value) return 0x7fc0;
  const auto bits = bit_cast<uint32_t>(value.value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Of an odd number of source channels each: a pair may be of two groups.
template <class T>
void pack_odd_groups(const Layout& layout, const Filters& f, const T* filters, int64_t groups, float* packed) {
  const int64_t group_src = 2 * layout.group_src / layout.merged;
  const int64_t group_dst = layout.group_dst / layout.merged;
  const int64_t filter_size = (f.transposed ? group_dst : group_src) * 9;
  const int64_t src_step = f.transposed ? filter_size : f.strides.input;
  const int64_t dst_step = f.transposed ? f.strides.input : filter_size;
  const int64_t term_size = 3 * tile_lanes(layout);
  for (int64_t lane = 0; lane < groups * group_dst; ++lane) {
    const int64_t group = lane / group_dst;
    const int64_t src = group * group_src;  // its first source channel, perhaps the second of a pair
    const T* from = filters + group * group_src * group_dst * 9 + lane % group_dst * dst_step;
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* to = packed + packed_tap(layout, f, tap) + lane;
      const T* weight = from + tap * f.strides.tap;
      for (int64_t i = -(src % 2); i < group_src; i += 2) {
        const uint32_t low = i < 0 ? 0 : rounded_bits(weight[i * src_step]);
        const uint32_t high = i + 1 < group_src ? rounded_bits(weight[(i + 1) * src_step]) : 0;
        const uint32_t pair = low | high << 16;
        __builtin_memcpy(to + (src + i) / 2 * term_size, &pair, sizeof(pair));
      }
    }
  }
}

// The only tile of `groups` groups, whose weights begin at `filters`.
template <class T>
void pack_merged_tile(const Layout& merged, const Filters& f, const T* filters, int64_t groups, float* packed) {
  __builtin_memset(packed, 0, packed_weight_size(merged) * sizeof(float));
  Layout layout = merged;  // of one group, beside the others
  layout.group_src /= merged.merged;
  layout.group_dst /= merged.merged;
  if (layout.group_src * merged.merged != merged.group_src) return pack_odd_groups(merged, f, filters, groups, packed);
  const auto pack_group = f.strides.tap == 1 ? pack_oihw<true, T>
                          : f.transposed     ? pack_inputs_ohwi<true, T>
                                             : pack_filters_ohwi<true, T>;
  for (int64_t group = 0; group < groups; ++group) {
    pack_group(layout, f, filters, /*tile=*/0, packed);
    filters += 2 * layout.group_src * layout.group_dst * 9;
    packed += layout.group_src * 3 * tile_lanes(layout) + layout.group_dst;
  }
}

// Tiles [begin, end) of one bundle.
template <bool kPairs, class T>
void pack_tiles(const Layout& packed_layout, const Filters& f, float* scratch, int64_t bundle, int64_t begin,
                int64_t end, float* packed) {
  const Layout layout = without_pairs(packed_layout);
  if constexpr (kPairs) {
    if (layout.merged > 1) {
      const int64_t group_dst = layout.group_dst / layout.merged;
      const T* filters = static_cast<const T*>(f.weight) + bundle * layout.group_src * group_dst * 9;
      return pack_merged_tile(packed_layout, f, filters, bundle_dst_channels(layout, bundle) / group_dst, packed);
    }
  }
  const int64_t group_size = layout.group_src * layout.group_dst * 9;
  const T* filters = static_cast<const T*>(f.weight) + bundle * layout.shared * group_size;
  const int64_t groups = bundle_dst_channels(layout, bundle) / layout.group_dst;
  if (layout.shared > 1) widen(filters, groups * group_size, scratch);
  const auto of_inputs_inside = f.transposed ? pack_inputs_ohwi<kPairs, T> : pack_filters_ohwi<kPairs, T>;
  const auto of_one_group = f.strides.tap == 1 ? pack_oihw<kPairs, T> : of_inputs_inside;
  for (int64_t tile = begin; tile < end; ++tile, packed += packed_weight_size(packed_layout)) {
    if (layout.shared == 1) {
      of_one_group(packed_layout, f, filters, tile, packed);
      clear_rest(packed_layout, packed);
      continue;
    }
    float* whole = kPairs ? scratch + filters_size(layout) : packed;
    pack_shared_tile(layout, f, scratch, groups, whole);
    if (kPairs) {
      const int64_t term_size = 3 * tile_lanes(layout);
      pair_pieces(whole, 3 * layout.group_src, term_size, term_size, packed);
    }
  }
}

void pack_weight(const Layout& layout, const Filters& f, float* scratch, int64_t begin, int64_t end,
                 const PackedFilters& first) {
  PackedFilters to = first;
  for (int64_t i = begin; i < end;) {
    const int64_t bundle = i / layout.tiles;
    const int64_t tile = i % layout.tiles;
    const int64_t end_tile = min_of(layout.tiles, tile + end - i);
    with_weight_terms(layout.pairs, f.dtype, f.images, [&](auto pairs, auto value) {
      pack_tiles<decltype(pairs)::value, decltype(value)>(layout, f, scratch, bundle, tile, end_tile, to.weight);
    });
    for (int64_t t = tile; t < end_tile && to.bias != nullptr; ++t, to.bias += packed_bias_size(layout)) {
      pack_bias(layout, f, bundle, t, to.bias);
    }
    to.weight += (end_tile - tile) * packed_weight_size(layout);
    i += end_tile - tile;
  }
}
