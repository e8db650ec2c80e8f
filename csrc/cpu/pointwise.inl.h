// The 1x1 convolution in NHWC: matrix products over pixels, with the maps on read and write that correlate.inl.h has.
//
//   multiply          dst[pixel][j] = sum over i of src[pixel][i] * weight[i][j]      forward, and input gradient
//   pixel_gradient    dw[o][i] = sum over pixels of grad[pixel][o] * x[pixel][i]      weight gradient
//
// Sources are read, mapped, into panels of so many pixels that they stay in the L2 cache, as
// [block of pixels][vector of channels][pixel of the block][lane]: the inner loops read both operands in the order of
// memory. Lanes, pixels and weights that are not there are zero.
//
// With pairs of bfloat16, a lane of the products' panels and weights holds two source channels, and one of the
// gradient's panels two pixels. AMX multiplies the same panels, in blocks of 16 pixels.
//
// fp32 accumulation, in an order that depends on neither threads nor, without pairs, instruction sets: channels, or
// pixels of a chunk.

// Accumulators: pixels (or channels of grad) times vectors.
constexpr int kProductPixels = kRegisters >= 32 ? 14 : 6;
constexpr int kGradientChannels = kRegisters >= 32 ? 8 : 4;
constexpr int kProductVectors = 2;
constexpr int kFewPixels = 4;  // of the rest of a panel: with enough accumulators to hide the latency of multiply-adds
constexpr int kGradientPiece = 16;  // pixels read together
constexpr int kGradientPixels = 4;  // of one iteration: short loops' ends are predicted
constexpr int kProductLanes = kProductVectors * kLanes;

// The pixel of an image that is number `index` of a grid.
RESNEXT_INLINE int64_t image_pixel(const PixelGrid& grid, const GridImage& at, int64_t index) {
  if (at.step_h == 1 && at.step_w == 1) return index;
  const int64_t w = index % grid.width;
  const int64_t h = index / grid.width % grid.height;
  const int64_t n = index / grid.width / grid.height;
  return (n * at.image.height + h * at.step_h) * at.image.width + w * at.step_w;
}

// What a panel holds: pixels [first, first + pixels) of a grid, channels [c, c + channels).
struct PanelPart {
  int64_t first, pixels, c, channels;
};

RESNEXT_INLINE int64_t panel_lanes(int64_t channels) { return round_up(channels, kPanelLanes); }

// Of an even number of channels, if in pairs.
RESNEXT_INLINE int64_t paired_lanes(int64_t channels, bool pairs) {
  return panel_lanes(pairs ? channels / 2 : channels);
}

// One vector of channels, from c on, of pixels of which `offsets` tells where they begin.
template <bool kWhole, class T, template <class, class> class Map>
RESNEXT_INLINE void read_column(const T* data, const T* other, const ReadMap& read, const int64_t* offsets,
                                int64_t pixels, int64_t c, int64_t count, float* to) {
  const Map<T, ChannelLanes> map(read, {c, count});
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    store(to + pixel * kLanes, mapped_lanes<kWhole>(map, data, other, offsets[pixel] + c, count));
  }
}

// kPiece: pixels of which one vector is read before the next. One reads in the order of memory; several keep the map in
// registers, which is faster where what is read is in the cache.
template <bool kPairs, int kPiece, class T, template <class, class> class Map>
void read_panel_as(const GridImage& from, const PixelGrid& grid, ReadMap read, PanelPart part, int64_t block_pixels,
                   float* panel) {
  const T* data = static_cast<const T*>(from.image.data);
  const T* other = static_cast<const T*>(read.other);
  constexpr int64_t kChannels = kPairs ? 2 * kLanes : kLanes;  // of a vector
  const int64_t lanes = paired_lanes(part.channels, kPairs);
  const int64_t stride = block_pixels * kLanes;
  int64_t offsets[kPiece];
  int64_t pixels = kPiece;
  const auto read_lanes = [&](auto whole, int64_t c, int64_t count, float* to) RESNEXT_ALWAYS {
    if constexpr (kPairs) {
      static_assert(kPiece == 1);
      store(to, read_channel_pairs<decltype(whole)::value, Map>(data, other, read, offsets[0] + c, c, count));
    } else {
      read_column<decltype(whole)::value, T, Map>(data, other, read, offsets, pixels, c, count, to);
    }
  };
  for (int64_t pixel = 0; pixel < part.pixels; pixel += pixels) {
    const int64_t in_block = pixel % block_pixels;
    if (kPiece > 1) pixels = min_of(kPiece, min_of(block_pixels - in_block, part.pixels - pixel));
    for (int64_t i = 0; i < pixels; ++i) {
      offsets[i] = image_pixel(grid, from, part.first + pixel + i) * from.image.channels;
    }
    float* to = panel + (pixel - in_block) * lanes + in_block * kLanes;
    int64_t i = 0;
    for (; i + kChannels <= part.channels; i += kChannels, to += stride) {
      read_lanes(std::true_type{}, part.c + i, kChannels, to);
    }
    for (; i < lanes * kChannels / kLanes; i += kChannels, to += stride) {
      read_lanes(std::false_type{}, part.c + i, i < part.channels ? part.channels - i : 0, to);
    }
  }
  for (int64_t pixel = part.pixels; pixel % block_pixels != 0; ++pixel) {
    float* to = panel + pixel / block_pixels * block_pixels * lanes + pixel % block_pixels * kLanes;
    for (int64_t i = 0; i < lanes; i += kLanes, to += stride) store(to, Vec{});
  }
}

