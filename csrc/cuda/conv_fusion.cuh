// What a convolution kernel does besides convolving, as a policy of the kernel. A fusion has
//
//   Prologue   what happens to 8 neighbouring channels of the source once they are staged; constructed from the member
//              `prologue` where that is given. void: nothing, and no code for it
//   Epilogue   what happens to kWidth neighbouring channels of a result before they are rounded and stored
//   Totals     what the epilogue sums up, for the kernel to merge and write to `partial`; NoTotals: nothing
#pragma once

#include "batch_norm.cuh"

namespace resnext::cuda {

constexpr int kGranule = 8;  // channels of 16 bits that are staged at once

// round(relu(affine(x))); padding stays zero, as it is never passed through.
template <typename T>
struct ActivationPrologue {
  Activation<T, kGranule> activation;

  __device__ __forceinline__ ActivationPrologue(const Affine& affine, int64_t channel) : activation(affine, channel) {}

  __device__ __forceinline__ Vector<T, kGranule> operator()(Vector<T, kGranule> x, int64_t) const {
#pragma unroll
    for (int c = 0; c < kGranule; ++c) {
      x.values[c] = activation(x.values[c], c);
    }
    return x;
  }
};

// dz with what comes through the statistics of z.
template <typename T>
struct StatisticsPrologue {
  StatisticsGradient<T, kGranule> gradient;
  const T* z;

  __device__ __forceinline__ StatisticsPrologue(const StatisticsGradients& statistics, int64_t channel)
      : gradient(statistics, channel), z(static_cast<const T*>(statistics.z)) {}

  __device__ __forceinline__ Vector<T, kGranule> operator()(Vector<T, kGranule> dz, int64_t element) const {
    const auto raw = load<kGranule>(z + element);
#pragma unroll
    for (int c = 0; c < kGranule; ++c) {
      dz.values[c] = gradient(dz.values[c], raw.values[c], c);
    }
    return dz;
  }
};

// The plain convolution: + bias.
template <typename T>
struct BiasFusion {
  using Prologue = void;
  template <int kWidth>
  using Totals = NoTotals;

  const T* bias;  // null: none

  template <int kWidth>
  struct Epilogue {
    float shift[kWidth];

    __device__ __forceinline__ Epilogue(const BiasFusion& fusion, int64_t channel) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        shift[c] = fusion.bias != nullptr ? static_cast<float>(fusion.bias[channel + c]) : 0.0f;
      }
    }

    __device__ __forceinline__ void operator()(float (&values)[kWidth], int64_t, NoTotals&) const {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        values[c] += shift[c];
      }
    }
  };
};

// Inference: relu?(affine(result) + residual).
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
    AffineChannels<kWidth> affine;
    const T* residual;
    bool with_relu;

    __device__ __forceinline__ Epilogue(const AffineFusion& fusion, int64_t channel)
        : affine(fusion.affine, channel), residual(fusion.residual), with_relu(fusion.with_relu) {}

    __device__ __forceinline__ void operator()(float (&values)[kWidth], int64_t element, NoTotals&) const {
      Vector<T, kWidth> added{};
      if (residual != nullptr) {
        added = load<kWidth>(residual + element);
      }
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float value = affine(values[c], c) + static_cast<float>(added.values[c]);
        values[c] = with_relu ? relu(value) : value;
      }
    }
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
    bool statistics;

    __device__ __forceinline__ Epilogue(const ForwardFusion& fusion, int64_t) : statistics(fusion.partial != nullptr) {}

    __device__ __forceinline__ void operator()(float (&values)[kWidth], int64_t, Totals<kWidth>& totals) const {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        values[c] = static_cast<float>(static_cast<T>(values[c]));
      }
      if (statistics) {
        totals.add(values);
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
    Activation<T, kWidth> activation;
    const T* x;

    __device__ __forceinline__ Epilogue(const GradientFusion& fusion, int64_t channel)
        : activation(fusion.affine, channel), x(fusion.partial != nullptr ? fusion.x : nullptr) {}

    __device__ __forceinline__ void operator()(float (&values)[kWidth], int64_t element, Totals<kWidth>& totals) const {
      if (x == nullptr) {
        return;
      }
      const auto raw = load<kWidth>(x + element);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float t = activation.passes(raw.values[c], c) ? values[c] : 0.0f;
        const float centered = static_cast<float>(raw.values[c]) - activation.affine.center[c];
        totals.sums[0][c] += t;
        totals.sums[1][c] = fmaf(t, centered, totals.sums[1][c]);
        values[c] = activation.affine.scale[c] * t;
      }
    }
  };
};

}  // namespace resnext::cuda
