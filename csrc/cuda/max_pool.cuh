// The stem's 3x3 max pool (stride 2, padding 1) of round(relu(affine(z))) and its gradient: jobs of channel_kernel.cuh.
//
// Forward walks the pooled tensor, backward the input. `taps` keeps which of its 9 taps a window took, as PyTorch
// would: the first of equals in row-major order, the last NaN. Bytes: z about once (windows overlap in L1), the pooled
// tensor and one byte of tap per pooled element once.
#pragma once

#include "channel_kernel.cuh"

namespace resnext::cuda {

struct PoolShape {
  int64_t channels, height, width, out_height, out_width;
  bool channels_last;

  // Offset of (image, channel, row, column) in a tensor of `area` pixels per image.
  __device__ __forceinline__ int64_t offset(int64_t image, int64_t channel, int64_t area, int64_t pixel) const {
    return channels_last ? (image * area + pixel) * channels + channel : (image * channels + channel) * area + pixel;
  }
};

template <typename T, int kVectorWidth, bool kAcross>
struct MaxPoolJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  static_assert(kAcross || kVectorWidth == 1, "a window's columns are not neighbours");
  using Totals = NoTotals;
  struct Constants {
    Activation<T, Base::kChannels> activation;
    __device__ Constants(const MaxPoolJob& job, int64_t channel) : activation(job.affine, channel) {}
  };

  const T* z;
  Affine affine;
  T* out;
  uint8_t* taps;  // null: not wanted
  PoolShape shape;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals&) const {
    const int64_t out_col = place.pixel % shape.out_width;
    const int64_t out_row = place.pixel / shape.out_width % shape.out_height;
    const int64_t image = place.pixel / (shape.out_width * shape.out_height);
    Vector<T, kVectorWidth> best;
    Vector<uint8_t, kVectorWidth> best_taps{};
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      best.values[e] = static_cast<T>(-1.0f);  // less than any activation
    }
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t row = 2 * out_row - 1 + tap / 3, col = 2 * out_col - 1 + tap % 3;
      if (row < 0 || row >= shape.height || col < 0 || col >= shape.width) {
        continue;
      }
      const auto values = load<kVectorWidth>(z + shape.offset(image, place.channel, shape.height * shape.width,
                                                              row * shape.width + col));
#pragma unroll
      for (int e = 0; e < kVectorWidth; ++e) {
        const T value = constants.activation(values.values[e], Base::channel_of(e));
        const float wide = static_cast<float>(value);
        if (wide > static_cast<float>(best.values[e]) || wide != wide) {
          best.values[e] = value;
          best_taps.values[e] = static_cast<uint8_t>(tap);
        }
      }
    }
    store(out + place.element, best);
    if (taps != nullptr) {
      store(taps + place.element, best_taps);
    }
  }
};

// t = what the windows that took this element pass on, where the activation is not zero; dz = scale * t (null: not
// wanted). Totals: sum t, sum t * (z - center).
template <typename T, int kVectorWidth, bool kAcross>
struct MaxPoolGradJob : ChannelJob<T, kVectorWidth, kAcross> {
  using Base = ChannelJob<T, kVectorWidth, kAcross>;
  static_assert(kAcross || kVectorWidth == 1, "a window's columns are not neighbours");
  using Totals = Sums<Base::kChannels, 2>;
  struct Constants {
    Activation<T, Base::kChannels> activation;
    __device__ Constants(const MaxPoolGradJob& job, int64_t channel) : activation(job.affine, channel) {}
  };

  const T* dout;
  const uint8_t* taps;
  const T* z;
  Affine affine;
  T* dz;
  PoolShape shape;

  __device__ __forceinline__ void visit(const Place& place, const Constants& constants, Totals& totals) const {
    const int64_t col = place.pixel % shape.width;
    const int64_t row = place.pixel / shape.width % shape.height;
    const int64_t image = place.pixel / (shape.width * shape.height);
    float sums[kVectorWidth] = {};
#pragma unroll 1  // unrolled, the windows' addresses would not fit into registers
    for (int64_t out_row = row / 2; out_row <= (row + 1) / 2 && out_row < shape.out_height; ++out_row) {
#pragma unroll 1
      for (int64_t out_col = col / 2; out_col <= (col + 1) / 2 && out_col < shape.out_width; ++out_col) {
        const int64_t tap = (row + 1 - 2 * out_row) * 3 + col + 1 - 2 * out_col;
        const int64_t offset = shape.offset(image, place.channel, shape.out_height * shape.out_width,
                                            out_row * shape.out_width + out_col);
        const auto grad = load<kVectorWidth>(dout + offset);
        const auto taken = load<kVectorWidth>(taps + offset);
#pragma unroll
        for (int e = 0; e < kVectorWidth; ++e) {
          sums[e] += taken.values[e] == tap ? static_cast<float>(grad.values[e]) : 0.0f;
        }
      }
    }
    auto values = load<kVectorWidth>(z + place.element);
#pragma unroll
    for (int e = 0; e < kVectorWidth; ++e) {
      const int c = Base::channel_of(e);
      const float t = constants.activation.passes(values.values[e], c) ? sums[e] : 0.0f;
      const float centered = static_cast<float>(values.values[e]) - constants.activation.affine.center[c];
      totals.sums[0][c] += t;
      totals.sums[1][c] = fmaf(t, centered, totals.sums[1][c]);
      values.values[e] = static_cast<T>(constants.activation.affine.scale[c] * t);
    }
    if (dz != nullptr) {
      store(dz + place.element, values);
    }
  }
};

}  // namespace resnext::cuda
