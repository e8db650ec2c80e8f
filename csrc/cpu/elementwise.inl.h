// The operations without a convolution (Elementwise in kernels.h), on the tensors where they are.
//
// NHWC: vectors are channels, walked pixel by pixel in the order of memory; what belongs to a channel is loaded from
// the L1 cache at every pixel, and its sums are added to there, which memory leaves time for. NCHW: vectors are pixels
// of a plane. Loops take the arguments by value, for the reason given in rows.inl.h.

template <class T, bool kWhole>
RESNEXT_INLINE Vec get(const void* data, int64_t offset, int64_t count) {
  return load_lanes<kWhole>(static_cast<const T*>(data) + offset, count);
}
template <class T, bool kWhole>
RESNEXT_INLINE void put(void* data, int64_t offset, Vec value, int64_t count) {
  store_lanes<kWhole>(static_cast<T*>(data) + offset, value, count);
}

// One operation on vectors of some channels, `offset` elements from the first of every image.
template <class T, class Channels>
struct AddAffineOperation {
  const Elementwise& e;
  const AffineVectors<Channels> affine;
  RESNEXT_INLINE AddAffineOperation(const Elementwise& elementwise, const Channels& channels, float*)
      : e(elementwise), affine(e.affine, channels) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) const {
    const Vec value = get<T, kWhole>(e.dout, offset, count);
    const Vec other = get<T, kWhole>(e.z, offset, count);
    put<T, kWhole>(e.result, offset, value + affine(other), count);
  }
  RESNEXT_INLINE void finish() const {}
};

template <class T, class Channels>
struct AffineAddReluOperation {
  const Elementwise& e;
  const AffineVectors<Channels> affine, residual_affine;
  RESNEXT_INLINE AffineAddReluOperation(const Elementwise& elementwise, const Channels& channels, float*)
      : e(elementwise), affine(e.affine, channels), residual_affine(e.residual_affine, channels) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) const {
    Vec value = affine(get<T, kWhole>(e.z, offset, count));
    if (e.residual != nullptr) value += residual_affine(get<T, kWhole>(e.residual, offset, count));
    put<T, kWhole>(e.result, offset, relu(value), count);
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
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) {
    Vec z{};
    if (e.z != nullptr) z = get<T, kWhole>(e.z, offset, count);
    const Vec dout = get<T, kWhole>(e.dout, offset, count);
    const IntVec zero = e.out == nullptr ? affine(z) <= kLargestZero<T> : get<T, kWhole>(e.out, offset, count) <= 0.0f;
    const Vec t = zero ? Vec{} : dout;
    dshift += t;
    dscale += t * (z - affine.center);
    if (e.residual != nullptr) {
      const Vec residual = get<T, kWhole>(e.residual, offset, count);
      dresidual_scale += t * (residual - residual_affine.center);
    }
    if (e.result != nullptr) put<T, kWhole>(e.result, offset, affine.scale * t, count);
    if (e.dresidual != nullptr) put<T, kWhole>(e.dresidual, offset, residual_affine.scale * t, count);
  }
  RESNEXT_INLINE void finish() const {
    if (sums == nullptr) return;
    channels.add(sums, dshift);
    channels.add(sums + e.channels, dscale);
    if (e.residual != nullptr) channels.add(sums + 2 * e.channels, dresidual_scale);
  }
};

template <class Channels>
RESNEXT_INLINE Vec activated(const Elementwise& e, const AffineVectors<Channels>& affine, Vec z) {
  return e.relu ? relu(affine(z)) : affine(z);
}

// What is left of the result's gradient where a sum with the residual ended in relu.
template <class T, bool kWhole>
RESNEXT_INLINE Vec passed_gradient(const Elementwise& e, int64_t offset, int64_t count) {
  const Vec dout = get<T, kWhole>(e.dout, offset, count);
  return e.out != nullptr && get<T, kWhole>(e.out, offset, count) <= 0.0f ? Vec{} : dout;
}

template <class T, class Channels>
struct MeanOperation {
  const Elementwise& e;
  const Channels channels;
  const AffineVectors<Channels> affine;
  float* const sums;
  Vec sum{};
  RESNEXT_INLINE MeanOperation(const Elementwise& elementwise, const Channels& lanes, float* partial)
      : e(elementwise), channels(lanes), affine(e.affine, lanes), sums(partial) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) {
    sum += only_first<kWhole>(activated(e, affine, get<T, kWhole>(e.z, offset, count)), count);
  }
  RESNEXT_INLINE void finish() const { channels.add(sums, sum); }
};

