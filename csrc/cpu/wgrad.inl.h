// Weight gradient: dw[o, i, r, s] = sum over n, p, q of grad[n, p, q, o] * x[n, p * stride_h + r - 1, q * stride_w + s - 1, i].
//
// A task walks a chunk of grad's rows for a block of bundles; x rows live in a zero-padded ring as in correlate.inl.h.
// For one grad row and one kernel row, the accumulators (three taps times some channel pairs) stay in registers over
// the whole row. Chunks are cut by the problem alone and summed in order: the result does not depend on threads.
//
// A bundle's slice: rotating [r][s][rotation][lane], otherwise [x vector][grad block][r][grad channel of the block][s][lane].

constexpr int kGradBlock = kRegisters >= 32 ? 8 : 4;  // grad channels times three taps are accumulators

struct WgradArgs {
  const float* grad;  // [pixel][grad_lanes]
  const float* x;     // [column][x_lanes], at the first pixel's first tap
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
  const float* x = args.x;
  for (int64_t q = 0; q < args.pixels; ++q, x += kStep * kLanes) {
    const Vec grad = load(args.grad + q * kLanes);
    const Vec rotated[kWidth] = {rotate<kWidth, kWidth - R>(grad)...};
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) {
      const Vec value = load(x + s * kLanes);
      RESNEXT_UNROLL
      for (int r = 0; r < kWidth; ++r) acc[s][r] += value * rotated[r];
    }
  }
  RESNEXT_UNROLL
  for (int s = 0; s < 3; ++s) {
    RESNEXT_UNROLL
    for (int r = 0; r < kWidth; ++r) store(args.acc + (s * kWidth + r) * kLanes, acc[s][r]);
  }
}

template <int kStep, int kWidth>
void rotating_wgrad_row(const WgradArgs& args) {
  rotating_wgrad<kStep>(args, typename FromStd<std::make_integer_sequence<int, kWidth>>::Type{});
}

// Lanes are x channels; every grad value is broadcast once for the three taps.
template <int kStep>
void broadcast_wgrad_row(const WgradArgs& args) {
  Vec acc[kGradBlock][3];
  RESNEXT_UNROLL
  for (int o = 0; o < kGradBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) acc[o][s] = load(args.acc + (o * 3 + s) * kLanes);
  }
  const float* x = args.x;
  const float* grad = args.grad;
  for (int64_t q = 0; q < args.pixels; ++q, x += kStep * args.x_lanes, grad += args.grad_lanes) {
    Vec value[3];
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) value[s] = load(x + s * args.x_lanes);
    RESNEXT_UNROLL
    for (int o = 0; o < kGradBlock; ++o) {
      const Vec g = broadcast(grad[o]);
      RESNEXT_UNROLL
      for (int s = 0; s < 3; ++s) acc[o][s] += g * value[s];
    }
  }
  RESNEXT_UNROLL
  for (int o = 0; o < kGradBlock; ++o) {
    RESNEXT_UNROLL
    for (int s = 0; s < 3; ++s) store(args.acc + (o * 3 + s) * kLanes, acc[o][s]);
  }
}

template <int kStep>
WgradKernel wgrad_kernel(const Layout& layout) {
  if (!layout.rotating) return broadcast_wgrad_row<kStep>;
  switch (layout.group_src) {
    case 1:
      return rotating_wgrad_row<kStep, 1>;
    case 2:
      return rotating_wgrad_row<kStep, 2>;
    case 4:
      if constexpr (kLanes > 4) return rotating_wgrad_row<kStep, 4>;
      break;
    case 8:
      if constexpr (kLanes > 8) return rotating_wgrad_row<kStep, 8>;
      break;
  }
  return nullptr;  // never asked for: make_layout rotates only groups narrower than a vector
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

int64_t wgrad_scratch(const WeightGradient& g) {
  return kRingRows * g.block * wgrad_panel_size(g) + g.grad.width * grad_lanes(g.layout);
}

// Adds what grad row p gives to one bundle's slice.
void wgrad_row(const WeightGradient& g, WgradKernel kernel, int64_t p, const float* ring, const float* grad,
               float* slice) {
  const Layout& layout = g.layout;
  const int64_t vectors = layout.src_lanes / kLanes;
  const int64_t grad_blocks = layout.rotating ? 1 : ceil_div(layout.group_dst, kGradBlock);
  const int64_t row_size = wgrad_row_size(layout);
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t o = 0; o < grad_blocks; ++o) {
      for (int64_t r = 0; r < 3; ++r) {
        const int64_t row = p * g.stride_h + r - 1;
        if (row < 0 || row >= g.x.height) continue;
        kernel({grad + o * kGradBlock, ring + row % kRingRows * g.block * wgrad_panel_size(g) + v * kLanes,
                grad_lanes(layout), layout.src_lanes, g.grad.width, slice + ((v * grad_blocks + o) * 3 + r) * row_size});
      }
    }
  }
}