template <int kPiece>
void read_panel(const GridImage& from, const PixelGrid& grid, const ReadMap& read, const PanelPart& part,
                int64_t block_pixels, float* panel) {
  with_float_type(from.image.dtype, [&](auto value) {
    with_read_map(read, [&](auto map) {
      read_panel_as<false, kPiece, decltype(value), decltype(map)::template Map>(from, grid, read, part, block_pixels,
                                                                                 panel);
    });
  });
}

// The same, pixel by pixel, with pairs of channels, of a bfloat16 image of an even number of them.
void read_panel_pairs(const GridImage& from, const PixelGrid& grid, const ReadMap& read, const PanelPart& part,
                      int64_t block_pixels, float* panel) {
  if (read.kind == ReadMap::kNone) {  // a pair is as good as a float where it is only moved
    const GridImage pairs = {as_pairs(from.image), from.step_h, from.step_w};
    const PanelPart pairs_part = {part.first, part.pixels, part.c / 2, part.channels / 2};
    return read_panel<1>(pairs, grid, read, pairs_part, block_pixels, panel);
  }
  with_read_map(read, [&](auto map) {
    read_panel_as<true, 1, BFloat16, decltype(map)::template Map>(from, grid, read, part, block_pixels, panel);
  });
}

// One vector of channels, from c on, of pixels two by two; nothing follows the last of an odd number.
template <bool kWhole, template <class, class> class Map>
RESNEXT_INLINE void read_pair_column(const BFloat16* data, const BFloat16* other, const ReadMap& read,
                                     const int64_t* offsets, int64_t pixels, int64_t c, int64_t count, float* to) {
  const Map<float, ChannelLanes> map(read, {c, count});  // rounded when they are paired
  const auto value = [&](int64_t pixel) RESNEXT_ALWAYS {
    return mapped_lanes<kWhole>(map, data, other, offsets[pixel] + c, count);
  };
  for (int64_t pixel = 0; pixel < pixels; pixel += 2, to += kLanes) {
    const Vec second = pixel + 1 < pixels ? value(pixel + 1) : Vec{};
    store(to, round_to_pairs(value(pixel), second));
  }
}

// A panel of one block of so many pixels, an even number, two by two, of a bfloat16 image.
template <template <class, class> class Map>
void read_pixel_pairs_as(const GridImage& from, const PixelGrid& grid, ReadMap read, PanelPart part,
                         int64_t panel_pixels, float* panel) {
  const auto* data = static_cast<const BFloat16*>(from.image.data);
  const auto* other = static_cast<const BFloat16*>(read.other);
  const int64_t stride = panel_pixels / 2 * kLanes;
  const int64_t lanes = panel_lanes(part.channels);
  int64_t offsets[kGradientPiece];
  for (int64_t pixel = 0; pixel < part.pixels; pixel += kGradientPiece) {
    const int64_t pixels = min_of(kGradientPiece, part.pixels - pixel);
    for (int64_t i = 0; i < pixels; ++i) {
      offsets[i] = image_pixel(grid, from, part.first + pixel + i) * from.image.channels;
    }
    float* to = panel + pixel / 2 * kLanes;
    int64_t i = 0;
    for (; i + kLanes <= part.channels; i += kLanes, to += stride) {
      read_pair_column<true, Map>(data, other, read, offsets, pixels, part.c + i, kLanes, to);
    }
    for (; i < lanes; i += kLanes, to += stride) {
      const int64_t count = i < part.channels ? part.channels - i : 0;
      read_pair_column<false, Map>(data, other, read, offsets, pixels, part.c + i, count, to);
    }
  }
  const int64_t read_lanes = ceil_div(part.pixels, 2) * kLanes;
  for (int64_t i = 0; i < lanes; i += kLanes, panel += stride) {
    __builtin_memset(panel + read_lanes, 0, (stride - read_lanes) * sizeof(float));
  }
}

void read_pixel_pairs(const GridImage& from, const PixelGrid& grid, const ReadMap& read, const PanelPart& part,
                      int64_t panel_pixels, float* panel) {
  with_read_map(read, [&](auto map) {
    read_pixel_pairs_as<decltype(map)::template Map>(from, grid, read, part, panel_pixels, panel);
  });
}

