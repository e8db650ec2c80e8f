// Mean and sum of squared deviations, in two passes over values that stay in the L1 cache in between. Values are taken
// relative to one of them, the shift: a mean far larger than the spread then costs no digits, and the variance of a
// constant is exactly zero.
//
// A record of a part is [shift, mean, m2][channel] with the mean relative to the shift; the driver merges records.

template <bool kWhole, class T, class Term>
RESNEXT_INLINE Vec sum_lanes(const T* data, int64_t step, int64_t steps, int64_t count, Term term) {
  constexpr int kChains = 4;  // additions that do not wait for each other
  Vec sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= steps; i += kChains) {
    RESNEXT_UNROLL
    for (int k = 0; k < kChains; ++k) sum[k] += term(load_lanes<kWhole>(data + (i + k) * step, count));
  }
  for (; i < steps; ++i) sum[0] += term(load_lanes<kWhole>(data + i * step, count));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T, class Term>
RESNEXT_INLINE Vec sum_of(const T* data, int64_t step, int64_t steps, int64_t count, Term term) {
  return count == kLanes ? sum_lanes<true>(data, step, steps, count, term)
                         : sum_lanes<false>(data, step, steps, count, term);
}

// Adds `pixels` values, `step` elements apart, of some channels to a record that has seen `before` pixels (Chan, Golub
// and LeVeque 1979).
template <class T>
void add_moments(const T* data, int64_t step, int64_t pixels, const ChannelLanes& channels, int64_t before,
                 float* record, int64_t all_channels) {
  float* const records[3] = {record, record + all_channels, record + 2 * all_channels};
  const Vec shift = before == 0 ? load_first(data, channels.count) : channels.get(records[0]);
  const float count = static_cast<float>(pixels);
  Vec mean = sum_of(data, step, pixels, channels.count, [=](Vec value) { return value - shift; }) / count;
  Vec m2 = sum_of(data, step, pixels, channels.count, [=](Vec value) {
    const Vec deviation = value - shift - mean;
    return deviation * deviation;
  });
  if (before != 0) {
    const float share = count / static_cast<float>(before + pixels);
    const Vec old_mean = channels.get(records[1]);
    const Vec delta = mean - old_mean;
    mean = old_mean + delta * share;
    m2 = channels.get(records[2]) + m2 + delta * delta * (share * static_cast<float>(before));
  }
  channels.set(records[0], shift);
  channels.set(records[1], mean);
  channels.set(records[2], m2);
}

// The record of `count` values of one channel that follow each other in memory.
template <class T>
void plane_moments(const T* data, int64_t count, float* record, int64_t all_channels) {
  const int64_t vectors = count / kLanes;
  const int64_t rest = count % kLanes;
  const Vec last = load_first(data + vectors * kLanes, rest);
  const auto sum_terms = [=](auto term) {
    return sum_of_lanes(sum_lanes<true>(data, kLanes, vectors, kLanes, term) + keep_first(term(last), rest));
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
