// What the CPU operators share: images of tensors, vectors with their defaults, scratch memory, and the last stage of
// every sum: partial results of the kernels, added up in an order that does not depend on the number of threads.
#pragma once

#include <array>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace resnext::cpu {

struct Free {
  void operator()(float* data) const;
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count);
Buffer allocate_zeros(int64_t count);

Dtype dtype_of(const Tensor& tensor);
Image image_of(const Tensor& tensor, bool channels_last);
float* floats_of(const OptionalTensor& tensor);  // null if there is none

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
