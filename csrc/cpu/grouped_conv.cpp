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

constexpr int64_t kAmxPositions = 448;  // of rows that meet the weights, or make up a gradient, at once (measured)

int64_t phase_rows(const Correlation& c) { return ceil_div(c.dst.height, c.rows.phases); }

// Whole images of a task: small ones whose rows meet the weights together, if there are tasks enough.
int64_t images_together(const Correlation& c) {
  if (!c.layout.amx) return 1;
  const int64_t positions = (c.dst.width + 1) * (phase_rows(c) + 1) * c.rows.phases;
  const int64_t most = c.dst.batch * c.layout.bundles * c.layout.tiles / wanted_tasks();
  return std::clamp<int64_t>(std::min(kAmxPositions / positions, most), 1, c.dst.batch);
}

// Rows that weights meet at once: weights of wide groups would otherwise come from far caches for a few pixels. With
// stride 2 a row needs two more of the source in the ring; weights that are near come faster than these. (Measured.)
int64_t rows_at_once(const Correlation& c, int64_t weight_size) {
  constexpr int64_t kNear = 16384;  // floats
  constexpr int64_t kPixels = 56;
  if (c.layout.amx) {
    const int64_t rows = c.images * (phase_rows(c) + 1) - 1;
    return std::clamp<int64_t>(kAmxPositions / (c.dst.width + 1) / c.rows.phases, 1, rows);
  }
  if (c.rows.in_step == 2 && c.layout.tiles * weight_size <= kNear) return 1;
  return std::clamp<int64_t>(kPixels / c.dst.width, 1, kMostRowsAtOnce);
}

int64_t packed_size(const Kernels& kernels, const Layout& layout) {
  return layout.bundles * layout.tiles * kernels.packed_weight_size(layout);
}

void pack(const Kernels& kernels, const Layout& layout, const Filters& filters, const PackedFilters& packed) {
  const int64_t weight_size = kernels.packed_weight_size(layout);
  const int64_t bias_size = kernels.packed_bias_size(layout);
  run_tasks(layout.bundles * layout.tiles, copies_at_once(weight_size), kernels.weight_scratch(layout),
            [&](int64_t begin, int64_t end, float* scratch) {
              float* bias = packed.bias == nullptr ? nullptr : packed.bias + begin * bias_size;
              const PackedFilters first = {packed.weight + begin * weight_size, bias};
              kernels.pack_weight(layout, filters, scratch, begin, end, first);
            });
}

// A weight that was packed before: by pack_pointwise, pack_winograd or pack_filters; the others are null.
struct PackedBefore {
  const float *pointwise, *winograd, *filters;
};

// Whether groups are wide enough for AMX to gain, of whose work in narrow ones most is with weights of zero. (Measured.)
bool fits_amx(const Kernels& kernels, Dtype dtype, int64_t group_src, int64_t group_dst) {
  constexpr int64_t kLeast = 5;
  return kernels.amx && dtype == Dtype::kBFloat16 && std::max(group_src, group_dst) >= kLeast;
}

// How the kernels lay out a correlation's channels. AMX takes pairs; in narrow groups, which it merges, also of an odd
// number of channels. What it does not take goes by floats: processors that have it do not multiply pairs faster.
Layout correlation_layout(const Kernels& kernels, Dtype dtype, int64_t groups, int64_t group_src, int64_t group_dst,
                          bool may_use_amx = true) {
  constexpr int64_t kMerged = 16;
  const int64_t channels = std::max(group_src, group_dst) <= kMerged ? groups * group_src : group_src;
  const bool amx = may_use_amx && fits_amx(kernels, dtype, group_src, group_dst) && channels % 2 == 0;
  const bool pairs = amx || (!kernels.amx && channels_by_pairs(kernels, dtype, group_src));
  return kernels.make_layout(groups, group_src, group_dst, pairs, amx);
}

