// Weight gradient:
// dw[o, i, r, s] = sum over n, p, q of grad[n, p, q, o] * x[n, p * stride_h + r - 1, q * stride_w + s - 1, i].
//
// A task walks a chunk of grad's rows for a block of units; x rows live in a zero-padded ring as in correlate.inl.h.
// For one grad row and one kernel row, the accumulators (three taps times some grad channels) stay in registers over
// the whole row. Chunks are cut by the problem alone and summed in order: the result does not depend on threads.
//
// A unit's slice: [x vector][block of grad channels][r][grad channel of the block][s][x lane]; with groups that share
// a vector, a lane is that of its group's x channel, and a grad channel stands for one of every group.
//
// With pairs of pixels, a grad row has half as many "pixels", the last of which may be one and nothing, and an x row
// holds for each of them what the three taps meet: three columns, of which two pairs that follow each other may share
// one (wgrad_pair_columns).

constexpr int kMaxGradBlock = kRegisters >= 32 ? 8 : 4;  // grad channels times three taps are accumulators

struct WgradRow {
  const float* grad;  // [pixel][grad_lanes]
  const float* x;     // [column][x_lanes], at the first pixel's first tap
};

struct WgradArgs {
  const WgradRow* rows;
  int count;
  int64_t grad_lanes, x_lanes;
  int64_t pixels;  // or pairs
  float* acc;
};
using WgradKernel = void (*)(const WgradArgs&);

// Adds kPixels neighbouring pixels, each to accumulators of its own chain if there are several chains.
template <class Terms, int kStep, int kShared, int kBlock, int kChains, int kPixels>
RESNEXT_INLINE void wgrad_pixels(const float* x, const float* grad, int64_t x_lanes, int64_t grad_lanes,
                                 Vec (&acc)[kChains][kBlock][3]) {
  constexpr int kColumns = (kPixels - 1) * kStep + 3;
  Vec value[kColumns];
  RESNEXT_UNROLL
  for (int column = 0; column < kColumns; ++column) value[column] = in_register(load(x + column * x_lanes));
  RESNEXT_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    RESNEXT_UNROLL
    for (int o = 0; o < kBlock; ++o) {
      const Vec g = in_register(repeat<kShared>(grad + p * grad_lanes + o * kShared));
      RESNEXT_UNROLL
      for (int s = 0; s < 3; ++s) {
        acc[p % kChains][o][s] = Terms::add(acc[p % kChains][o][s], g, value[p * kStep + s]);
      }
    }
  }
}

// Lanes are x channels; every grad value is loaded once for the three taps.
template <class Terms, int kStep, int kShared>
void wgrad_rows(const WgradArgs& args) {
  constexpr int kBlock = kShared > 1 ? kLanes / kShared : kMaxGradBlock;
  // Enough accumulators to hide the latency of multiply-adds: 8 or more.
  constexpr int kChains = kBlock >= 4 ? 1 : 4 / kBlock;
  Vec acc[kChains][kBlock][3] = {};
  RESNEXT_UNROLL
  for (int o = 0; o < kBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) acc[0][o][s] = load(args.acc + (o * 3 + s) * kLanes);
  }
  int row = 0;
  do {  // at least one row and one pixel: with tests at the start GCC keeps the accumulators in memory between loops
    const float* x = args.rows[row].x;
    const float* grad = args.rows[row].grad;
    int64_t q = args.pixels;
    if constexpr (kChains > 1) {
      for (; q >= kChains; q -= kChains) {
        wgrad_pixels<Terms, kStep, kShared, kBlock, kChains, kChains>(x, grad, args.x_lanes, args.grad_lanes, acc);
        x += kChains * kStep * args.x_lanes;
        grad += kChains * args.grad_lanes;
      }
      if (q == 0) continue;
    }
    do {
      wgrad_pixels<Terms, kStep, kShared, kBlock, kChains, 1>(x, grad, args.x_lanes, args.grad_lanes, acc);
      x += kStep * args.x_lanes;
      grad += args.grad_lanes;
    } while (--q > 0);
  } while (++row < args.count);
  RESNEXT_UNROLL
  for (int o = 0; o < kBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) {
      Vec sum = acc[0][o][s];
      RESNEXT_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][o][s];
      store(args.acc + (o * 3 + s) * kLanes, sum);
    }
  }
}

// Columns of a panel from one pair of pixels to the next: what the first tap of a pair meets, the last of the one
// before has met, unless there is nothing behind an odd last pixel.
RESNEXT_INLINE int64_t wgrad_pair_columns(const WeightGradient& g) {
  return g.stride_w == 1 && g.grad.width % 2 == 0 ? 2 : 3;
}

