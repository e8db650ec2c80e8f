// What a convolution kernel does besides convolving, as a policy of the kernel. A fusion has
//
//   Prologue   what happens to 8 neighbouring channels of the source once they are staged, where the member `prologue`
//              is given. void: nothing, and no code for it
//   Epilogue   what happens to kWidth neighbouring channels of a result, whose place is so many elements, and bytes,
//              from the element that begin() was told: load_at() reads what else is needed there, if loads(), ahead of
//              the products; operator() is called before they are rounded and stored, stored() after
//   Totals     what the epilogue sums up, for the kernel to merge and write to `partial`; NoTotals: nothing
//
// A prologue is made of its Source and of the 8 channels' place once per block, and waits in shared memory. kCompanion:
// it reads a second tensor, staged beside the source.
#pragma once

#include "batch_norm.cuh"

namespace resnext::cuda {

constexpr int kGranule = 8;  // channels of 16 bits that are staged at once

// kWidth neighbours of a tensor as they are loaded: separated at once, they would have to be waited for at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packed {
  uint32_t pairs[kWidth / 2];

  __device__ __forceinline__ void unpack(float (&values)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      unpack2<T>(pairs[i], values[2 * i], values[2 * i + 1]);
    }
  }
};

// One channel at a time, of any type: for the kernels without tensor cores.
template <typename T>
struct alignas(sizeof(T)) Packed<T, 1> {
  T value;

  __device__ __forceinline__ void unpack(float (&values)[1]) const { values[0] = static_cast<float>(value); }
};

template <typename T>
using Granule = Packed<T, kGranule>;

// round(relu(affine(x))); padding stays zero, as it is never passed through.
template <typename T>
struct alignas(16) ActivationPrologue {
  using Source = Affine;
  static constexpr bool kCompanion = false;

  AffineChannels<kGranule> affine;

  __device__ __forceinline__ ActivationPrologue(const Affine& vectors, int64_t channel) : affine(vectors, channel) {}

  __device__ __forceinline__ Granule<T> operator()(const Granule<T>& x, const Granule<T>&) const {
    float values[kGranule];
    x.unpack(values);
    Granule<T> result;
#pragma unroll
    for (int c = 0; c < kGranule; c += 2) {
      result.pairs[c / 2] = pack2_relu<T>(affine(values[c], c), affine(values[c + 1], c + 1));
    }
    return result;
  }
};

// dz with what comes through the statistics of z.
template <typename T>
struct alignas(16) StatisticsPrologue {
  using Source = StatisticsGradients;
  static constexpr bool kCompanion = true;

  StatisticsGradient<kGranule> gradient;

  __device__ __forceinline__ StatisticsPrologue(const StatisticsGradients& vectors, int64_t channel)
      : gradient(vectors, channel) {}

  __device__ __forceinline__ Granule<T> operator()(const Granule<T>& dz, const Granule<T>& z) const {
    float values[kGranule], raw[kGranule];
    dz.unpack(values);
    z.unpack(raw);
    Granule<T> result;
#pragma unroll
    for (int c = 0; c < kGranule; c += 2) {
      result.pairs[c / 2] = pack2<T>(gradient(values[c], raw[c], c), gradient(values[c + 1], raw[c + 1], c + 1));
    }
    return result;
  }
};

// The prologues of channels first, first + 1, ..., first + count - 1 of a tensor of `channels` channels, by all threads
// of the block; none for channels beyond the end.
template <typename Prologue>
__device__ __forceinline__ void make_prologues(const typename Prologue::Source& source, int first, int count,
                                               int channels, Prologue* shared) {
  for (int c = threadIdx.x * kGranule; c < count && first + c < channels; c += blockDim.x * kGranule) {
    shared[c / kGranule] = Prologue(source, first + c);
  }
}

template <typename Prologue>
constexpr int kPrologueBytes = sizeof(Prologue) / kGranule;  // per channel
template <>
inline constexpr int kPrologueBytes<void> = 0;

template <typename Prologue>
constexpr bool kHasCompanion = Prologue::kCompanion;
template <>
inline constexpr bool kHasCompanion<void> = false;

// Bytes from one tensor to another of the same layout.
__device__ __forceinline__ int64_t bytes_between(const void* first, const void* second) {
  return reinterpret_cast<intptr_t>(second) - reinterpret_cast<intptr_t>(first);
}

struct Nothing {};

// The plain convolution.
template <typename T>
struct PlainFusion {
  using Prologue = void;
  template <int kWidth>
  using Totals = NoTotals;

  template <int kWidth>
  struct Epilogue {
    using Loaded = Nothing;

    __device__ __forceinline__ Epilogue(const PlainFusion&, int64_t) {}
    __device__ __forceinline__ bool loads() const { return false; }
    __device__ __forceinline__ void begin(int64_t) {}
    __device__ __forceinline__ Loaded load_at(int, int) const { return {}; }
    __device__ __forceinline__ void operator()(float (&)[kWidth], const Loaded&, int, int, NoTotals&) const {}
    __device__ __forceinline__ void stored(const float (&)[kWidth], NoTotals&, NoTotals::Step&) const {}
  };
};

// + bias.
template <typename T>
struct BiasFusion {
  using Prologue = void;
  template <int kWidth>
  using Totals = NoTotals;

  const T* bias;

