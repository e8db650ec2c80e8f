// Vectors of floats, on the vector extensions of GCC and Clang: the same source becomes AVX-512, AVX2, SSE2 or NEON.
// Included once per instruction set, inside a namespace of its own and under its target pragma (see isa_*.cpp), so
// nothing here may call inline functions of the standard library: they would be compiled for that instruction set and
// then shared with the rest of the program.

constexpr int kLanes = RESNEXT_LANES;
constexpr int kRegisters = RESNEXT_REGISTERS;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef int64_t LongVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

#define RESNEXT_INLINE inline __attribute__((always_inline))
#define RESNEXT_ALWAYS __attribute__((always_inline))
#if defined(__clang__)
#define RESNEXT_UNROLL _Pragma("unroll")
#define RESNEXT_UNROLL_4 _Pragma("unroll 4")
#else
#define RESNEXT_UNROLL _Pragma("GCC unroll 64")
#define RESNEXT_UNROLL_4 _Pragma("GCC unroll 4")
#endif

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The same, rounded by the processor's own instruction, which takes subnormals for zero.
struct FastBFloat16 {};

// work(a value of the dtype, one of floating-point numbers), for its type.
template <class Work>
RESNEXT_INLINE auto with_float_type(Dtype dtype, Work work) {
  switch (dtype) {
    case Dtype::kFloat16:
      return work(Half{});
    case Dtype::kBFloat16:
      return work(BFloat16{});
    default:
      return work(float{});
  }
}

// A float32 weight that is rounded to T as it is read.
template <class T>
struct Rounded {
  float value;
};

// The same for weights, or biases, that meet images of a dtype: float32 ones count as rounded to it.
template <class Work>
RESNEXT_INLINE auto with_weight_type(Dtype dtype, Dtype images, Work work) {
  if (dtype == images) return with_float_type(dtype, work);
  return images == Dtype::kFloat16 ? work(Rounded<Half>{}) : work(Rounded<BFloat16>{});
}

RESNEXT_INLINE Vec broadcast(float value) { return value - Vec{}; }  // x - 0 is x, also for -0

template <class To, class From>
RESNEXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Integer arithmetic only, except for one exact scaling that turns half's subnormals into normal floats.
// (AVX-512: the masked forms, as GCC 12 warns that the plain ones read an undefined register)
RESNEXT_INLINE Vec widen_half(ShortVec half) {
#if RESNEXT_LANES == 16
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(half)));
#elif RESNEXT_LANES == 8
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#else
  const UintVec bits = __builtin_convertvector(half, UintVec);
  const UintVec magnitude = bits & 0x7fff;
  const UintVec scaled = bit_cast<UintVec>(bit_cast<Vec>(magnitude << 13) * 0x1p112f);
  const UintVec special = bit_cast<UintVec>(magnitude >= 0x7c00) & 0x7f800000;  // Inf and NaN
  return bit_cast<Vec>(scaled | special | ((bits & 0x8000) << 16));
#endif
}

RESNEXT_INLINE ShortVec narrow_half(Vec value) {
#if RESNEXT_LANES == 16
  return bit_cast<ShortVec>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif RESNEXT_LANES == 8
  return bit_cast<ShortVec>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const UintVec bits = bit_cast<UintVec>(value);
  const UintVec magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is subnormal: adding 0.5 leaves exactly the bits to keep at the bottom, rounded to even.
  const UintVec subnormal = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const UintVec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  UintVec half = bit_cast<UintVec>(magnitude < 0x38800000) & subnormal;
  half |= bit_cast<UintVec>(magnitude >= 0x38800000) & normal;
  const UintVec large = bit_cast<UintVec>(magnitude >= 0x477ff000);  // rounds to 65536 or more, Inf, NaN
  const UintVec nan = bit_cast<UintVec>(magnitude > 0x7f800000);
  half = (half & ~large) | (large & 0x7c00) | (nan & 0x200);
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), ShortVec);
#endif
}

