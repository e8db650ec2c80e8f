// The same correlations by AMX, of whole strips of rows at once: a register has 16 rows, and rows of images are short.
//
// A strip's source rows lie behind each other in a *plane*, with one column of zeros between them, for what is left of
// a row's first pixel and right of the row before. Counting positions in a plane whose rows are `pitch` wide, every tap
// of every destination position q is at q plus a constant: 16 positions that follow each other are one register, across
// the ends of rows. (What the columns of zeros make is not stored.) Small images are stacked, with a row of zeros
// between them: a strip has rows of several, and meets the weights once for all of them. With stride 2 even and odd
// rows and columns have planes of their own, or in the input gradient, where every phase has fewer taps, destinations
// of their own.
//
// Groups too narrow for a register are merged, with weights of zero: infinity times zero would be NaN in all of them,
// so that `not_finite` tells of such sources, and the driver takes the other kernels.

#if RESNEXT_LANES == 16

// What the taps of a phase read along an axis: the plane's, `offset` rows or columns further on.
struct AmxTaps {
  int count;
  struct {
    int tap, plane, offset;
  } taps[3];
};

RESNEXT_INLINE AmxTaps row_taps(const Correlation& c, int phase) {
  const Phase& rows = c.rows.phase[phase];
  const int step = c.rows.in_step;
  AmxTaps found{rows.count, {}};
  for (int k = 0; k < rows.count; ++k) {
    const int at = rows.first + k + step;  // not negative
    found.taps[k] = {rows.taps[k], at % step, at / step - 1};
  }
  return found;
}

// Of a forward pass.
RESNEXT_INLINE AmxTaps forward_taps(int64_t step) {
  if (step == 2) return {3, {{0, 1, -1}, {1, 0, 0}, {2, 1, 0}}};
  return {3, {{0, 0, -1}, {1, 0, 0}, {2, 0, 1}}};
}

RESNEXT_INLINE AmxTaps column_taps(const Correlation& c, int phase) {
  if (c.cols.phases == 1) return forward_taps(c.cols.in_step);
  return phase == 0 ? AmxTaps{1, {{1, 0, 0}}} : AmxTaps{2, {{0, 0, 1}, {2, 0, 0}}};  // d = 2 * s + k - 1
}

// Rows of a strip: [first, first + c.rows_at_once) of every phase. Its planes hold one row more before these, and one
// after them.
struct AmxStrip {
  int64_t pitch, lanes;  // of a position
  int64_t image_rows;    // of a phase, of stacked images: with a row of zeros
  int64_t row_planes, column_planes;
  int64_t plane_size, bundle_size;
  int64_t dst_pitch, dst_rows;  // pixels, and rows, of the results of all phases

  RESNEXT_INLINE explicit AmxStrip(const Correlation& c)
      : pitch((c.cols.phases == 2 ? c.src.width : c.dst.width) + 1),
        lanes(c.layout.src_lanes),
        image_rows(ceil_div(c.dst.height, c.rows.phases) + 1),
        row_planes(c.rows.in_step),
        column_planes(c.cols.in_step),
        plane_size(((c.rows_at_once + 2) * pitch + 1) * lanes),
        bundle_size(row_planes * column_planes * plane_size),
        dst_pitch(c.cols.phases * pitch),
        dst_rows(c.rows.phases * c.rows_at_once) {}

  // Floats of all planes, with what registers read behind the last, and of the results of a tile.
  RESNEXT_INLINE int64_t planes_size(const Correlation& c) const { return c.block * bundle_size + 34 * lanes; }
  RESNEXT_INLINE int64_t results_size(const Correlation& c) const {
    return (dst_rows * dst_pitch + 32 * c.cols.phases) * tile_lanes(c.layout);
  }
};

Scratch amx_correlate_scratch(const Correlation& c) {
  const AmxStrip strip(c);
  const int64_t row = c.src.channels_last ? 0 : 3 * c.src.width * strip.lanes;
  return {strip.planes_size(c) + strip.results_size(c) + row, strip.planes_size(c)};
}

