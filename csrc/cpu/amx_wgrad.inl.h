// The weight gradient by AMX, of strips of rows at once (amx_correlate.inl.h tells of planes and positions). Images are
// stacked, with a row of zeros between them, so that strips of small ones are long too.
//
//   sum over positions of grad[position][o] * x[position + constant of the tap][i]
//
// Of x there is a pair for every position, of what is there and at the next: any tap's operand, whose rows are pairs,
// is every second one from somewhere on. grad is turned square by square.
//
// What the rows and columns of zeros meet is added too: where the sums are not finite, that may be because of it, and
// `not_finite` lets the driver take the other kernels.
//
// A unit's slice: [x vector][tap][grad channel][x lane].

#if RESNEXT_LANES == 16

// Floats of a pixel of so many channels, as it is read: pairs of channels, in whole vectors.
RESNEXT_INLINE int64_t amx_pixel_lanes(int64_t channels) { return round_up(ceil_div(channels, 2), kLanes); }

struct AmxGradientStrip {
  int64_t pitch, image_rows;         // of stacked images, with a column and a row of zeros
  int64_t after;                     // rows of planes that the last row of a strip sees behind itself
  int64_t grad_channels, x_vectors;  // in whole vectors
  int64_t most_steps;                // of 32 positions, of a strip
  int64_t vector_size, plane_size;   // floats of the pairs of a vector of x, and of a plane
  int64_t planes;                    // of a unit

  RESNEXT_INLINE explicit AmxGradientStrip(const WeightGradient& g)
      : pitch(g.grad.width + 1),
        image_rows(g.grad.height + 1),
        after(g.stride_h == 1 ? 1 : 0),
        grad_channels(grad_lanes(g)),
        x_vectors(x_lanes(g) / kLanes),
        most_steps(steps(g.rows_at_once)),
        vector_size(((g.rows_at_once + 2) * pitch + 2 * kAmxRows + 2) * kLanes),
        plane_size(x_vectors * vector_size),
        planes(g.stride_h * g.stride_w) {}

  RESNEXT_INLINE int64_t steps(int64_t rows) const { return ceil_div(rows * pitch, 2 * kAmxRows); }
  RESNEXT_INLINE int64_t unit_size() const { return planes * plane_size; }
  RESNEXT_INLINE int64_t grad_size() const { return most_steps * 2 * kAmxRows * amx_pixel_lanes(grad_channels); }
  RESNEXT_INLINE int64_t turned_size() const { return most_steps * kAmxFloats * (grad_channels / kLanes); }
};

int64_t amx_slice_size(const WeightGradient& g) {
  const AmxGradientStrip strip(g);
  return strip.x_vectors * 9 * strip.grad_channels * kLanes;
}

// Floats of a row of x as it is read, and of what reading one, or one of grad, needs.
RESNEXT_INLINE int64_t amx_x_row_size(const WeightGradient& g) { return g.x.width * amx_pixel_lanes(g.x_part); }
RESNEXT_INLINE int64_t amx_row_scratch(const WeightGradient& g) {
  const int64_t of_x = amx_x_row_size(g);
  const int64_t of_grad = g.grad.width * amx_pixel_lanes(g.grad_part);
  return 2 * (of_x > of_grad ? of_x : of_grad);
}

Scratch amx_wgrad_scratch(const WeightGradient& g) {
  const AmxGradientStrip strip(g);
  return g.block * strip.unit_size() + strip.grad_size() + strip.turned_size() + amx_x_row_size(g) +
         amx_row_scratch(g) + (g.chunks == 1 ? g.block * amx_slice_size(g) : 0);
}

// Brings channels [c, c + channels) of a row to pixels of bfloat16, of `lanes` floats each.
void amx_read_pixels(const Image& image, const ReadMap& read, int64_t n, int64_t h, int64_t c, int64_t channels,
                     int64_t lanes, float* scratch, float* pixels) {
  if (c % 2 == 0 && channels % 2 == 0 && image.channels % 2 == 0) {
    return read_row_pairs(image, read, n, h, c / 2, channels / 2, lanes, in_order(), scratch, pixels);
  }
  read_row_and_pair(image, read, n, h, c, channels, lanes, in_order(), scratch, pixels);
}

// 16 bfloat16, in the lower halves of the lanes; and pairs of those of two pixels.
RESNEXT_INLINE UintVec load_halves(const float* pixels, int64_t channel) {
  const auto* from = reinterpret_cast<const __m256i*>(reinterpret_cast<const BFloat16*>(pixels) + channel);
  return bit_cast<UintVec>(_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(from)));
}
RESNEXT_INLINE Vec pair_halves(UintVec first, UintVec second) { return bit_cast<Vec>(first | second << 16); }

