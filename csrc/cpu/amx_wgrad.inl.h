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

struct AmxGradientStrip {
  int64_t pitch, image_rows;  // of stacked images, with a column and a row of zeros
  int64_t grad_channels, x_vectors;  // in whole vectors
  int64_t steps;                    // of 32 positions, of a strip
  int64_t vector_size, plane_size;  // floats of the pairs of a vector of x, and of a plane
  int64_t unit_size;                // of all planes of a unit

  RESNEXT_INLINE explicit AmxGradientStrip(const WeightGradient& g)
      : pitch(g.grad.width + 1),
        image_rows(g.grad.height + 1),
        grad_channels(grad_lanes(g)),
        x_vectors(x_lanes(g) / kLanes),
        steps(ceil_div(g.rows_at_once * pitch, 2 * kAmxRows)),
        vector_size(((g.rows_at_once + 2) * pitch + 2 * kAmxRows + 2) * kLanes),
        plane_size(x_vectors * vector_size),
        unit_size(g.stride_h * g.stride_w * plane_size) {}

  RESNEXT_INLINE int64_t grad_size() const { return steps * 2 * kAmxRows * grad_channels; }
  RESNEXT_INLINE int64_t turned_size() const { return steps * kAmxFloats * (grad_channels / kLanes); }
};

int64_t amx_slice_size(const WeightGradient& g) {
  const AmxGradientStrip strip(g);
  return strip.x_vectors * 9 * strip.grad_channels * kLanes;
}

int64_t amx_wgrad_scratch(const WeightGradient& g) {
  const AmxGradientStrip strip(g);
  const int64_t row = g.x.width * x_lanes(g);
  return g.block * strip.unit_size + strip.grad_size() + strip.turned_size() + row +
         (g.chunks == 1 ? g.block * amx_slice_size(g) : 0);
}

// Row number `row` of a strip's planes: stacked row `from` of every plane.
void amx_read_x_row(const WeightGradient& g, const AmxGradientStrip& strip, const WgradUnit& unit, int64_t from,
                    int64_t row, float* scratch, float* planes) {
  const int64_t lanes = x_lanes(g);
  const int64_t columns = strip.pitch - 1;
  const int64_t n = from / strip.image_rows;
  for (int64_t i = 0; i < g.stride_h; ++i) {
    const int64_t h = from % strip.image_rows * g.stride_h + i;
    const bool inside = from >= 0 && n < g.x.batch && h < g.x.height && from % strip.image_rows < g.grad.height;
    if (inside) {
      read_row(g.x, g.read_x, n, h, unit.bundle * g.layout.src_channels + unit.x_c, unit.x_channels, lanes, in_order(),
               scratch);
    }
    for (int64_t j = 0; j < g.stride_w; ++j, planes += strip.plane_size) {
      const int64_t there = inside ? (g.x.width - j + g.stride_w - 1) / g.stride_w : 0;  // columns of the plane
      for (int64_t v = 0; v < strip.x_vectors; ++v) {
        float* to = planes + v * strip.vector_size + row * strip.pitch * kLanes;
        const float* pixel = scratch + j * lanes + v * kLanes;
        Vec before{};
        for (int64_t w = 0; w < columns; ++w, to += kLanes, pixel += g.stride_w * lanes) {
          const Vec here = w < there ? load(pixel) : Vec{};
          store(to, pair_lanes(before, here));
          before = here;
        }
        store(to, pair_lanes(before, Vec{}));
      }
    }
  }
}

// Brings stacked rows [first, first + rows) of grad to registers' rows of terms.
void amx_read_grad(const WeightGradient& g, const AmxGradientStrip& strip, const WgradUnit& unit, int64_t first,
                   int64_t rows, float* pixels, float* turned) {
  const int64_t lanes = strip.grad_channels;
  const int64_t channel = unit.bundle * g.layout.dst_channels + unit.grad_c;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t h = (first + row) % strip.image_rows;
    float* to = pixels + row * strip.pitch * lanes;
    if (h == g.grad.height) {
      __builtin_memset(to, 0, strip.pitch * lanes * sizeof(float));
      continue;
    }
    read_row(g.grad, g.read_grad, (first + row) / strip.image_rows, h, channel, unit.grad_channels, lanes, in_order(),
             to);
    __builtin_memset(to + g.grad.width * lanes, 0, lanes * sizeof(float));
  }
  const int64_t positions = strip.steps * 2 * kAmxRows;
  const int64_t used = rows * strip.pitch;
  __builtin_memset(pixels + used * lanes, 0, (positions - used) * lanes * sizeof(float));
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t step = 0; step < strip.steps; ++step, turned += kAmxFloats) {
      const float* from = pixels + step * 2 * kAmxRows * lanes + lane;
      Vec square[kLanes];
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        square[i] = pair_lanes(load(from + 2 * i * lanes), load(from + (2 * i + 1) * lanes));
      }
      transpose(square);
      RESNEXT_UNROLL
      for (int i = 0; i < kLanes; ++i) store(turned + i * kLanes, square[i]);
    }
  }
}

