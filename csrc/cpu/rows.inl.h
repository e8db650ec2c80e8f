// Moves one row of an image, for some of its channels, between memory (any dtype, NHWC or NCHW) and a panel: floats,
// [pixel][lane], with the lanes a whole number of vectors. Kernels only see panels.
//
// Rows are read in order, but in pieces that hardware prefetchers do not follow: the same piece of the next row is
// asked for while one is read. (A prefetch past the end of the tensor is harmless.)

constexpr int kForReading = 0;
constexpr int kForWriting = 1;
constexpr int kKeepInL2 = 2;

template <class T>
void read_row_nhwc(const T* from, int64_t pixel_stride, int64_t pixels, int64_t channels, int64_t lanes, float* panel) {
  const int64_t next_row = pixels * pixel_stride;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* source = from + pixel * pixel_stride;
    float* target = panel + pixel * lanes;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      __builtin_prefetch(source + next_row + c, kForReading, kKeepInL2);
      store(target + c, load(source + c));
    }
    if (c < channels) store(target + c, load_first(source + c, channels - c));
  }
}

template <class T>
void write_row_nhwc(T* to, int64_t pixel_stride, int64_t pixels, int64_t channels, int64_t lanes, const float* panel) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    T* target = to + pixel * pixel_stride;
    const float* source = panel + pixel * lanes;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) store(target + c, load(source + c));
    if (c < channels) store_first(target + c, load(source + c), channels - c);
  }
}

template <class T>
void read_row_nchw(const T* from, int64_t channel_stride, int64_t pixels, int64_t channels, int64_t lanes,
                   float* panel) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = min_of(kLanes, channels - c);
    for (int64_t pixel = 0; pixel < pixels; pixel += kLanes) {
      const int64_t width = min_of(kLanes, pixels - pixel);
      Vec square[kLanes];
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const T* source = from + (c + i) * channel_stride + pixel;
        __builtin_prefetch(source + pixels, kForReading, kKeepInL2);
        square[i] = i < count ? load_first(source, width) : Vec{};
      }
      transpose(square);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i < width) store(panel + (pixel + i) * lanes + c, square[i]);
      }
    }
  }
}

template <class T>
void write_row_nchw(T* to, int64_t channel_stride, int64_t pixels, int64_t channels, int64_t lanes,
                    const float* panel) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = min_of(kLanes, channels - c);
    for (int64_t pixel = 0; pixel < pixels; pixel += kLanes) {
      const int64_t width = min_of(kLanes, pixels - pixel);
      Vec square[kLanes];
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) square[i] = i < width ? load(panel + (pixel + i) * lanes + c) : Vec{};
      transpose(square);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        T* target = to + (c + i) * channel_stride + pixel;
        __builtin_prefetch(target + pixels, kForWriting, kKeepInL2);
        if (i < count) store_first(target, square[i], width);
      }
    }
  }
}

template <class T>
void read_row_as(const Image& image, int64_t n, int64_t h, int64_t c, int64_t channels, int64_t lanes, float* panel) {
  const T* data = static_cast<const T*>(image.data);
  if (image.channels_last) {
    data += (n * image.height + h) * image.width * image.channels + c;
    read_row_nhwc(data, image.channels, image.width, channels, lanes, panel);
  } else {
    data += ((n * image.channels + c) * image.height + h) * image.width;
    read_row_nchw(data, image.height * image.width, image.width, channels, lanes, panel);
  }
}

template <class T>
void write_row_as(const Image& image, int64_t n, int64_t h, int64_t c, int64_t channels, int64_t lanes,
                  const float* panel) {
  T* data = static_cast<T*>(image.data);
  if (image.channels_last) {
    data += (n * image.height + h) * image.width * image.channels + c;
    write_row_nhwc(data, image.channels, image.width, channels, lanes, panel);
  } else {
    data += ((n * image.channels + c) * image.height + h) * image.width;
    write_row_nchw(data, image.height * image.width, image.width, channels, lanes, panel);
  }
}

// Row h of image n, channels [c, c + channels): the panel's further lanes become zero.
void read_row(const Image& image, int64_t n, int64_t h, int64_t c, int64_t channels, int64_t lanes, float* panel) {
  switch (image.dtype) {
    case Dtype::kFloat32:
      return read_row_as<float>(image, n, h, c, channels, lanes, panel);
    case Dtype::kFloat16:
      return read_row_as<Half>(image, n, h, c, channels, lanes, panel);
    case Dtype::kBFloat16:
      return read_row_as<BFloat16>(image, n, h, c, channels, lanes, panel);
  }
}

void write_row(const Image& image, int64_t n, int64_t h, int64_t c, int64_t channels, int64_t lanes,
               const float* panel) {
  switch (image.dtype) {
    case Dtype::kFloat32:
      return write_row_as<float>(image, n, h, c, channels, lanes, panel);
    case Dtype::kFloat16:
      return write_row_as<Half>(image, n, h, c, channels, lanes, panel);
    case Dtype::kBFloat16:
      return write_row_as<BFloat16>(image, n, h, c, channels, lanes, panel);
  }
}

// Elements [begin, begin + count) of a tensor as floats: in place, or converted to `scratch` (whole vectors).
const float* read_floats(const void* data, Dtype dtype, int64_t begin, int64_t count, float* scratch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data) + begin;
    case Dtype::kFloat16:
      read_row_nhwc(static_cast<const Half*>(data) + begin, 0, 1, count, 0, scratch);
      return scratch;
    case Dtype::kBFloat16:
      read_row_nhwc(static_cast<const BFloat16*>(data) + begin, 0, 1, count, 0, scratch);
      return scratch;
  }
  return nullptr;
}

void write_floats(void* data, Dtype dtype, int64_t begin, int64_t count, const float* from) {
  switch (dtype) {
    case Dtype::kFloat32:
      return write_row_nhwc(static_cast<float*>(data) + begin, 0, 1, count, 0, from);
    case Dtype::kFloat16:
      return write_row_nhwc(static_cast<Half*>(data) + begin, 0, 1, count, 0, from);
    case Dtype::kBFloat16:
      return write_row_nhwc(static_cast<BFloat16*>(data) + begin, 0, 1, count, 0, from);
  }
}
