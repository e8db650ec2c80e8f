#include "driver.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace resnext::cpu {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#elif defined(__has_feature)
constexpr bool kKeeps = !__has_feature(address_sanitizer);
#else
constexpr bool kKeeps = true;
#endif

// Large buffers that a thread has no use for at present, the smallest first; small ones are the allocator's. Under the
// address sanitizer there are none: each use has memory of its own, with known ends.
class Kept {
 public:
  ~Kept() {
    for (const Slot& slot : slots_) std::free(slot.data);
  }

  // The smallest of at least `count` floats, or null.
  Buffer take(int64_t count) {
    if (count < kLeast) return nullptr;
    for (Slot& slot : slots_) {
      if (slot.count < count) continue;
      const Slot found = std::exchange(slot, Slot{});
      total_ -= found.count;
      sort();
      return Buffer(found.data, Release{found.count});
    }
    return nullptr;
  }

  void give(float* data, int64_t count) {
    if (kKeeps && count >= kLeast && count > slots_[0].count) {
      total_ += count - slots_[0].count;
      std::swap(data, slots_[0].data);
      slots_[0].count = count;
      sort();
      for (Slot& slot : slots_) {
        if (total_ <= kMost) break;
        total_ -= slot.count;
        std::free(std::exchange(slot, Slot{}).data);
      }
    }
    std::free(data);
  }

 private:
  static constexpr int64_t kLeast = 16 << 10;  // 64 KiB
  static constexpr int64_t kMost = 8 << 20;    // 32 MiB in all: the largest weights of ResNet-50, packed, are 16

  struct Slot {
    float* data = nullptr;
    int64_t count = 0;
  };

  void sort() {
    std::sort(slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) { return a.count < b.count; });
  }

  std::array<Slot, 6> slots_;  // no call uses more at once
  int64_t total_ = 0;
};

thread_local Kept kept;

}  // namespace

void Release::operator()(float* data) const { kept.give(data, count); }

Buffer allocate(int64_t count) {
  constexpr int64_t kAlignment = 64;  // bytes: a cache line, and the widest vector
  if (Buffer buffer = kept.take(count)) return buffer;
  count = round_up(std::max<int64_t>(count, 1), kAlignment / size_of(Dtype::kFloat32));
  void* data = nullptr;
  const auto bytes = static_cast<size_t>(count * size_of(Dtype::kFloat32));
  if (posix_memalign(&data, kAlignment, bytes) != 0) throw std::bad_alloc();
  return Buffer(static_cast<float*>(data), Release{count});
}

Buffer allocate_zeros(int64_t count) {
  Buffer buffer = allocate(count);
  std::memset(buffer.get(), 0, static_cast<size_t>(count) * sizeof(float));
  return buffer;
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Byte:
      return Dtype::kUint8;
    default:
      return Dtype::kFloat32;  // the checks let nothing else through
  }
}

Image image_of(const Tensor& tensor, bool channels_last) {
  return {tensor.data_ptr(), dtype_of(tensor), channels_last, tensor.size(0),
          tensor.size(1),    tensor.size(2),   tensor.size(3)};
}

FilterStrides filter_strides(const Tensor& weight) {
  const bool inputs_inside = weight.size(1) > 1 && weight.stride(1) == 1;  // channels_last
  return inputs_inside ? FilterStrides{1, weight.size(1)} : FilterStrides{9, 1};
}

Filters filters_to_pack(const Tensor& weight, const char* op) {
  const Checks check(op);
  check.dtype(weight, "weight");
  const Sizes4 sizes = check.sizes4(weight, "weight", "(C_out, C_in / groups, 3, 3)");
  check.sizes(weight, "weight", {sizes[0], sizes[1], 3, 3});
  check.dense_either_way(weight, "weight");
  const Dtype dtype = dtype_of(weight);
  return {weight.data_ptr(), filter_strides(weight), nullptr, dtype, dtype, /*transposed=*/false, /*mirrored=*/false};
}

float* floats_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->data_ptr()) : nullptr;
}

OwnedAffine affine_of(int64_t channels, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift) {
  Buffer storage = allocate_zeros(2 * channels);
  const float* zeros = storage.get();
  float* ones = storage.get() + channels;
  std::fill_n(ones, channels, 1.0f);
  const Affine affine = {center.has_value() ? floats_of(center) : zeros, scale.has_value() ? floats_of(scale) : ones,
                         shift.has_value() ? floats_of(shift) : zeros};
  return {affine, std::move(storage)};
}