// --- weights: [tile][source channel][kTileChannels], whatever the instruction set ---

RESNEXT_INLINE int64_t packed_tile_size(const WeightMatrix& weight, bool pairs) {
  return paired_lanes(weight.src_channels, pairs) * kTileChannels;
}

// Packs source channels [begin, end) of a tile: whole vectors of them, or of pairs.
template <bool kPairs, class T>
void pack_tile_of(const WeightMatrix& weight, int64_t tile, int64_t begin, int64_t end, float* packed) {
  constexpr int kTerms = kPairs ? 2 : 1;  // source channels of a lane
  const int64_t src = weight.src_channels;
  const int64_t first = tile * kTileChannels;
  const int64_t channels = min_of(kTileChannels, weight.dst_channels - first);
  const T* data = static_cast<const T*>(weight.data);
  if (weight.transposed) {  // (source channel, destination channel)
    for (int64_t i = begin; i < end; i += kTerms) {
      const T* row = data + i * weight.dst_channels + first;
      for (int64_t lane = 0; lane < kTileChannels; lane += kLanes) {
        const int64_t count = i < src && lane < channels ? channels - lane : 0;
        const Vec lanes = load_row_terms<kPairs>(row + lane, weight.dst_channels, count);
        store(packed + i / kTerms * kTileChannels + lane, lanes);
      }
    }
    return;
  }
  for (int64_t lane = 0; lane < kTileChannels; lane += kLanes) {
    for (int64_t i = begin; i < end; i += kTerms * kLanes) {
      const int64_t terms = i < src ? src - i : 0;
      Vec square[kLanes];
      RESNEXT_UNROLL
      for (int row = 0; row < kLanes; ++row) {
        const T* from = data + (first + lane + row) * src + i;
        const int64_t count = lane + row < channels ? terms : 0;
        const T* ahead = from + 2 * kTerms * kLanes;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kTerms * kLanes - 1);
        square[row] = load_terms<kPairs>(from, count);
      }
      transpose(square);
      float* to = packed + i / kTerms * kTileChannels + lane;
      RESNEXT_UNROLL
      for (int term = 0; term < kLanes; ++term) store(to + term * kTileChannels, square[term]);
    }
  }
}

void pack_tile(const WeightMatrix& weight, bool pairs, int64_t tile, int64_t begin, int64_t end, float* packed) {
  with_weight_terms(pairs, weight.dtype, weight.images, [&](auto in_pairs, auto value) {
    pack_tile_of<decltype(in_pairs)::value, decltype(value)>(weight, tile, begin, end, packed);
  });
}

// Reads the weight in the order of memory: a transposed one row by row, through all tiles.
void pack_matrix(const WeightMatrix& weight, bool pairs, float* packed, int64_t begin_tile, int64_t end_tile) {
  const int64_t channels = paired_lanes(weight.src_channels, pairs) * (pairs ? 2 : 1);
  const int64_t piece = weight.transposed ? kPanelLanes : channels;
  for (int64_t i = 0; i < channels; i += piece) {
    for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
      pack_tile(weight, pairs, tile, i, i + piece, packed + tile * packed_tile_size(weight, pairs));
    }
  }
}

// --- forward, and input gradient ---

// The sums over `terms` source channels for the first kPixels pixels of a block and kVectors vectors of destination
// channels. `stride`: floats from a row of the weight to the next.
template <class Terms, int kVectors, int kPixels>
RESNEXT_INLINE void product_sums(const float* panel, const float* weight, int64_t terms, int64_t stride,
                                 Vec (&acc)[kPixels][kVectors]) {
  const auto add_term = [&](const float* x) RESNEXT_ALWAYS {
    Vec w[kVectors];
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = in_register(load(weight + v * kLanes));
    weight += stride;
    RESNEXT_UNROLL
    for (int p = 0; p < kPixels; ++p) add_products<Terms>(acc[p], x + p * kLanes, w, p);
  };
  for (int64_t i = 0; i + kLanes <= terms; i += kLanes) {
    RESNEXT_UNROLL_4
    for (int lane = 0; lane < kLanes; ++lane) add_term(panel + lane);
    panel += kProductPixels * kLanes;
  }
  for (int64_t lane = 0; lane < terms % kLanes; ++lane) add_term(panel + lane);
}

// The same, to out[pixel][lane], whose rows are as far apart as the weight's.
template <class Terms, int kVectors, int kPixels>
RESNEXT_INLINE void product_block(const float* panel, const float* weight, int64_t terms, int64_t stride, float* out) {
  Vec acc[kPixels][kVectors] = {};
  product_sums<Terms>(panel, weight, terms, stride, acc);
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + p * stride + v * kLanes, acc[p][v]);
  }
}