// `results`: mean and variance, or dshift and dscale, where the write map makes them. Returns whether they are right:
// where groups are merged, and the source is not finite, they are not.
bool run_sums(Correlation& c, std::array<float*, 2> results, const float* packed_before) {
  const Kernels& kernels = active_kernels();
  const Layout& layout = c.layout;
  c.images = images_together(c);
  const int64_t image_groups = ceil_div(c.dst.batch, c.images);
  c.block = bundle_block(layout, c.src.channels_last, image_groups);
  int64_t blocks = ceil_div(layout.bundles, c.block);
  // Bands would each read all weights of a wide group, its tiles each read all of the image: whichever is less.
  const bool cuts_tiles = c.block == 1 && layout.group_dst * 9 > c.src.height * c.src.width;
  const int64_t wanted_blocks = cuts_tiles ? wanted_tasks() / (image_groups * blocks) : 1;
  c.tile_block = ceil_div(layout.tiles, std::clamp<int64_t>(wanted_blocks, 1, layout.tiles));
  blocks *= ceil_div(layout.tiles, c.tile_block);
  c.rows_at_once = rows_at_once(c, kernels.packed_weight_size(layout));
  const bool sums = takes_sums(c.write);
  c.cuts = cut_rows(c.dst, blocks, sums);
  if (c.images > 1) c.cuts.bands = 1;
  const Parts parts = parts_of(c.cuts, c.dst);
  const Buffer partial = sums ? allocate_partial(parts, c.dst.channels) : nullptr;
  c.write.partial = partial.get();
  c.write.channels = c.dst.channels;

  Buffer packed_weight, packed_bias;
  const int64_t bias_size = layout.bundles * layout.tiles * kernels.packed_bias_size(layout);
  c.packed = {};
  if (packed_before != nullptr) {
    packed_bias = allocate_zeros(bias_size);
    c.packed = {const_cast<float*>(packed_before), packed_bias.get()};
  } else if (layout.amx || c.dst.batch * c.cuts.bands > 1) {
    packed_weight = allocate(packed_size(kernels, layout));
    packed_bias = allocate(bias_size);
    c.packed = {packed_weight.get(), packed_bias.get()};
    pack(kernels, layout, c.filters, c.packed);
  }
  int not_finite = 0;
  c.not_finite = &not_finite;
  run_tasks(image_groups * c.cuts.bands * blocks, 1, kernels.correlate_scratch(c),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.correlate(c, scratch, begin, end); });
  if (not_finite != 0) return false;
  merge_results(c.write, parts, results);
  return true;
}