template <int kShared = kLanes>
WgradKernel wgrad_kernel(const WeightGradient& g) {
  if constexpr (kShared > 1) {
    if (g.layout.shared != kShared) return wgrad_kernel<kShared / 2>(g);
  }
  return with_terms(g.pairs, [&](auto terms) -> WgradKernel {
    using Terms = decltype(terms);
    if constexpr (Terms::kPairs) {
      return wgrad_pair_columns(g) == 2 ? wgrad_rows<Terms, 2, kShared> : wgrad_rows<Terms, 3, kShared>;
    } else {
      return g.stride_w == 2 ? wgrad_rows<Terms, 2, kShared> : wgrad_rows<Terms, 1, kShared>;
    }
  });
}

RESNEXT_INLINE int64_t grad_lanes(const WeightGradient& g) { return round_up(g.grad_part, kLanes); }
RESNEXT_INLINE int64_t x_lanes(const WeightGradient& g) { return round_up(g.x_part, kLanes); }

RESNEXT_INLINE int64_t grad_block(const Layout& layout) {
  return layout.shared > 1 ? kLanes / layout.shared : kMaxGradBlock;
}
RESNEXT_INLINE int64_t grad_blocks(const WeightGradient& g) {
  return ceil_div(g.layout.shared > 1 ? g.layout.group_dst : g.grad_part, grad_block(g.layout));
}

// Floats one (x vector, grad block) takes for one kernel row.
RESNEXT_INLINE int64_t wgrad_row_size(const Layout& layout) { return 3 * grad_block(layout) * kLanes; }

// The channels of a unit: of x, and of grad, from the first of its bundle on.
struct WgradUnit {
  int64_t bundle;
  int64_t x_c, x_channels;
  int64_t grad_c, grad_channels;
};

#if RESNEXT_LANES == 16
int64_t amx_slice_size(const WeightGradient& g);  // amx_wgrad.inl.h
Scratch amx_wgrad_scratch(const WeightGradient& g);
void amx_wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end);
void store_amx_wgrad(const WeightGradient& g, const WgradUnit& unit, const float* slice);
#endif

int64_t wgrad_slice_size(const WeightGradient& g) {
#if RESNEXT_LANES == 16
  if (g.layout.amx) return amx_slice_size(g);
#endif
  return x_lanes(g) / kLanes * grad_blocks(g) * 3 * wgrad_row_size(g.layout);
}

RESNEXT_INLINE WgradUnit wgrad_unit(const WeightGradient& g, int64_t unit) {
  const Layout& layout = g.layout;
  if (g.x_part == layout.src_channels && g.grad_part == layout.dst_channels) {  // without divisions, which take time
    return {unit, 0, bundle_src_channels(layout, unit), 0, bundle_dst_channels(layout, unit)};
  }
  const int64_t x_parts = ceil_div(layout.src_channels, g.x_part);
  const int64_t grad_parts = ceil_div(layout.dst_channels, g.grad_part);
  const int64_t bundle = unit / grad_parts / x_parts;
  const int64_t x_c = unit / grad_parts % x_parts * g.x_part;
  const int64_t grad_c = unit % grad_parts * g.grad_part;
  return {bundle, x_c, min_of(g.x_part, bundle_src_channels(layout, bundle) - x_c), grad_c,
          min_of(g.grad_part, bundle_dst_channels(layout, bundle) - grad_c)};
}

// Columns of an x row in memory, with its zeros, and floats of its panel.
RESNEXT_INLINE int64_t wgrad_row_columns(const WeightGradient& g) { return g.x.width + 2; }
RESNEXT_INLINE int64_t wgrad_panel_size(const WeightGradient& g) {
  return (g.pairs ? wgrad_pair_columns(g) * (steps_of(g) - 1) + 3 : wgrad_row_columns(g)) * x_lanes(g);
}

RESNEXT_INLINE int64_t wgrad_ring_rows(const WeightGradient& g) { return (g.rows_at_once - 1) * g.stride_h + 3; }
RESNEXT_INLINE int64_t wgrad_ring_size(const WeightGradient& g) {
  return wgrad_ring_rows(g) * g.block * wgrad_panel_size(g);
}

RESNEXT_INLINE int64_t wgrad_grad_size(const WeightGradient& g) {
  return g.rows_at_once * steps_of(g) * grad_lanes(g);
}

// Floats of an x and a grad row before their pixels become pairs.
RESNEXT_INLINE int64_t wgrad_unpaired_size(const WeightGradient& g) {
  if (!g.pairs) return 0;
  return wgrad_row_columns(g) * x_lanes(g) + g.grad.width * grad_lanes(g);
}

Scratch wgrad_scratch(const WeightGradient& g) {
#if RESNEXT_LANES == 16
  if (g.layout.amx) return amx_wgrad_scratch(g);
#endif
  const int64_t zeros = wgrad_ring_size(g) + wgrad_unpaired_size(g);
  const int64_t own = g.chunks == 1 ? g.block * wgrad_slice_size(g) + weight_scratch(g.layout) : 0;
  return {zeros + wgrad_grad_size(g) + own, zeros};
}