// Row number `row` of a strip's planes: stacked row `from` of every plane. `scratch`: a row of pixels, and what reading
// it needs.
void amx_read_x_row(const WeightGradient& g, const AmxGradientStrip& strip, const WgradUnit& unit, int64_t from,
                    int64_t row, float* scratch, float* planes) {
  const int64_t lanes = amx_pixel_lanes(g.x_part);
  const int64_t next = g.stride_w * lanes;  // pixel of a plane
  const int64_t columns = strip.pitch - 1;
  const int64_t n = from / strip.image_rows;
  for (int64_t i = 0; i < g.stride_h; ++i) {
    const int64_t h = from % strip.image_rows * g.stride_h + i;
    const bool inside = from >= 0 && n < g.x.batch && h < g.x.height && from % strip.image_rows < g.grad.height;
    if (inside) {
      amx_read_pixels(g.x, g.read_x, n, h, unit.bundle * g.layout.src_channels + unit.x_c, unit.x_channels, lanes,
                      scratch + amx_x_row_size(g), scratch);
    }
    for (int64_t j = 0; j < g.stride_w; ++j, planes += strip.plane_size) {
      const int64_t there = inside ? (g.x.width - j + g.stride_w - 1) / g.stride_w : 0;  // columns of the plane
      for (int64_t v = 0; v < strip.x_vectors; ++v) {
        float* to = planes + v * strip.vector_size + row * strip.pitch * kLanes;
        const float* pixel = scratch + j * lanes;
        UintVec before{};
        for (int64_t w = 0; w < there; ++w, to += kLanes, pixel += next) {
          const UintVec here = load_halves(pixel, v * kLanes);
          store(to, pair_halves(before, here));
          before = here;
        }
        for (int64_t w = there; w <= columns; ++w, to += kLanes) {
          store(to, pair_halves(before, UintVec{}));
          before = UintVec{};
        }
      }
    }
  }
}

// What registers read behind the last row of planes meets zeros of grad: it has to be finite.
void amx_clear_behind(const AmxGradientStrip& strip, int64_t rows, float* planes) {
  const int64_t end = (rows + 1 + strip.after) * strip.pitch;
  const int64_t read = strip.steps(rows) * 2 * kAmxRows + (1 + strip.after) * strip.pitch + 2;
  for (int64_t i = 0; i < strip.planes * strip.x_vectors; ++i, planes += strip.vector_size) {
    __builtin_memset(planes + end * kLanes, 0, (read - end) * kLanes * sizeof(float));
  }
}

// Brings stacked rows [first, first + rows) of grad to registers' rows of terms.
void amx_read_grad(const WeightGradient& g, const AmxGradientStrip& strip, const WgradUnit& unit, int64_t first,
                   int64_t rows, float* scratch, float* pixels, float* turned) {
  const int64_t lanes = amx_pixel_lanes(g.grad_part);
  const int64_t channel = unit.bundle * g.layout.dst_channels + unit.grad_c;
  float* to = pixels;
  for (int64_t row = first; row < first + rows; ++row, to += strip.pitch * lanes) {
    const int64_t h = row % strip.image_rows;
    int64_t there = 0;
    if (h < g.grad.height) {
      amx_read_pixels(g.grad, g.read_grad, row / strip.image_rows, h, channel, unit.grad_channels, lanes, scratch, to);
      there = g.grad.width;
    }
    __builtin_memset(to + there * lanes, 0, (strip.pitch - there) * lanes * sizeof(float));
  }
  const int64_t steps = strip.steps(rows);
  const int64_t behind = steps * 2 * kAmxRows - rows * strip.pitch;
  __builtin_memset(to, 0, behind * lanes * sizeof(float));
  for (int64_t lane = 0; lane < strip.grad_channels; lane += kLanes) {
    float* square = turned + lane * strip.most_steps * kLanes;
    for (int64_t step = 0; step < steps; ++step, square += kAmxFloats) {
      const float* from = pixels + step * 2 * kAmxRows * lanes;
      Vec terms[kLanes];
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        terms[i] = pair_halves(load_halves(from + 2 * i * lanes, lane),
                               load_halves(from + (2 * i + 1) * lanes, lane));
      }
      transpose(terms);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) store(square + i * kLanes, terms[i]);
    }
  }
}

