// The CPU operators of the convolutions, plain and fused: check the tensors, plan, pack the weights, run the kernels of
// the active instruction set.
#include "../grouped_conv.h"

#include <algorithm>

#include "../operators.h"
#include "capability.h"
#include "driver.h"
#include "pointwise_conv.h"
#include "winograd_conv.h"

namespace resnext::cpu {
namespace {

Axis forward_rows(int64_t stride) { return {static_cast<int>(stride), 1, {{3, -1, {0, 1, 2}}, {}}}; }

// With stride 2, an even position of the input took part through the middle tap only, an odd one through the last tap
// of one output and the first tap of the next.
Axis gradient_rows(int64_t stride) {
  if (stride == 1) return {1, 1, {{3, -1, {2, 1, 0}}, {}}};
  return {1, 2, {{1, 0, {1}}, {2, 0, {2, 0}}}};
}

// Bundles whose rows are worked on together, in each of `tasks` parts of the work. NHWC reads the block's channels of a
// pixel at once, and long pieces come faster: as many channels as leave every thread a few tasks. NCHW reads one stream
// per channel. (The limits are measured.)
int64_t bundle_block(const Layout& layout, bool channels_last, int64_t tasks) {
  const int64_t narrowest = channels_last ? 32 : 16;
  const int64_t widest = channels_last ? 256 : 16;
  const int64_t blocks = ceil_div(wanted_tasks(), tasks);
  const int64_t channels = std::clamp<int64_t>(layout.bundles * layout.src_lanes / blocks, narrowest, widest);
  const int64_t bundles = std::clamp<int64_t>(channels / layout.src_lanes, 1, layout.bundles);
  const int64_t balanced = ceil_div(layout.bundles, bundles);
  return ceil_div(layout.bundles, balanced);
}

// `results`: mean and variance, or dshift and dscale, where the write map makes them. `packed`: the weight as
// pack_winograd leaves it, or null.
void run_correlation(Correlation& c, const Tensor& weight, const OptionalTensor& bias, bool transposed,
                     const GroupedConvShape& shape, std::array<float*, 2> results = {}, const float* packed = nullptr) {
  const Kernels& kernels = active_kernels();
  c.filters = {weight.data_ptr(),
               filter_strides(weight),
               bias.has_value() ? bias->data_ptr() : nullptr,
               dtype_of(weight),
               transposed,
               /*mirrored=*/transposed && c.cols.phases == 1};
  const int64_t group_src = c.src.channels / shape.groups;
  const bool pairs = channels_by_pairs(kernels, c.src.dtype, group_src);
  if (!pairs && winograd_serves(shape, packed == nullptr ? TileUse::kProduct : TileUse::kPackedProduct) &&
      run_winograd({c.src, c.dst, c.filters, packed}, c.read, c.write, shape, results)) {
    return;
  }
  c.layout = kernels.make_layout(shape.groups, group_src, c.dst.channels / shape.groups, pairs);
  c.block = bundle_block(c.layout, c.src.channels_last, c.dst.batch);
  const int64_t blocks = ceil_div(c.layout.bundles, c.block);
  const bool sums = takes_sums(c.write);
  c.cuts = cut_rows(c.dst, blocks, sums);
  const Parts parts = parts_of(c.cuts, c.dst);
  const Buffer partial = sums ? allocate_partial(parts, c.dst.channels) : nullptr;
  c.write.partial = partial.get();
  c.write.channels = c.dst.channels;

  Buffer packed_weight, packed_bias;
  if (c.dst.batch * c.cuts.bands > 1) {
    const int64_t weight_size = kernels.packed_weight_size(c.layout);
    const int64_t bias_size = kernels.packed_bias_size(c.layout);
    packed_weight = allocate(c.layout.bundles * weight_size);
    packed_bias = allocate(c.layout.bundles * bias_size);
    c.packed = {packed_weight.get(), packed_bias.get()};
    run_tasks(c.layout.bundles, copies_at_once(weight_size), kernels.weight_scratch(c.layout),
              [&](int64_t begin, int64_t end, float* scratch) {
                const PackedFilters first = {c.packed.weight + begin * weight_size, c.packed.bias + begin * bias_size};
                kernels.pack_weight(c.layout, c.filters, scratch, begin, end, first);
              });
  }
  run_tasks(c.dst.batch * c.cuts.bands * blocks, 1, kernels.correlate_scratch(c),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.correlate(c, scratch, begin, end); });
  merge_results(c.write, parts, results);
}

Correlation forward(const Tensor& x, const Tensor& out, int64_t stride_h, int64_t stride_w, bool channels_last) {
  Correlation c{};
  c.src = image_of(x, channels_last);
  c.dst = image_of(out, channels_last);
  c.rows = forward_rows(stride_h);
  c.cols = {static_cast<int>(stride_w), 1};
  return c;
}

Correlation input_gradient(const Tensor& grad, const Tensor& out, int64_t stride_h, int64_t stride_w,
                           bool channels_last) {
  Correlation c{};
  c.src = image_of(grad, channels_last);
  c.dst = image_of(out, channels_last);
  c.rows = gradient_rows(stride_h);
  c.cols = {1, static_cast<int>(stride_w)};
  return c;
}

void run_wgrad(WeightGradient& g, const Tensor& out, const GroupedConvShape& shape) {
  const Kernels& kernels = active_kernels();
  g.stride_h = shape.stride_h;
  g.stride_w = shape.stride_w;
  g.layout = kernels.make_layout(shape.groups, shape.group_in(), shape.group_out(), /*pairs=*/false);
  g.pairs = by_pairs(kernels, g.x.dtype);
  g.dw = out.data_ptr();
  g.strides = filter_strides(out);
  g.dtype = dtype_of(out);
  if (!g.pairs && winograd_serves(shape, TileUse::kGradient) &&
      run_winograd_gradient({g.grad, g.x, g.read_grad, g.read_x, g.dw, g.strides, g.dtype}, shape)) {
    return;
  }
  // Chunks depend on the problem alone, so that the result does not depend on the number of threads. Each has enough
  // pixels to be worth adding up its partial result, and all partial results together stay small.
  constexpr int64_t kMostChunks = 32;
  constexpr int64_t kPixelsPerChunk = 512;
  constexpr int64_t kPartialFloats = int64_t{1} << 20;
  const int64_t slice_size = kernels.wgrad_slice_size(g.layout);
  const int64_t rows = shape.batch * shape.out_height;
  g.chunks = std::clamp<int64_t>(std::min({kMostChunks, rows * shape.out_width / kPixelsPerChunk,
                                           kPartialFloats / (g.layout.bundles * slice_size)}),
                                 1, rows);
  g.block = bundle_block(g.layout, shape.channels_last, g.chunks);
  const int64_t blocks = ceil_div(g.layout.bundles, g.block);
  const Buffer partial = g.chunks > 1 ? allocate(g.chunks * g.layout.bundles * slice_size) : nullptr;
  g.partial = partial.get();
  run_tasks(blocks * g.chunks, 1, kernels.wgrad_scratch(g),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.wgrad(g, scratch, begin, end); });
  if (g.chunks == 1) return;
  run_tasks(g.layout.bundles, copies_at_once(g.chunks * slice_size), kernels.weight_scratch(g.layout),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.reduce_wgrad(g, scratch, begin, end); });
}

