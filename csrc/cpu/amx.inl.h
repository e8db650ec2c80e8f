// Products of bfloat16 by AMX, the matrix unit of Intel's Xeons: C += A * B, of registers of 16 rows of 64 bytes (which
// Intel calls tiles; here tiles are something else). C: 16 x 16 floats. A: a row holds 16 pairs of terms. B: a row
// holds the same pair of terms for 16 columns. So a panel of pairs (rows.inl.h) is made of As, and packed pairs of
// weights of Bs.
//
// As PairTerms, it takes subnormals for zero. Written out, and not by intrinsics: these functions are compiled for all
// machines with AVX-512, and GCC's let stores to what is loaded sink below the load.

#if RESNEXT_LANES == 16

constexpr int kAmxRows = 16;
constexpr int64_t kAmxFloats = 256;

// While it lives, this thread's eight registers are there. (Released at the end: other libraries shape them otherwise,
// and the system saves those of idle threads too.)
class AmxRegisters {
 public:
  AmxRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = kAmxRows;
    }
    static_assert(sizeof(shapes) == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~AmxRegisters() { __asm__ volatile("tilerelease"); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

template <int kRegister>
RESNEXT_INLINE void amx_clear() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}

// `stride`: floats from one row to the next.
template <int kRegister>
RESNEXT_INLINE void amx_load(const float* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
RESNEXT_INLINE void amx_store(float* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(to), "r"(stride), "i"(kRegister) : "memory");
}

// C += A * B.
template <int kC, int kA, int kB>
RESNEXT_INLINE void amx_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Transposes a register's worth of memory.
RESNEXT_INLINE void transpose_in_place(float* square) {
  Vec rows[kLanes];
  RESNEXT_UNROLL
  for (int i = 0; i < kLanes; ++i) rows[i] = load(square + i * kLanes);
  transpose(rows);
  RESNEXT_UNROLL
  for (int i = 0; i < kLanes; ++i) store(square + i * kLanes, rows[i]);
}

// What kernels of FloatTerms and PairTerms are specialised for.
struct AmxTerms {
  using Registers = AmxRegisters;
  static constexpr bool kPairs = true;
};

// Sums of kRows x kColumns squares of 16 x 16, up to two each, in registers 0 to 3; A is in 4 and 5, B in 6 and 7.
template <int kRows, int kColumns>
struct AmxSums {
  RESNEXT_INLINE void clear() const {
    amx_clear<0>();
    if (kColumns > 1) amx_clear<1>();
    if (kRows > 1) amx_clear<2>();
    if (kRows > 1 && kColumns > 1) amx_clear<3>();
  }
  // The second row, or column, of squares is `row` or `column` floats behind the first.
  RESNEXT_INLINE void load(const float* from, int64_t stride, int64_t row, int64_t column) const {
    amx_load<0>(from, stride);
    if (kColumns > 1) amx_load<1>(from + column, stride);
    if (kRows > 1) amx_load<2>(from + row, stride);
    if (kRows > 1 && kColumns > 1) amx_load<3>(from + row + column, stride);
  }
  RESNEXT_INLINE void store(float* to, int64_t stride, int64_t row, int64_t column) const {
    amx_store<0>(to, stride);
    if (kColumns > 1) amx_store<1>(to + column, stride);
    if (kRows > 1) amx_store<2>(to + row, stride);
    if (kRows > 1 && kColumns > 1) amx_store<3>(to + row + column, stride);
  }
  RESNEXT_INLINE void add(const float* a, int64_t a_stride, int64_t a_row, const float* b, int64_t b_stride,
                          int64_t b_column) const {
    amx_load<6>(b, b_stride);
    amx_load<4>(a, a_stride);
    amx_multiply<0, 4, 6>();
    if (kColumns > 1) {
      amx_load<7>(b + b_column, b_stride);
      amx_multiply<1, 4, 7>();
    }
    if (kRows > 1) {
      amx_load<5>(a + a_row, a_stride);
      amx_multiply<2, 5, 6>();
    }
    if (kRows > 1 && kColumns > 1) amx_multiply<3, 5, 7>();
  }
};

// work(the AmxSums), for one or two, or more, squares along either side.
template <class Work>
RESNEXT_INLINE void with_amx_sums(bool two_rows, bool two_columns, Work work) {
  if (two_rows) return two_columns ? work(AmxSums<2, 2>{}) : work(AmxSums<2, 1>{});
  two_columns ? work(AmxSums<1, 2>{}) : work(AmxSums<1, 1>{});
}

// Maps and writes sums, [pixel][kTileChannels], of all channels of a tile: a line of memory for each pixel.
template <class Map>
void write_sums_as(const float* sums, WriteMap write, Piece<BFloat16> to) {
  static_assert(kTileChannels == 2 * kLanes);
  const auto get = [=](int64_t offset) RESNEXT_ALWAYS {
    return [=](int64_t pixel) RESNEXT_ALWAYS { return load(sums + pixel * kTileChannels + offset); };
  };
  Map low(write, ChannelLanes{to.c, kLanes});
  Map high(write, ChannelLanes{to.c + kLanes, kLanes});
  low.start(to.pixels, get(0));
  high.start(to.pixels, get(kLanes));
  for_pixels<Map::kChains>(to.pixels, [=, &low, &high](int64_t pixel, int chain) RESNEXT_ALWAYS {
    const int64_t offset = pixel * to.stride;
    const Vec low_other = Map::kOther ? load(to.other + offset) : Vec{};
    const Vec high_other = Map::kOther ? load(to.other + offset + kLanes) : Vec{};
    store_rounded(to.data + offset, low(get(0)(pixel), low_other, chain), high(get(kLanes)(pixel), high_other, chain));
  });
  low.finish();
  high.finish();
}

void write_sums(const float* sums, const WriteMap& write, const Piece<BFloat16>& to) {
  with_write_map<FastBFloat16>(write, [&](auto map) { write_sums_as<typename decltype(map)::Type>(sums, write, to); });
}

#endif
