// Moves one row of an image, for some of its channels, between memory (any dtype, NHWC or NCHW) and a panel: floats,
// [pixel][lane], with the lanes a whole number of vectors, mapping the values on the way. Kernels only see panels.
//
// Rows are read in order, but in pieces that hardware prefetchers do not follow: the same piece of the next row is
// asked for while one is read. (A prefetch past the end of the tensor is harmless.)

constexpr int kForReading = 0;
constexpr int kForWriting = 1;
constexpr int kKeepInL2 = 2;

// A piece of a row: channels [c, c + channels) of an image; `data` is its first element, and `other` that of an image
// laid out alike. `stride`: elements from one pixel (NHWC) or one channel (NCHW) to the next. Loops take it by value:
// what is not a local variable is loaded again after every store, which might have changed it.
template <class T>
struct Piece {
  T* data;
  const T* other;
  int64_t stride, pixels;
  int64_t c, channels;
};

template <class T>
RESNEXT_INLINE Piece<T> piece_of(const Image& image, const void* other, int64_t n, int64_t h, int64_t c,
                                 int64_t channels) {
  const int64_t offset = image.channels_last ? (n * image.height + h) * image.width * image.channels + c
                                             : ((n * image.channels + c) * image.height + h) * image.width;
  return {static_cast<T*>(image.data) + offset,
          other == nullptr ? nullptr : static_cast<const T*>(other) + offset,
          image.channels_last ? image.channels : image.height * image.width,
          image.width,
          c,
          channels};
}

// kWhole: the vector's channels fill it.
template <bool kWhole, class T, template <class, class> class Map>
RESNEXT_INLINE void read_vector(Piece<T> from, ReadMap read, int64_t c, int64_t offset, IntVec order, float* to) {
  const int64_t count = kWhole ? kLanes : from.channels - c;
  const int64_t next_row = from.pixels * from.stride;
  const Map<T, ChannelLanes> map(read, {from.c + c, count});
  __builtin_prefetch(from.data + offset + next_row, kForReading, kKeepInL2);
  if (Map<T, ChannelLanes>::kOther) __builtin_prefetch(from.other + offset + next_row, kForReading, kKeepInL2);
  store(to, permute(mapped_lanes<kWhole>(map, from.data, from.other, offset, count), order));
}

// In the order of memory. The tighter loop, over the pixels of one vector of channels with its map in registers, asks
// for more lines of the next row at a time than the memory system takes (measured: whole passes a sixth slower).
template <class T, template <class, class> class Map>
void read_row_nhwc(Piece<T> from, ReadMap read, int64_t lanes, IntVec order, float* panel) {
  for (int64_t pixel = 0; pixel < from.pixels; ++pixel) {
    const int64_t first = pixel * from.stride;
    float* to = panel + pixel * lanes;
    int64_t c = 0;
    for (; c + kLanes <= from.channels; c += kLanes) read_vector<true, T, Map>(from, read, c, first + c, order, to + c);
    if (c < from.channels) read_vector<false, T, Map>(from, read, c, first + c, order, to + c);
  }
}

template <bool kWhole, class T, class Map>
RESNEXT_INLINE void write_column(Piece<T> to, int64_t c, int64_t count, Map& map, int64_t lanes,
                                 const float* panel) {
  const int64_t next_row = to.pixels * to.stride;
  for_pixels<Map::kChains>(to.pixels, [=, &map](int64_t pixel, int chain) RESNEXT_ALWAYS {
    const int64_t offset = pixel * to.stride + c;
    Vec other{};
    if (Map::kOther) {
      __builtin_prefetch(to.other + offset + next_row, kForReading, kKeepInL2);
      other = load_lanes<kWhole>(to.other + offset, count);
    }
    __builtin_prefetch(to.data + offset + next_row, kForWriting, kKeepInL2);
    store_lanes<kWhole>(to.data + offset, map(load(panel + pixel * lanes + c), other, chain), count);
  });
}