// The same for the first `pixels` of a block. The last block of an image or batch may have few.
template <class Terms, int kVectors>
RESNEXT_INLINE void product_pixels(const float* panel, const float* weight, int64_t terms, int64_t stride,
                                   int64_t pixels, float* out) {
  if (round_up(pixels, kFewPixels) >= kProductPixels) {
    return product_block<Terms, kVectors, kProductPixels>(panel, weight, terms, stride, out);
  }
  for (int64_t pixel = 0; pixel < pixels; pixel += kFewPixels) {
    product_block<Terms, kVectors, kFewPixels>(panel + pixel * kLanes, weight, terms, stride, out + pixel * stride);
  }
}

// What images hold whose products are mapped in registers: those of pairs are bfloat16, of floats the usual ones.
template <class Terms>
using ImageType = std::conditional_t<Terms::kPairs, BFloat16, float>;

// A whole block, mapped in registers, to pixels that follow each other in the image. What is written, and read beside
// it, is asked for while the sums are made.
template <class Terms, class Map>
void mapped_product(const float* panel, const float* weight, int64_t terms, const WriteMap& write,
                    Piece<ImageType<Terms>> to) {
  RESNEXT_UNROLL
  for (int p = 0; p < kProductPixels; ++p) {
    __builtin_prefetch(to.data + p * to.stride, kForWriting);
    if (Map::kOther) __builtin_prefetch(to.other + p * to.stride);
  }
  Vec acc[kProductPixels][kProductVectors] = {};
  product_sums<Terms>(panel, weight, terms, kTileChannels, acc);
  RESNEXT_UNROLL
  for (int v = 0; v < kProductVectors; ++v) {
    Map map(write, ChannelLanes{to.c + v * kLanes, kLanes});
    map.start(kProductPixels, [zero = Vec{}](int64_t) RESNEXT_ALWAYS { return zero; });  // not for the first pixels
    RESNEXT_UNROLL
    for (int p = 0; p < kProductPixels; ++p) {
      const int64_t offset = p * to.stride + v * kLanes;
      const Vec other = Map::kOther ? load(to.other + offset) : Vec{};
      store(to.data + offset, map(acc[p][v], other, p % Map::kChains));
    }
    map.finish();
  }
}

// The mapped_product of a call, or null where results go another way.
template <class Terms>
RESNEXT_INLINE decltype(&mapped_product<Terms, ScaleShift<false>>) mapped_product_of(const PixelProduct& p) {
  using T = ImageType<Terms>;
  constexpr Dtype kDtype = Terms::kPairs ? Dtype::kBFloat16 : Dtype::kFloat32;
  if (p.dst.step_h != 1 || p.dst.step_w != 1 || p.dst.image.dtype != kDtype) return nullptr;
  return with_write_map<T>(p.write, [](auto map) { return &mapped_product<Terms, typename decltype(map)::Type>; });
}

// Pixels whose products are made together, and pixels of a block of the panel.
template <class Terms>
constexpr int kTogether = kProductPixels;
template <class Terms>
constexpr int kPanelBlock = kProductPixels;

// Products of the first `count` pixels of a panel's block, of `lanes` lanes, with a tile of `channels` channels, to
// results[pixel][lane].
template <class Terms>
RESNEXT_INLINE void product_results(const float* panel, int64_t /*lanes*/, const float* weight, int64_t terms,
                                    int64_t count, int64_t channels, float* results) {
  for (int64_t lane = 0; lane < channels; lane += kProductLanes) {
    const auto product = channels - lane > kLanes ? product_pixels<Terms, kProductVectors> : product_pixels<Terms, 1>;
    product(panel, weight + lane, terms, kTileChannels, count, results + lane);
  }
}

#if RESNEXT_LANES == 16
template <>
constexpr int kTogether<AmxTerms> = 2 * kAmxRows;
template <>
constexpr int kPanelBlock<AmxTerms> = kAmxRows;

template <>  // they are not in registers that could be mapped
RESNEXT_INLINE decltype(&mapped_product<AmxTerms, ScaleShift<false>>) mapped_product_of<AmxTerms>(const PixelProduct&) {
  return nullptr;
}

template <>
RESNEXT_INLINE void product_results<AmxTerms>(const float* panel, int64_t lanes, const float* weight,
                                              int64_t /*terms*/, int64_t count, int64_t channels, float* results) {
  static_assert(kTileChannels == 2 * kLanes);
  with_amx_sums(count > kAmxRows, channels > kLanes, [&](auto sums) RESNEXT_ALWAYS {
    sums.clear();
    for (int64_t i = 0; i < lanes; i += kLanes) {
      sums.add(panel + i * kAmxRows, kLanes, kAmxRows * lanes, weight + i * kTileChannels, kTileChannels, kLanes);
    }
    sums.store(results, kTileChannels, kAmxRows * kTileChannels, kLanes);
  });
}
#endif

