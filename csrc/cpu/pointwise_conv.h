// 1x1 convolutions in NHWC, plain and fused (see pointwise.inl.h): planning, and running on the active instruction set.
#pragma once

#include <array>

#include "../shape.h"
#include "driver.h"

namespace resnext::cpu {

// y = conv(x), or dx = the input gradient of dy (`transposed`). `results`: mean and variance, or dshift and dscale,
// where the write map makes them. `packed`: the weight as pack_pointwise leaves it, or null.
struct PointwiseOperands {
  const Tensor &src, &dst, &weight;
  const float* packed;
  bool transposed;
};
void run_pointwise(const PointwiseOperands& operands, const ReadMap& read, WriteMap write,
                   const GroupedConvShape& shape, std::array<float*, 2> results = {});

// dw of dy and x.
void run_pointwise_gradient(const Tensor& grad, const ReadMap& read_grad, const Tensor& x, const ReadMap& read_x,
                            const Tensor& dw, const GroupedConvShape& shape);

// Lays a weight out as conv_affine reads it; `packed` has the dtype and sizes that packed_data insists on.
void pack_pointwise(const Tensor& weight, const Tensor& packed);

// Checks that `packed` is what pack_pointwise makes of a weight with these channels, for images of a dtype; returns its
// data.
const float* packed_data(const OptionalTensor& packed, const Tensor& weight, Dtype images, const char* op);

}  // namespace resnext::cpu
