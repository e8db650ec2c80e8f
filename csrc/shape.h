// The problem all three passes of all backends work on. No dependency, so that kernels can be compiled without PyTorch.
#pragma once

#include <cstdint>

namespace resnext {

// y[n, o, p, q] = bias[o] + sum over i, r, s of x[n, i, p*stride_h + r - 1, q*stride_w + s - 1] * weight[o, i, r, s],
// where i runs over the in_channels / groups inputs of o's group, r and s over 0..2, and x is zero outside the image.
// With kernel 1 there is one tap, r = s = 1, one group, and NHWC order.
struct GroupedConvShape {
  int64_t batch;
  int64_t in_channels, out_channels;
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of y: (height - 1) / stride_h + 1, (width - 1) / stride_w + 1
  int64_t groups;
  int64_t stride_h, stride_w;  // 1 or 2 each
  bool channels_last;          // x and y are dense in NHWC order, otherwise in NCHW order
  int64_t kernel;              // 3 or 1

  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
};

}  // namespace resnext