// Adds what grad rows [begin, end) of an image give to one unit's slice.
void wgrad_add_rows(const WeightGradient& g, WgradKernel kernel, int64_t begin, int64_t end, const float* ring,
                    const float* grad, float* slice) {
  const int64_t vectors = x_lanes(g) / kLanes;
  const int64_t blocks = grad_blocks(g);
  const int64_t row_size = wgrad_row_size(g.layout);
  for (int64_t r = 0; r < 3; ++r) {
    WgradRow rows[kMostRowsAtOnce];
    int count = 0;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * g.stride_h + r - 1;
      if (row < 0 || row >= g.x.height) continue;
      rows[count++] = {grad + (p - begin) * steps_of(g) * grad_lanes(g),
                       ring + row % wgrad_ring_rows(g) * g.block * wgrad_panel_size(g)};
    }
    if (count == 0) continue;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t o = 0; o < blocks; ++o) {
        WgradRow block_rows[kMostRowsAtOnce];
        for (int i = 0; i < count; ++i) block_rows[i] = {rows[i].grad + o * kMaxGradBlock, rows[i].x + v * kLanes};
        kernel({block_rows, count, grad_lanes(g), x_lanes(g), steps_of(g),
                slice + ((v * blocks + o) * 3 + r) * row_size});
      }
    }
  }
}

// One slice of groups that share a vector, to filters.
void unpack_shared_slice(const Layout& layout, const FilterStrides& strides, const float* slice, int64_t outputs,
                         float* filters) {
  const int64_t row_size = wgrad_row_size(layout);
  for (int64_t output = 0; output < outputs; ++output, filters += layout.group_src * 9) {
    const float* from = slice + output % layout.group_dst * 3 * kLanes + output / layout.group_dst;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t s = 0; s < 3; ++s) {
        float* filter = filters + (r * 3 + s) * strides.tap;
        const float* lanes = from + r * row_size + s * kLanes;
        for (int64_t i = 0; i < layout.group_src; ++i) filter[i * strides.input] = lanes[i * layout.shared];
      }
    }
  }
}

// Stores the nine taps of inputs [input, input + count) of a filter, whose inputs are the lanes.
template <class T>
RESNEXT_INLINE void store_taps(const Vec (&taps)[9], const FilterStrides& strides, T* filter, int64_t input,
                               int64_t count) {
  if (strides.tap != 1) {
    RESNEXT_UNROLL
    for (int tap = 0; tap < 9; ++tap) store_first(filter + tap * strides.tap + input, taps[tap], count);
    return;
  }
  RESNEXT_UNROLL
  for (int tap = 0; tap < 9; tap += kLanes) {
    Vec square[kLanes];
    RESNEXT_UNROLL
    for (int i = 0; i < kLanes; ++i) square[i] = tap + i < 9 ? taps[tap + i] : Vec{};
    transpose(square);
    RESNEXT_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (i < count) store_first(filter + (input + i) * 9 + tap, square[i], 9 - tap);
    }
  }
}

// One slice of a wide group's unit, to the filters of the group, from the unit's first on.
template <class T>
void unpack_slice(const WeightGradient& g, const WgradUnit& unit, const float* slice, T* filters) {
  const int64_t row_size = wgrad_row_size(g.layout);
  for (int64_t output = 0; output < unit.grad_channels; ++output, filters += g.layout.group_src * 9) {
    for (int64_t input = 0; input < unit.x_channels; input += kLanes) {
      const int64_t block = input / kLanes * grad_blocks(g) + output / kMaxGradBlock;
      const float* from = slice + block * 3 * row_size + output % kMaxGradBlock * 3 * kLanes;
      Vec taps[9];
      RESNEXT_UNROLL
      for (int tap = 0; tap < 9; ++tap) taps[tap] = load(from + tap / 3 * row_size + tap % 3 * kLanes);
      store_taps(taps, g.strides, filters, unit.x_c + input, min_of(kLanes, unit.x_channels - input));
    }
  }
}

// Brings a unit's slice to (C_out, C_in / groups, 3, 3).
void store_wgrad(const WeightGradient& g, const WgradUnit& unit, const float* slice, float* scratch) {
#if RESNEXT_LANES == 16
  if (g.layout.amx) return store_amx_wgrad(g, unit, slice);
#endif
  const Layout& layout = g.layout;
  const int64_t filter_size = layout.group_src * 9;
  with_float_type(g.dtype, [&](auto value) {
    const int64_t first = unit.bundle * layout.dst_channels + unit.grad_c;
    auto* filters = static_cast<decltype(value)*>(g.dw) + first * filter_size;
    if (layout.shared == 1) return unpack_slice(g, unit, slice, filters);
    unpack_shared_slice(layout, g.strides, slice, unit.grad_channels, scratch);
    narrow(filters, unit.grad_channels * filter_size, scratch);
  });
}

void wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
#if RESNEXT_LANES == 16
  if (g.layout.amx) return amx_wgrad(g, scratch, begin, end);
#endif
  const Layout& layout = g.layout;
  const int64_t units = units_of(g);
  const int64_t slice_size = wgrad_slice_size(g);
  const int64_t height = g.grad.height;
  const int64_t rows = g.grad.batch * height;
  const WgradKernel kernel = wgrad_kernel(g);
  const IntVec x_order = channels_of_lanes(layout, layout.group_src);
  const IntVec grad_order = channels_of_lanes(layout, layout.group_dst);
  float* ring = scratch;
  float* unpaired_x = ring + wgrad_ring_size(g);
  float* unpaired_grad = unpaired_x + wgrad_row_columns(g) * x_lanes(g);
  float* grad = unpaired_x + wgrad_unpaired_size(g);
  float* own_slices = grad + wgrad_grad_size(g);
  float* store_scratch = own_slices + g.block * slice_size;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % g.chunks;
    const int64_t first_unit = task / g.chunks * g.block;
    const int64_t count = min_of(g.block, units - first_unit);
    float* slices = g.chunks == 1 ? own_slices : g.partial + (chunk * units + first_unit) * slice_size;
    __builtin_memset(slices, 0, count * slice_size * sizeof(float));
    const int64_t chunk_end = rows * (chunk + 1) / g.chunks;
    int64_t next_row = 0;
    for (int64_t flat = rows * chunk / g.chunks; flat < chunk_end;) {
      const int64_t n = flat / height;
      const int64_t p = flat % height;
      const int64_t p_end = min_of(min_of(p + g.rows_at_once, height), p + chunk_end - flat);
      flat += p_end - p;
      const int64_t first_row = p * g.stride_h - 1;
      if (p == 0 || next_row < first_row) next_row = first_row < 0 ? 0 : first_row;
      for (; next_row < min_of((p_end - 1) * g.stride_h + 2, g.x.height); ++next_row) {
        for (int64_t i = 0; i < count; ++i) {
          const WgradUnit unit = wgrad_unit(g, first_unit + i);
          float* panel = ring + (next_row % wgrad_ring_rows(g) * g.block + i) * wgrad_panel_size(g);
          read_row(g.x, g.read_x, n, next_row, unit.bundle * layout.src_channels + unit.x_c, unit.x_channels,
                   x_lanes(g), x_order, (g.pairs ? unpaired_x : panel) + x_lanes(g));
          if (g.pairs) {  // what the taps of each pair meet
            const int64_t width = g.grad.width;
            const int64_t size = wgrad_pair_columns(g) * x_lanes(g);
            pair_pieces(unpaired_x, width, g.stride_w * x_lanes(g), size, panel);
            if (wgrad_pair_columns(g) == 2) {  // and the last tap of the last
              pair_pieces(unpaired_x + width * x_lanes(g), 2, x_lanes(g), x_lanes(g), panel + steps_of(g) * size);
            }
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const WgradUnit unit = wgrad_unit(g, first_unit + i);
        for (int64_t row = p; row < p_end; ++row) {
          float* panel = grad + (row - p) * steps_of(g) * grad_lanes(g);
          read_row(g.grad, g.read_grad, n, row, unit.bundle * layout.dst_channels + unit.grad_c, unit.grad_channels,
                   grad_lanes(g), grad_order, g.pairs ? unpaired_grad : panel);
          if (g.pairs) pair_pieces(unpaired_grad, g.grad.width, grad_lanes(g), grad_lanes(g), panel);
        }
        wgrad_add_rows(g, kernel, p, p_end, ring + i * wgrad_panel_size(g), grad, slices + i * slice_size);
      }
    }
    if (g.chunks > 1) continue;
    for (int64_t i = 0; i < count; ++i) {
      store_wgrad(g, wgrad_unit(g, first_unit + i), slices + i * slice_size, store_scratch);
    }
  }
}

// Sums the chunks of units [begin, end), in order, and stores them.
void reduce_wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
  const int64_t units = units_of(g);
  const int64_t slice_size = wgrad_slice_size(g);
  for (int64_t unit = begin; unit < end; ++unit) {
    float* total = g.partial + unit * slice_size;
    for (int64_t chunk = 1; chunk < g.chunks; ++chunk) {
      const float* slice = g.partial + (chunk * units + unit) * slice_size;
      for (int64_t i = 0; i < slice_size; i += kLanes) store(total + i, load(total + i) + load(slice + i));
    }
    store_wgrad(g, wgrad_unit(g, unit), total, scratch);
  }
}
