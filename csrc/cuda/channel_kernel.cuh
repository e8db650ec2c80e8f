// The elementwise passes around the convolutions: batch norm's statistics, affine-add-ReLU, the stem's max pool, and
// their gradients, in NHWC and NCHW.
//
// One kernel walks a tensor for all of them. A tensor is (outer, channels, inner): NHWC has inner = 1, NCHW outer =
// batch. A thread keeps to one vector of channels, whose constants and totals stay in its registers, and visits
// every rows-th place of its block's split: NHWC, 16 bytes of neighbouring channels of one pixel; NCHW, 16 bytes of
// one channel's pixels; single elements where those do not fit. What is done at a place is the job's business; a
// job's totals are merged over the block's rows in order and written once per split (reduce.cuh merges the splits).
// Bytes: each tensor of a job once, in coalesced rows.
#pragma once

#include <type_traits>

#include "batch_norm.cuh"

namespace resnext::cuda {

constexpr int kChannelThreads = 256;

// A job may belong to single images (kByImage): a block's split is of one image then, whose totals are a row by
// themselves, and outer counts pixels of that image (NHWC).
struct ChannelGrid {
  int64_t channels, inner;
  int64_t images;         // 1, if the job does not belong to single ones
  int64_t image_elements;
  int64_t positions;      // vectors per channel: over outer and inner
  int64_t inner_vectors;  // of one channel, side by side
  int64_t tiles;          // blocks that share a split
  int lanes;              // threads side by side in channels: a power of two, at most a warp
  int splits;
};

struct Place {
  int64_t element;  // offset of the vector
  int64_t channel;
  int64_t pixel;  // (image, row, column) as one number
};

// Blocks resident at once, by registers.
template <typename Job>
constexpr int kChannelBlocksPerMultiprocessor = std::is_empty_v<typename Job::Totals> && !Job::kByImage ? 3 : 2;

template <typename Job>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocksPerMultiprocessor<Job>)
    channel_kernel(Job job, ChannelGrid grid, float* partial) {
  using Totals = typename Job::Totals;
  const int row = threadIdx.x / grid.lanes;
  const int rows = kChannelThreads / grid.lanes;
  const int64_t vector = blockIdx.x % grid.tiles * grid.lanes + threadIdx.x % grid.lanes;
  const int64_t part = blockIdx.x / grid.tiles;
  const int64_t image = Job::kByImage ? part % grid.images : 0;
  const int64_t split = Job::kByImage ? part / grid.images : part;
  const int64_t channel = vector * Job::kChannels;
  const bool active = channel < grid.channels;

  Totals totals = {};
  if (active) {
    const auto constants = [&] {
      if constexpr (Job::kByImage) {
        return typename Job::Constants(job, channel, image * grid.channels + channel);
      } else {
        return typename Job::Constants(job, channel);
      }
    }();
    const int64_t last = grid.positions * (split + 1) / grid.splits;
    int64_t position = grid.positions * split / grid.splits + row;
    int64_t outer = position / grid.inner_vectors, inner = position % grid.inner_vectors;
    const int64_t outer_step = rows / grid.inner_vectors, inner_step = rows % grid.inner_vectors;
    for (; position < last; position += rows) {
      const int64_t inside = inner * Job::kWidth;
      const int64_t element = (outer * grid.channels + channel) * grid.inner + inside;
      job.visit({image * grid.image_elements + element, channel, outer * grid.inner + inside}, constants, totals);
      outer += outer_step;
      inner += inner_step;
      if (inner >= grid.inner_vectors) {
        inner -= grid.inner_vectors;
        ++outer;
      }
    }
  }
  if constexpr (!std::is_empty_v<Totals>) {
    merge_rows<kChannelThreads>(totals, row, rows, grid.lanes);
    if (active && row == 0 && partial != nullptr) {
      totals.store(partial, part, grid.channels, channel);
    }
  }
}

// What all jobs share: kAcross, a vector lies across channels (NHWC), otherwise along one channel (NCHW).
template <typename T, int kVectorWidth, bool kAcross>
struct ChannelJob {
  using Element = T;
  static constexpr bool kByImage = false;
  static constexpr int kWidth = kVectorWidth;
  static constexpr int kChannels = kAcross ? kVectorWidth : 1;
  __device__ static constexpr int channel_of(int e) { return kAcross ? e : 0; }
};