// Where the x of a tap's first position is, of vector 0.
RESNEXT_INLINE const float* amx_tap_source(const WeightGradient& g, const AmxGradientStrip& strip,
                                           const AmxTaps& in_column, const AmxTaps& in_row, int tap,
                                           const float* planes) {
  const auto& row = in_column.taps[tap / 3];
  const auto& column = in_row.taps[tap % 3];
  return planes + (row.plane * g.stride_w + column.plane) * strip.plane_size +
         ((row.offset + 1) * strip.pitch + column.offset + 1) * kLanes;
}

// Adds what a strip of `steps` steps gives to a unit's slice, or makes it.
void amx_add_strip(const WeightGradient& g, const AmxGradientStrip& strip, int64_t steps, bool adds,
                   const float* planes, const float* turned, float* slice) {
  const AmxTaps in_column = forward_taps(g.stride_h);
  const AmxTaps in_row = forward_taps(g.stride_w);
  const int64_t vector = strip.steps * kAmxFloats;  // of grad
  const int64_t tap_size = strip.grad_channels * kLanes;
  for (int64_t v = 0; v < strip.x_vectors; v += 2) {
    for (int64_t o = 0; o < strip.grad_channels; o += 2 * kAmxRows) {
      for (int tap = 0; tap < 9; ++tap) {
        const float* x = amx_tap_source(g, strip, in_column, in_row, tap, planes) + v * strip.vector_size;
        const float* grad = turned + o / kLanes * vector;
        float* sum = slice + (v * 9 + tap) * tap_size + o * kLanes;
        with_amx_sums(strip.grad_channels - o > kAmxRows, strip.x_vectors - v > 1, [&](auto sums) RESNEXT_ALWAYS {
          if (adds) {
            sums.load(sum, kLanes, kAmxFloats, 9 * tap_size);
          } else {
            sums.clear();
          }
          for (int64_t step = 0; step < steps; ++step) {
            sums.add(grad + step * kAmxFloats, kLanes, vector, x + step * 2 * kAmxRows * kLanes, 2 * kLanes,
                     strip.vector_size);
          }
          sums.store(sum, kLanes, kAmxFloats, 9 * tap_size);
        });
      }
    }
  }
}

// Whether merged groups see only what is in the same square of 16 x 16 channels of theirs.
RESNEXT_INLINE bool amx_is_diagonal(const Layout& layout) {
  return layout.merged > 1 && layout.group_src == 2 * kAmxRows && layout.group_dst == 2 * kAmxRows;
}

using SixIndices = Indices<0, 1, 2, 3, 4, 5>;

// The same where only two squares are wanted: three taps of both at a time, in registers 0 to 5.
void amx_add_diagonal(const WeightGradient& g, const AmxGradientStrip& strip, int64_t steps, bool adds,
                      const float* planes, const float* turned, float* slice) {
  const AmxTaps in_column = forward_taps(g.stride_h);
  const AmxTaps in_row = forward_taps(g.stride_w);
  const int64_t vector = strip.steps * kAmxFloats;
  const int64_t tap_size = strip.grad_channels * kLanes;
  const int64_t second = 9 * tap_size + kAmxFloats;  // square, from the first
  for (int row = 0; row < 3; ++row) {
    float* sums = slice + row * 3 * tap_size;
    const float* x[3];
    for (int k = 0; k < 3; ++k) x[k] = amx_tap_source(g, strip, in_column, in_row, row * 3 + k, planes);
    const auto sum_of = [&](int number) RESNEXT_ALWAYS { return sums + number / 3 * second + number % 3 * tap_size; };
    for_each_index(SixIndices{}, [&](auto k) RESNEXT_ALWAYS {
      if (adds) {
        amx_load<k>(sum_of(k), kLanes);
      } else {
        amx_clear<k>();
      }
    });
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t at = step * 2 * kAmxRows * kLanes;
      for_each_index(SixIndices{}, [&](auto k) RESNEXT_ALWAYS {
        if (k % 3 == 0) amx_load<6>(turned + k / 3 * vector + step * kAmxFloats, kLanes);
        amx_load<7>(x[k % 3] + k / 3 * strip.vector_size + at, 2 * kLanes);
        amx_multiply<k, 6, 7>();
      });
    }
    for_each_index(SixIndices{}, [&](auto k) RESNEXT_ALWAYS { amx_store<k>(sum_of(k), kLanes); });
  }
}