template <class T, class Map>
void write_row_nhwc(Piece<T> to, const WriteMap& write, int64_t lanes, const float* panel) {
  for (int64_t c = 0; c < to.channels; c += kLanes) {
    const int64_t count = min_of(kLanes, to.channels - c);
    Map map(write, ChannelLanes{to.c + c, count});
    map.start(to.pixels, [=](int64_t pixel) RESNEXT_ALWAYS { return load(panel + pixel * lanes + c); });
    if (count == kLanes) {
      write_column<true>(to, c, count, map, lanes, panel);
    } else {
      write_column<false>(to, c, count, map, lanes, panel);
    }
    map.finish();
  }
}

// The same `width` pixels of `count` channels, one vector for each; those of the next row are asked for.
template <class T>
RESNEXT_INLINE void load_square(const T* from, int64_t stride, int64_t count, int64_t width, int64_t next_row,
                                Vec (&square)[kLanes]) {
  RESNEXT_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    __builtin_prefetch(from + i * stride + next_row, kForReading, kKeepInL2);
    square[i] = i < count ? load_first(from + i * stride, width) : Vec{};
  }
}

template <class T, template <class, class> class Map>
void read_row_nchw(Piece<T> from, ReadMap read, int64_t lanes, IntVec order, float* panel) {
  for (int64_t c = 0; c < from.channels; c += kLanes) {
    const int64_t count = min_of(kLanes, from.channels - c);
    for (int64_t pixel = 0; pixel < from.pixels; pixel += kLanes) {
      const int64_t width = min_of(kLanes, from.pixels - pixel);
      const int64_t offset = c * from.stride + pixel;
      Vec square[kLanes], other[kLanes] = {};
      load_square(from.data + offset, from.stride, count, width, from.pixels, square);
      if (Map<T, OneChannel>::kOther) {
        load_square(from.other + offset, from.stride, count, width, from.pixels, other);
      }
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < count) square[i] = Map<T, OneChannel>(read, {from.c + c + i})(square[i], other[i]);
      }
      transpose(square);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < width) store(panel + (pixel + i) * lanes + c, permute(square[i], order));
      }
    }
  }
}

template <class T, class Map>
void write_row_nchw(Piece<T> to, const WriteMap& write, int64_t lanes, const float* panel) {
  for (int64_t c = 0; c < to.channels; c += kLanes) {
    const int64_t count = min_of(kLanes, to.channels - c);
    Map map(write, ChannelLanes{to.c + c, count});
    map.start(to.pixels, [=](int64_t pixel) RESNEXT_ALWAYS { return load(panel + pixel * lanes + c); });
    for (int64_t pixel = 0; pixel < to.pixels; pixel += kLanes) {
      const int64_t width = min_of(kLanes, to.pixels - pixel);
      const int64_t offset = c * to.stride + pixel;
      Vec square[kLanes], other[kLanes] = {};
      if (Map::kOther) {
        load_square(to.other + offset, to.stride, count, width, to.pixels, other);
        transpose(other);
      }
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < width ? map(load(panel + (pixel + i) * lanes + c), other[i], i % Map::kChains) : Vec{};
      }
      transpose(square);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        T* target = to.data + offset + i * to.stride;
        __builtin_prefetch(target + to.pixels, kForWriting, kKeepInL2);
        if (i < count) store_first(target, square[i], width);
      }
    }
    map.finish();
  }
}

template <template <class, class> class Map, class T>
void read_piece(const Image& image, const Piece<T>& piece, const ReadMap& read, int64_t lanes, IntVec order,
                float* panel) {
  (image.channels_last ? read_row_nhwc<T, Map> : read_row_nchw<T, Map>)(piece, read, lanes, order, panel);
}

template <class Map, class T>
void write_piece(const Image& image, const Piece<T>& piece, const WriteMap& write, int64_t lanes, const float* panel) {
  (image.channels_last ? write_row_nhwc<T, Map> : write_row_nchw<T, Map>)(piece, write, lanes, panel);
}

template <class T>
void read_row_as(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t channels,
                 int64_t lanes, IntVec order, float* panel) {
  const auto piece = piece_of<T>(image, read.other, n, h, c, channels);
  with_read_map(read,
                [&](auto map) { read_piece<decltype(map)::template Map>(image, piece, read, lanes, order, panel); });
}