// Floats of a panel, and of results.
template <class Terms>
RESNEXT_INLINE int64_t product_panel(const PixelProduct& p) {
  return round_up(p.panel_pixels, kPanelBlock<Terms>) * paired_lanes(p.src.image.channels, p.pairs);
}
template <class Terms>
constexpr int64_t kResults = int64_t{kTogether<Terms>} * kTileChannels;

// work(the terms) of a PixelProduct or PixelGradient.
template <class Problem, class Work>
RESNEXT_INLINE auto with_product_terms(const Problem& p, Work work) {
#if RESNEXT_LANES == 16
  if (p.amx) return work(AmxTerms{});
#endif
  return with_terms(p.pairs, work);
}

int64_t product_scratch(const PixelProduct& p) {
  const int64_t tile = p.packed == nullptr ? packed_tile_size(p.weight, p.pairs) : 0;
  return tile + with_product_terms(p, [&](auto terms) {
           using Terms = decltype(terms);
           return product_panel<Terms>(p) + kResults<Terms>;
         });
}

// `pixels` pixels of an image that follow each other in memory, as an image of one row.
RESNEXT_INLINE Image pixel_run(const Image& image, int64_t first, int64_t pixels) {
  Image run = image;
  run.data = static_cast<char*>(image.data) + first * image.channels * size_of(image.dtype);
  run.batch = run.height = 1;
  run.width = pixels;
  return run;
}

// Maps and writes results for pixels that follow each other in the destination.
RESNEXT_INLINE void write_run(const Image& dst, WriteMap write, const PanelPart& part, int64_t lanes,
                              const float* results) {
  if (write.other != nullptr) {
    write.other = static_cast<const char*>(write.other) + part.first * dst.channels * size_of(dst.dtype);
  }
  write_row(pixel_run(dst, part.first, part.pixels), write, 0, 0, part.c, part.channels, lanes, results);
}

// Writes the results of a block of pixels, which have to follow each other only where all of the destination's have.
void write_block(const PixelProduct& p, const WriteMap& write, const PanelPart& part, const float* results) {
  if (p.dst.step_h == 1 && p.dst.step_w == 1) return write_run(p.dst.image, write, part, kTileChannels, results);
  for (int64_t i = 0; i < part.pixels; ++i) {
    write_run(p.dst.image, write, {image_pixel(p.grid, p.dst, part.first + i), 1, part.c, part.channels}, kTileChannels,
              results + i * kTileChannels);
  }
}

// Writes the results of a block of pixels as its terms allow.
template <class Terms>
RESNEXT_INLINE void write_results(const PixelProduct& p, const WriteMap& write, const PanelPart& part,
                                  const float* results) {
  write_block(p, write, part, results);
}

#if RESNEXT_LANES == 16
template <>
RESNEXT_INLINE void write_results<AmxTerms>(const PixelProduct& p, const WriteMap& write, const PanelPart& part,
                                            const float* results) {
  if (part.channels < kTileChannels) return write_block(p, write, part, results);
  const int64_t channels = p.dst.image.channels;
  const bool dense = p.dst.step_h == 1 && p.dst.step_w == 1;
  auto* data = static_cast<BFloat16*>(p.dst.image.data) + part.c;
  const auto* other = write.other == nullptr ? nullptr : static_cast<const BFloat16*>(write.other) + part.c;
  WriteMap of_run = write;
  for (int64_t done = 0; done < part.pixels;) {  // pixels that are equally far apart: all, or those of a row
    const int64_t first = part.first + done;
    const int64_t run = dense ? part.pixels : min_of(part.pixels - done, p.grid.width - first % p.grid.width);
    const int64_t offset = image_pixel(p.grid, p.dst, first) * channels;
    write_sums(results + done * kTileChannels, of_run,
               {data + offset, other == nullptr ? nullptr : other + offset, p.dst.step_w * channels, run, part.c,
                part.channels});
    done += run;
    of_run.before += run;
  }
}
#endif