RESNEXT_INLINE Vec widen_bfloat16(ShortVec value) {
#if RESNEXT_LANES == 16  // one instruction, of which GCC 12 makes four
  const UintVec bits = bit_cast<UintVec>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(value)));
#else
  const UintVec bits = __builtin_convertvector(value, UintVec);
#endif
  return bit_cast<Vec>(bits << 16);
}

// Rounded in the upper halves of the lanes; the lower halves are left over.
RESNEXT_INLINE UintVec round_bfloat16(Vec value) {
  const UintVec bits = bit_cast<UintVec>(value);
  return value != value ? UintVec{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}

RESNEXT_INLINE ShortVec narrow_bfloat16(Vec value) {
  return __builtin_convertvector(round_bfloat16(value) >> 16, ShortVec);
}

RESNEXT_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(Vec));
  return value;
}
RESNEXT_INLINE Vec load(const Half* from) {
  ShortVec value;
  __builtin_memcpy(&value, from, sizeof(ShortVec));
  return widen_half(value);
}
RESNEXT_INLINE Vec load(const BFloat16* from) {
  ShortVec value;
  __builtin_memcpy(&value, from, sizeof(ShortVec));
  return widen_bfloat16(value);
}

RESNEXT_INLINE Vec load(const uint8_t* from) {
  ByteVec value;
  __builtin_memcpy(&value, from, sizeof(ByteVec));
  return __builtin_convertvector(value, Vec);
}

RESNEXT_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(Vec)); }
RESNEXT_INLINE void store(Half* to, Vec value) {
  const ShortVec half = narrow_half(value);
  __builtin_memcpy(to, &half, sizeof(ShortVec));
}
RESNEXT_INLINE void store(BFloat16* to, Vec value) {
  const ShortVec half = narrow_bfloat16(value);
  __builtin_memcpy(to, &half, sizeof(ShortVec));
}

RESNEXT_INLINE void store(uint8_t* to, Vec value) {  // whole numbers from 0 to 255
  const ByteVec bytes = __builtin_convertvector(__builtin_convertvector(value, IntVec), ByteVec);
  __builtin_memcpy(to, &bytes, sizeof(ByteVec));
}

// The value as a T in memory has it.
template <class T>
RESNEXT_INLINE Vec round_to(Vec value) {
  return value;
}
template <>
RESNEXT_INLINE Vec round_to<Half>(Vec value) {
  return widen_half(narrow_half(value));
}
template <>
RESNEXT_INLINE Vec round_to<BFloat16>(Vec value) {
  return bit_cast<Vec>(round_bfloat16(value) & 0xffff0000);
}

#if RESNEXT_LANES == 16
template <>
RESNEXT_INLINE Vec round_to<FastBFloat16>(Vec value) {
  ShortVec half;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(value));
  return widen_bfloat16(half);
}

// What two vectors round to, likewise: of `low` first.
RESNEXT_INLINE void store_rounded(BFloat16* to, Vec low, Vec high) {
  Vec both;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  __builtin_memcpy(to, &both, sizeof(Vec));
}
#endif

// Zero where the value is not positive; NaN stays.
RESNEXT_INLINE Vec relu(Vec value) { return value <= 0.0f ? Vec{} : value; }

RESNEXT_INLINE float sum_of_lanes(Vec value) {
  float sum[kLanes];
  store(sum, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  }
  return sum[0];
}