template <class T, class Channels>
struct GateOperation {
  const Elementwise& e;
  const AffineVectors<Channels> affine, residual_affine;
  const Vec gate;
  RESNEXT_INLINE GateOperation(const Elementwise& elementwise, const Channels& channels, float*)
      : e(elementwise),
        affine(e.affine, channels),
        residual_affine(e.residual_affine, channels),
        gate(channels.get(e.gate)) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) const {
    Vec value = gate * activated(e, affine, get<T, kWhole>(e.z, offset, count));
    if (e.residual != nullptr) value = relu(value + residual_affine(get<T, kWhole>(e.residual, offset, count)));
    put<T, kWhole>(e.result, offset, value, count);
  }
  RESNEXT_INLINE void finish() const {}
};

template <class T, class Channels>
struct GateSumsOperation {
  const Elementwise& e;
  const Channels channels;
  const AffineVectors<Channels> affine, residual_affine;
  float* const sums;
  Vec dgate{}, dshift{}, dscale{};
  RESNEXT_INLINE GateSumsOperation(const Elementwise& elementwise, const Channels& lanes, float* partial)
      : e(elementwise),
        channels(lanes),
        affine(e.affine, lanes),
        residual_affine(e.residual_affine, lanes),
        sums(partial) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) {
    const Vec t = passed_gradient<T, kWhole>(e, offset, count);
    dgate += t * activated(e, affine, get<T, kWhole>(e.z, offset, count));
    if (e.residual != nullptr) {
      dshift += t;
      dscale += t * (get<T, kWhole>(e.residual, offset, count) - residual_affine.center);
    }
    if (e.dresidual != nullptr) put<T, kWhole>(e.dresidual, offset, residual_affine.scale * t, count);
  }
  RESNEXT_INLINE void finish() const {
    channels.add(sums, dgate);
    if (e.residual == nullptr) return;
    channels.add(sums + e.channels, dshift);
    channels.add(sums + 2 * e.channels, dscale);
  }
};

template <class T, class Channels>
struct GateGradientOperation {
  const Elementwise& e;
  const Channels channels;
  const AffineVectors<Channels> affine;
  const Vec gate, added;
  float* const sums;
  Vec dshift{}, dscale{};
  RESNEXT_INLINE GateGradientOperation(const Elementwise& elementwise, const Channels& lanes, float* partial)
      : e(elementwise),
        channels(lanes),
        affine(e.affine, lanes),
        gate(e.gate == nullptr ? Vec{} : lanes.get(e.gate)),
        added(e.added == nullptr ? Vec{} : lanes.get(e.added)),
        sums(partial) {}
  template <bool kWhole>
  RESNEXT_INLINE void run(int64_t offset, int64_t count) {
    Vec t = added;
    if (e.dout != nullptr) t += gate * passed_gradient<T, kWhole>(e, offset, count);
    const Vec z = get<T, kWhole>(e.z, offset, count);
    t = only_first<kWhole>(e.relu && affine(z) <= kLargestZero<T> ? Vec{} : t, count);
    dshift += t;
    dscale += t * (z - affine.center);
    put<T, kWhole>(e.result, offset, affine.scale * t, count);
  }
  RESNEXT_INLINE void finish() const {
    if (sums == nullptr) return;
    channels.add(sums, dshift);
    channels.add(sums + e.channels, dscale);
  }
};

RESNEXT_INLINE float* partial_of(const Elementwise& e, int64_t part) {
  return e.partial == nullptr ? nullptr : e.partial + part * kPartialSums * e.channels;
}

template <bool kWhole, class T, template <class, class> class Operation>
RESNEXT_INLINE void run_channels(const Elementwise& e, int64_t pixel, int64_t c, float* partial) {
  const int64_t count = kWhole ? kLanes : e.channels - c;
  Operation<T, ChannelLanes> operation(e, {c, count}, partial);
  operation.template run<kWhole>(pixel * e.channels + c, count);
  operation.finish();
}

// The pixels of a part, in the order of memory (NHWC).
struct PixelRange {
  int64_t image, first, last;
};
RESNEXT_INLINE PixelRange pixels_of_part(const Elementwise& e, int64_t part) {
  const int64_t parts = ceil_div(e.pixels, e.part_pixels);
  const int64_t image = part / parts;
  const int64_t first = part % parts * e.part_pixels;
  return {image, image * e.pixels + first, image * e.pixels + min_of(first + e.part_pixels, e.pixels)};
}

