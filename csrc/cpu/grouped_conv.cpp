// The CPU operators: check the tensors, plan, pack the weights, run the kernels of the active instruction set.
#include "../grouped_conv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "capability.h"
#include "kernels.h"

namespace resnext::cpu {
namespace {

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count) {
  constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, std::max(bytes, kAlignment)) != 0) throw std::bad_alloc();
  return Buffer(static_cast<float*>(data));
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat32;  // check_dtype lets nothing else through
  }
}

Image image_of(const Tensor& tensor, bool channels_last) {
  return {tensor.data_ptr(), dtype_of(tensor), channels_last,  tensor.size(0),
          tensor.size(1),    tensor.size(2),   tensor.size(3)};
}

FilterStrides filter_strides(const Tensor& weight) {
  const bool inputs_inside = weight.size(1) > 1 && weight.stride(1) == 1;  // channels_last
  return inputs_inside ? FilterStrides{1, weight.size(1)} : FilterStrides{9, 1};
}

Axis forward_axis(int64_t stride) { return {static_cast<int>(stride), 1, {{3, -1, {0, 1, 2}}, {}}}; }

// With stride 2, an even position of the input took part through the middle tap only, an odd one through the last tap
// of one output and the first tap of the next.
Axis gradient_axis(int64_t stride) {
  if (stride == 1) return {1, 1, {{3, -1, {2, 1, 0}}, {}}};
  return {1, 2, {{1, 0, {1}}, {2, 0, {2, 0}}}};
}

// Bundles whose rows are worked on together: their panels should fit the L1 cache. NHWC reads the block's channels of a
// pixel at once, NCHW reads one stream per channel; hence the wider block for NHWC (both measured).
int64_t bundle_block(const Layout& layout, bool channels_last) {
  const int64_t channels = channels_last ? 32 : 16;
  return std::clamp<int64_t>(channels / layout.src_lanes, 1, layout.bundles);
}

void run_correlation(Correlation& c, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
                     int64_t groups) {
  const Kernels& kernels = active_kernels();
  c.layout = kernels.make_layout(groups, c.src.channels / groups, c.dst.channels / groups);
  const Buffer packed_weight = allocate(kernels.packed_weight_size(c.layout));
  const Buffer packed_bias = allocate(kernels.packed_bias_size(c.layout));
  const WeightPacking packing = {weight.data_ptr(),
                                 filter_strides(weight),
                                 bias.has_value() ? bias->data_ptr() : nullptr,
                                 dtype_of(weight),
                                 transposed,
                                 c.cols,
                                 c.layout,
                                 packed_weight.get(),
                                 packed_bias.get()};
  const int64_t weights_per_bundle = kernels.packed_weight_size(c.layout) / c.layout.bundles;
  torch::stable::parallel_for(0, c.layout.bundles, std::max<int64_t>(1, 16384 / weights_per_bundle),
                              [&](int64_t begin, int64_t end) {
                                const Buffer scratch = allocate(kernels.weight_scratch(c.layout));
                                kernels.pack_weight(packing, scratch.get(), begin, end);
                              });

  c.weight = packed_weight.get();
  c.bias = packed_bias.get();
  c.block = bundle_block(c.layout, c.src.channels_last);
  const int64_t blocks = (c.layout.bundles + c.block - 1) / c.block;
  const int64_t wanted_tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  c.bands = std::clamp<int64_t>((wanted_tasks + c.dst.batch * blocks - 1) / (c.dst.batch * blocks), 1, c.dst.height);
  torch::stable::parallel_for(0, c.dst.batch * c.bands * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate(kernels.correlate_scratch(c));
    kernels.correlate(c, scratch.get(), begin, end);
  });
}

void grouped_conv2d_fwd(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, Tensor out,
                        int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  check_fwd(x, weight, bias, out, stride_h, stride_w, groups, channels_last);
  Correlation c{};
  c.src = image_of(x, channels_last);
  c.dst = image_of(out, channels_last);
  c.rows = forward_axis(stride_h);
  c.cols = forward_axis(stride_w);
  run_correlation(c, weight, bias, /*transposed=*/false, groups);
}

void grouped_conv2d_dgrad(const Tensor grad, const Tensor weight, Tensor out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  check_dgrad(grad, weight, out, stride_h, stride_w, groups, channels_last);
  Correlation c{};
  c.src = image_of(grad, channels_last);
  c.dst = image_of(out, channels_last);
  c.rows = gradient_axis(stride_h);
  c.cols = gradient_axis(stride_w);
  run_correlation(c, weight, std::nullopt, /*transposed=*/true, groups);
}

void grouped_conv2d_wgrad(const Tensor grad, const Tensor x, Tensor out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_wgrad(grad, x, out, stride_h, stride_w, groups, channels_last);
  const Kernels& kernels = active_kernels();
  WeightGradient g{};
  g.grad = image_of(grad, channels_last);
  g.x = image_of(x, channels_last);
  g.stride_h = stride_h;
  g.stride_w = stride_w;
  g.layout = kernels.make_layout(groups, shape.group_in(), shape.group_out());
  g.block = bundle_block(g.layout, channels_last);
  g.dw = out.data_ptr();
  g.strides = filter_strides(out);
  g.dtype = dtype_of(out);
  // Chunks depend on the problem alone, so that the result does not depend on the number of threads. Each has enough
  // pixels to be worth adding up its partial result, and all partial results together stay small.
  constexpr int64_t kWantedTasks = 64;
  constexpr int64_t kPixelsPerChunk = 512;
  constexpr int64_t kPartialFloats = int64_t{1} << 23;
  const int64_t slice_size = kernels.wgrad_slice_size(g.layout);
  const int64_t blocks = (g.layout.bundles + g.block - 1) / g.block;
  const int64_t rows = shape.batch * shape.out_height;
  g.chunks = std::clamp<int64_t>(
      std::min({(kWantedTasks + blocks - 1) / blocks, rows * shape.out_width / kPixelsPerChunk,
                kPartialFloats / (g.layout.bundles * slice_size)}),
      1, rows);
  const Buffer partial = allocate(g.chunks * g.layout.bundles * slice_size);
  g.partial = partial.get();
  torch::stable::parallel_for(0, blocks * g.chunks, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate(kernels.wgrad_scratch(g));
    kernels.wgrad(g, scratch.get(), begin, end);
  });
  torch::stable::parallel_for(0, g.layout.bundles, std::max<int64_t>(1, 16384 / (g.chunks * slice_size)),
                              [&](int64_t begin, int64_t end) {
                                const Buffer scratch = allocate(kernels.weight_scratch(g.layout));
                                kernels.reduce_wgrad(g, scratch.get(), begin, end);
                              });
}

std::string cpu_capability() { return active_kernels().name; }

void set_cpu_capability(std::string name) { force_capability(name); }

}  // namespace
}  // namespace resnext::cpu

STABLE_TORCH_LIBRARY_IMPL(resnext_C, CPU, m) {
  m.impl("grouped_conv2d_fwd", TORCH_BOX(&resnext::cpu::grouped_conv2d_fwd));
  m.impl("grouped_conv2d_dgrad", TORCH_BOX(&resnext::cpu::grouped_conv2d_dgrad));
  m.impl("grouped_conv2d_wgrad", TORCH_BOX(&resnext::cpu::grouped_conv2d_wgrad));
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnext_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&resnext::cpu::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&resnext::cpu::set_cpu_capability));
}