  template <int kWidth>
  struct Epilogue {
    using Loaded = Nothing;

    float shift[kWidth];

    __device__ __forceinline__ Epilogue(const BiasFusion& fusion, int64_t channel) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        shift[c] = static_cast<float>(fusion.bias[channel + c]);
      }
    }

    __device__ __forceinline__ bool loads() const { return false; }
    __device__ __forceinline__ void begin(int64_t) {}
    __device__ __forceinline__ Loaded load_at(int, int) const { return {}; }

    __device__ __forceinline__ void operator()(float (&values)[kWidth], const Loaded&, int, int, NoTotals&) const {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        values[c] += shift[c];
      }
    }

    __device__ __forceinline__ void stored(const float (&)[kWidth], NoTotals&, NoTotals::Step&) const {}
  };
};

// Inference: relu?(affine(result) + residual); the affine has no center.
template <typename T>
struct AffineFusion {
  using Prologue = void;
  template <int kWidth>
  using Totals = NoTotals;

  Affine affine;
  const T* residual;  // null: none
  bool with_relu;

  template <int kWidth>
  struct Epilogue {
    using Loaded = Nothing;  // a residual is rare here

    AffineChannels<kWidth> affine;
    const T* residual;
    bool with_relu;
    int64_t first;

    __device__ __forceinline__ Epilogue(const AffineFusion& fusion, int64_t channel)
        : affine({nullptr, fusion.affine.scale, fusion.affine.shift}, channel),
          residual(fusion.residual),
          with_relu(fusion.with_relu) {}

    __device__ __forceinline__ bool loads() const { return false; }
    __device__ __forceinline__ void begin(int64_t element) { first = element; }
    __device__ __forceinline__ Loaded load_at(int, int) const { return {}; }

    __device__ __forceinline__ void operator()(float (&values)[kWidth], const Loaded&, int elements, int bytes,
                                               NoTotals&) const {
      float added[kWidth] = {};
      if (residual != nullptr) {
        reinterpret_cast<const Packed<T, kWidth>*>(from(residual + first + elements, bytes))->unpack(added);
      }
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float value = affine(values[c], c) + added[c];
        values[c] = with_relu ? relu(value) : value;
      }
    }

    __device__ __forceinline__ void stored(const float (&)[kWidth], NoTotals&, NoTotals::Step&) const {}
  };
};

// Training, forward: the batch norm and ReLU before the convolution, and the statistics of what is stored.
template <typename T>
struct ForwardFusion {
  using Prologue = ActivationPrologue<T>;
  template <int kWidth>
  using Totals = Moments<kWidth>;

  Affine prologue;
  float* partial;  // null: no statistics

  template <int kWidth>
  struct Epilogue {
    using Loaded = Nothing;

    bool statistics;

    __device__ __forceinline__ Epilogue(const ForwardFusion& fusion, int64_t) : statistics(fusion.partial != nullptr) {}

    __device__ __forceinline__ bool loads() const { return false; }
    __device__ __forceinline__ void begin(int64_t) {}
    __device__ __forceinline__ Loaded load_at(int, int) const { return {}; }

    __device__ __forceinline__ void operator()(float (&)[kWidth], const Loaded&, int, int, Totals<kWidth>&) const {}

    __device__ __forceinline__ void stored(const float (&values)[kWidth], Totals<kWidth>& totals,
                                           typename Totals<kWidth>::Step& step) const {
      if (statistics) {
        step.add(values, totals);
      }
    }
  };
};

// Training, input gradient: what comes through the statistics, ReLU's mask and the affine before the convolution, and
// the sums of its gradient: shift, then scale.
template <typename T>
struct GradientFusion {
  using Prologue = StatisticsPrologue<T>;
  template <int kWidth>
  using Totals = Sums<kWidth, 2>;

  StatisticsGradients prologue;
  const T* x;
  Affine affine;
  float* partial;  // null: no affine

  template <int kWidth>
  struct Epilogue {
    using Loaded = Packed<T, kWidth>;

    Activation<T, kWidth> activation;
    const T *x, *first;

    __device__ __forceinline__ Epilogue(const GradientFusion& fusion, int64_t channel)
        : activation(fusion.affine, channel), x(fusion.partial != nullptr ? fusion.x : nullptr) {}

    __device__ __forceinline__ bool loads() const { return x != nullptr; }
    __device__ __forceinline__ void begin(int64_t element) { first = loads() ? held(x + element) : nullptr; }

    __device__ __forceinline__ Loaded load_at(int elements, int bytes) const {
      return *reinterpret_cast<const Loaded*>(from(first + elements, bytes));
    }

    __device__ __forceinline__ void operator()(float (&values)[kWidth], const Loaded& raw, int, int,
                                               Totals<kWidth>& totals) const {
      if (x == nullptr) {
        return;
      }
      float inputs[kWidth];
      raw.unpack(inputs);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float input = inputs[c];
        const float t = activation.passes(input, c) ? values[c] : 0.0f;
        totals.sums[0][c] += t;
        totals.sums[1][c] = fmaf(t, input - activation.affine.center[c], totals.sums[1][c]);
        values[c] = activation.affine.scale[c] * t;
      }
    }

    __device__ __forceinline__ void stored(const float (&)[kWidth], Totals<kWidth>&,
                                           typename Totals<kWidth>::Step&) const {}
  };
};

}  // namespace resnext::cuda