void wgrad(const WeightGradient& g, float* scratch, int64_t begin, int64_t end) {
  const Layout& layout = g.layout;
  const int64_t slice_size = wgrad_slice_size(layout);
  const int64_t rows = g.grad.batch * g.grad.height;
  const WgradKernel kernel = g.stride_w == 2 ? wgrad_kernel<2>(layout) : wgrad_kernel<1>(layout);
  float* ring = scratch;
  float* grad = scratch + kRingRows * g.block * wgrad_panel_size(g);
  __builtin_memset(ring, 0, kRingRows * g.block * wgrad_panel_size(g) * sizeof(float));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % g.chunks;
    const int64_t first_bundle = task / g.chunks * g.block;
    const int64_t bundles = min_of(g.block, layout.bundles - first_bundle);
    float* slices = g.partial + (chunk * layout.bundles + first_bundle) * slice_size;
    __builtin_memset(slices, 0, bundles * slice_size * sizeof(float));
    int64_t next_row = 0;
    for (int64_t flat = rows * chunk / g.chunks; flat < rows * (chunk + 1) / g.chunks; ++flat) {
      const int64_t n = flat / g.grad.height;
      const int64_t p = flat % g.grad.height;
      const int64_t first_row = p * g.stride_h - 1;
      if (p == 0 || next_row < first_row) next_row = first_row < 0 ? 0 : first_row;
      for (; next_row < min_of(first_row + 3, g.x.height); ++next_row) {
        for (int64_t b = 0; b < bundles; ++b) {
          float* panel = ring + (next_row % kRingRows * g.block + b) * wgrad_panel_size(g);
          read_row(g.x, n, next_row, (first_bundle + b) * layout.src_channels,
                   bundle_src_channels(layout, first_bundle + b), layout.src_lanes, panel + layout.src_lanes);
        }
      }
      for (int64_t b = 0; b < bundles; ++b) {
        const int64_t bundle = first_bundle + b;
        read_row(g.grad, n, p, bundle * layout.dst_channels, bundle_dst_channels(layout, bundle), grad_lanes(layout),
                 grad);
        wgrad_row(g, kernel, p, ring + b * wgrad_panel_size(g), grad, slices + b * slice_size);
      }
    }
  }
}

// Sums the chunks of some bundles, in order, and brings them to (C_out, C_in / groups, 3, 3).
void reduce_wgrad(const WeightGradient& g, int64_t begin_bundle, int64_t end_bundle) {
  const Layout& layout = g.layout;
  const int64_t slice_size = wgrad_slice_size(layout);
  const int64_t row_size = wgrad_row_size(layout);
  const int64_t grad_blocks = ceil_div(layout.group_dst, kGradBlock);
  for (int64_t bundle = begin_bundle; bundle < end_bundle; ++bundle) {
    float* total = g.partial + bundle * slice_size;
    for (int64_t chunk = 1; chunk < g.chunks; ++chunk) {
      const float* slice = g.partial + (chunk * layout.bundles + bundle) * slice_size;
      for (int64_t i = 0; i < slice_size; i += kLanes) store(total + i, load(total + i) + load(slice + i));
    }
    const int64_t first_output = bundle * layout.dst_channels;
    for (int64_t output = 0; output < bundle_dst_channels(layout, bundle); ++output) {
      for (int64_t input = 0; input < layout.group_src; ++input) {
        for (int64_t r = 0; r < 3; ++r) {
          const float* from;
          int64_t tap_stride;
          if (layout.rotating) {
            const int64_t mask = layout.group_src - 1;
            const int64_t rotation = (input - output) & mask;
            from = total + r * row_size + rotation * kLanes + ((output & ~mask) | input);
            tap_stride = layout.group_src * kLanes;
          } else {
            const int64_t block = input / kLanes * grad_blocks + output / kGradBlock;
            from = total + (block * 3 + r) * row_size + output % kGradBlock * 3 * kLanes + input % kLanes;
            tap_stride = kLanes;
          }
          const int64_t index = (((first_output + output) * layout.group_src + input) * 3 + r) * 3;
          for (int64_t s = 0; s < 3; ++s) write_scalar(g.dw, g.dtype, index + s, from[s * tap_stride]);
        }
      }
    }
  }
}