// Whether merged groups see only what is in the same square of 16 x 16 channels of theirs.
RESNEXT_INLINE bool amx_is_diagonal(const Layout& layout) {
  return layout.merged > 1 && layout.group_src == 2 * kAmxRows && layout.group_dst == 2 * kAmxRows;
}

// A row of taps of 16 channels of grad and of x: where these begin, and what the first tap adds to.
struct AmxTapRow {
  const float *grad, *x;
  float* sum;
};

// Adds what `steps` steps give to one or two rows of taps, or makes it: sums are in registers 0 to 5. kOneGrad: both
// have the same. `taps`: what they are behind x.
template <bool kOneGrad, int kRows>
RESNEXT_INLINE void amx_add_rows(const AmxTapRow (&rows)[kRows], const int64_t (&taps)[3], int64_t steps, bool adds,
                                 int64_t tap_size) {
  using Sums = std::conditional_t<kRows == 2, Indices<0, 1, 2, 3, 4, 5>, Indices<0, 1, 2>>;
  const auto sum_of = [&](int number) RESNEXT_ALWAYS { return rows[number / 3].sum + number % 3 * tap_size; };
  for_each_index(Sums{}, [&](auto k) RESNEXT_ALWAYS {
    if (adds) {
      amx_load<k>(sum_of(k), kLanes);
    } else {
      amx_clear<k>();
    }
  });
  for (int64_t step = 0; step < steps; ++step) {
    for_each_index(Sums{}, [&](auto k) RESNEXT_ALWAYS {
      const AmxTapRow& row = rows[k / 3];
      if (k == 0 || (k == 3 && !kOneGrad)) amx_load<6>(row.grad + step * kAmxFloats, kLanes);
      amx_load<7>(row.x + taps[k % 3] + step * 2 * kAmxRows * kLanes, 2 * kLanes);
      amx_multiply<k, 6, 7>();
    });
  }
  for_each_index(Sums{}, [&](auto k) RESNEXT_ALWAYS { amx_store<k>(sum_of(k), kLanes); });
}

// Adds what a strip of `steps` steps gives to a unit's slice, or makes it. The first and the last row of taps meet much
// the same of x, and go together.
void amx_add_strip(const WeightGradient& g, const AmxGradientStrip& strip, int64_t steps, bool adds,
                   const float* planes, const float* turned, float* slice) {
  const AmxTaps in_column = forward_taps(g.stride_h);
  const AmxTaps in_row = forward_taps(g.stride_w);
  const int64_t tap_size = strip.grad_channels * kLanes;
  int64_t taps[3];
  for (int s = 0; s < 3; ++s) {
    taps[s] = in_row.taps[s].plane * strip.plane_size + (in_row.taps[s].offset + 1) * kLanes;
  }
  const auto tap_row = [&](int r, int64_t o, int64_t v) RESNEXT_ALWAYS {
    const auto& row = in_column.taps[r];
    return AmxTapRow{turned + o * strip.most_steps * kAmxFloats,
                     planes + row.plane * g.stride_w * strip.plane_size + v * strip.vector_size +
                         (row.offset + 1) * strip.pitch * kLanes,
                     slice + (v * 9 + r * 3) * tap_size + o * kAmxFloats};
  };
  const auto add_outer = [&](int64_t o, int64_t v) RESNEXT_ALWAYS {
    amx_add_rows</*kOneGrad=*/true>({tap_row(0, o, v), tap_row(2, o, v)}, taps, steps, adds, tap_size);
  };
  if (amx_is_diagonal(g.layout)) {
    add_outer(0, 0);
    add_outer(1, 1);
    amx_add_rows</*kOneGrad=*/false>({tap_row(1, 0, 0), tap_row(1, 1, 1)}, taps, steps, adds, tap_size);
    return;
  }
  for (int64_t o = 0; o < strip.grad_channels / kLanes; ++o) {
    for (int64_t v = 0; v < strip.x_vectors; v += 2) {
      add_outer(o, v);
      if (v + 1 < strip.x_vectors) {
        add_outer(o, v + 1);
        amx_add_rows</*kOneGrad=*/true>({tap_row(1, o, v), tap_row(1, o, v + 1)}, taps, steps, adds, tap_size);
      } else {
        amx_add_rows</*kOneGrad=*/true>({tap_row(1, o, v)}, taps, steps, adds, tap_size);
      }
    }
  }
}