void grouped_conv2d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                        int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_fwd(x, weight, bias, out, stride_h, stride_w, groups, channels_last);
  Correlation c = forward(x, out, stride_h, stride_w, channels_last);
  run_correlation(c, weight, bias, /*transposed=*/false, shape);
}

void grouped_conv2d_dgrad(const Tensor& grad, const Tensor& weight, const Tensor& out, int64_t stride_h,
                          int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_dgrad(grad, weight, out, stride_h, stride_w, groups, channels_last);
  Correlation c = input_gradient(grad, out, stride_h, stride_w, channels_last);
  run_correlation(c, weight, std::nullopt, /*transposed=*/true, shape);
}

void grouped_conv2d_wgrad(const Tensor& grad, const Tensor& x, const Tensor& out, int64_t stride_h, int64_t stride_w,
                          int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_wgrad(grad, x, out, stride_h, stride_w, groups, channels_last);
  WeightGradient g{};
  g.grad = image_of(grad, channels_last);
  g.x = image_of(x, channels_last);
  run_wgrad(g, out, shape);
}

// The batch norm and ReLU before a convolution, applied as its input is read.
struct InputPrologue {
  OwnedAffine affine;
  ReadMap read;
  InputPrologue(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift)
      : affine(affine_of(x.size(1), center, scale, shift)),
        read{scale.has_value() ? ReadMap::kAffineRelu : ReadMap::kNone, affine.affine, nullptr} {}
};

// What the statistics of z add to its gradient, added as the gradient is read.
struct GradPrologue {
  OwnedAffine affine{};
  ReadMap read{};
  GradPrologue(const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& dmean,
               const OptionalTensor& dvar) {
    if (!z.has_value()) return;
    affine = statistics_gradient(*mean, *dmean, *dvar, z->numel() / z->size(1));
    read = {ReadMap::kAddAffine, affine.affine, z->data_ptr()};
  }
};

void run_forward(const Tensor& x, const ReadMap& read, const Tensor& weight, const float* packed, const Tensor& out,
                 const WriteMap& write, const GroupedConvShape& shape, std::array<float*, 2> results = {}) {
  if (shape.kernel == 1) {
    return run_pointwise({x, out, weight, packed, /*transposed=*/false}, read, write, shape, results);
  }
  Correlation c = forward(x, out, shape.stride_h, shape.stride_w, shape.channels_last);
  c.read = read;
  c.write = write;
  run_correlation(c, weight, std::nullopt, /*transposed=*/false, shape, results, packed);
}