OwnedAffine statistics_gradient(const Tensor& mean, const Tensor& dmean, const Tensor& dvar, int64_t count) {
  const int64_t channels = mean.size(0);
  const float* dmeans = floats_of(dmean);
  const float* dvars = floats_of(dvar);
  Buffer storage = allocate(2 * channels);
  float* scale = storage.get();
  float* shift = storage.get() + channels;
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = 2.0f * dvars[c] / static_cast<float>(count);
    shift[c] = dmeans[c] / static_cast<float>(count);
  }
  return {{floats_of(mean), scale, shift}, std::move(storage)};
}

int64_t wanted_tasks() { return 4 * static_cast<int64_t>(torch::stable::get_num_threads()); }

RowCuts cut_rows(const Image& written, int64_t blocks, bool sums) {
  constexpr int64_t kPartPixels = 256;
  const int64_t part_rows = sums ? std::clamp<int64_t>(kPartPixels / written.width, 1, written.height) : 1;
  const int64_t parts = ceil_div(written.height, part_rows);
  const int64_t tasks = written.batch * blocks;
  int64_t bands = ceil_div(wanted_tasks(), tasks);
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  while (bands > 1 && tasks * bands % threads != 0) ++bands;  // as many tasks for each
  return {part_rows, parts, std::clamp<int64_t>(bands, 1, parts)};
}

Parts parts_of(const RowCuts& cuts, const Image& image) {
  return {image.batch, cuts.parts, image.height * image.width, cuts.part_rows * image.width};
}

Buffer allocate_partial(const Parts& parts, int64_t channels) {
  return allocate_zeros(parts.count() * kPartialSums * channels);
}

namespace {

constexpr int64_t kBlock = 64;  // channels added up together

// Calls merge(c, channels of the block) for blocks of channels, in parallel if there is much to add up.
template <class Merge>
void for_channel_blocks(const Parts& parts, int64_t channels, Merge merge) {
  constexpr int64_t kAdditions = 32768;
  torch::stable::parallel_for(0, ceil_div(channels, kBlock),
                              std::max<int64_t>(1, kAdditions / (parts.count() * kBlock)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t block = begin; block < end; ++block) {
                                  merge(block * kBlock, std::min(kBlock, channels - block * kBlock));
                                }
                              });
}

}  // namespace

void merge_moments(const float* partial, const Parts& parts, int64_t channels, float* mean, float* var) {
  for_channel_blocks(parts, channels, [&](int64_t first, int64_t count) {
    double means[kBlock] = {};
    double m2s[kBlock] = {};
    int64_t pixels = 0;
    for (int64_t part = 0; part < parts.count(); ++part) {
      const float* shifts = partial + part * kPartialSums * channels + first;
      const float* part_means = shifts + channels;
      const float* part_m2s = part_means + channels;
      const int64_t before = part % parts.per_image * parts.part_pixels;
      const int64_t added = std::min(parts.part_pixels, parts.image_pixels - before);
      const double share = static_cast<double>(added) / static_cast<double>(pixels + added);
      const double weight = share * static_cast<double>(pixels);
      for (int64_t c = 0; c < count; ++c) {
        const double delta = static_cast<double>(shifts[c]) + static_cast<double>(part_means[c]) - means[c];
        means[c] += delta * share;
        m2s[c] += static_cast<double>(part_m2s[c]) + delta * delta * weight;
      }
      pixels += added;
    }
    for (int64_t c = 0; c < count; ++c) {
      mean[first + c] = static_cast<float>(means[c]);
      var[first + c] = static_cast<float>(m2s[c] / static_cast<double>(pixels));
    }
  });
}

void merge_sums(const float* partial, const Parts& parts, int64_t channels, int index, float* sum) {
  for_channel_blocks(parts, channels, [&](int64_t first, int64_t count) {
    double sums[kBlock] = {};
    for (int64_t part = 0; part < parts.count(); ++part) {
      const float* added = partial + (part * kPartialSums + index) * channels + first;
      for (int64_t c = 0; c < count; ++c) sums[c] += static_cast<double>(added[c]);
    }
    for (int64_t c = 0; c < count; ++c) sum[first + c] = static_cast<float>(sums[c]);
  });
}

bool takes_sums(const WriteMap& write) {
  return write.kind == WriteMap::kMoments || write.kind == WriteMap::kReluGradient;
}

void merge_results(const WriteMap& write, const Parts& parts, const std::array<float*, 2>& results) {
  if (write.kind == WriteMap::kMoments) {
    merge_moments(write.partial, parts, write.channels, results[0], results[1]);
  } else if (write.kind == WriteMap::kReluGradient) {
    for (int i = 0; i < 2; ++i) merge_sums(write.partial, parts, write.channels, i, results[i]);
  }
}

}  // namespace resnext::cpu
