// The operations without a convolution (Elementwise in kernels.h), on the tensors where they are.
//
// NHWC: vectors are channels, walked pixel by pixel in the order of memory; what belongs to a channel is loaded from, and
// its sums are added to, the L1 cache at every pixel, which memory leaves time for. NCHW: vectors are pixels of a plane.

// One operation on vectors of some channels, `offset` elements from the first of every image.
template <class T, class Channels>
struct AddAffineOperation {
  const Elementwise& e;
  const AffineVectors<Channels> affine;
  RESNEXT_INLINE AddAffineOperation(const Elementwise& elementwise, const Channels& channels, float*)
      : e(elementwise), affine(e.affine, channels) {}
  RESNEXT_INLINE void operator()(int64_t offset, int64_t count) const {
    const Vec value = load_first(static_cast<const T*>(e.dout) + offset, count);
    const Vec other = load_first(static_cast<const T*>(e.z) + offset, count);
    store_first(static_cast<T*>(e.result) + offset, value + affine(other), count);
  }
  RESNEXT_INLINE void finish() const {}
};

template <class T, class Channels>
struct AffineAddReluOperation {
  const Elementwise& e;
  const AffineVectors<Channels> affine, residual_affine;
  RESNEXT_INLINE AffineAddReluOperation(const Elementwise& elementwise, const Channels& channels, float*)
      : e(elementwise), affine(e.affine, channels), residual_affine(e.residual_affine, channels) {}
  RESNEXT_INLINE void operator()(int64_t offset, int64_t count) const {
    Vec value = affine(load_first(static_cast<const T*>(e.z) + offset, count));
    if (e.residual != nullptr) value += residual_affine(load_first(static_cast<const T*>(e.residual) + offset, count));
    store_first(static_cast<T*>(e.result) + offset, relu(value), count);
  }
  RESNEXT_INLINE void finish() const {}
};

template <class T, class Channels>
struct AffineAddReluGradientOperation {
  const Elementwise& e;
  const Channels channels;
  const AffineVectors<Channels> affine, residual_affine;
  float* const sums;
  Vec dshift{}, dscale{}, dresidual_scale{};
  RESNEXT_INLINE AffineAddReluGradientOperation(const Elementwise& elementwise, const Channels& lanes, float* partial)
      : e(elementwise),
        channels(lanes),
        affine(e.affine, lanes),
        residual_affine(e.residual_affine, lanes),
        sums(partial) {}
  RESNEXT_INLINE void operator()(int64_t offset, int64_t count) {
    Vec z{};
    if (e.z != nullptr) z = load_first(static_cast<const T*>(e.z) + offset, count);
    const Vec out = e.out == nullptr ? round_to<T>(affine(z)) : load_first(static_cast<const T*>(e.out) + offset, count);
    const Vec dout = load_first(static_cast<const T*>(e.dout) + offset, count);
    const Vec t = out <= 0.0f ? Vec{} : dout;
    dshift += t;
    dscale += t * (z - affine.center);
    if (e.residual != nullptr) {
      const Vec residual = load_first(static_cast<const T*>(e.residual) + offset, count);
      dresidual_scale += t * (residual - residual_affine.center);
    }
    if (e.result != nullptr) store_first(static_cast<T*>(e.result) + offset, affine.scale * t, count);
    if (e.dresidual != nullptr) store_first(static_cast<T*>(e.dresidual) + offset, residual_affine.scale * t, count);
  }
  RESNEXT_INLINE void finish() const {
    if (sums == nullptr) return;
    channels.add(sums, dshift);
    channels.add(sums + e.channels, dscale);
    if (e.residual != nullptr) channels.add(sums + 2 * e.channels, dresidual_scale);
  }
};

RESNEXT_INLINE float* partial_of(const Elementwise& e, int64_t part) {
  return e.partial == nullptr ? nullptr : e.partial + part * kPartialSums * e.channels;
}

template <class T, template <class, class> class Operation>
void walk_nhwc(const Elementwise& e, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const int64_t last = min_of((part + 1) * e.part_pixels, e.batch * e.pixels);
    for (int64_t pixel = part * e.part_pixels; pixel < last; ++pixel) {
      for (int64_t c = 0; c < e.channels; c += kLanes) {
        const int64_t count = min_of(kLanes, e.channels - c);
        Operation<T, ChannelLanes> operation(e, {c, count}, partial_of(e, part));
        operation(pixel * e.channels + c, count);
        operation.finish();
      }
    }
  }
}

template <class T, template <class, class> class Operation>
void walk_nchw(const Elementwise& e, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(e.pixels, e.part_pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / e.channels;
    const int64_t c = plane % e.channels;
    for (int64_t part = 0; part < parts; ++part) {
      Operation<T, OneChannel> operation(e, {c}, partial_of(e, n * parts + part));
      const int64_t last = min_of((part + 1) * e.part_pixels, e.pixels);
      for (int64_t pixel = part * e.part_pixels; pixel < last; pixel += kLanes) {
        operation(plane * e.pixels + pixel, min_of(kLanes, last - pixel));
      }
      operation.finish();
    }
  }
}

template <class T>
void moments_nhwc(const Elementwise& e, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = part * e.part_pixels;
    const int64_t pixels = min_of(e.part_pixels, e.batch * e.pixels - first);
    const T* z = static_cast<const T*>(e.z) + first * e.channels;
    for (int64_t c = 0; c < e.channels; c += kLanes) {
      const ChannelLanes channels{c, min_of(kLanes, e.channels - c)};
      add_moments(z + c, e.channels, pixels, channels, 0, partial_of(e, part), e.channels);
    }
  }
}

template <class T>
void moments_nchw(const Elementwise& e, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(e.pixels, e.part_pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * e.part_pixels;
      plane_moments(static_cast<const T*>(e.z) + plane * e.pixels + first, min_of(e.part_pixels, e.pixels - first),
                    partial_of(e, plane / e.channels * parts + part) + plane % e.channels, e.channels);
    }
  }
}

template <class T>
void elementwise_as(const Elementwise& e, int64_t begin, int64_t end) {
  switch (e.kind) {
    case Elementwise::kMoments:
      return (e.channels_last ? moments_nhwc<T> : moments_nchw<T>)(e, begin, end);
    case Elementwise::kAddAffine:
      return (e.channels_last ? walk_nhwc<T, AddAffineOperation> : walk_nchw<T, AddAffineOperation>)(e, begin, end);
    case Elementwise::kAffineAddRelu:
      return (e.channels_last ? walk_nhwc<T, AffineAddReluOperation> : walk_nchw<T, AffineAddReluOperation>)(e, begin,
                                                                                                             end);
    case Elementwise::kAffineAddReluGradient:
      return (e.channels_last ? walk_nhwc<T, AffineAddReluGradientOperation>
                              : walk_nchw<T, AffineAddReluGradientOperation>)(e, begin, end);
  }
}

void elementwise(const Elementwise& e, int64_t begin, int64_t end) {
  switch (e.dtype) {
    case Dtype::kFloat16:
      return elementwise_as<Half>(e, begin, end);
    case Dtype::kBFloat16:
      return elementwise_as<BFloat16>(e, begin, end);
    default:
      return elementwise_as<float>(e, begin, end);
  }
}