// As of run_sums.
void run_correlation(Correlation& c, const Tensor& weight, const OptionalTensor& bias, bool transposed,
                     const GroupedConvShape& shape, std::array<float*, 2> results = {},
                     const PackedBefore& before = {}) {
  const Kernels& kernels = active_kernels();
  c.filters = {weight.data_ptr(),
               filter_strides(weight),
               bias.has_value() ? bias->data_ptr() : nullptr,
               dtype_of(weight),
               c.src.dtype,
               transposed,
               /*mirrored=*/transposed && c.cols.phases == 1};
  const int64_t group_src = c.src.channels / shape.groups;
  const int64_t group_dst = c.dst.channels / shape.groups;
  c.layout = correlation_layout(kernels, c.src.dtype, shape.groups, group_src, group_dst);
  const TileUse use = before.winograd == nullptr ? TileUse::kProduct : TileUse::kPackedProduct;
  if (!c.layout.pairs && before.filters == nullptr && winograd_serves(shape, use) &&
      run_winograd({c.src, c.dst, c.filters, before.winograd}, c.read, c.write, shape, results)) {
    return;
  }
  if (run_sums(c, results, before.filters)) return;
  c.layout = correlation_layout(kernels, c.src.dtype, shape.groups, group_src, group_dst, /*may_use_amx=*/false);
  run_sums(c, results, nullptr);
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

// `most` channels or fewer, in parts of about one size: whole vectors.
int64_t part_of(int64_t channels, int64_t most) {
  return channels <= most ? channels : round_up(ceil_div(channels, ceil_div(channels, most)), kPanelLanes);
}

// So that a unit's sums stay in the L2 cache. (The limits are measured.)
void cut_wide_groups(WeightGradient& g) {
  const int64_t most_of_x = g.layout.amx ? 128 : 64;
  constexpr int64_t kMostOfGrad = 128;
  constexpr int64_t kNear = 1 << 17;
  if (g.x_part * g.grad_part * 9 <= kNear) return;
  g.x_part = part_of(g.layout.src_channels, most_of_x);
  g.grad_part = part_of(g.layout.dst_channels, kMostOfGrad);
}

// Cuts further, where there are fewer tasks than threads could take.
void cut_for_threads(WeightGradient& g) {
  constexpr int64_t kNarrowest = 32;
  while (units_of(g) * g.chunks < wanted_tasks() / 2) {
    int64_t& wider = g.x_part > g.grad_part ? g.x_part : g.grad_part;
    if (wider <= kNarrowest) return;
    wider = part_of(wider, wider / 2);
  }
}

// Rows of grad, with one between two images.
int64_t stacked_rows(const WeightGradient& g) { return g.grad.batch * (g.grad.height + 1) - 1; }

// Rows of grad for which sums are loaded and stored once; those of wide groups come from far.
int64_t rows_of_sums(const WeightGradient& g, int64_t slice_size) {
  if (g.layout.amx) {
    return std::clamp<int64_t>(kAmxPositions / (g.grad.width + 1), 1, ceil_div(stacked_rows(g), g.chunks));
  }
  constexpr int64_t kNear = 16384;  // floats
  const int64_t pixels = slice_size <= kNear ? 49 : 112;  // or pairs
  return std::clamp<int64_t>(pixels / steps_of(g), 1, kMostRowsAtOnce);
}

// Returns whether the sums are right, as of run_sums.
bool run_gradient_sums(WeightGradient& g, const GroupedConvShape& shape, bool amx) {
  const Kernels& kernels = active_kernels();
  g.layout = kernels.make_layout(shape.groups, shape.group_in(), shape.group_out(), /*pairs=*/false, amx);
  // Chunks depend on the problem alone, so that the result does not depend on the number of threads. (Units may: they
  // are not added up.) Each has enough pixels to be worth adding up its partial result, and all partial results
  // together stay small, unless there were few tasks.
  constexpr int64_t kMostChunks = 32;
  constexpr int64_t kPixelsPerChunk = 512;
  constexpr int64_t kPartialFloats = int64_t{1} << 20;
  constexpr int64_t kFewTasks = 16;
  const Layout& layout = g.layout;
  const int64_t rows = shape.batch * shape.out_height;
  g.x_part = layout.src_channels;
  g.grad_part = layout.dst_channels;
  const int64_t small = kPartialFloats / (layout.bundles * kernels.wgrad_slice_size(g));
  cut_wide_groups(g);
  const int64_t most = std::max(small, ceil_div(kFewTasks, units_of(g)));
  g.chunks = std::clamp<int64_t>(std::min({kMostChunks, rows * shape.out_width / kPixelsPerChunk, most}), 1, rows);
  cut_for_threads(g);
  const int64_t units = units_of(g);
  const int64_t slice_size = kernels.wgrad_slice_size(g);
  g.rows_at_once = rows_of_sums(g, slice_size);
  g.block = units > layout.bundles ? 1 : bundle_block(layout, shape.channels_last, g.chunks);
  const Buffer partial = g.chunks > 1 ? allocate(g.chunks * units * slice_size) : nullptr;
  g.partial = partial.get();
  int not_finite = 0;
  g.not_finite = &not_finite;
  run_tasks(ceil_div(units, g.block) * g.chunks, 1, kernels.wgrad_scratch(g),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.wgrad(g, scratch, begin, end); });
  if (g.chunks == 1) return not_finite == 0;
  run_tasks(units, copies_at_once(g.chunks * slice_size), kernels.weight_scratch(layout),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.reduce_wgrad(g, scratch, begin, end); });
  return not_finite == 0;
}