template <typename T, int kVectorWidth, bool kAcross>
struct StatisticsJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  using Totals = Moments<Base::kChannels>;
  struct Constants {
    __device__ Constants(const StatisticsJob&, int64_t) {}
  };

  const T* z;

  __device__ __forceinline__ void visit(const Place& place, const Constants&, Totals& totals) const {
    const auto values = load<kVectorWidth>(z + place.element);
#pragma unroll
    for (int first = 0; first < kVectorWidth; first += Base::kChannels) {
      float wide[Base::kChannels];
#pragma unroll
      for (int c = 0; c < Base::kChannels; ++c) {
        wide[c] = static_cast<float>(values.values[first + c]);
      }
      totals.add(wide);
    }
  }
};

template <typename T, int kVectorWidth, bool kAcross>
struct StatisticsGradJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  using Totals = NoTotals;
  struct Constants {
    StatisticsGradient<Base::kChannels> gradient;
    __device__ Constants(const StatisticsGradJob& job, int64_t channel) : gradient(job.statistics, channel) {}
  };

  const T* dz;
  StatisticsGradients statistics;
  T* g;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals&) const {
    auto values = load<kVectorWidth>(dz + place.element);
    const auto z = load<kVectorWidth>(static_cast<const T*>(statistics.z) + place.element);
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      values.values[e] = static_cast<T>(constants.gradient(static_cast<float>(values.values[e]),
                                                           static_cast<float>(z.values[e]), Base::channel_of(e)));
    }
    store(g + place.element, values);
  }
};

// out = round(relu(affine(z) + residual_affine(residual))); residual null: none.
template <typename T, int kVectorWidth, bool kAcross>
struct AffineAddReluJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  using Totals = NoTotals;
  struct Constants {
    AffineChannels<Base::kChannels> affine, residual;  // both shifts in one: registers
    __device__ Constants(const AffineAddReluJob& job, int64_t channel)
        : affine(job.affine, channel), residual(job.residual_affine, channel) {
#pragma unroll
      for (int c = 0; c < Base::kChannels; ++c) {
        affine.shift[c] += residual.shift[c];
      }
    }
  };

  const T* z;
  Affine affine;
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
      float value = constants.affine(static_cast<float>(values.values[e]), c);
      if (residual != nullptr) {
        const float centered = static_cast<float>(added.values[e]) - constants.residual.center[c];
        value = fmaf(constants.residual.scale[c], centered, value);
      }
      values.values[e] = static_cast<T>(relu(value));
    }
    store(out + place.element, values);
  }
};

// t = dout where not (out <= 0); dz = scale * t, dresidual = residual's scale * t. Totals: sum t, sum t * (z - center),
// sum t * (residual - residual's center). out null: what forward made of z. dz, dresidual null: not wanted. dout may
// be wider than T: a convolution's gradient before it is rounded.
template <typename T, int kVectorWidth, bool kAcross, typename Grad>
struct AffineAddReluGradJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  using Totals = Sums<Base::kChannels, 3>;
  struct Constants {
    Activation<T, Base::kChannels> activation;
    AffineChannels<Base::kChannels> residual;
    __device__ Constants(const AffineAddReluGradJob& job, int64_t channel)
        : activation(job.affine, channel), residual(job.residual_affine, channel) {}
  };

  const Grad* dout;
  const T *out, *z;
  Affine affine;
  const T* residual;
  Affine residual_affine;
  T *dz, *dresidual;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals& totals) const {
    const auto grad = load<kVectorWidth>(dout + place.element);
    const auto input = load<kVectorWidth>(z + place.element);
    Vector<T, kVectorWidth> result{}, added{};
    if (out != nullptr) {
      result = load<kVectorWidth>(out + place.element);
    }
    if (residual != nullptr) {
      added = load<kVectorWidth>(residual + place.element);
    }
    Vector<T, kVectorWidth> dz_values, dresidual_values;
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      const bool passes = out != nullptr ? !(static_cast<float>(result.values[e]) <= 0.0f)
                                         : constants.activation.passes(input.values[e], c);
      const float t = passes ? static_cast<float>(grad.values[e]) : 0.0f;
      totals.sums[0][c] += t;
      totals.sums[1][c] =
          fmaf(t, static_cast<float>(input.values[e]) - constants.activation.affine.center[c], totals.sums[1][c]);
      if (residual != nullptr) {
        totals.sums[2][c] =
            fmaf(t, static_cast<float>(added.values[e]) - constants.residual.center[c], totals.sums[2][c]);
      }
      dz_values.values[e] = static_cast<T>(constants.activation.affine.scale[c] * t);
      dresidual_values.values[e] = static_cast<T>(constants.residual.scale[c] * t);
    }
    if (dz != nullptr) {
      store(dz + place.element, dz_values);
    }
    if (dresidual != nullptr) {
      store(dresidual + place.element, dresidual_values);
    }
  }
};

}  // namespace resnext::cuda