// The first `count` lanes; the others are zero, or are left alone.
template <class T>
RESNEXT_INLINE Vec load_first(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T buffer[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) buffer[lane] = from[lane];
  return load(buffer);
}
template <class T>
RESNEXT_INLINE void store_first(T* to, Vec value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  T buffer[kLanes];
  store(buffer, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = buffer[lane];
}
#if RESNEXT_LANES == 16
RESNEXT_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1);
}
RESNEXT_INLINE Vec load_first(const float* from, int64_t count) {
  return bit_cast<Vec>(_mm512_maskz_loadu_ps(first_lanes(count), from));
}
RESNEXT_INLINE void store_first(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), bit_cast<__m512>(value));
}
RESNEXT_INLINE ShortVec load_first_bits(const void* from, int64_t count) {
  return bit_cast<ShortVec>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
RESNEXT_INLINE void store_first_bits(void* to, ShortVec bits, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), bit_cast<__m256i>(bits));
}
RESNEXT_INLINE Vec load_first(const Half* from, int64_t count) { return widen_half(load_first_bits(from, count)); }
RESNEXT_INLINE Vec load_first(const BFloat16* from, int64_t count) {
  return widen_bfloat16(load_first_bits(from, count));
}
RESNEXT_INLINE void store_first(Half* to, Vec value, int64_t count) {
  store_first_bits(to, narrow_half(value), count);
}
RESNEXT_INLINE void store_first(BFloat16* to, Vec value, int64_t count) {
  store_first_bits(to, narrow_bfloat16(value), count);
}
#elif RESNEXT_LANES == 8
RESNEXT_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RESNEXT_INLINE Vec load_first(const float* from, int64_t count) {
  return bit_cast<Vec>(_mm256_maskload_ps(from, first_lanes(count)));
}
RESNEXT_INLINE void store_first(float* to, Vec value, int64_t count) {
  _mm256_maskstore_ps(to, first_lanes(count), bit_cast<__m256>(value));
}
#endif

template <class T>
RESNEXT_INLINE Vec load_first(const Rounded<T>* from, int64_t count) {
  return round_to<T>(load_first(&from->value, count));
}

// The same for the lanes of a vector that may be known to be whole.
template <bool kWhole, class T>
RESNEXT_INLINE Vec load_lanes(const T* from, int64_t count) {
  return kWhole ? load(from) : load_first(from, count);
}
template <bool kWhole, class T>
RESNEXT_INLINE void store_lanes(T* to, Vec value, int64_t count) {
  kWhole ? store(to, value) : store_first(to, value, count);
}

// Keeps a value in a register: GCC otherwise loads it again for every use, and loads are what the loops run out of.
RESNEXT_INLINE Vec in_register(Vec value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

// Integer sequences whose only member is a type: they put no code anywhere.
template <int... I>
struct Indices {};
template <class Sequence>
struct FromStd;
template <int... I>
struct FromStd<std::integer_sequence<int, I...>> {
  using Type = Indices<I...>;
};
using LaneIndices = FromStd<std::make_integer_sequence<int, kLanes>>::Type;

// work(each of them, as a constant), in order.
template <int... I, class Work>
RESNEXT_INLINE void for_each_index(Indices<I...>, Work work) {
  (work(std::integral_constant<int, I>{}), ...);
}

template <int... I>
RESNEXT_INLINE IntVec indices(Indices<I...>) {
  return IntVec{I...};
}

// The value in the first `count` lanes, zero in the others.
template <bool kWhole>
RESNEXT_INLINE Vec only_first(Vec value, int64_t count) {
  return kWhole || indices(LaneIndices{}) < static_cast<int>(count) ? value : Vec{};
}

// Lane l of the result is lane I[l] of a, or lane I[l] - kLanes of b.
template <int... I>
RESNEXT_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntVec{I...});
#endif
}

// Pairs of bfloat16, which are given as floats: of the same lane of `first` and `second`.
RESNEXT_INLINE Vec pair_lanes(Vec first, Vec second) {
  return bit_cast<Vec>((bit_cast<UintVec>(first) >> 16) | (bit_cast<UintVec>(second) & 0xffff0000));
}

