// What becomes of values on their way between memory and the kernels: ReadMap and WriteMap of kernels.h, as classes for
// the loops of rows.inl.h. An object serves some channels: it keeps their vectors in registers, and of what is
// written their sums from start() to finish(), in `kChains` chains of additions that do not wait for each other.

// The channels c, c + 1, ... of a vector whose lanes are channels; lanes past the last one count as zero.
struct ChannelLanes {
  int64_t c, count;
  RESNEXT_INLINE Vec get(const float* values) const { return load_first(values + c, count); }
  RESNEXT_INLINE void set(float* values, Vec value) const { store_first(values + c, value, count); }
  RESNEXT_INLINE void add(float* sums, Vec value) const { set(sums, get(sums) + value); }
};

// The channel of a vector whose lanes are pixels.
struct OneChannel {
  int64_t c;
  RESNEXT_INLINE Vec get(const float* values) const { return broadcast(values[c]); }
  RESNEXT_INLINE void add(float* sums, Vec value) const { sums[c] += sum_of_lanes(value); }
};

template <class Channels>
struct AffineVectors {
  Vec center, scale, shift;
  RESNEXT_INLINE AffineVectors(const Affine& affine, const Channels& channels)
      : center(channels.get(affine.center)), scale(channels.get(affine.scale)), shift(channels.get(affine.shift)) {}
  RESNEXT_INLINE Vec operator()(Vec value) const { return (value - center) * scale + shift; }
};

// The largest value that a T rounds to zero: relu(v), rounded, is zero up to here.
template <class T>
constexpr float kLargestZero = 0.0f;
template <>
constexpr float kLargestZero<Half> = 0x1p-25f;
template <>
constexpr float kLargestZero<BFloat16> = 0x1p-134f;
template <>
constexpr float kLargestZero<FastBFloat16> = kLargestZero<BFloat16>;

template <class T, class Channels>
struct KeepValue {
  static constexpr bool kOther = false;
  static constexpr int kChains = 1;
  template <class Map>
  RESNEXT_INLINE KeepValue(const Map&, const Channels&) {}
  template <class Get>
  RESNEXT_INLINE void start(int64_t, Get) const {}
  RESNEXT_INLINE Vec operator()(Vec value, Vec, int = 0) const { return value; }
  RESNEXT_INLINE void finish() const {}
};

template <class T, class Channels>
struct AffineRelu {
  static constexpr bool kOther = false;
  AffineVectors<Channels> affine;
  RESNEXT_INLINE AffineRelu(const ReadMap& map, const Channels& channels) : affine(map.affine, channels) {}
  RESNEXT_INLINE Vec operator()(Vec value, Vec) const { return round_to<T>(relu(affine(value))); }
};

template <class T, class Channels>
struct AddAffine {
  static constexpr bool kOther = true;
  AffineVectors<Channels> affine;
  RESNEXT_INLINE AddAffine(const ReadMap& map, const Channels& channels) : affine(map.affine, channels) {}
  RESNEXT_INLINE Vec operator()(Vec value, Vec other) const { return round_to<T>(value + affine(other)); }
};

// What a map makes of the first `count` lanes at an offset of an image, whose `other` image may be null.
template <bool kWhole, class Map, class T>
RESNEXT_INLINE Vec mapped_lanes(const Map& map, const T* data, const T* other, int64_t offset, int64_t count) {
  Vec other_lanes{};
  if (Map::kOther) other_lanes = load_lanes<kWhole>(other + offset, count);
  return map(load_lanes<kWhole>(data + offset, count), other_lanes);
}

// A map by name: decltype(name)::template Map<T, Channels>.
template <template <class, class> class M>
struct MapName {
  template <class T, class Channels>
  using Map = M<T, Channels>;
};

// work(the name of the map of this kind).
template <class Work>
RESNEXT_INLINE void with_read_map(const ReadMap& read, Work work) {
  switch (read.kind) {
    case ReadMap::kNone:
      return work(MapName<KeepValue>{});
    case ReadMap::kAffineRelu:
      return work(MapName<AffineRelu>{});
    case ReadMap::kAddAffine:
      return work(MapName<AddAffine>{});
  }
}

template <bool kAdd>
struct ScaleShift {
  static constexpr bool kOther = kAdd;
  static constexpr int kChains = 1;
  Vec scale, shift;
  bool with_relu;
  RESNEXT_INLINE ScaleShift(const WriteMap& map, const ChannelLanes& channels)
      : scale(channels.get(map.affine.scale)), shift(channels.get(map.affine.shift)), with_relu(map.relu) {}
  template <class Get>
  RESNEXT_INLINE void start(int64_t, Get) const {}
  RESNEXT_INLINE Vec operator()(Vec value, Vec other, int) const {
    value = value * scale + shift;
    if (kAdd) value += other;
    return with_relu ? relu(value) : value;
  }
  RESNEXT_INLINE void finish() const {}
};

template <class T>
struct ReluGradient {
  static constexpr bool kOther = true;
  static constexpr int kChains = 2;
  const ChannelLanes channels;
  float *dshift_sums, *dscale_sums;
  const AffineVectors<ChannelLanes> affine;
  Vec dshift[kChains] = {}, dscale[kChains] = {};
  RESNEXT_INLINE ReluGradient(const WriteMap& map, const ChannelLanes& lanes)
      : channels(lanes),
        dshift_sums(map.partial),
        dscale_sums(map.partial + map.channels),
        affine(map.affine, lanes) {}
  template <class Get>
  RESNEXT_INLINE void start(int64_t, Get) const {}
  RESNEXT_INLINE Vec operator()(Vec value, Vec x, int chain) {
    const Vec t = affine(x) <= kLargestZero<T> ? Vec{} : value;
    dshift[chain] += t;
    dscale[chain] += t * (x - affine.center);
    return affine.scale * t;
  }
  RESNEXT_INLINE void finish() const {
    channels.add(dshift_sums, dshift[0] + dshift[1]);
    channels.add(dscale_sums, dscale[0] + dscale[1]);
  }
};

// work(pixel, chain) for every pixel, the chains in turn.
template <int kChains, class Work>
RESNEXT_INLINE void for_pixels(int64_t pixels, Work work) {
  int64_t pixel = 0;
  for (; pixel + kChains <= pixels; pixel += kChains) {
    RESNEXT_UNROLL
    for (int chain = 0; chain < kChains; ++chain) work(pixel + chain, chain);
  }
  for (; pixel < pixels; ++pixel) work(pixel, 0);
}

// `check`: the sum of what is zero for every finite value.
RESNEXT_INLINE void tell_not_finite(Vec check, int* not_finite) {
  if (sum_of_lanes(check) != 0.0f) __atomic_store_n(not_finite, 1, __ATOMIC_RELAXED);
}
