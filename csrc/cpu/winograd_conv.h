// 3x3 convolutions by Winograd's algorithm (see winograd.inl.h): where it serves, planning, and running on the active
// instruction set.
#pragma once

#include <array>
#include <string>

#include "../shape.h"
#include "driver.h"

namespace resnext::cpu {

enum class TileUse { kProduct, kPackedProduct, kGradient };  // y or dx, y with the weight packed before, dw

// Of "product", "packed_product" or "gradient".
TileUse tile_use(const std::string& name);

// Whether it is the faster way, by measurement, for a convolution of this shape.
bool winograd_serves(const GroupedConvShape& shape, TileUse use);

// y = conv(x) + bias, or dx = the input gradient of dy (filters.transposed). `packed`: the weight as pack_winograd
// leaves it, or null; there is no bias with it. `results`: mean and variance, or dshift and dscale, where the write map
// makes them. Returns false where a result is not finite, which then has to be computed in another way.
struct TileOperands {
  Image src, dst;
  Filters filters;
  const float* packed;
};
bool run_winograd(const TileOperands& operands, const ReadMap& read, WriteMap write, const GroupedConvShape& shape,
                  std::array<float*, 2> results = {});

// dw of what `g` says of grad, x and dw; the same.
bool run_winograd_gradient(TileGradient g, const GroupedConvShape& shape);

// Lays the weight of a dense convolution out as conv_affine reads it, in float32; `packed` has the sizes that
// packed_tile_data insists on.
void pack_winograd(const Tensor& weight, const Tensor& packed);

// Checks that `packed` is what pack_winograd makes of a weight with these channels; returns its data, or null if there
// is none.
const float* packed_tile_data(const OptionalTensor& packed, int64_t in_channels, int64_t out_channels, const char* op);

}  // namespace resnext::cpu