template <class T>
void write_row_as(const Image& image, const WriteMap& write, int64_t n, int64_t h, int64_t c, int64_t channels,
                  int64_t lanes, const float* panel) {
  const auto piece = piece_of<T>(image, write.other, n, h, c, channels);
  with_write_map<T>(write, [&](auto map) {
    write_piece<typename decltype(map)::Type>(image, piece, write, lanes, panel);
  });
}

// Pairs of bfloat16, which are given as floats, of `count` pieces of `size` floats that begin `step` floats apart: of
// the first and second, third and fourth and so on; nothing follows the last of an odd number.
void pair_pieces(const float* from, int64_t count, int64_t step, int64_t size, float* to) {
  for (int64_t piece = 0; piece < count; piece += 2, from += 2 * step, to += size) {
    const bool whole = piece + 1 < count;
    for (int64_t i = 0; i < size; i += kLanes) {
      store(to + i, pair_lanes(load(from + i), whole ? load(from + step + i) : Vec{}));
    }
  }
}

// A bfloat16 image in NHWC, of an even number of channels, whose floats are pairs.
RESNEXT_INLINE Image as_pairs(Image image) {
  image.dtype = Dtype::kFloat32;
  image.channels /= 2;
  return image;
}

// Row h of image n, channels [c, c + channels): the panel's further lanes become zero. `order` is that of the channels
// in every vector.
void read_row(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t channels,
              int64_t lanes, IntVec order, float* panel) {
  switch (image.dtype) {
    case Dtype::kFloat32:
      return read_row_as<float>(image, read, n, h, c, channels, lanes, order, panel);
    case Dtype::kFloat16:
      return read_row_as<Half>(image, read, n, h, c, channels, lanes, order, panel);
    case Dtype::kBFloat16:
      return read_row_as<BFloat16>(image, read, n, h, c, channels, lanes, order, panel);
    case Dtype::kUint8:
      return read_row_as<uint8_t>(image, read, n, h, c, channels, lanes, order, panel);
  }
}

// A vector of pairs of neighbouring channels c, c + 1, ... of one pixel, whose first element is number `offset`. Even
// `count`, of 2 * kLanes channels if kWhole.
template <bool kWhole, template <class, class> class Map>
RESNEXT_INLINE Vec read_channel_pairs(const BFloat16* data, const BFloat16* other, const ReadMap& read, int64_t offset,
                                      int64_t c, int64_t count) {
  const auto half = [&](int64_t first, int64_t lanes) RESNEXT_ALWAYS {
    const Map<float, ChannelLanes> map(read, {c + first, lanes});  // rounded when they are paired
    return mapped_lanes<kWhole>(map, data, other, offset + first, lanes);
  };
  if (kWhole) return pair_neighbours(half(0, kLanes), half(kLanes, kLanes), LaneIndices{});
  const int64_t low = min_of(count, kLanes);
  return pair_neighbours(half(0, low), half(kLanes, count - low), LaneIndices{});
}

template <template <class, class> class Map>
void read_row_pairs_nhwc(Piece<BFloat16> from, ReadMap read, int64_t lanes, IntVec order, float* panel) {
  const int64_t next_row = from.pixels * from.stride;
  const auto read_lanes = [&](auto whole, int64_t pixel, int64_t c, int64_t count) RESNEXT_ALWAYS {
    const int64_t offset = pixel * from.stride + c;
    __builtin_prefetch(from.data + offset + next_row, kForReading, kKeepInL2);
    if (Map<float, ChannelLanes>::kOther) __builtin_prefetch(from.other + offset + next_row, kForReading, kKeepInL2);
    const auto pairs =
        read_channel_pairs<decltype(whole)::value, Map>(from.data, from.other, read, offset, from.c + c, count);
    store(panel + pixel * lanes + c / 2, permute(pairs, order));
  };
  for (int64_t pixel = 0; pixel < from.pixels; ++pixel) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= from.channels; c += 2 * kLanes) read_lanes(std::true_type{}, pixel, c, 2 * kLanes);
    if (c < from.channels) read_lanes(std::false_type{}, pixel, c, from.channels - c);
  }
}