// Results are written block by block: rows of a power of two bytes compete for a few sets of the caches, which hold the
// lines of one block but not of a panel.
template <class Terms>
void multiply_as(const PixelProduct& p, float* scratch, int64_t begin, int64_t end) {
  using T = ImageType<Terms>;
  [[maybe_unused]] const typename Terms::Registers registers;
  const auto mapped = mapped_product_of<Terms>(p);
  constexpr int kPixels = kTogether<Terms>;
  const int64_t src_channels = p.src.image.channels;
  const int64_t dst_channels = p.dst.image.channels;
  const int64_t terms = p.pairs ? src_channels / 2 : src_channels;
  const int64_t lanes = panel_lanes(terms);
  const int64_t tiles = ceil_div(dst_channels, kTileChannels);
  const int64_t all_pixels = p.grid.batch * p.grid.height * p.grid.width;
  float* panel = scratch;
  float* results = panel + product_panel<Terms>(p);
  float* own_tile = results + kResults<Terms>;
  int64_t read = -1;  // the panel
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task % tiles;
    const int64_t c = tile * kTileChannels;
    const int64_t channels = min_of(kTileChannels, dst_channels - c);
    const int64_t first = task / tiles * p.panel_pixels;
    const int64_t pixels = min_of(p.panel_pixels, all_pixels - first);
    if (task / tiles != read) {
      read = task / tiles;
      const auto read_terms = p.pairs ? read_panel_pairs : read_panel<1>;
      read_terms(p.src, p.grid, p.read, {first, pixels, 0, src_channels}, kPanelBlock<Terms>, panel);
    }
    WriteMap write = p.write;
    if (write.partial != nullptr) write.partial += read * kPartialSums * dst_channels;
    if (p.packed == nullptr) pack_tile(p.weight, p.pairs, tile, 0, p.pairs ? 2 * lanes : lanes, own_tile);
    const float* weight = p.packed == nullptr ? own_tile : p.packed + tile * packed_tile_size(p.weight, p.pairs);
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      const int64_t count = min_of(kPixels, pixels - pixel);
      write.before = pixel;
      const bool starts = p.write.kind == WriteMap::kMoments && pixel == 0;  // which looks at all values first
      if (mapped != nullptr && !starts && count == kPixels && channels == kTileChannels) {
        for (int64_t lane = 0; lane < channels; lane += kProductLanes) {
          const int64_t offset = (first + pixel) * dst_channels + c + lane;
          const auto* other = static_cast<const T*>(p.write.other);
          mapped(panel + pixel * lanes, weight + lane, terms, write,
                 {static_cast<T*>(p.dst.image.data) + offset, other == nullptr ? nullptr : other + offset, dst_channels,
                  count, c + lane, kProductLanes});
        }
        continue;
      }
      product_results<Terms>(panel + pixel * lanes, lanes, weight, terms, count, channels, results);
      write_results<Terms>(p, write, {first + pixel, count, c, channels}, results);
    }
  }
}

void multiply(const PixelProduct& p, float* scratch, int64_t begin, int64_t end) {
  with_product_terms(p, [&](auto terms) { multiply_as<decltype(terms)>(p, scratch, begin, end); });
}

// --- weight gradient ---

// Makes, or adds to, a tile of dw: kGradientChannels channels of grad, kProductLanes of x. Both operands lie as
// [term][lane], a term being a pixel or two; x has its second vector `stride` floats behind the first. What is there is
// added last: sums of sums round less than one long sum.
template <class Terms, int kVectors = kProductVectors>
RESNEXT_INLINE void gradient_tile(const float* grad, const float* x, int64_t terms, int64_t stride, bool adds,
                                  float* dw) {
  Vec acc[kGradientChannels][kVectors] = {};
  int64_t i = 0;
  do {  // the test at the end: or GCC keeps the accumulators in memory
    RESNEXT_UNROLL
    for (int pixel = 0; pixel < kGradientPixels; ++pixel, i += kLanes) {
      Vec value[kVectors];
      RESNEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) value[v] = in_register(load(x + v * stride + i));
      RESNEXT_UNROLL
      for (int o = 0; o < kGradientChannels; ++o) add_products<Terms>(acc[o], grad + i + o, value, o);
    }
  } while (i < terms * kLanes);
  if (adds) {
    RESNEXT_UNROLL
    for (int o = 0; o < kGradientChannels; ++o) {
      RESNEXT_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[o][v] += load(dw + o * kProductLanes + v * kLanes);
    }
  }
  RESNEXT_UNROLL
  for (int o = 0; o < kGradientChannels; ++o) {
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) store(dw + o * kProductLanes + v * kLanes, acc[o][v]);
  }
}

// A slice: [kProductLanes channels of x][kGradientChannels channels of grad][channel of grad][channel of x].
RESNEXT_INLINE int64_t grad_lanes(const PixelGradient& g) { return panel_lanes(g.grad_block); }
RESNEXT_INLINE int64_t x_lanes(const PixelGradient& g) { return round_up(g.x_block, kTileChannels); }

int64_t gradient_slice_size(const PixelGradient& g) { return grad_lanes(g) * x_lanes(g); }

// The pixels, or pairs, of a panel that holds so many pixels.
RESNEXT_INLINE int64_t whole_iterations(const PixelGradient& g, int64_t pixels) {
  return round_up(g.pairs ? ceil_div(pixels, 2) : pixels, g.amx ? kLanes : kGradientPixels);
}

// Floats of both panels.
RESNEXT_INLINE int64_t gradient_panels(const PixelGradient& g) {
  return whole_iterations(g, g.panel_pixels) * (grad_lanes(g) + x_lanes(g));
}

int64_t gradient_scratch(const PixelGradient& g) {
  return gradient_panels(g) + (g.chunks == 1 ? gradient_slice_size(g) : 0);
}

