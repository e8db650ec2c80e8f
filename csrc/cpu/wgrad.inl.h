// Weight gradient:
// dw[o, i, r, s] = sum over n, p, q of grad[n, p, q, o] * x[n, p * stride_h + r - 1, q * stride_w + s - 1, i].
//
// A task walks a chunk of grad's rows for a block of bundles; x rows live in a zero-padded ring as in correlate.inl.h.
// For one grad row and one kernel row, the accumulators (three taps times some channel pairs) stay in registers over
// the whole row. Chunks are cut by the problem alone and summed in order: the result does not depend on threads.
//
// A bundle's slice: rotating [r][s][rotation][lane], otherwise [x vector][grad block][r][grad channel of the block][s]
// [lane].

constexpr int kGradBlock = kRegisters >= 32 ? 8 : 4;  // grad channels times three taps are accumulators

constexpr int64_t kMaxRows = 8;

struct WgradRow {
  const float* grad;  // [pixel][grad_lanes]
  const float* x;     // [column][x_lanes], at the first pixel's first tap
};

// At least one row and one pixel: the loops test at their end, or GCC keeps the accumulators in memory between them.
struct WgradArgs {
  const WgradRow* rows;
  int count;
  int64_t grad_lanes, x_lanes;
  int64_t pixels;
  float* acc;
};
using WgradKernel = void (*)(const WgradArgs&);

// Lane j of rotation r: x channel j with grad channel (j - r) mod width of its group.
template <int kStep, int... R>
RESNEXT_INLINE void rotating_wgrad(const WgradArgs& args, Indices<R...>) {
  constexpr int kWidth = sizeof...(R);
  Vec acc[3][kWidth];
  RESNEXT_UNROLL
  for (int s = 0; s < 3; ++s) {
    RESNEXT_UNROLL
    for (int r = 0; r < kWidth; ++r) acc[s][r] = load(args.acc + (s * kWidth + r) * kLanes);
  }
  int row = 0;
  do {
    const float* x = args.rows[row].x;
    const float* grad = args.rows[row].grad;
    int64_t q = 0;
    do {
      const Vec value = load(grad);
      const Vec rotated[kWidth] = {rotate<kWidth, kWidth - R>(value)...};
      RESNEXT_UNROLL
      for (int s = 0; s < 3; ++s) {
        const Vec x_value = in_register(load(x + s * kLanes));
        RESNEXT_UNROLL
        for (int r = 0; r < kWidth; ++r) acc[s][r] += x_value * rotated[r];
      }
      x += kStep * kLanes;
      grad += kLanes;
    } while (++q < args.pixels);
  } while (++row < args.count);
  RESNEXT_UNROLL
  for (int s = 0; s < 3; ++s) {
    RESNEXT_UNROLL
    for (int r = 0; r < kWidth; ++r) store(args.acc + (s * kWidth + r) * kLanes, acc[s][r]);
  }
}

template <int kStep, int kWidth>
void rotating_wgrad_rows(const WgradArgs& args) {
  if constexpr (rotates(kWidth)) {  // make_layout never asks for another
    rotating_wgrad<kStep>(args, typename FromStd<std::make_integer_sequence<int, kWidth>>::Type{});
  }
}

// Lanes are x channels; every grad value is broadcast once for the three taps.
template <int kStep>
void broadcast_wgrad_rows(const WgradArgs& args) {
  Vec acc[kGradBlock][3];
  RESNEXT_UNROLL
  for (int o = 0; o < kGradBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) acc[o][s] = load(args.acc + (o * 3 + s) * kLanes);
  }
  int row = 0;
  do {
    const float* x = args.rows[row].x;
    const float* grad = args.rows[row].grad;
    int64_t q = 0;
    do {
      Vec value[3];
      RESNEXT_UNROLL
      for (int s = 0; s < 3; ++s) value[s] = in_register(load(x + s * args.x_lanes));
      RESNEXT_UNROLL
      for (int o = 0; o < kGradBlock; ++o) {
        const Vec g = in_register(broadcast(grad[o]));
        RESNEXT_UNROLL
        for (int s = 0; s < 3; ++s) acc[o][s] += g * value[s];
      }
      x += kStep * args.x_lanes;
      grad += args.grad_lanes;
    } while (++q < args.pixels);
  } while (++row < args.count);
  RESNEXT_UNROLL
  for (int o = 0; o < kGradBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) store(args.acc + (o * 3 + s) * kLanes, acc[o][s]);
  }
}