// A row of bfloat16 in any layout, channels [c, c + channels), to a panel of pairs of neighbouring channels: nothing
// follows the last of an odd number. `row`: scratch, width * 2 * lanes floats.
void read_row_and_pair(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t channels,
                       int64_t lanes, IntVec order, float* row, float* panel) {
  read_row(image, read, n, h, c, channels, 2 * lanes, in_order(), row);
  for (int64_t pixel = 0; pixel < image.width; ++pixel) {
    for (int64_t lane = 0; 2 * lane < channels; lane += kLanes) {
      const float* from = row + 2 * (pixel * lanes + lane);
      const Vec high = channels - 2 * lane > kLanes ? load(from + kLanes) : Vec{};
      store(panel + pixel * lanes + lane, permute(pair_neighbours(load(from), high, LaneIndices{}), order));
    }
  }
}

// The same of an even number of channels, from an even one on: pairs [c, c + pairs) of the image's.
void read_row_pairs(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t pairs,
                    int64_t lanes, IntVec order, float* row, float* panel) {
  if (!image.channels_last) return read_row_and_pair(image, read, n, h, 2 * c, 2 * pairs, lanes, order, row, panel);
  if (read.kind == ReadMap::kNone) {  // a pair is as good as a float where it is only moved
    return read_row(as_pairs(image), read, n, h, c, pairs, lanes, order, panel);
  }
  const auto piece = piece_of<BFloat16>(image, read.other, n, h, 2 * c, 2 * pairs);
  with_read_map(read, [&](auto map) {
    read_row_pairs_nhwc<decltype(map)::template Map>(piece, read, lanes, order, panel);
  });
}

void write_row(const Image& image, const WriteMap& write, int64_t n, int64_t h, int64_t c, int64_t channels,
               int64_t lanes, const float* panel) {
  switch (image.dtype) {
    case Dtype::kFloat32:
      return write_row_as<float>(image, write, n, h, c, channels, lanes, panel);
    case Dtype::kFloat16:
      return write_row_as<Half>(image, write, n, h, c, channels, lanes, panel);
    case Dtype::kBFloat16:
      return write_row_as<BFloat16>(image, write, n, h, c, channels, lanes, panel);
    case Dtype::kUint8:
      return write_row_as<uint8_t>(image, write, n, h, c, channels, lanes, panel);
  }
}

RESNEXT_INLINE int64_t first_row_of_band(const RowCuts& cuts, const Image& image, int64_t band) {
  return min_of(cuts.parts * band / cuts.bands * cuts.part_rows, image.height);
}

// Task number `task` of batch * bands * blocks: rows [first_row, last_row) of image n, for a block of channels.
struct BandTask {
  int64_t n, first_row, last_row, block;
};
RESNEXT_INLINE BandTask band_task(const RowCuts& cuts, const Image& image, int64_t blocks, int64_t task) {
  const int64_t band = task / blocks % cuts.bands;
  return {task / blocks / cuts.bands, first_row_of_band(cuts, image, band), first_row_of_band(cuts, image, band + 1),
          task % blocks};
}

// The map of row h of image n: its sums go to the row's part.
RESNEXT_INLINE WriteMap map_of_row(WriteMap write, const RowCuts& cuts, const Image& image, int64_t n, int64_t h) {
  if (write.partial != nullptr) {
    write.partial += (n * cuts.parts + h / cuts.part_rows) * kPartialSums * image.channels;
    write.before = h % cuts.part_rows * image.width;
  }
  return write;
}

// Elements of a weight or bias, as floats in whole vectors; and back.
template <class T>
RESNEXT_INLINE void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load_first(from + i, min_of(kLanes, count - i)));
}
template <class T>
RESNEXT_INLINE void narrow(T* to, int64_t count, const float* from) {
  for (int64_t i = 0; i < count; i += kLanes) store_first(to + i, load(from + i), min_of(kLanes, count - i));
}
