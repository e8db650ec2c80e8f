// Channel attention: the mean of an activation, its gate, and their gradients, as jobs of channel_kernel.cuh that belong
// to one image each.
//
// act is relu where `relu` says so, else the identity. Gates, and what is added to a gradient, have a float for each
// channel of each image.
#pragma once

#include "channel_kernel.cuh"

namespace resnext::cuda {

template <typename T, int kVectorWidth, bool kAcross>
struct AttentionJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  static constexpr bool kByImage = true;

  // What a thread keeps of the affine, and of a vector over the image's channels (null: zeros).
  struct Activated {
    AffineChannels<Base::kChannels> affine;
    bool relu;

    __device__ Activated(const Affine& vectors, bool relu, int64_t channel) : affine(vectors, channel), relu(relu) {}

    __device__ __forceinline__ float operator()(T value, int c) const {
      const float mapped = affine(static_cast<float>(value), c);
      return relu ? cuda::relu(mapped) : mapped;
    }
  };

  struct OfImage {
    float values[Base::kChannels];

    __device__ OfImage(const float* vectors, int64_t first) {
#pragma unroll
      for (int c = 0; c < Base::kChannels; ++c) {
        values[c] = vectors != nullptr ? vectors[first + c] : 0.0f;
      }
    }
  };
};

// Gradient of a result where the result, if it is there, is that of a relu.
template <typename T>
__device__ __forceinline__ float passed(T dout, const T* out, T result) {
  return out != nullptr && static_cast<float>(result) <= 0.0f ? 0.0f : static_cast<float>(dout);
}

// Totals: sum of act(affine(z)).
template <typename T, int kVectorWidth, bool kAcross>
struct MeanJob : AttentionJob<T, kVectorWidth, kAcross> {
  using Base = AttentionJob<T, kVectorWidth, kAcross>;
  using Totals = Sums<Base::kChannels, 1>;
  struct Constants {
    typename Base::Activated activated;
    __device__ Constants(const MeanJob& job, int64_t channel, int64_t) : activated(job.affine, job.relu, channel) {}
  };

  const T* z;
  Affine affine;
  bool relu;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals& totals) const {
    const auto values = load<kVectorWidth>(z + place.element);
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      totals.sums[0][c] += constants.activated(values.values[e], c);
    }
  }
};

// out = gate * act(affine(z)), with a residual relu(that + residual_affine(residual)); residual null: none.
template <typename T, int kVectorWidth, bool kAcross>
struct GateJob : AttentionJob<T, kVectorWidth, kAcross> {
  using Base = AttentionJob<T, kVectorWidth, kAcross>;
  using Totals = NoTotals;
  struct Constants {
    typename Base::Activated activated;
    AffineChannels<Base::kChannels> residual;
    typename Base::OfImage gate;
    __device__ Constants(const GateJob& job, int64_t channel, int64_t of_image)
        : activated(job.affine, job.relu, channel),
          residual(job.residual_affine, channel),
          gate(job.gate, of_image) {}
  };

  const T* z;
  Affine affine;
  bool relu;
  const float* gate;
  const T* residual;
  Affine residual_affine;
  T* out;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals&) const {
    auto values = load<kVectorWidth>(z + place.element);
    Vector<T, kVectorWidth> added{};
    if (residual != nullptr) {
      added = load<kVectorWidth>(residual + place.element);
    }
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      float value = constants.gate.values[c] * constants.activated(values.values[e], c);
      if (residual != nullptr) {
        value = cuda::relu(value + constants.residual(static_cast<float>(added.values[e]), c));
      }
      values.values[e] = static_cast<T>(value);
    }
    store(out + place.element, values);
  }
};

// t = dout where not (out <= 0); dresidual = residual's scale * t. Totals: sum t * act(affine(z)), sum t, sum t *
// (residual - residual's center). out null: all of dout. dresidual null: not wanted.
template <typename T, int kVectorWidth, bool kAcross>
struct GateSumsJob : AttentionJob<T, kVectorWidth, kAcross> {
  using Base = AttentionJob<T, kVectorWidth, kAcross>;
  using Totals = Sums<Base::kChannels, 3>;
  struct Constants {
    typename Base::Activated activated;
    AffineChannels<Base::kChannels> residual;
    __device__ Constants(const GateSumsJob& job, int64_t channel, int64_t)
        : activated(job.affine, job.relu, channel), residual(job.residual_affine, channel) {}
  };

  const T *dout, *out, *z;
  Affine affine;
  bool relu;
  const T* residual;
  Affine residual_affine;
  T* dresidual;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals& totals) const {
    const auto grad = load<kVectorWidth>(dout + place.element);
    const auto input = load<kVectorWidth>(z + place.element);
    Vector<T, kVectorWidth> result{}, added{}, passed_on;
    if (out != nullptr) {
      result = load<kVectorWidth>(out + place.element);
    }
    if (residual != nullptr) {
      added = load<kVectorWidth>(residual + place.element);
    }
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      const float t = passed(grad.values[e], out, result.values[e]);
      totals.sums[0][c] = fmaf(t, constants.activated(input.values[e], c), totals.sums[0][c]);
      totals.sums[1][c] += t;
      if (residual != nullptr) {
        const float centered = static_cast<float>(added.values[e]) - constants.residual.center[c];
        totals.sums[2][c] = fmaf(t, centered, totals.sums[2][c]);
      }
      passed_on.values[e] = static_cast<T>(constants.residual.scale[c] * t);
    }
    if (dresidual != nullptr) {
      store(dresidual + place.element, passed_on);
    }
  }
};

// t = gate * (dout as above, or 0) + added, where act passes it; dz = scale * t. Totals: sum t, sum t * (z - center).
template <typename T, int kVectorWidth, bool kAcross>
struct GateGradJob : AttentionJob<T, kVectorWidth, kAcross> {
  using Base = AttentionJob<T, kVectorWidth, kAcross>;
  using Totals = Sums<Base::kChannels, 2>;
  struct Constants {
    Activation<T, Base::kChannels> activation;
    typename Base::OfImage gate, added;
    __device__ Constants(const GateGradJob& job, int64_t channel, int64_t of_image)
        : activation(job.affine, channel), gate(job.gate, of_image), added(job.added, of_image) {}
  };

  const T* z;
  Affine affine;
  bool relu;
  const T *dout, *out;
  const float *gate, *added;
  T* dz;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals& totals) const {
    const auto input = load<kVectorWidth>(z + place.element);
    Vector<T, kVectorWidth> grad{}, result{}, dz_values;
    if (dout != nullptr) {
      grad = load<kVectorWidth>(dout + place.element);
    }
    if (out != nullptr) {
      result = load<kVectorWidth>(out + place.element);
    }
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      const float value = static_cast<float>(input.values[e]);
      float t = constants.added.values[c];
      if (dout != nullptr) {
        t = fmaf(constants.gate.values[c], passed(grad.values[e], out, result.values[e]), t);
      }
      if (relu && !constants.activation.passes(value, c)) {
        t = 0.0f;
      }
      totals.sums[0][c] += t;
      totals.sums[1][c] = fmaf(t, value - constants.activation.affine.center[c], totals.sums[1][c]);
      dz_values.values[e] = static_cast<T>(constants.activation.affine.scale[c] * t);
    }
    store(dz + place.element, dz_values);
  }
};

}  // namespace resnext::cuda