// Which of these bfloat16 are infinite or NaN.
RESNEXT_INLINE __mmask32 not_finite_lanes(Vec pairs) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(bit_cast<__m512i>(pairs), exponent), exponent);
}

// Where the pixels of a row go: columns w, w + planes, w + 2 * planes, ... follow each other in plane number w.
struct AmxRow {
  float* to;
  int64_t planes, plane_size, lanes;
};

// Brings a row's pairs of channels to its planes; returns whether all are finite.
template <template <class, class> class Map>
bool amx_read_nhwc(Piece<BFloat16> from, ReadMap read, AmxRow row) {
  const int64_t next_row = from.pixels * from.stride;
  __mmask32 found = 0;
  const auto read_pairs = [&](auto whole, int64_t offset, int64_t c) RESNEXT_ALWAYS {
    const int64_t count = from.channels - c;
    __builtin_prefetch(from.data + offset + next_row, kForReading, kKeepInL2);
    if (Map<float, ChannelLanes>::kOther) __builtin_prefetch(from.other + offset + next_row, kForReading, kKeepInL2);
    if constexpr (std::is_same_v<Map<float, ChannelLanes>, KeepValue<float, ChannelLanes>>) {  // only moved
      const auto* pairs = reinterpret_cast<const float*>(from.data + offset);
      return load_lanes<decltype(whole)::value>(pairs, count / 2);
    } else {
      return read_channel_pairs<decltype(whole)::value, Map>(from.data, from.other, read, offset, from.c + c, count);
    }
  };
  for (int64_t j = 0; j < row.planes; ++j, row.to += row.plane_size) {
    float* pixel = row.to;
    for (int64_t w = j; w < from.pixels; w += row.planes, pixel += row.lanes) {
      int64_t c = 0;
      for (; c + 2 * kLanes <= from.channels; c += 2 * kLanes) {
        const Vec pairs = read_pairs(std::true_type{}, w * from.stride + c, c);
        found |= not_finite_lanes(pairs);
        store(pixel + c / 2, pairs);
      }
      if (c == from.channels) continue;
      const Vec pairs = read_pairs(std::false_type{}, w * from.stride + c, c);
      found |= not_finite_lanes(pairs);
      store(pixel + c / 2, pairs);
    }
  }
  return found == 0;
}

// The same of NCHW. `scratch`: two rows of floats and one of pairs.
bool amx_read_nchw(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t pairs,
                   float* scratch, AmxRow row) {
  float* pixels = scratch + image.width * 2 * row.lanes;
  read_row_pairs(image, read, n, h, c, pairs, row.lanes, in_order(), scratch, pixels);
  __mmask32 found = 0;
  for (int64_t w = 0; w < image.width; ++w) {
    float* pixel = row.to + w % row.planes * row.plane_size + w / row.planes * row.lanes;
    for (int64_t lane = 0; lane < row.lanes; lane += kLanes, pixels += kLanes) {
      found |= not_finite_lanes(load(pixels));
      store(pixel + lane, load(pixels));
    }
  }
  return found == 0;
}