// A slice of merged groups, to the filters of the unit.
template <class T>
void unpack_merged_slice(const WeightGradient& g, const WgradUnit& unit, const float* slice, T* filters) {
  const Layout& layout = g.layout;
  const int64_t group_src = layout.group_src / layout.merged;
  const int64_t group_dst = layout.group_dst / layout.merged;
  const int64_t tap_size = grad_lanes(g) * kLanes;
  float filter[9 * kLanes] = {};  // merged groups have no more channels
  Vec check{};
  for (int64_t output = 0; output < unit.grad_channels; ++output, filters += group_src * 9) {
    for (int64_t i = 0; i < group_src; ++i) {
      const int64_t input = output / group_dst * group_src + i;
      const float* from = slice + input / kLanes * 9 * tap_size + output * kLanes + input % kLanes;
      for (int tap = 0; tap < 9; ++tap) filter[i * g.strides.input + tap * g.strides.tap] = from[tap * tap_size];
    }
    for (int64_t i = 0; i < group_src * 9; i += kLanes) {
      const Vec values = load(filter + i);
      check += values - values;
      store_first(filters + i, values, min_of(kLanes, group_src * 9 - i));
    }
  }
  tell_not_finite(check, g.not_finite);
}

// A slice of a wide group's unit, to the filters of the group, from the unit's first on.
template <class T>
void unpack_amx_slice(const WeightGradient& g, const WgradUnit& unit, const float* slice, T* filters) {
  const int64_t tap_size = grad_lanes(g) * kLanes;
  Vec check{};
  for (int64_t output = 0; output < unit.grad_channels; ++output, filters += g.layout.group_src * 9) {
    for (int64_t input = 0; input < unit.x_channels; input += kLanes) {
      const float* from = slice + input / kLanes * 9 * tap_size + output * kLanes;
      Vec taps[9];
      RESNEXT_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        taps[tap] = load(from + tap * tap_size);
        check += taps[tap] - taps[tap];
      }
      store_taps(taps, g.strides, filters, unit.x_c + input, min_of(kLanes, unit.x_channels - input));
    }
  }
  tell_not_finite(check, g.not_finite);
}

void store_amx_wgrad(const WeightGradient& g, const WgradUnit& unit, const float* slice) {
  with_float_type(g.dtype, [&](auto value) {
    const Layout& layout = g.layout;
    const int64_t first = unit.bundle * layout.dst_channels + unit.grad_c;
    auto* filters = static_cast<decltype(value)*>(g.dw) + first * layout.group_src / layout.merged * 9;
    layout.merged > 1 ? unpack_merged_slice(g, unit, slice, filters) : unpack_amx_slice(g, unit, slice, filters);
  });
}

void amx_wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
  const AmxRegisters registers;
  const AmxGradientStrip strip(g);
  const auto add = amx_is_diagonal(g.layout) ? amx_add_diagonal : amx_add_strip;
  const int64_t after = g.stride_h == 1 ? 1 : 0;  // rows of planes that the last row of a strip sees behind itself
  const int64_t units = units_of(g);
  const int64_t slice_size = amx_slice_size(g);
  const int64_t all_rows = g.grad.batch * strip.image_rows - 1;
  float* planes = scratch;
  float* pixels = planes + g.block * strip.unit_size;
  float* turned = pixels + strip.grad_size();
  float* row_scratch = turned + strip.turned_size();
  float* own_slices = row_scratch + g.x.width * x_lanes(g);
  __builtin_memset(planes, 0, g.block * strip.unit_size * sizeof(float));
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
      for (int64_t i = 0; i < count * strip.unit_size && have > 0; i += strip.vector_size) {
        __builtin_memmove(planes + i, planes + i + g.rows_at_once * strip.pitch * kLanes,
                          have * strip.pitch * kLanes * sizeof(float));
      }
      for (int64_t row = have; row < rows + 1 + after; ++row) {
        for (int64_t i = 0; i < count; ++i) {
          amx_read_x_row(g, strip, wgrad_unit(g, first_unit + i), first - 1 + row, row, row_scratch,
                         planes + i * strip.unit_size);
        }
      }
      have = 1 + after;
      for (int64_t i = 0; i < count; ++i) {
        amx_read_grad(g, strip, wgrad_unit(g, first_unit + i), first, rows, pixels, turned);
        add(g, strip, ceil_div(rows * strip.pitch, 2 * kAmxRows), /*adds=*/first != first_row,
            planes + i * strip.unit_size, turned, slices + i * slice_size);
      }
    }
    if (g.chunks > 1) continue;
    for (int64_t i = 0; i < count; ++i) {
      store_amx_wgrad(g, wgrad_unit(g, first_unit + i), slices + i * slice_size);
    }
  }
}

#endif