// Sums the channels of x in tiles [begin, end) of a block, of all chunks, in order, and stores them; `slice` is the
// block's in the first chunk.
template <class T>
void store_gradient_as(const PixelGradient& g, int64_t block, int64_t begin, int64_t end, const float* slice) {
  const int64_t all_channels = g.x.image.channels;
  const int64_t x_blocks = ceil_div(all_channels, g.x_block);
  const int64_t grad_blocks = ceil_div(g.grad.image.channels, g.grad_block);
  const int64_t chunk_size = grad_blocks * x_blocks * gradient_slice_size(g);
  const int64_t first_row = block / x_blocks * g.grad_block;
  const int64_t rows = min_of(g.grad_block, g.grad.image.channels - first_row);
  const int64_t first = block % x_blocks * g.x_block;
  const int64_t channels = min_of(end * kTileChannels, min_of(g.x_block, all_channels - first));
  T* to = static_cast<T*>(g.dw) + first_row * all_channels + first;
  for (int64_t row = 0; row < rows; ++row, to += all_channels) {
    for (int64_t lane = begin * kTileChannels; lane < channels; lane += kLanes) {
      const int64_t column = lane / kProductLanes * kProductLanes;
      const float* from = slice + column * grad_lanes(g) + row * kProductLanes + lane % kProductLanes;
      Vec sum = load(from);
      for (int64_t chunk = 1; chunk < g.chunks; ++chunk) sum += load(from + chunk * chunk_size);
      if (lane + kLanes <= channels) {
        store(to + lane, sum);
      } else {
        store_first(to + lane, sum, channels - lane);
      }
    }
  }
}

void store_gradient(const PixelGradient& g, int64_t block, int64_t begin, int64_t end, const float* slice) {
  with_float_type(g.dtype, [&](auto value) { store_gradient_as<decltype(value)>(g, block, begin, end, slice); });
}

// Asks for what the next panel will read, a few lines at a time while this one is multiplied. (`multiply` does without:
// its results need the memory system too, and it was a few percent slower with it.)
class PanelAhead {
 public:
  PanelAhead(const GridImage& from, const PixelGrid& grid, const ReadMap& read, const PanelPart& part, int64_t times)
      : from_(from), grid_(grid), other_(static_cast<const char*>(read.other)), part_(part) {
    const int64_t bytes = part.channels * size_of(from.image.dtype);
    lines_ = ceil_div(bytes, kLine);
    share_ = ceil_div(part.pixels * lines_, times);
    start_pixel();
  }

