// Mean and sum of squared deviations. A record of a part is [shift, mean, m2][channel], with the mean relative to the
// shift, which is close to it: a mean far larger than the spread then costs no digits, and the variance of a constant
// is exactly zero. The driver merges records.

// Adds the values of some channels, rounded to a T, to their record, in pieces: the sums of a piece are about the mean
// of those before it, of the first one about its own, so that squares lose no digits (Chan, Golub and LeVeque 1979).
template <class T>
class Moments {
 public:
  static constexpr bool kOther = false;
  static constexpr int kChains = 2;
  RESNEXT_INLINE Moments(const WriteMap& map, const ChannelLanes& lanes)
      : channels_(lanes),
        record_{map.partial, map.partial + map.channels, map.partial + 2 * map.channels},
        before_(map.before) {}
  // A piece has so many pixels, whose values are `get(pixel)`.
  template <class Get>
  RESNEXT_INLINE void start(int64_t pixels, Get get) {
    pixels_ = pixels;
    if (before_ != 0) {
      center_ = channels_.get(record_[0]) + channels_.get(record_[1]);
      return;
    }
    const Vec first = round_to<T>(get(0));
    Vec sum{};
    for (int64_t pixel = 1; pixel < pixels; ++pixel) sum += round_to<T>(get(pixel)) - first;
    center_ = first + sum / static_cast<float>(pixels);
  }
  RESNEXT_INLINE Vec operator()(Vec value, Vec, int chain) {
    const Vec deviation = round_to<T>(value) - center_;
    sums_[chain] += deviation;
    squares_[chain] += deviation * deviation;
    return value;
  }
  RESNEXT_INLINE void finish() const {
    const float count = static_cast<float>(pixels_);
    const Vec sum = sums_[0] + sums_[1];
    Vec mean = sum / count;
    Vec m2 = relu(squares_[0] + squares_[1] - sum * mean);
    Vec shift = center_;
    if (before_ != 0) {
      shift = channels_.get(record_[0]);
      const float share = count / static_cast<float>(before_ + pixels_);
      const Vec old_mean = channels_.get(record_[1]);
      const Vec delta = (center_ - shift - old_mean) + mean;
      mean = old_mean + delta * share;
      m2 += channels_.get(record_[2]) + delta * delta * (share * static_cast<float>(before_));
    }
    channels_.set(record_[0], shift);
    channels_.set(record_[1], mean);
    channels_.set(record_[2], m2);
  }

 private:
  const ChannelLanes channels_;
  float* const record_[3];
  const int64_t before_;
  int64_t pixels_ = 0;
  Vec center_{}, sums_[kChains] = {}, squares_[kChains] = {};
};

// A type by name: decltype(name)::Type.
template <class T>
struct TypeName {
  using Type = T;
};

// work(the name of the map of this kind, for an image of T).
template <class T, class Work>
RESNEXT_INLINE auto with_write_map(const WriteMap& write, Work work) {
  switch (write.kind) {
    case WriteMap::kMoments:
      return work(TypeName<Moments<T>>{});
    case WriteMap::kAffine:
      return work(TypeName<ScaleShift<false>>{});
    case WriteMap::kAffineAdd:
      return work(TypeName<ScaleShift<true>>{});
    case WriteMap::kReluGradient:
      return work(TypeName<ReluGradient<T>>{});
    case WriteMap::kNone:
      break;
  }
  return work(TypeName<KeepValue<T, ChannelLanes>>{});
}

// A piece of pixels that begin `step` elements apart; map: that of its part.
template <bool kWhole, class T>
RESNEXT_INLINE void add_moments(const T* values, int64_t step, int64_t pixels, const ChannelLanes& lanes,
                                const WriteMap& map) {
  const auto get = [&](int64_t pixel) RESNEXT_ALWAYS {
    return load_lanes<kWhole>(values + pixel * step, lanes.count);
  };
  Moments<T> moments(map, lanes);
  moments.start(pixels, get);
  for_pixels<Moments<T>::kChains>(pixels, [&](int64_t pixel, int chain) RESNEXT_ALWAYS {
    moments(get(pixel), Vec{}, chain);
  });
  moments.finish();
}

// Of `vectors` vectors that follow each other in memory.
template <class T, class Term>
RESNEXT_INLINE Vec sum_of(const T* data, int64_t vectors, Term term) {
  constexpr int kChains = 4;  // additions that do not wait for each other
  Vec sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= vectors; i += kChains) {
    RESNEXT_UNROLL
    for (int k = 0; k < kChains; ++k) sum[k] += term(load(data + (i + k) * kLanes));
  }
  for (; i < vectors; ++i) sum[0] += term(load(data + i * kLanes));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The record of `count` values of one channel that follow each other in memory, in two passes.
template <class T>
void plane_moments(const T* data, int64_t count, float* record, int64_t all_channels) {
  const int64_t vectors = count / kLanes;
  const int64_t rest = count % kLanes;
  const Vec last = load_first(data + vectors * kLanes, rest);
  const auto sum_terms = [=](auto term) {
    return sum_of_lanes(sum_of(data, vectors, term) + keep_first(term(last), rest));
  };
  const float shift = load_first(data, 1)[0];
  const float mean = sum_terms([=](Vec value) { return value - shift; }) / static_cast<float>(count);
  const float m2 = sum_terms([=](Vec value) {
    const Vec deviation = value - shift - mean;
    return deviation * deviation;
  });
  record[0] = shift;
  record[all_channels] = mean;
  record[2 * all_channels] = m2;
}