// Pairs of what two vectors round to in bfloat16: of neighbouring lanes, those of `low` before those of `high`.
template <int... L>
RESNEXT_INLINE Vec pair_neighbours(Vec low, Vec high, Indices<L...>) {
#if RESNEXT_LANES == 16  // which takes subnormals for zero, as products of pairs do
  Vec pairs;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
  return pairs;
#else
  low = round_to<BFloat16>(low);
  high = round_to<BFloat16>(high);
  return pair_lanes(shuffle<(2 * L)...>(low, high), shuffle<(2 * L + 1)...>(low, high));
#endif
}

template <int... L>
RESNEXT_INLINE IntVec lane_numbers(Indices<L...>) {
  return IntVec{L...};
}

RESNEXT_INLINE IntVec in_order() { return lane_numbers(LaneIndices{}); }

// Lane l of the result is lane order[l] of the value.
RESNEXT_INLINE Vec permute(Vec value, IntVec order) {
#if !defined(__clang__)
  return __builtin_shuffle(value, order);
#elif RESNEXT_LANES == 16
  return bit_cast<Vec>(_mm512_permutexvar_ps(bit_cast<__m512i>(order), bit_cast<__m512>(value)));
#elif RESNEXT_LANES == 8
  return bit_cast<Vec>(_mm256_permutevar8x32_ps(bit_cast<__m256>(value), bit_cast<__m256i>(order)));
#else
  Vec result{};
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = value[order[lane]];
  return result;
#endif
}

// kCount values (a power of two), again and again, whatever their bits stand for: one load, which takes no other
// execution unit.
template <int kCount>
RESNEXT_INLINE Vec repeat(const float* from) {
  if constexpr (kCount == 1) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return bit_cast<Vec>(IntVec{} + bits);
  }
  if constexpr (kCount == 2) {
    int64_t pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return bit_cast<Vec>(LongVec{} + pair);
  }
#if RESNEXT_LANES == 16
  if constexpr (kCount == 4) return bit_cast<Vec>(_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from)));
  if constexpr (kCount == 8) return bit_cast<Vec>(_mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(from)));
#elif RESNEXT_LANES == 8
  if constexpr (kCount == 4) return bit_cast<Vec>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)));
#endif
  return load(from);
}

// What kernels have to hold while they run, beside the compiler's registers.
struct NoRegisters {};

// What the lanes of a sum's terms hold: a float each, or (below) two of bfloat16, whose products are both added.
// `add`: acc + a * b, lane by lane. `add_broadcast`: acc + *x * b, with the load and the broadcast in the same
// instruction where there is one. A value is then loaded for every vector that it meets, but instructions are what the
// loops run out of if another thread shares the core.
struct FloatTerms {
  using Registers = NoRegisters;
  static constexpr bool kPairs = false;
  static RESNEXT_INLINE Vec add(Vec acc, Vec a, Vec b) { return acc + a * b; }
  static RESNEXT_INLINE Vec add_broadcast(Vec acc, const float* x, Vec b) {
#if RESNEXT_LANES == 16
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*x));
    return acc;
#else
    return acc + broadcast(*x) * b;
#endif
  }
};

// As written out, and not by intrinsics: these kernels are compiled for machines without the instruction, too, which
// takes bfloat16's subnormals for zero.
#if RESNEXT_LANES == 16
struct PairTerms {
  using Registers = NoRegisters;
  static constexpr bool kPairs = true;
  static RESNEXT_INLINE Vec add(Vec acc, Vec a, Vec b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static RESNEXT_INLINE Vec add_broadcast(Vec acc, const float* x, Vec b) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*x));
    return acc;
  }
};
#endif

// work(the terms). Only kernels of an instruction set that multiplies pairs are asked for them.
template <class Work>
RESNEXT_INLINE auto with_terms([[maybe_unused]] bool pairs, Work work) {
#if RESNEXT_LANES == 16
  if (pairs) return work(PairTerms{});
#endif
  return work(FloatTerms{});
}

