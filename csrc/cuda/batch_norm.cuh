// The formulas of batch norm, as every fused kernel applies them: to a vector of neighbouring elements whose channels
// the thread keeps in registers.
//
// All arithmetic is float32. affine() is one subtraction and one fused multiply-add wherever it stands: backward
// recomputes the mask of forward bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.h"

namespace resnext::cuda {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

// A pointer `bytes` further, which are not negative.
template <typename T>
__device__ __forceinline__ T* from(T* base, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + static_cast<uint32_t>(bytes));
}

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* elements) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(elements);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* elements, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(elements) = vector;
}

// NaN stays, as in PyTorch.
__device__ __forceinline__ float relu(float value) { return value <= 0.0f ? 0.0f : value; }

// Affine of the channels [channel, channel + kChannels).
template <int kChannels>
struct AffineChannels {
  float center[kChannels], scale[kChannels], shift[kChannels];

  __device__ __forceinline__ AffineChannels(const Affine& affine, int64_t channel) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      center[c] = affine.center != nullptr ? affine.center[channel + c] : 0.0f;
      scale[c] = affine.scale != nullptr ? affine.scale[channel + c] : 1.0f;
      shift[c] = affine.shift != nullptr ? affine.shift[channel + c] : 0.0f;
    }
  }

  __device__ __forceinline__ float operator()(float value, int c) const {
    return fmaf(scale[c], value - center[c], shift[c]);
  }
};

// round(relu(affine(x))): a convolution's input, and the mask of its gradient.
template <typename T, int kChannels>
struct Activation {
  AffineChannels<kChannels> affine;

  __device__ __forceinline__ Activation(const Affine& vectors, int64_t channel) : affine(vectors, channel) {}

  __device__ __forceinline__ T operator()(T value, int c) const {
    return static_cast<T>(relu(affine(static_cast<float>(value), c)));
  }

  // A gradient that reaches the activation goes on to where this is not zero: NaN passes. What rounds to zero is at
  // most half of the least number of T.
  __device__ __forceinline__ bool passes(float value, int c) const {
    constexpr float kZero = std::is_same_v<T, Half> ? 0x1p-25f : std::is_same_v<T, BFloat16> ? 0x1p-134f : 0.0f;
    return !(affine(value, c) <= kZero);
  }
};

// dz + dmean / count + 2 * dvar / count * (z - mean): a gradient with what comes through the statistics.
template <int kChannels>
struct StatisticsGradient {
  float mean[kChannels], offset[kChannels], slope[kChannels];

  __device__ __forceinline__ StatisticsGradient(const StatisticsGradients& vectors, int64_t channel) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = vectors.mean[channel + c];
      offset[c] = vectors.dmean[channel + c] / vectors.count;
      slope[c] = vectors.dvar[channel + c] * (2.0f / vectors.count);
    }
  }

  __device__ __forceinline__ float operator()(float dz, float z, int c) const {
    return fmaf(slope[c], z - mean[c], dz + offset[c]);
  }
};

// Running totals of a thread, per channel. merge() adds those of a later part of the data, in a fixed order; store()
// writes them to row `split` of the partial results (split, plane, channel) that reduce.cuh brings together. Values may
// be taken in steps: a Step is what is not in the totals yet. What is summed at once has steps without content.
struct WithoutSteps {
  struct Step {};

  __device__ __forceinline__ static constexpr bool empty() { return false; }
  template <typename Values>
  __device__ __forceinline__ static void begin(const Values&) {}
  __device__ __forceinline__ static void close(const Step&, int) {}
};

struct NoTotals : WithoutSteps {};

template <int kChannels>
struct Moments {
  static constexpr int kPlanes = 3;

  // Sums about the totals' mean as it is, with half of add()'s instructions; closed after a few values. Totals of
  // nothing take begin() first, with any of the values: far from zero sums about zero would cancel.
  struct Step {
    float sums[kChannels], squares[kChannels];

    __device__ __forceinline__ void add(const float (&values)[kChannels], const Moments& totals) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float delta = values[c] - totals.mean[c];
        sums[c] += delta;
        squares[c] = fmaf(delta, delta, squares[c]);
      }
    }
  };

  float count, mean[kChannels], squares[kChannels];  // squares: sum of (value - mean)^2

  __device__ __forceinline__ bool empty() const { return count == 0.0f; }

  __device__ __forceinline__ void begin(const float (&values)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = values[c];
    }
  }

  // `values`: how many there were of every channel.
  __device__ __forceinline__ void close(const Step& step, int values) {
    if (values == 0) {
      return;
    }
    count += static_cast<float>(values);
    const float weight = 1.0f / count;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float shift = step.sums[c] * weight;
      mean[c] += shift;
      squares[c] += fmaf(-step.sums[c], shift, step.squares[c]);
    }
  }

  // Welford's update with one value of every channel.
  __device__ __forceinline__ void add(const float (&values)[kChannels]) {
    count += 1.0f;
    const float weight = 1.0f / count;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float delta = values[c] - mean[c];
      mean[c] = fmaf(delta, weight, mean[c]);
      squares[c] = fmaf(delta, values[c] - mean[c], squares[c]);
    }
  }

  // Chan's formula.
  __device__ __forceinline__ void merge(const Moments& other) {
    if (count == 0.0f) {
      *this = other;
    } else if (other.count != 0.0f) {
      const float total = count + other.count;
      const float weight = other.count / total;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float delta = other.mean[c] - mean[c];
        mean[c] = fmaf(delta, weight, mean[c]);
        squares[c] += other.squares[c] + delta * delta * (count * weight);
      }
      count = total;
    }
  }

  __device__ __forceinline__ void store(float* partial, int64_t split, int64_t channels, int64_t channel) const {
    float* const row = partial + split * kPlanes * channels + channel;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      row[c] = count;
      row[channels + c] = mean[c];
      row[2 * channels + c] = squares[c];
    }
  }
};

template <int kChannels, int kSums>
struct Sums : WithoutSteps {
  static constexpr int kPlanes = kSums;

  float sums[kSums][kChannels];

  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        sums[s][c] += other.sums[s][c];
      }
    }
  }

  __device__ __forceinline__ void store(float* partial, int64_t split, int64_t channels, int64_t channel) const {
    float* const row = partial + split * kPlanes * channels + channel;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        row[s * channels + c] = sums[s][c];
      }
    }
  }
};

// Merges the totals of the warp's lanes that are equal modulo `lanes` (a power of two) into those of lanes 0 ..
// lanes - 1, always in the same order.
template <typename Totals>
__device__ __forceinline__ void merge_lanes(Totals& totals, int lanes) {
  constexpr int kWords = sizeof(Totals) / sizeof(float);
  for (int distance = lanes; distance < kWarpSize; distance *= 2) {
    float words[kWords];
    memcpy(words, &totals, sizeof(Totals));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = shuffle_xor(words[i], distance);
    }
    Totals other;
    memcpy(&other, words, sizeof(Totals));
    totals.merge(other);
  }
}

// Merges the totals of `rows` (a power of two) threads per lane, thread = row * lanes + lane, into those of row 0: by
// halves, so always in the same order. All threads of the block call it.
template <int kThreads, typename Totals>
__device__ __forceinline__ void merge_rows(Totals& totals, int row, int rows, int lanes) {
  __shared__ Totals slots[kThreads / 2];
  const int lane = threadIdx.x - row * lanes;
  for (int half = rows / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) {
      slots[(row - half) * lanes + lane] = totals;
    }
    __syncthreads();
    if (row < half) {
      totals.merge(slots[row * lanes + lane]);
    }
    __syncthreads();
  }
}

}  // namespace resnext::cuda