template <int kStep>
WgradKernel wgrad_kernel(const Layout& layout) {
  if (!layout.rotating) return broadcast_wgrad_rows<kStep>;
  switch (layout.group_src) {
    case 1:
      return rotating_wgrad_rows<kStep, 1>;
    case 2:
      return rotating_wgrad_rows<kStep, 2>;
    case 3:
      return rotating_wgrad_rows<kStep, 3>;
    case 4:
      return rotating_wgrad_rows<kStep, 4>;
    case 6:
      return rotating_wgrad_rows<kStep, 6>;
    default:
      return rotating_wgrad_rows<kStep, 8>;
  }
}

RESNEXT_INLINE int64_t grad_lanes(const Layout& layout) { return round_up(layout.dst_channels, kLanes); }

// Floats one (x vector, grad block) or one rotating bundle takes for one kernel row.
RESNEXT_INLINE int64_t wgrad_row_size(const Layout& layout) {
  return 3 * (layout.rotating ? layout.group_src : kGradBlock) * kLanes;
}

int64_t wgrad_slice_size(const Layout& layout) {
  const int64_t blocks = layout.rotating ? 1 : layout.src_lanes / kLanes * ceil_div(layout.group_dst, kGradBlock);
  return blocks * 3 * wgrad_row_size(layout);
}

RESNEXT_INLINE int64_t wgrad_panel_size(const WeightGradient& g) { return (g.x.width + 2) * g.layout.src_lanes; }

// Grad rows worked on together: narrow images would otherwise load and store the accumulators for a few pixels.
RESNEXT_INLINE int64_t wgrad_rows(const WeightGradient& g) {
  constexpr int64_t kPixels = 49;
  const int64_t rows = kPixels / g.grad.width;
  return rows < 1 ? 1 : min_of(rows, kMaxRows);
}
RESNEXT_INLINE int64_t wgrad_ring_rows(const WeightGradient& g) { return (wgrad_rows(g) - 1) * g.stride_h + 3; }
RESNEXT_INLINE int64_t wgrad_ring_size(const WeightGradient& g) {
  return wgrad_ring_rows(g) * g.block * wgrad_panel_size(g);
}

int64_t wgrad_scratch(const WeightGradient& g) {
  return wgrad_ring_size(g) + wgrad_rows(g) * g.grad.width * grad_lanes(g.layout);
}

// Adds what grad rows [begin, end) of an image give to one bundle's slice.
void wgrad_add_rows(const WeightGradient& g, WgradKernel kernel, int64_t begin, int64_t end, const float* ring,
                    const float* grad, float* slice) {
  const Layout& layout = g.layout;
  const int64_t vectors = layout.src_lanes / kLanes;
  const int64_t grad_blocks = layout.rotating ? 1 : ceil_div(layout.group_dst, kGradBlock);
  const int64_t row_size = wgrad_row_size(layout);
  for (int64_t r = 0; r < 3; ++r) {
    WgradRow rows[kMaxRows];
    int count = 0;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * g.stride_h + r - 1;
      if (row < 0 || row >= g.x.height) continue;
      rows[count++] = {grad + (p - begin) * g.grad.width * grad_lanes(layout),
                       ring + row % wgrad_ring_rows(g) * g.block * wgrad_panel_size(g)};
    }
    if (count == 0) continue;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t o = 0; o < grad_blocks; ++o) {
        WgradRow block_rows[kMaxRows];
        for (int i = 0; i < count; ++i) block_rows[i] = {rows[i].grad + o * kGradBlock, rows[i].x + v * kLanes};
        kernel({block_rows, count, grad_lanes(layout), layout.src_lanes, g.grad.width,
                slice + ((v * grad_blocks + o) * 3 + r) * row_size});
      }
    }
  }
}

void wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
  const Layout& layout = g.layout;
  const int64_t slice_size = wgrad_slice_size(layout);
  const int64_t height = g.grad.height;
  const int64_t rows = g.grad.batch * height;
  const WgradKernel kernel = g.stride_w == 2 ? wgrad_kernel<2>(layout) : wgrad_kernel<1>(layout);
  float* ring = scratch;
  float* grad = scratch + wgrad_ring_size(g);
  __builtin_memset(ring, 0, wgrad_ring_size(g) * sizeof(float));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % g.chunks;
    const int64_t first_bundle = task / g.chunks * g.block;
    const int64_t bundles = min_of(g.block, layout.bundles - first_bundle);
    float* slices = g.partial + (chunk * layout.bundles + first_bundle) * slice_size;
    __builtin_memset(slices, 0, bundles * slice_size * sizeof(float));
    const int64_t chunk_end = rows * (chunk + 1) / g.chunks;
    int64_t next_row = 0;
    for (int64_t flat = rows * chunk / g.chunks; flat < chunk_end;) {
      const int64_t n = flat / height;
      const int64_t p = flat % height;
      const int64_t p_end = min_of(min_of(p + wgrad_rows(g), height), p + chunk_end - flat);
      flat += p_end - p;
      const int64_t first_row = p * g.stride_h - 1;
      if (p == 0 || next_row < first_row) next_row = first_row < 0 ? 0 : first_row;
      for (; next_row < min_of((p_end - 1) * g.stride_h + 2, g.x.height); ++next_row) {
        for (int64_t b = 0; b < bundles; ++b) {
          float* panel = ring + (next_row % wgrad_ring_rows(g) * g.block + b) * wgrad_panel_size(g);
          read_row(g.x, g.read_x, n, next_row, (first_bundle + b) * layout.src_channels,
                   bundle_src_channels(layout, first_bundle + b), layout.src_lanes, panel + layout.src_lanes);
        }
      }
      for (int64_t b = 0; b < bundles; ++b) {
        const int64_t bundle = first_bundle + b;
        for (int64_t row = p; row < p_end; ++row) {
          read_row(g.grad, g.read_grad, n, row, bundle * layout.dst_channels, bundle_dst_channels(layout, bundle),
                   grad_lanes(layout), grad + (row - p) * g.grad.width * grad_lanes(layout));
        }
        wgrad_add_rows(g, kernel, p, p_end, ring + b * wgrad_panel_size(g), grad, slices + b * slice_size);
      }
    }
  }
}

// One rotating slice to filters, one per grad channel.
void unpack_rotating_slice(const Layout& layout, const FilterStrides& strides, const float* slice, int64_t outputs,
                           float* filters) {
  const int64_t width = layout.group_src;
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t first = output / width * width;
    for (int64_t input = 0; input < width; ++input) {
      const int64_t rotation = (first + input - output + width) % width;
      float* filter = filters + output * width * 9 + input * strides.input;
      for (int64_t tap = 0; tap < 9; ++tap) {
        filter[tap * strides.tap] = slice[(tap * width + rotation) * kLanes + first + input];
      }
    }
  }
}

void unpack_broadcast_slice(const Layout& layout, const FilterStrides& strides, const float* slice, int64_t outputs,
                            float* filters) {
  const int64_t row_size = wgrad_row_size(layout);
  const int64_t grad_blocks = ceil_div(layout.group_dst, kGradBlock);
  for (int64_t output = 0; output < outputs; ++output, filters += layout.group_src * 9) {
    for (int64_t input = 0; input < layout.group_src; input += kLanes) {
      const int64_t block = input / kLanes * grad_blocks + output / kGradBlock;
      const float* from = slice + block * 3 * row_size + output % kGradBlock * 3 * kLanes;
      if (strides.tap != 1) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          store_first(filters + tap * strides.tap + input, load(from + tap / 3 * row_size + tap % 3 * kLanes),
                      min_of(kLanes, layout.group_src - input));
        }
        continue;
      }
      for (int64_t tap = 0; tap < 9; tap += kLanes) {
        Vec square[kLanes];
        RESNEXT_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const int64_t t = tap + i;
          square[i] = t < 9 ? load(from + t / 3 * row_size + t % 3 * kLanes) : Vec{};
        }
        transpose(square);
        RESNEXT_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          if (input + i >= layout.group_src) break;
          store_first(filters + (input + i) * 9 + tap, square[i], 9 - tap);
        }
      }
    }
  }
}

// Sums the chunks of some bundles, in order, and brings them to (C_out, C_in / groups, 3, 3).
void reduce_wgrad(const WeightGradient& g, float* scratch, int64_t begin_bundle, int64_t end_bundle) {
  const Layout& layout = g.layout;
  const int64_t slice_size = wgrad_slice_size(layout);
  for (int64_t bundle = begin_bundle; bundle < end_bundle; ++bundle) {
    float* total = g.partial + bundle * slice_size;
    for (int64_t chunk = 1; chunk < g.chunks; ++chunk) {
      const float* slice = g.partial + (chunk * layout.bundles + bundle) * slice_size;
      for (int64_t i = 0; i < slice_size; i += kLanes) store(total + i, load(total + i) + load(slice + i));
    }
    const int64_t outputs = bundle_dst_channels(layout, bundle);
    const auto unpack = layout.rotating ? unpack_rotating_slice : unpack_broadcast_slice;
    unpack(layout, g.strides, total, outputs, scratch);
    const int64_t filter_size = layout.group_src * 9;
    write_floats(g.dw, g.dtype, bundle * layout.dst_channels * filter_size, outputs * filter_size, scratch);
  }
}