// Brings row number `row` of a strip's planes there, for a bundle: of every plane row number `from` of the images that
// are stacked from the n-th on.
void amx_read_row(const Correlation& c, const AmxStrip& strip, int64_t bundle, int64_t n, int64_t from, int64_t row,
                  float* scratch, float* planes) {
  const Layout& layout = c.layout;
  const int64_t channel = bundle * layout.src_channels;
  const int64_t channels = bundle_src_channels(layout, bundle);
  const bool between = from < 0 || from % strip.image_rows == strip.image_rows - 1;
  n += from / strip.image_rows;
  from %= strip.image_rows;
  for (int64_t i = 0; i < strip.row_planes; ++i, planes += strip.column_planes * strip.plane_size) {
    const int64_t h = from * strip.row_planes + i;
    float* to = planes + (row * strip.pitch + 1) * strip.lanes;
    if (between || n >= c.src.batch || h >= c.src.height) {
      for (int64_t j = 0; j < strip.column_planes; ++j, to += strip.plane_size) {
        __builtin_memset(to, 0, (strip.pitch - 1) * strip.lanes * sizeof(float));
      }
      continue;
    }
    const AmxRow pixels = {to, strip.column_planes, strip.plane_size, strip.lanes};
    bool finite = true;
    if (c.src.channels_last) {
      const auto piece = piece_of<BFloat16>(c.src, c.read.other, n, h, 2 * channel, 2 * channels);
      with_read_map(c.read, [&](auto map) {
        finite = amx_read_nhwc<decltype(map)::template Map>(piece, c.read, pixels);
      });
    } else {
      finite = amx_read_nchw(c.src, c.read, n, h, channel, channels, scratch, pixels);
    }
    if (layout.merged > 1 && !finite) __atomic_store_n(c.not_finite, 1, __ATOMIC_RELAXED);
  }
}

// A tap of a phase: where the first position meets the source, and the weights it takes.
struct AmxTap {
  const float *source, *weight;
};

// Results of `positions` positions of one phase for a tile, to [position][lane], `stride` floats apart.
void amx_positions(const AmxTap (&taps)[9], int count, const Layout& layout, const float* bias, int64_t positions,
                   float* results, int64_t stride) {
  const int64_t lanes = layout.src_lanes;
  const int64_t weight_stride = 3 * tile_lanes(layout);
  for (int64_t q = 0; q < positions; q += 2 * kAmxRows) {
    with_amx_sums(positions - q > kAmxRows, layout.tile_vectors == 2, [&](auto sums) RESNEXT_ALWAYS {
      if (bias == nullptr) {
        sums.clear();
      } else {
        sums.load(bias, 0, 0, kLanes);
      }
      for (int tap = 0; tap < count; ++tap) {
        const float* source = taps[tap].source + q * lanes;
        const float* weight = taps[tap].weight;
        for (int64_t i = 0; i < lanes; i += kLanes, weight += kLanes * weight_stride) {
          sums.add(source + i, lanes, kAmxRows * lanes, weight, weight_stride, kLanes);
        }
      }
      sums.store(results + q * stride, stride, kAmxRows * stride, kLanes);
    });
  }
}

// All phases of the rows of a strip, for one tile.
void amx_strip(const Correlation& c, const AmxStrip& strip, const float* planes, const float* weight,
               const float* bias, int64_t rows, float* results) {
  const Layout& layout = c.layout;
  const int64_t lanes = tile_lanes(layout);
  const int64_t positions = rows * strip.pitch - 1;
  for (int row_phase = 0; row_phase < c.rows.phases; ++row_phase) {
    for (int column_phase = 0; column_phase < c.cols.phases; ++column_phase) {
      const AmxTaps in_column = row_taps(c, row_phase);
      const AmxTaps in_row = column_taps(c, column_phase);
      AmxTap taps[9];
      int count = 0;
      for (int i = 0; i < in_column.count; ++i) {
        for (int j = 0; j < in_row.count; ++j) {
          const auto& row = in_column.taps[i];
          const auto& column = in_row.taps[j];
          const float* plane = planes + (row.plane * strip.column_planes + column.plane) * strip.plane_size;
          taps[count++] = {plane + ((row.offset + 1) * strip.pitch + column.offset + 1) * strip.lanes,
                           weight + row.tap * packed_row_size(layout) + column.tap * lanes};
        }
      }
      amx_positions(taps, count, layout, bias, positions,
                    results + (row_phase * c.rows_at_once * strip.dst_pitch + column_phase) * lanes,
                    c.cols.phases * lanes);
    }
  }
}