// The sums of x's channels [first, first + count) of a unit, no more than a vector has. `vector_size`: from one vector
// of channels to the next.
RESNEXT_INLINE Vec load_sums(const float* from, int64_t vector_size, int64_t first, int64_t count) {
  const int64_t lane = first % kLanes;
  from += first / kLanes * vector_size;
  const Vec sums = load_first(from + lane, min_of(count, kLanes - lane));
  if (lane + count <= kLanes) return sums;
  const auto rest = static_cast<__mmask16>(first_lanes(count) & ~first_lanes(kLanes - lane));
  return bit_cast<Vec>(_mm512_mask_expandloadu_ps(bit_cast<__m512>(sums), rest, from + vector_size));
}

// A unit's slice, to its filters, whose inputs are those of one of the merged groups, or its x channels.
template <class T>
void unpack_amx_slice(const WeightGradient& g, const WgradUnit& unit, const float* slice, T* filters) {
  const Layout& layout = g.layout;
  const int64_t group_src = layout.group_src / layout.merged;
  const int64_t group_dst = layout.group_dst / layout.merged;
  const int64_t inputs = min_of(group_src, unit.x_channels);
  const int64_t tap_size = grad_lanes(g) * kLanes;
  Vec check{};
  for (int64_t output = 0; output < unit.grad_channels; ++output, filters += group_src * 9) {
    const int64_t first = layout.merged > 1 ? output / group_dst * group_src : 0;
    for (int64_t input = 0; input < inputs; input += kLanes) {
      const int64_t count = min_of(kLanes, inputs - input);
      Vec taps[9];
      RESNEXT_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        taps[tap] = load_sums(slice + tap * tap_size + output * kLanes, 9 * tap_size, first + input, count);
        check += taps[tap] - taps[tap];
      }
      store_taps(taps, g.strides, filters, unit.x_c + input, count);
    }
  }
  tell_not_finite(check, g.not_finite);
}

void store_amx_wgrad(const WeightGradient& g, const WgradUnit& unit, const float* slice) {
  with_float_type(g.dtype, [&](auto value) {
    const Layout& layout = g.layout;
    const int64_t first = unit.bundle * layout.dst_channels + unit.grad_c;
    auto* filters = static_cast<decltype(value)*>(g.dw) + first * layout.group_src / layout.merged * 9;
    unpack_amx_slice(g, unit, slice, filters);
  });
}

void amx_wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
  const AmxRegisters registers;
  const AmxGradientStrip strip(g);
  const int64_t units = units_of(g);
  const int64_t slice_size = amx_slice_size(g);
  const int64_t all_rows = g.grad.batch * strip.image_rows - 1;
  float* planes = scratch;
  float* pixels = planes + g.block * strip.unit_size();
  float* turned = pixels + strip.grad_size();
  float* row_scratch = turned + strip.turned_size();
  float* own_slices = row_scratch + amx_x_row_size(g) + amx_row_scratch(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % g.chunks;
    const int64_t first_unit = task / g.chunks * g.block;
    const int64_t count = min_of(g.block, units - first_unit);
    float* slices = g.chunks == 1 ? own_slices : g.partial + (chunk * units + first_unit) * slice_size;
    const int64_t first_row = all_rows * chunk / g.chunks;
    const int64_t end_row = all_rows * (chunk + 1) / g.chunks;
    int64_t have = 0;  // rows that are in the planes already
    for (int64_t first = first_row; first < end_row; first += g.rows_at_once) {
      const int64_t rows = min_of(g.rows_at_once, end_row - first);
      for (int64_t i = 0; i < count * strip.unit_size() && have > 0; i += strip.vector_size) {
        __builtin_memmove(planes + i, planes + i + g.rows_at_once * strip.pitch * kLanes,
                          have * strip.pitch * kLanes * sizeof(float));
      }
      for (int64_t row = have; row < rows + 1 + strip.after; ++row) {
        for (int64_t i = 0; i < count; ++i) {
          amx_read_x_row(g, strip, wgrad_unit(g, first_unit + i), first - 1 + row, row, row_scratch,
                         planes + i * strip.unit_size());
        }
      }
      have = 1 + strip.after;
      for (int64_t i = 0; i < count; ++i) {
        float* of_unit = planes + i * strip.unit_size();
        amx_clear_behind(strip, rows, of_unit);
        amx_read_grad(g, strip, wgrad_unit(g, first_unit + i), first, rows, row_scratch, pixels, turned);
        amx_add_strip(g, strip, strip.steps(rows), /*adds=*/first != first_row, of_unit, turned,
                      slices + i * slice_size);
      }
    }
    if (g.chunks > 1) continue;
    for (int64_t i = 0; i < count; ++i) {
      store_amx_wgrad(g, wgrad_unit(g, first_unit + i), slices + i * slice_size);
    }
  }
}

#endif
