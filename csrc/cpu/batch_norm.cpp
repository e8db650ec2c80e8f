// The CPU operators around the convolutions: batch norm's statistics and vectors, affine-add-relu, the stem's max pool.
#include "../batch_norm.h"

#include <algorithm>
#include <cmath>

#include "../operators.h"
#include "capability.h"
#include "driver.h"

namespace resnext::cpu {
namespace {

void* data_of(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// by_image: something belongs to a single image.
Elementwise elementwise_of(Elementwise::Kind kind, const Tensor& z, bool channels_last, bool by_image = false) {
  Elementwise e{};
  e.kind = kind;
  e.dtype = dtype_of(z);
  e.channels_last = channels_last;
  e.batch = z.size(0);
  e.channels = z.size(1);
  e.pixels = z.size(2) * z.size(3);
  e.z = z.data_ptr();
  // By the problem alone, as results must not depend on threads: parts of a plane fit the L1 cache, parts of the batch
  // are enough for every thread and have enough pixels for their partial sums to be small beside them.
  e.part_pixels = channels_last ? std::clamp<int64_t>(e.batch * e.pixels / 64, 64, 512) : 4096;
  if (channels_last && !by_image) {
    e.pixels *= e.batch;
    e.batch = 1;
  }
  return e;
}

Parts parts_of(const Elementwise& e) {
  return {e.batch, ceil_div(e.pixels, e.part_pixels), e.pixels, e.part_pixels};
}

void run_elementwise(const Elementwise& e) {
  const int64_t tasks = e.channels_last ? parts_of(e).count() : e.batch * e.channels;
  const int64_t elements = e.channels_last ? e.part_pixels * e.channels : e.pixels;
  const Kernels& kernels = active_kernels();
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / elements),
                              [&](int64_t begin, int64_t end) { kernels.elementwise(e, begin, end); });
}

void statistics(const Tensor& z, const Tensor& mean, const Tensor& var, bool channels_last) {
  check_statistics(z, mean, var, channels_last);
  Elementwise e = elementwise_of(Elementwise::kMoments, z, channels_last);
  const Parts parts = parts_of(e);
  const Buffer partial = allocate_partial(parts, e.channels);
  e.partial = partial.get();
  run_elementwise(e);
  merge_moments(e.partial, parts, e.channels, floats_of(mean), floats_of(var));
}

void statistics_bwd(const Tensor& dz, const Tensor& z, const Tensor& mean, const Tensor& dmean, const Tensor& dvar,
                    const Tensor& g, bool channels_last) {
  check_statistics_bwd(dz, z, mean, dmean, dvar, g, channels_last);
  const OwnedAffine affine = statistics_gradient(mean, dmean, dvar, z.numel() / z.size(1));
  Elementwise e = elementwise_of(Elementwise::kAddAffine, z, channels_last);
  e.affine = affine.affine;
  e.dout = dz.data_ptr();
  e.result = g.data_ptr();
  run_elementwise(e);
}

void affine_add_relu(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                     const OptionalTensor& residual, const OptionalTensor& residual_center,
                     const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const Tensor& out,
                     bool channels_last) {
  check_affine_add_relu(z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, out,
                        channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  const OwnedAffine residual_affine = affine_of(z.size(1), residual_center, residual_scale, residual_shift);
  Elementwise e = elementwise_of(Elementwise::kAffineAddRelu, z, channels_last);
  e.affine = affine.affine;
  e.residual_affine = residual_affine.affine;
  e.residual = data_of(residual);
  e.result = out.data_ptr();
  run_elementwise(e);
}

void affine_add_relu_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z, const OptionalTensor& center,
                         const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                         const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                         const OptionalTensor& dz, const OptionalTensor& dresidual, const OptionalTensor& dscale,
                         const OptionalTensor& dshift, const OptionalTensor& dresidual_scale, bool channels_last) {
  check_affine_add_relu_bwd(dout, out, z, center, scale, shift, residual, residual_center, residual_scale, dz,
                            dresidual, dscale, dshift, dresidual_scale, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  const OwnedAffine residual_affine = affine_of(z.size(1), residual_center, residual_scale, std::nullopt);
  Elementwise e = elementwise_of(Elementwise::kAffineAddReluGradient, z, channels_last);
  const bool sums = dshift.has_value();
  const Parts parts = parts_of(e);
  const Buffer partial = sums ? allocate_partial(parts, e.channels) : nullptr;
  e.affine = affine.affine;
  e.residual_affine = residual_affine.affine;
  e.dout = dout.data_ptr();
  e.out = data_of(out);
  if (out.has_value() && !sums) e.z = nullptr;  // not needed
  if (dresidual_scale.has_value()) e.residual = data_of(residual);
  e.result = data_of(dz);
  e.dresidual = data_of(dresidual);
  e.partial = partial.get();
  run_elementwise(e);
  if (!sums) return;
  merge_sums(e.partial, parts, e.channels, 0, floats_of(dshift));
  merge_sums(e.partial, parts, e.channels, 1, floats_of(dscale));
  if (dresidual_scale.has_value()) merge_sums(e.partial, parts, e.channels, 2, floats_of(dresidual_scale));
}

// Adds up the first sum of each image by itself.
void merge_images(const Elementwise& e, float factor, float* sums) {
  const Parts parts = parts_of(e);
  const Parts of_image = {1, parts.per_image, parts.image_pixels, parts.part_pixels};
  for (int64_t n = 0; n < e.batch; ++n) {
    merge_sums(e.partial + n * parts.per_image * kPartialSums * e.channels, of_image, e.channels, 0,
               sums + n * e.channels);
  }
  for (int64_t i = 0; factor != 1.0f && i < e.batch * e.channels; ++i) sums[i] *= factor;
}

void affine_mean(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                 const OptionalTensor& shift, bool relu, const Tensor& mean, bool channels_last) {
  check_affine_mean(z, center, scale, shift, mean, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  Elementwise e = elementwise_of(Elementwise::kMean, z, channels_last, /*by_image=*/true);
  const Buffer partial = allocate_partial(parts_of(e), e.channels);
  e.affine = affine.affine;
  e.relu = relu;
  e.partial = partial.get();
  run_elementwise(e);
  merge_images(e, 1.0f / static_cast<float>(e.pixels), floats_of(mean));
}

void affine_gate(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                 const OptionalTensor& shift, bool relu, const Tensor& gate, const OptionalTensor& residual,
                 const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                 const OptionalTensor& residual_shift, const Tensor& out, bool channels_last) {
  check_affine_gate(z, center, scale, shift, gate, residual, residual_center, residual_scale, residual_shift, out,
                    channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  const OwnedAffine residual_affine = affine_of(z.size(1), residual_center, residual_scale, residual_shift);
  Elementwise e = elementwise_of(Elementwise::kGate, z, channels_last, /*by_image=*/true);
  e.affine = affine.affine;
  e.residual_affine = residual_affine.affine;
  e.relu = relu;
  e.gate = floats_of(gate);
  e.residual = data_of(residual);
  e.result = out.data_ptr();
  run_elementwise(e);
}

void affine_gate_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z, const OptionalTensor& center,
                     const OptionalTensor& scale, const OptionalTensor& shift, bool relu,
                     const OptionalTensor& residual, const OptionalTensor& residual_center,
                     const OptionalTensor& residual_scale, const Tensor& dgate, const OptionalTensor& dresidual,
                     const OptionalTensor& dresidual_scale, const OptionalTensor& dresidual_shift,
                     bool channels_last) {
  check_affine_gate_bwd(dout, out, z, center, scale, shift, residual, residual_center, residual_scale, dgate,
                        dresidual, dresidual_scale, dresidual_shift, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  const OwnedAffine residual_affine = affine_of(z.size(1), residual_center, residual_scale, std::nullopt);
  Elementwise e = elementwise_of(Elementwise::kGateSums, z, channels_last, /*by_image=*/true);
  const Parts parts = parts_of(e);
  const Buffer partial = allocate_partial(parts, e.channels);
  e.affine = affine.affine;
  e.residual_affine = residual_affine.affine;
  e.relu = relu;
  e.dout = dout.data_ptr();
  e.out = data_of(out);
  if (dresidual_scale.has_value()) e.residual = data_of(residual);
  e.dresidual = data_of(dresidual);
  e.partial = partial.get();
  run_elementwise(e);
  merge_images(e, 1.0f, floats_of(dgate));
  if (!dresidual_scale.has_value()) return;
  merge_sums(e.partial, parts, e.channels, 1, floats_of(dresidual_shift));
  merge_sums(e.partial, parts, e.channels, 2, floats_of(dresidual_scale));
}

void gated_affine_bwd(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, bool relu, const OptionalTensor& dout, const OptionalTensor& out,
                      const OptionalTensor& gate, const OptionalTensor& added, const Tensor& dz,
                      const OptionalTensor& dscale, const OptionalTensor& dshift, bool channels_last) {
  check_gated_affine_bwd(z, center, scale, shift, dout, out, gate, added, dz, dscale, dshift, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  Elementwise e = elementwise_of(Elementwise::kGateGradient, z, channels_last, /*by_image=*/true);
  const Parts parts = parts_of(e);
  const Buffer partial = dshift.has_value() ? allocate_partial(parts, e.channels) : nullptr;
  e.affine = affine.affine;
  e.relu = relu;
  e.dout = data_of(dout);
  e.out = data_of(out);
  e.gate = floats_of(gate);
  e.added = floats_of(added);
  e.result = dz.data_ptr();
  e.partial = partial.get();
  run_elementwise(e);
  if (!dshift.has_value()) return;
  merge_sums(e.partial, parts, e.channels, 0, floats_of(dshift));
  merge_sums(e.partial, parts, e.channels, 1, floats_of(dscale));
}

// Channels worked on together: as for the convolution's blocks of bundles.
MaxPool max_pool_of(const Tensor& z, const Tensor& pooled, const OptionalTensor& taps, bool channels_last) {
  MaxPool p{};
  p.z = image_of(z, channels_last);
  p.pooled = image_of(pooled, channels_last);
  if (taps.has_value()) p.taps = image_of(*taps, channels_last);
  p.lanes = channels_last ? 32 : 16;
  return p;
}

int64_t blocks_of(const MaxPool& p) { return ceil_div(p.z.channels, p.lanes); }

void affine_relu_max_pool(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                          const Tensor& out, const OptionalTensor& taps, bool channels_last) {
  check_affine_relu_max_pool(z, center, scale, shift, out, taps, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  MaxPool p = max_pool_of(z, out, taps, channels_last);
  p.read = {ReadMap::kAffineRelu, affine.affine, nullptr};
  p.cuts = cut_rows(p.pooled, blocks_of(p), /*sums=*/false);
  const Kernels& kernels = active_kernels();
  run_tasks(p.z.batch * p.cuts.bands * blocks_of(p), 1, kernels.max_pool_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.max_pool(p, scratch, begin, end); });
}

void affine_relu_max_pool_bwd(const Tensor& dout, const Tensor& taps, const Tensor& z, const OptionalTensor& center,
                              const Tensor& scale, const Tensor& shift, const OptionalTensor& dz,
                              const OptionalTensor& dscale, const OptionalTensor& dshift, bool channels_last) {
  check_affine_relu_max_pool_bwd(dout, taps, z, center, scale, shift, dz, dscale, dshift, channels_last);
  const OwnedAffine affine = affine_of(z.size(1), center, scale, shift);
  MaxPool p = max_pool_of(z, dout, taps, channels_last);
  const Buffer unwanted = dz.has_value() ? nullptr : allocate(z.numel());
  p.z.data = dz.has_value() ? dz->data_ptr() : unwanted.get();
  p.write.kind = WriteMap::kReluGradient;
  p.write.affine = affine.affine;
  p.write.other = z.data_ptr();
  p.write.channels = p.z.channels;
  p.cuts = cut_rows(p.z, blocks_of(p), /*sums=*/true);
  const Parts parts = parts_of(p.cuts, p.z);
  const Buffer partial = allocate_partial(parts, p.z.channels);
  p.write.partial = partial.get();
  const Kernels& kernels = active_kernels();
  run_tasks(p.z.batch * p.cuts.bands * blocks_of(p), 1, kernels.max_pool_gradient_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.max_pool_gradient(p, scratch, begin, end); });
  if (!dshift.has_value()) return;
  merge_sums(partial.get(), parts, p.z.channels, 0, floats_of(dshift));
  merge_sums(partial.get(), parts, p.z.channels, 1, floats_of(dscale));
}

void laid_out(const Tensor& x, const Tensor& out, bool channels_last) {
  check_laid_out(x, out, channels_last);
  LayoutChange change{image_of(x, !channels_last), image_of(out, channels_last), /*lanes=*/64};
  // Rows are whole in memory in both layouts, so that several can count as one.
  constexpr int64_t kRowPixels = 256;
  const int64_t height = x.size(2);
  int64_t rows = std::clamp<int64_t>(kRowPixels / x.size(3), 1, height);
  while (height % rows != 0) --rows;
  for (Image* image : {&change.src, &change.dst}) {
    image->height /= rows;
    image->width *= rows;
  }
  const Kernels& kernels = active_kernels();
  const int64_t tasks = x.size(0) * change.src.height * ceil_div(x.size(1), change.lanes);
  run_tasks(tasks, copies_at_once(kernels.layout_change_scratch(change)), kernels.layout_change_scratch(change),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.change_layout(change, scratch, begin, end); });
}

// As torch.rsqrt has it.
float rsqrt(float value) { return 1.0f / std::sqrt(value); }

void bn_affine(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
               const Tensor& scale, const Tensor& shift, double eps) {
  check_bn_affine(mean, var, gamma, beta, scale, shift);
  const float *vars = floats_of(var), *gammas = floats_of(gamma), *betas = floats_of(beta);
  float *scales = floats_of(scale), *shifts = floats_of(shift);
  for (int64_t c = 0; c < mean.numel(); ++c) {
    const float rstd = rsqrt(vars[c] + static_cast<float>(eps));
    scales[c] = gammas == nullptr ? rstd : rstd * gammas[c];
    shifts[c] = betas == nullptr ? 0.0f : betas[c];
  }
}

void bn_affine_bwd(const Tensor& dscale, const Tensor& dshift, const Tensor& var, const OptionalTensor& gamma,
                   const Tensor& dmean, const Tensor& dvar, const OptionalTensor& dgamma, const OptionalTensor& dbeta,
                   double eps) {
  check_bn_affine_bwd(dscale, dshift, var, gamma, dmean, dvar, dgamma, dbeta);
  const float *dscales = floats_of(dscale), *dshifts = floats_of(dshift), *vars = floats_of(var);
  const float* gammas = floats_of(gamma);
  float *dmeans = floats_of(dmean), *dvars = floats_of(dvar), *dgammas = floats_of(dgamma), *dbetas = floats_of(dbeta);
  for (int64_t c = 0; c < dscale.numel(); ++c) {
    const float rstd = rsqrt(vars[c] + static_cast<float>(eps));
    const float scale = gammas == nullptr ? rstd : rstd * gammas[c];
    dmeans[c] = -scale * dshifts[c];
    dvars[c] = dscales[c] * scale * (rstd * rstd) * -0.5f;
    if (gammas == nullptr) continue;
    dgammas[c] = dscales[c] * rstd;
    dbetas[c] = dshifts[c];
  }
}

}  // namespace

void add_batch_norm(Operators& operators) {
  operators.statistics = &statistics;
  operators.statistics_bwd = &statistics_bwd;
  operators.affine_add_relu = &affine_add_relu;
  operators.affine_add_relu_bwd = &affine_add_relu_bwd;
  operators.affine_mean = &affine_mean;
  operators.affine_gate = &affine_gate;
  operators.affine_gate_bwd = &affine_gate_bwd;
  operators.gated_affine_bwd = &gated_affine_bwd;
  operators.affine_relu_max_pool = &affine_relu_max_pool;
  operators.affine_relu_max_pool_bwd = &affine_relu_max_pool_bwd;
  operators.laid_out = &laid_out;
  operators.bn_affine = &bn_affine;
  operators.bn_affine_bwd = &bn_affine_bwd;
}

}  // namespace resnext::cpu
