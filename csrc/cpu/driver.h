// What the CPU operators share: images of tensors, vectors with their defaults, scratch memory, and the last stage of
// every sum: partial results of the kernels, added up in an order that does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace resnext::cpu {

struct Release {
  int64_t count = 0;
  void operator()(float* data) const;
};
using Buffer = std::unique_ptr<float, Release>;

// Scratch memory. Each thread keeps large buffers for its next calls, up to 32 MiB: the system would take them back,
// and give their pages anew, cleared, every time.
Buffer allocate(int64_t count);
Buffer allocate_zeros(int64_t count);

Dtype dtype_of(const Tensor& tensor);
Image image_of(const Tensor& tensor, bool channels_last);
FilterStrides filter_strides(const Tensor& weight);  // of (C_out, C_in / groups, 3, 3), dense in either layout
Filters filters_to_pack(const Tensor& weight, const char* op);  // of such a weight, checked, for a forward pass
float* floats_of(const OptionalTensor& tensor);      // null if there is none

// The data of a weight that was packed before, checked to be of this dtype and these sizes; null if there is none.
template <size_t kDims>
const float* packed_weight(const OptionalTensor& packed, ScalarType dtype, const std::array<int64_t, kDims>& sizes,
                           const char* op) {
  if (!packed.has_value()) return nullptr;
  bool right = packed->dim() == kDims && packed->scalar_type() == dtype && packed->is_contiguous();
  for (size_t dim = 0; right && dim < kDims; ++dim) right = packed->size(static_cast<int64_t>(dim)) == sizes[dim];
  STD_TORCH_CHECK(right, op, ": expected a contiguous ", dtype == ScalarType::Float ? "float32" : "bfloat16",
                  " packed weight of shape ",
                  format_sizes(sizes.data(), kDims), ", got ", toString(packed->scalar_type()), " ",
                  format_sizes(*packed), "; pack the weight anew");
  return static_cast<const float*>(packed->data_ptr());
}

// An affine map, and the memory of those of its vectors that are not somebody else's.
struct OwnedAffine {
  Affine affine;
  Buffer storage;
};

// Without a center or shift they are 0, without a scale it is 1.
OwnedAffine affine_of(int64_t channels, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift);

// What statistics of `count` values add to the gradient of z: dmean / count + (2 * dvar / count) * (z - mean).
OwnedAffine statistics_gradient(const Tensor& mean, const Tensor& dmean, const Tensor& dvar, int64_t count);

// Tasks of about equal length that keep all threads busy to the end.
int64_t wanted_tasks();

// Tasks that each copy `floats` floats, as many as are worth a thread.
inline int64_t copies_at_once(int64_t floats) { return std::max<int64_t>(1, 16384 / floats); }

// Gives tasks [0, count) to threads as these become free, up to `at_once` that follow each other at a time: cores of
// different speed, or shared with others' work, then end together. Calls work(begin, end, scratch).
template <class Work>
void run_tasks(int64_t count, int64_t at_once, Scratch needed, Work work) {
  const int64_t pieces = ceil_div(count, at_once);
  const int64_t threads = std::min<int64_t>(pieces, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Buffer scratch = allocate(needed.size);
    std::memset(scratch.get(), 0, static_cast<size_t>(needed.zeros) * sizeof(float));
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      work(piece * at_once, std::min(count, (piece + 1) * at_once), scratch.get());
    }
  });
}

// Cuts the rows of the image that a band task writes. With sums, a part has enough pixels for its partial results to be
// small beside it.
RowCuts cut_rows(const Image& written, int64_t blocks, bool sums);

// Partial results: of every image (or plane, or the whole batch), `per_image` parts of `part_pixels`; the last may have
// fewer.
struct Parts {
  int64_t images, per_image, image_pixels, part_pixels;
  int64_t count() const { return images * per_image; }
};
Parts parts_of(const RowCuts& cuts, const Image& image);

Buffer allocate_partial(const Parts& parts, int64_t channels);

// Merges records [shift, mean, m2] to mean and biased variance.
void merge_moments(const float* partial, const Parts& parts, int64_t channels, float* mean, float* var);

// Adds up sum number `index` of kPartialSums.
void merge_sums(const float* partial, const Parts& parts, int64_t channels, int index, float* sum);

// Whether a map leaves partial results; brings them to mean and variance, or dshift and dscale.
bool takes_sums(const WriteMap& write);
void merge_results(const WriteMap& write, const Parts& parts, const std::array<float*, 2>& results);

}  // namespace resnext::cpu