// Maps and writes what a strip's stacked rows [first, first + rows) gave for a tile, the rows of its task.
void amx_write_rows(const Correlation& c, const AmxStrip& strip, const BandTask& task, int64_t first_image,
                    int64_t first, int64_t rows, int64_t bundle, int64_t tile, const float* results) {
  const Layout& layout = c.layout;
  const int64_t lanes = tile_lanes(layout);
  const int64_t phases = c.rows.phases;
  const int64_t channel = bundle * layout.dst_channels + tile * lanes;
  const int64_t channels = min_of(lanes, bundle_dst_channels(layout, bundle) - tile * lanes);
  for (int64_t i = 0; i < rows * phases; ++i) {
    const int64_t n = first_image + (first + i / phases) / strip.image_rows;
    const int64_t h = (first + i / phases) % strip.image_rows * phases + i % phases;
    if (h < task.first_row || h >= task.last_row) continue;
    const float* row = results + (i % phases * c.rows_at_once + i / phases) * strip.dst_pitch * lanes;
    const WriteMap write = map_of_row(c.write, c.cuts, c.dst, n, h);
    if (c.dst.channels_last && channels == kTileChannels) {
      write_sums(row, write, piece_of<BFloat16>(c.dst, write.other, n, h, channel, channels));
    } else {
      write_row(c.dst, write, n, h, channel, channels, lanes, row);
    }
  }
}

void amx_correlate(const Correlation& c, float* scratch, int64_t begin, int64_t end) {
  const AmxRegisters registers;
  const Layout& layout = c.layout;
  const AmxStrip strip(c);
  const int64_t tile_blocks = ceil_div(layout.tiles, c.tile_block);
  const int64_t blocks = ceil_div(layout.bundles, c.block) * tile_blocks;
  const int64_t phases = c.rows.phases;
  const int64_t after = c.rows.in_step == 1 ? 1 : 0;  // rows of planes that a strip's last row sees behind itself
  float* planes = scratch;
  float* results = planes + strip.planes_size(c);
  float* row_scratch = results + strip.results_size(c);
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(c.cuts, c.dst, blocks, task);
    const int64_t first_bundle = t.block / tile_blocks * c.block;
    const int64_t bundles = min_of(c.block, layout.bundles - first_bundle);
    const int64_t first_tile = t.block % tile_blocks * c.tile_block;
    const int64_t tiles = min_of(c.tile_block, layout.tiles - first_tile);
    const int64_t first_image = t.n * c.images;
    const int64_t images = min_of(c.images, c.dst.batch - first_image);
    const int64_t end_row = images > 1 ? images * strip.image_rows - 1 : ceil_div(t.last_row, phases);
    int64_t have = 0;  // rows that are in the planes already
    for (int64_t first = t.first_row / phases; first < end_row; first += c.rows_at_once) {
      const int64_t rows = min_of(c.rows_at_once, end_row - first);
      const int64_t wanted = rows + 1 + after;
      for (int64_t b = 0; b < bundles && have > 0; ++b) {  // the last of the strip before
        float* plane = planes + b * strip.bundle_size;
        for (int64_t i = 0; i < strip.row_planes * strip.column_planes; ++i, plane += strip.plane_size) {
          __builtin_memmove(plane, plane + c.rows_at_once * strip.pitch * strip.lanes,
                            have * strip.pitch * strip.lanes * sizeof(float));
        }
      }
      for (int64_t row = have; row < wanted; ++row) {
        for (int64_t b = 0; b < bundles; ++b) {
          amx_read_row(c, strip, first_bundle + b, first_image, first - 1 + row, row, row_scratch,
                       planes + b * strip.bundle_size);
        }
      }
      have = 1 + after;
      for (int64_t b = 0; b < bundles; ++b) {
        const int64_t bundle = first_bundle + b;
        for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
          const int64_t packed = bundle * layout.tiles + tile;
          const float* bias = c.filters.bias == nullptr ? nullptr : c.packed.bias + packed * packed_bias_size(layout);
          amx_strip(c, strip, planes + b * strip.bundle_size, c.packed.weight + packed * packed_weight_size(layout),
                    bias, rows, results);
          amx_write_rows(c, strip, t, first_image, first, rows, bundle, tile, results);
        }
      }
    }
  }
}

#endif