// acc[i] + *x * w[i] for kVectors vectors. Every second value goes by `add_broadcast`: loads and instructions balance.
template <class Terms, int kVectors>
RESNEXT_INLINE void add_products(Vec (&acc)[kVectors], const float* x, const Vec (&w)[kVectors], int index) {
  if (kVectors == 1 || index % 2 == 0) {
    RESNEXT_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[v] = Terms::add_broadcast(acc[v], x, w[v]);
    return;
  }
  const Vec value = in_register(repeat<1>(x));
  RESNEXT_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[v] = Terms::add(acc[v], value, w[v]);
}

// The first `count` lanes; zero in the others.
RESNEXT_INLINE Vec keep_first(Vec value, int64_t count) {
  return in_order() < static_cast<int32_t>(count) ? value : Vec{};
}

template <int... L>
RESNEXT_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high, Indices<L...>) {
  *low = shuffle<(L / 2 + (L % 2) * kLanes)...>(a, b);
  *high = shuffle<(kLanes / 2 + L / 2 + (L % 2) * kLanes)...>(a, b);
}

// Pairs of what two vectors round to in bfloat16, lane by lane.
RESNEXT_INLINE Vec round_to_pairs(Vec first, Vec second) {
  Vec low, high;
  interleave(first, second, &low, &high, LaneIndices{});
  return pair_neighbours(low, high, LaneIndices{});
}

// Pairs of bfloat16: of `count` weights that follow each other, an even number, or of the same lanes of two vectors.
RESNEXT_INLINE Vec load_pairs(const BFloat16* from, int64_t count) {
  return load_first(reinterpret_cast<const float*>(from), count / 2);
}
RESNEXT_INLINE Vec load_pairs(const Rounded<BFloat16>* from, int64_t count) {
  const Vec high = count > kLanes ? load_first(&from[kLanes].value, count - kLanes) : Vec{};
  return pair_neighbours(load_first(&from->value, count), high, LaneIndices{});
}
RESNEXT_INLINE Vec load_pairs(const BFloat16* first, const BFloat16* second, int64_t count) {
  return pair_lanes(load_first(first, count), load_first(second, count));
}
RESNEXT_INLINE Vec load_pairs(const Rounded<BFloat16>* first, const Rounded<BFloat16>* second, int64_t count) {
  return round_to_pairs(load_first(&first->value, count), load_first(&second->value, count));
}

// A vector of terms: weights that follow each other in memory, `count` of them, or with kPairs pairs of them; or of one
// row, or with kPairs pairs of this one and the row that is `row` weights further on.
template <bool kPairs, class T>
RESNEXT_INLINE Vec load_terms(const T* from, int64_t count) {
  if constexpr (kPairs) {
    return load_pairs(from, count);
  } else {
    return load_first(from, count);
  }
}
template <bool kPairs, class T>
RESNEXT_INLINE Vec load_row_terms(const T* from, int64_t row, int64_t count) {
  if constexpr (kPairs) {
    return load_pairs(from, from + row, count);
  } else {
    return load_first(from, count);
  }
}

// work(whether terms are pairs, a value of the weight's type), the former as a constant; pairs are of bfloat16 images.
template <class Work>
RESNEXT_INLINE void with_weight_terms(bool pairs, Dtype dtype, Dtype images, Work work) {
  if (!pairs) return with_weight_type(dtype, images, [&](auto value) { work(std::false_type{}, value); });
  if (dtype == Dtype::kBFloat16) return work(std::true_type{}, BFloat16{});
  work(std::true_type{}, Rounded<BFloat16>{});
}

// Transposes a square of kLanes vectors: log2(kLanes) perfect shuffles of its two halves.
RESNEXT_INLINE void transpose(Vec (&rows)[kLanes]) {
  RESNEXT_UNROLL
  for (int width = 1; width < kLanes; width *= 2) {
    Vec next[kLanes];
    RESNEXT_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1], LaneIndices{});
    }
    RESNEXT_UNROLL
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}
