// 3x3 max pool, stride 2, padding 1, of relu(affine(z)), and its gradient.
//
// A task makes the rows of a band of one image, for a block of channels; source rows are read once into a ring of
// panels, as in correlate.inl.h. z's panels have a column of -Inf on either side, which every value of relu beats;
// those of the taps end with a column that no tap equals.

constexpr int kRingRows = 3;    // rows of z in a window
constexpr int kPooledRows = 2;  // a row of z is in the windows of at most two pooled rows

RESNEXT_INLINE int64_t z_panel(const MaxPool& p) { return (p.z.width + 2) * p.lanes; }
RESNEXT_INLINE int64_t pooled_panel(const MaxPool& p) { return (p.pooled.width + 1) * p.lanes; }

int64_t max_pool_scratch(const MaxPool& p) { return kRingRows * z_panel(p) + 2 * pooled_panel(p); }
int64_t max_pool_gradient_scratch(const MaxPool& p) { return 2 * kPooledRows * pooled_panel(p) + z_panel(p); }

// One pooled row. The first of equal values in row-major order wins, and the last NaN, as in PyTorch; rows outside the
// image are null. Without kNan no NaN ever wins, but the sum of all values that is returned becomes NaN.
template <bool kNan>
Vec max_pool_row(const float* const (&rows)[3], int64_t pixels, int64_t lanes, float* out, float* taps) {
  Vec sum{};
  for (int64_t q = 0; q < pixels; ++q) {
    for (int64_t c = 0; c < lanes; c += kLanes) {
      Vec best = broadcast(-__builtin_inff());
      Vec best_tap{};
      for (int r = 0; r < 3; ++r) {
        if (rows[r] == nullptr) continue;
        Vec row_sum{};
        RESNEXT_UNROLL
        for (int s = 0; s < 3; ++s) {
          const Vec value = load(rows[r] + (2 * q + s) * lanes + c);
          const IntVec wins = kNan ? (value > best) | (value != value) : value > best;
          row_sum += value;
          best = wins ? value : best;
          best_tap = wins ? broadcast(static_cast<float>(3 * r + s)) : best_tap;
        }
        sum += row_sum;
      }
      store(out + q * lanes + c, best);
      store(taps + q * lanes + c, best_tap);
    }
  }
  return sum;
}

void max_pool(const MaxPool& p, float* scratch, int64_t begin, int64_t end) {
  float* out = scratch + kRingRows * z_panel(p);
  float* taps = out + pooled_panel(p);
  for (int64_t i = 0; i < kRingRows * z_panel(p); ++i) scratch[i] = -__builtin_inff();
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(p.cuts, p.pooled, ceil_div(p.z.channels, p.lanes), task);
    const int64_t c = t.block * p.lanes;
    const int64_t channels = min_of(p.lanes, p.z.channels - c);
    int64_t next_row = 0;
    for (int64_t row = t.first_row; row < t.last_row; ++row) {
      if (next_row < 2 * row - 1) next_row = 2 * row - 1;
      for (; next_row < min_of(2 * row + 2, p.z.height); ++next_row) {
        float* panel = scratch + next_row % kRingRows * z_panel(p);
        read_row(p.z, p.read, t.n, next_row, c, channels, p.lanes, in_order(), panel + p.lanes);
      }
      const float* rows[3] = {};
      for (int64_t r = 0; r < 3; ++r) {
        const int64_t h = 2 * row - 1 + r;
        if (h >= 0 && h < p.z.height) rows[r] = scratch + h % kRingRows * z_panel(p);
      }
      const float sum = sum_of_lanes(max_pool_row<false>(rows, p.pooled.width, p.lanes, out, taps));
      if (sum != sum) max_pool_row<true>(rows, p.pooled.width, p.lanes, out, taps);
      write_row(p.pooled, p.write, t.n, row, c, channels, p.lanes, out);
      if (p.taps.data != nullptr) write_row(p.taps, p.write, t.n, row, c, channels, p.lanes, taps);
    }
  }
}

// A pooled row that has a row of z in its windows; first_tap: 3 * the window's row that is the row of z.
struct PooledRow {
  const float *grad, *taps;
  int first_tap;
};

// One row of z: every pooled gradient to the pixel its tap names. Odd columns are in the windows of two pooled ones.
void max_pool_gradient_row(const PooledRow* rows, int count, int64_t width, int64_t lanes, float* out) {
  const auto taken = [=](const PooledRow& row, int64_t at, int s) {
    const Vec grad = load(row.grad + at);
    return load(row.taps + at) == static_cast<float>(row.first_tap + s) ? grad : Vec{};
  };
  for (int64_t column = 0; column < width; column += 2) {
    for (int64_t c = 0; c < lanes; c += kLanes) {
      const int64_t at = column / 2 * lanes + c;
      Vec even{}, odd{};
      for (int i = 0; i < count; ++i) {
        even += taken(rows[i], at, 1);
        odd += taken(rows[i], at, 2) + taken(rows[i], at + lanes, 0);
      }
      store(out + column * lanes + c, even);
      if (column + 1 < width) store(out + (column + 1) * lanes + c, odd);
    }
  }
}

void max_pool_gradient(const MaxPool& p, float* scratch, int64_t begin, int64_t end) {
  constexpr float kNoTap = 255.0f;
  float* grads = scratch;
  float* taps = grads + kPooledRows * pooled_panel(p);
  float* out = taps + kPooledRows * pooled_panel(p);
  for (int64_t i = 0; i < kPooledRows * pooled_panel(p); ++i) taps[i] = kNoTap;
  for (int64_t task = begin; task < end; ++task) {
    const BandTask t = band_task(p.cuts, p.z, ceil_div(p.z.channels, p.lanes), task);
    const int64_t c = t.block * p.lanes;
    const int64_t channels = min_of(p.lanes, p.z.channels - c);
    int64_t next_row = 0;
    for (int64_t h = t.first_row; h < t.last_row; ++h) {
      PooledRow rows[kPooledRows];
      int count = 0;
      if (next_row < h / 2) next_row = h / 2;
      for (int64_t row = h / 2; row < min_of((h + 1) / 2 + 1, p.pooled.height); ++row) {
        const int64_t at = row % kPooledRows * pooled_panel(p);
        if (row == next_row) {
          read_row(p.pooled, p.read, t.n, row, c, channels, p.lanes, in_order(), grads + at);
          read_row(p.taps, p.read, t.n, row, c, channels, p.lanes, in_order(), taps + at);
          ++next_row;
        }
        rows[count++] = {grads + at, taps + at, static_cast<int>(3 * (h + 1 - 2 * row))};
      }
      max_pool_gradient_row(rows, count, p.z.width, p.lanes, out);
      write_row(p.z, map_of_row(p.write, p.cuts, p.z, t.n, h), t.n, h, c, channels, p.lanes, out);
    }
  }
}