// With the vectors of an image.
RESNEXT_INLINE Elementwise at_image(Elementwise e, int64_t image) {
  if (e.gate != nullptr) e.gate += image * e.channels;
  if (e.added != nullptr) e.added += image * e.channels;
  return e;
}

template <class T, template <class, class> class Operation>
void walk_nhwc(Elementwise e, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    float* partial = partial_of(e, part);
    const PixelRange range = pixels_of_part(e, part);
    const Elementwise of_image = at_image(e, range.image);
    for (int64_t pixel = range.first; pixel < range.last; ++pixel) {
      int64_t c = 0;
      for (; c + kLanes <= e.channels; c += kLanes) run_channels<true, T, Operation>(of_image, pixel, c, partial);
      if (c < e.channels) run_channels<false, T, Operation>(of_image, pixel, c, partial);
    }
  }
}

template <class T, template <class, class> class Operation>
void walk_nchw(Elementwise e, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(e.pixels, e.part_pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / e.channels;
    const int64_t c = plane % e.channels;
    const Elementwise of_image = at_image(e, n);
    for (int64_t part = 0; part < parts; ++part) {
      Operation<T, OneChannel> operation(of_image, {c}, partial_of(e, n * parts + part));
      int64_t pixel = part * e.part_pixels;
      const int64_t last = min_of(pixel + e.part_pixels, e.pixels);
      for (; pixel + kLanes <= last; pixel += kLanes) operation.template run<true>(plane * e.pixels + pixel, kLanes);
      if (pixel < last) operation.template run<false>(plane * e.pixels + pixel, last - pixel);
      operation.finish();
    }
  }
}

template <class T>
void moments_nhwc(Elementwise e, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 16;  // pixels
  WriteMap map{};
  map.channels = e.channels;
  for (int64_t part = begin; part < end; ++part) {
    map.partial = partial_of(e, part);
    const PixelRange range = pixels_of_part(e, part);
    const int64_t pixels = range.last - range.first;
    for (map.before = 0; map.before < pixels; map.before += kPiece) {
      const T* z = static_cast<const T*>(e.z) + (range.first + map.before) * e.channels;
      const int64_t count = min_of(kPiece, pixels - map.before);
      int64_t c = 0;
      for (; c + kLanes <= e.channels; c += kLanes) add_moments<true>(z + c, e.channels, count, {c, kLanes}, map);
      if (c < e.channels) add_moments<false>(z + c, e.channels, count, {c, e.channels - c}, map);
    }
  }
}

template <class T>
void moments_nchw(Elementwise e, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(e.pixels, e.part_pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * e.part_pixels;
      plane_moments(static_cast<const T*>(e.z) + plane * e.pixels + first, min_of(e.part_pixels, e.pixels - first),
                    partial_of(e, plane / e.channels * parts + part) + plane % e.channels, e.channels);
    }
  }
}

template <class T, template <class, class> class Operation>
void walk(const Elementwise& e, int64_t begin, int64_t end) {
  (e.channels_last ? walk_nhwc<T, Operation> : walk_nchw<T, Operation>)(e, begin, end);
}

template <class T>
void elementwise_as(const Elementwise& e, int64_t begin, int64_t end) {
  switch (e.kind) {
    case Elementwise::kMoments:
      return (e.channels_last ? moments_nhwc<T> : moments_nchw<T>)(e, begin, end);
    case Elementwise::kAddAffine:
      return walk<T, AddAffineOperation>(e, begin, end);
    case Elementwise::kAffineAddRelu:
      return walk<T, AffineAddReluOperation>(e, begin, end);
    case Elementwise::kAffineAddReluGradient:
      return walk<T, AffineAddReluGradientOperation>(e, begin, end);
    case Elementwise::kMean:
      return walk<T, MeanOperation>(e, begin, end);
    case Elementwise::kGate:
      return walk<T, GateOperation>(e, begin, end);
    case Elementwise::kGateSums:
      return walk<T, GateSumsOperation>(e, begin, end);
    case Elementwise::kGateGradient:
      return walk<T, GateGradientOperation>(e, begin, end);
  }
}

void elementwise(const Elementwise& e, int64_t begin, int64_t end) {
  with_float_type(e.dtype, [&](auto value) { elementwise_as<decltype(value)>(e, begin, end); });
}