  RESNEXT_INLINE void ask() {
    for (int64_t i = 0; i < share_ && pixel_ < part_.pixels; ++i) {
      __builtin_prefetch(static_cast<const char*>(from_.image.data) + at_, kForReading, kKeepInL2);
      if (other_ != nullptr) __builtin_prefetch(other_ + at_, kForReading, kKeepInL2);
      at_ += kLine;
      if (++line_ == lines_) {
        line_ = 0;
        ++pixel_;
        start_pixel();
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const GridImage& from_;
  const PixelGrid& grid_;
  const char* other_;
  const PanelPart part_;
  int64_t lines_, share_, at_, pixel_ = 0, line_ = 0;

  void start_pixel() {
    const int64_t pixel = image_pixel(grid_, from_, part_.first + pixel_);
    at_ = (pixel * from_.image.channels + part_.c) * size_of(from_.image.dtype);
  }
};

// Adds a panel's sums to a slice, `ask`ing for the next one meanwhile. Of `terms` terms, as of gradient_tile.
template <class Terms>
struct PanelSums {
  static constexpr int kGradChannels = kGradientChannels;
  template <class Ask>
  static void add(const float* grad, int64_t grad_channels, const float* x, int64_t x_channels, int64_t terms,
                  bool adds, int64_t grad_lanes, float* slice, Ask ask) {
    for (int64_t i = 0; i < x_channels; i += kProductLanes) {
      for (int64_t o = 0; o < grad_channels; o += kGradientChannels) {
        ask();
        const auto tile = x_channels - i > kLanes ? gradient_tile<Terms, kProductVectors> : gradient_tile<Terms, 1>;
        tile(grad + o / kLanes * kLanes * terms + o % kLanes, x + i * terms, terms, terms * kLanes, adds,
             slice + i * grad_lanes + o * kProductLanes);
      }
    }
  }
};

#if RESNEXT_LANES == 16
// By AMX, whose first operand has rows of terms: grad is turned, square by square.
template <>
struct PanelSums<AmxTerms> {
  static constexpr int kGradChannels = 2 * kAmxRows;
  template <class Ask>
  static void add(float* grad, int64_t grad_channels, const float* x, int64_t x_channels, int64_t terms, bool adds,
                  int64_t grad_lanes, float* slice, Ask ask) {
    const int64_t vector = terms * kLanes;
    for (int64_t i = 0; i < panel_lanes(grad_channels) * terms; i += kAmxFloats) transpose_in_place(grad + i);
    for (int64_t i = 0; i < x_channels; i += kProductLanes) {
      for (int64_t o = 0; o < grad_channels; o += kGradChannels) {
        ask();
        float* to = slice + i * grad_lanes + o * kProductLanes;
        with_amx_sums(grad_channels - o > kLanes, x_channels - i > kLanes, [&](auto sums) RESNEXT_ALWAYS {
          if (adds) {
            sums.load(to, kProductLanes, kAmxRows * kProductLanes, kLanes);
          } else {
            sums.clear();
          }
          for (int64_t term = 0; term < vector; term += kAmxFloats) {
            sums.add(grad + o * terms + term, kLanes, vector, x + i * terms + term, kLanes, vector);
          }
          sums.store(to, kProductLanes, kAmxRows * kProductLanes, kLanes);
        });
      }
    }
  }
};
#endif

template <class Terms>
void pixel_gradient_as(const PixelGradient& g, float* scratch, int64_t begin, int64_t end) {
  [[maybe_unused]] const typename Terms::Registers registers;
  const int64_t x_blocks = ceil_div(g.x.image.channels, g.x_block);
  const int64_t grad_blocks = ceil_div(g.grad.image.channels, g.grad_block);
  const int64_t all_pixels = g.grid.batch * g.grid.height * g.grid.width;
  float* x = scratch;
  float* grad = scratch + whole_iterations(g, g.panel_pixels) * x_lanes(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / x_blocks / grad_blocks;
    const int64_t grad_c = task / x_blocks % grad_blocks * g.grad_block;
    const int64_t x_c = task % x_blocks * g.x_block;
    const int64_t grad_channels = min_of(g.grad_block, g.grad.image.channels - grad_c);
    const int64_t x_channels = min_of(g.x_block, g.x.image.channels - x_c);
    float* slice = g.chunks == 1 ? scratch + gradient_panels(g) : g.partial + task * gradient_slice_size(g);
    const int64_t chunk_end = all_pixels * (chunk + 1) / g.chunks;
    const int64_t chunk_first = all_pixels * chunk / g.chunks;
    for (int64_t first = chunk_first; first < chunk_end; first += g.panel_pixels) {
      const int64_t count = min_of(g.panel_pixels, chunk_end - first);
      const int64_t terms = whole_iterations(g, count);
      const PanelPart x_part = {first, count, x_c, x_channels};
      const PanelPart grad_part = {first, count, grad_c, grad_channels};
      if (g.pairs) {
        read_pixel_pairs(g.x, g.grid, g.read_x, x_part, 2 * terms, x);
        read_pixel_pairs(g.grad, g.grid, g.read_grad, grad_part, 2 * terms, grad);
      } else {
        read_panel<kGradientPiece>(g.x, g.grid, g.read_x, x_part, terms, x);
        read_panel<kGradientPiece>(g.grad, g.grid, g.read_grad, grad_part, terms, grad);
      }
      __builtin_memset(x + panel_lanes(x_channels) * terms, 0,
                       (x_lanes(g) - panel_lanes(x_channels)) * terms * sizeof(float));
      const int64_t next = first + g.panel_pixels;
      const int64_t next_count = next < chunk_end ? min_of(g.panel_pixels, chunk_end - next) : 0;
      const int64_t tiles =
          ceil_div(x_channels, kProductLanes) * ceil_div(grad_channels, PanelSums<Terms>::kGradChannels);
      PanelAhead x_ahead(g.x, g.grid, g.read_x, {next, next_count, x_c, x_channels}, tiles);
      PanelAhead grad_ahead(g.grad, g.grid, g.read_grad, {next, next_count, grad_c, grad_channels}, tiles);
      const auto ask = [&]() RESNEXT_ALWAYS {
        x_ahead.ask();
        grad_ahead.ask();
      };
      PanelSums<Terms>::add(grad, grad_channels, x, x_channels, terms, /*adds=*/first != chunk_first, grad_lanes(g),
                            slice, ask);
    }
    if (g.chunks == 1) store_gradient(g, task, 0, x_lanes(g) / kTileChannels, slice);
  }
}

void pixel_gradient(const PixelGradient& g, float* scratch, int64_t begin, int64_t end) {
  with_product_terms(g, [&](auto terms) { pixel_gradient_as<decltype(terms)>(g, scratch, begin, end); });
}

void reduce_gradient(const PixelGradient& g, int64_t begin, int64_t end) {
  const int64_t tiles = x_lanes(g) / kTileChannels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / tiles;
    const int64_t tile = task % tiles;
    store_gradient(g, block, tile, tile + 1, g.partial + block * gradient_slice_size(g));
  }
}