void run_wgrad(WeightGradient& g, const Tensor& out, const GroupedConvShape& shape) {
  const Kernels& kernels = active_kernels();
  g.stride_h = shape.stride_h;
  g.stride_w = shape.stride_w;
  const bool amx = fits_amx(kernels, g.x.dtype, shape.group_in(), shape.group_out());
  g.pairs = !kernels.amx && by_pairs(kernels, g.x.dtype);
  g.dw = out.data_ptr();
  g.strides = filter_strides(out);
  g.dtype = dtype_of(out);
  if (!amx && !g.pairs && winograd_serves(shape, TileUse::kGradient) &&
      run_winograd_gradient({g.grad, g.x, g.read_grad, g.read_x, g.dw, g.strides, g.dtype}, shape)) {
    return;
  }
  if (amx && run_gradient_sums(g, shape, /*amx=*/true)) return;
  run_gradient_sums(g, shape, /*amx=*/false);
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

void run_forward(const Tensor& x, const ReadMap& read, const Tensor& weight, const PackedBefore& before,
                 const Tensor& out, const WriteMap& write, const GroupedConvShape& shape,
                 std::array<float*, 2> results = {}) {
  if (shape.kernel == 1) {
    return run_pointwise({x, out, weight, before.pointwise, /*transposed=*/false}, read, write, shape, results);
  }
  Correlation c = forward(x, out, shape.stride_h, shape.stride_w, shape.channels_last);
  c.read = read;
  c.write = write;
  run_correlation(c, weight, std::nullopt, /*transposed=*/false, shape, results, before);
}

void conv_stats_fwd(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                    const OptionalTensor& shift, const Tensor& weight, const Tensor& z, const OptionalTensor& mean,
                    const OptionalTensor& var, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last) {
  const GroupedConvShape shape = check_conv_stats_fwd(x, center, scale, shift, weight, z, mean, var, stride_h, stride_w,
                                                      groups, channels_last, kernel_of(weight, groups, channels_last));
  const InputPrologue prologue(x, center, scale, shift);
  WriteMap write{};
  write.kind = mean.has_value() ? WriteMap::kMoments : WriteMap::kNone;
  run_forward(x, prologue.read, weight, {}, z, write, shape, {floats_of(mean), floats_of(var)});
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

Layout filters_layout(int64_t groups, int64_t group_in, int64_t group_out, Dtype dtype) {
  return correlation_layout(active_kernels(), dtype, groups, group_in, group_out);
}

const float* packed_filters_data(const OptionalTensor& packed, const Tensor& weight, int64_t groups, Dtype images,
                                 const char* op) {
  const Layout layout = filters_layout(groups, weight.size(1), weight.size(0) / groups, images);
  return packed_weight<1>(packed, ScalarType::Float, {packed_size(active_kernels(), layout)}, op);
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
  PackedBefore before{};
  if (shape.kernel == 1) {
    before.pointwise = packed_data(packed, weight, dtype_of(x), "conv_affine");
  } else if (packed.has_value() && packed->dim() == 1) {
    before.filters = packed_filters_data(packed, weight, groups, dtype_of(x), "conv_affine");
  } else {
    before.winograd = packed_tile_data(packed, x.size(1), y.size(1), "conv_affine");
  }
  run_forward(x, {}, weight, before, y, write, shape);
}

void pack_filters(const Tensor& weight, const Tensor& packed, int64_t groups) {
  constexpr const char* kOp = "pack_filters";
  const Filters filters = filters_to_pack(weight, kOp);
  const int64_t out_channels = weight.size(0);
  STD_TORCH_CHECK(groups >= 1 && out_channels % groups == 0, kOp, ": expected groups that divide ", out_channels,
                  " output channels, got ", groups, "; change groups");
  float* data = const_cast<float*>(packed_filters_data(packed, weight, groups, filters.dtype, kOp));
  const Layout layout = filters_layout(groups, weight.size(1), out_channels / groups, filters.dtype);
  pack(active_kernels(), layout, filters, {data, nullptr});
}

}  // namespace

int64_t packed_filters_size(int64_t groups, int64_t group_in, int64_t group_out, bool is_bfloat16) {
  const Dtype dtype = is_bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  return packed_size(active_kernels(), filters_layout(groups, group_in, group_out, dtype));
}

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
  operators.pack_filters = &pack_filters;
}

}  // namespace resnext::cpu