void conv_stats_fwd(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                    const OptionalTensor& shift, const Tensor& weight, const Tensor& z, const OptionalTensor& mean,
                    const OptionalTensor& var, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_conv_stats_fwd(x, center, scale, shift, weight, z, mean, var, stride_h, stride_w,
                                                      groups, channels_last, kernel_of(weight, groups, channels_last));
  const InputPrologue prologue(x, center, scale, shift);
  WriteMap write{};
  write.kind = mean.has_value() ? WriteMap::kMoments : WriteMap::kNone;
  run_forward(x, prologue.read, weight, nullptr, z, write, shape, {floats_of(mean), floats_of(var)});
}

void conv_stats_dgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                      const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& weight,
                      const OptionalTensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, const Tensor& dx, const OptionalTensor& dscale,
                      const OptionalTensor& dshift, const OptionalTensor& onto, int64_t stride_h, int64_t stride_w,
                      int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_conv_stats_dgrad(
      dz, z, mean, dmean, dvar, weight, x, center, scale, shift, dx, dscale, dshift, onto, stride_h, stride_w, groups,
      channels_last, kernel_of(weight, groups, channels_last));
  const GradPrologue prologue(z, mean, dmean, dvar);
  const OwnedAffine affine = affine_of(dx.size(1), center, scale, shift);
  WriteMap write{};
  write.affine = affine.affine;
  if (x.has_value()) {
    write.kind = WriteMap::kReluGradient;
    write.other = x->data_ptr();
  } else if (onto.has_value()) {
    write.kind = WriteMap::kAffineAdd;
    write.other = onto->data_ptr();
  }
  const std::array<float*, 2> results = {floats_of(dshift), floats_of(dscale)};
  if (shape.kernel == 1) {
    return run_pointwise({dz, dx, weight, nullptr, /*transposed=*/true}, prologue.read, write, shape, results);
  }
  Correlation c = input_gradient(dz, dx, stride_h, stride_w, channels_last);
  c.read = prologue.read;
  c.write = write;
  run_correlation(c, weight, std::nullopt, /*transposed=*/true, shape, results);
}

void conv_stats_wgrad(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                      const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& x,
                      const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift,
                      const Tensor& dw, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape =
      check_conv_stats_wgrad(dz, z, mean, dmean, dvar, x, center, scale, shift, dw, stride_h, stride_w, groups,
                             channels_last, kernel_of(dw, groups, channels_last));
  const GradPrologue grad_prologue(z, mean, dmean, dvar);
  const InputPrologue prologue(x, center, scale, shift);
  if (shape.kernel == 1) return run_pointwise_gradient(dz, grad_prologue.read, x, prologue.read, dw, shape);
  WeightGradient g{};
  g.grad = image_of(dz, channels_last);
  g.x = image_of(x, channels_last);
  g.read_grad = grad_prologue.read;
  g.read_x = prologue.read;
  run_wgrad(g, dw, shape);
}

void conv_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& packed, const OptionalTensor& scale,
                 const OptionalTensor& shift, const OptionalTensor& residual, bool relu, const Tensor& y,
                 int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_conv_affine(x, weight, packed, scale, shift, residual, y, stride_h, stride_w,
                                                   groups, channels_last, kernel_of(weight, groups, channels_last));
  const OwnedAffine affine = affine_of(y.size(1), std::nullopt, scale, shift);
  WriteMap write{};
  write.kind = residual.has_value() ? WriteMap::kAffineAdd : WriteMap::kAffine;
  write.affine = affine.affine;
  write.other = residual.has_value() ? residual->data_ptr() : nullptr;
  write.relu = relu;
  const float* packed_weight = shape.kernel == 1 ? packed_data(packed, weight, "conv_affine")
                                                 : packed_tile_data(packed, x.size(1), y.size(1), "conv_affine");
  run_forward(x, {}, weight, packed_weight, y, write, shape);
}

}  // namespace

void add_convolutions(Operators& operators) {
  operators.grouped_conv2d_fwd = &grouped_conv2d_fwd;
  operators.grouped_conv2d_dgrad = &grouped_conv2d_dgrad;
  operators.grouped_conv2d_wgrad = &grouped_conv2d_wgrad;
  operators.conv_stats_fwd = &conv_stats_fwd;
  operators.conv_stats_dgrad = &conv_stats_dgrad;
  operators.conv_stats_wgrad = &conv_stats_wgrad;
  operators.conv_affine = &conv_affine;
  operators.pack_pointwise = &pack_pointwise;
  operators.pack_winograd = &pack_winograd;
}

}  // namespace resnext::cpu
