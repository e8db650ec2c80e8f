// Checks of the elementwise operators: batch norm's statistics, affine-add-relu and the stem's max pool.
#pragma once

#include "checks.h"

namespace resnext {

// An affine map scale * (v - center) + shift over the channels of `like`.
inline void check_affine(const Checks& check, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                         const Tensor& like) {
  check.vector(center, "center", like.size(1), like, "z");
  check.vector(scale, "scale", like.size(1), ScalarType::Float, like, "z");
  check.vector(shift, "shift", like.size(1), ScalarType::Float, like, "z");
}

// A dense z of a dtype the kernels serve.
inline Sizes4 check_z(const Checks& check, const Tensor& z, bool channels_last) {
  const Sizes4 sizes = check.sizes4(z, "z");
  check.dtype(z, "z");
  check.dense(z, "z", channels_last);
  return sizes;
}

inline void check_image_if_given(const Checks& check, const OptionalTensor& tensor, const char* name,
                                 const Tensor& z, bool channels_last) {
  if (tensor.has_value()) check.image(*tensor, name, check.sizes4(z, "z"), z, "z", channels_last);
}

inline void check_statistics(const Tensor& z, const Tensor& mean, const Tensor& var, bool channels_last) {
  const Checks check("statistics");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check.vector(mean, "mean", sizes[1], ScalarType::Float, z, "z");
  check.vector(var, "var", sizes[1], ScalarType::Float, z, "z");
}

inline void check_statistics_bwd(const Tensor& dz, const Tensor& z, const Tensor& mean, const Tensor& dmean,
                                 const Tensor& dvar, const Tensor& g, bool channels_last) {
  const Checks check("statistics_bwd");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check.image(dz, "dz", sizes, z, "z", channels_last);
  check.image(g, "g", sizes, z, "z", channels_last);
  check.vector(mean, "mean", sizes[1], ScalarType::Float, z, "z");
  check.vector(dmean, "dmean", sizes[1], ScalarType::Float, z, "z");
  check.vector(dvar, "dvar", sizes[1], ScalarType::Float, z, "z");
}

// A residual that may be absent, and its affine, which may be too.
inline void check_residual(const Checks& check, const OptionalTensor& residual, const OptionalTensor& residual_center,
                           const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const Tensor& z,
                           bool channels_last) {
  check_image_if_given(check, residual, "residual", z, channels_last);
  check.vector(residual_center, "residual_center", z.size(1), z, "z");
  check.vector(residual_scale, "residual_scale", z.size(1), z, "z");
  check.vector(residual_shift, "residual_shift", z.size(1), z, "z");
  const bool mapped = check.together({&residual_scale, &residual_shift}, "residual_scale and residual_shift");
  check.given_with(residual_center, "residual_center", mapped, "residual_scale");
  check.given_with(residual_scale, "residual_scale", residual.has_value(), "residual");
}

// The residual's affine map is scale and shift (forward) or scale alone (backward), with or without a center.
inline void check_affine_add_relu(const Tensor& z, const OptionalTensor& center, const Tensor& scale,
                                  const Tensor& shift, const OptionalTensor& residual,
                                  const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                                  const OptionalTensor& residual_shift, const Tensor& out, bool channels_last) {
  const Checks check("affine_add_relu");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine(check, center, scale, shift, z);
  check_residual(check, residual, residual_center, residual_scale, residual_shift, z, channels_last);
  check.image(out, "output", sizes, z, "z", channels_last);
}

inline void check_affine_add_relu_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z,
                                      const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                                      const OptionalTensor& residual, const OptionalTensor& residual_center,
                                      const OptionalTensor& residual_scale, const OptionalTensor& dz,
                                      const OptionalTensor& dresidual, const OptionalTensor& dscale,
                                      const OptionalTensor& dshift, const OptionalTensor& dresidual_scale,
                                      bool channels_last) {
  const Checks check("affine_add_relu_bwd");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine(check, center, scale, shift, z);
  check.image(dout, "dout", sizes, z, "z", channels_last);
  check_image_if_given(check, out, "out", z, channels_last);
  check_image_if_given(check, residual, "residual", z, channels_last);
  check_image_if_given(check, dz, "dz", z, channels_last);
  check_image_if_given(check, dresidual, "dresidual", z, channels_last);
  check.vector(residual_center, "residual_center", sizes[1], z, "z");
  check.vector(residual_scale, "residual_scale", sizes[1], z, "z");
  check.vector(dscale, "dscale", sizes[1], z, "z");
  check.vector(dshift, "dshift", sizes[1], z, "z");
  check.vector(dresidual_scale, "dresidual_scale", sizes[1], z, "z");
  const bool mapped = check.together({&residual, &residual_scale}, "residual and residual_scale");
  check.given_with(residual_center, "residual_center", mapped, "residual_scale");
  check.given_with(dresidual_scale, "dresidual_scale", mapped, "residual_scale");
  check.given_with(residual, "residual", out.has_value(), "out");
  check.given_with(dresidual, "dresidual", out.has_value(), "out");
  check.together({&dscale, &dshift}, "dscale and dshift");
  check.given_with(dresidual_scale, "dresidual_scale", dscale.has_value(), "dscale");
}

// Of channel attention: an affine that may be absent, and something of each channel of each image.
inline void check_affine_if_given(const Checks& check, const OptionalTensor& center, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const Tensor& z) {
  check.vector(center, "center", z.size(1), z, "z");
  check.vector(scale, "scale", z.size(1), z, "z");
  check.vector(shift, "shift", z.size(1), z, "z");
  const bool mapped = check.together({&scale, &shift}, "scale and shift");
  check.given_with(center, "center", mapped, "scale");
}

inline void check_of_images(const Checks& check, const OptionalTensor& tensor, const char* name, const Tensor& z) {
  if (!tensor.has_value()) return;
  check.sizes(*tensor, name, {z.size(0), z.size(1), 1, 1});
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, check.op(), ": expected ", name,
                  " of dtype Float, got ", toString(tensor->scalar_type()), "; cast it");
  check.same_device(*tensor, name, z, "z");
  check.dense(*tensor, name, /*channels_last=*/false);
}

inline void check_affine_mean(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                              const OptionalTensor& shift, const Tensor& mean, bool channels_last) {
  const Checks check("affine_mean");
  check_z(check, z, channels_last);
  check_affine_if_given(check, center, scale, shift, z);
  check_of_images(check, mean, "mean", z);
}

inline void check_affine_gate(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                              const OptionalTensor& shift, const Tensor& gate, const OptionalTensor& residual,
                              const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                              const OptionalTensor& residual_shift, const Tensor& out, bool channels_last) {
  const Checks check("affine_gate");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine_if_given(check, center, scale, shift, z);
  check_of_images(check, gate, "gate", z);
  check_residual(check, residual, residual_center, residual_scale, residual_shift, z, channels_last);
  check.image(out, "output", sizes, z, "z", channels_last);
}

inline void check_affine_gate_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z,
                                  const OptionalTensor& center, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const OptionalTensor& residual,
                                  const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                                  const Tensor& dgate, const OptionalTensor& dresidual,
                                  const OptionalTensor& dresidual_scale, const OptionalTensor& dresidual_shift,
                                  bool channels_last) {
  const Checks check("affine_gate_bwd");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine_if_given(check, center, scale, shift, z);
  check.image(dout, "dout", sizes, z, "z", channels_last);
  check_image_if_given(check, out, "out", z, channels_last);
  check_image_if_given(check, residual, "residual", z, channels_last);
  check_image_if_given(check, dresidual, "dresidual", z, channels_last);
  check_of_images(check, dgate, "dgate", z);
  check.vector(residual_center, "residual_center", sizes[1], z, "z");
  check.vector(residual_scale, "residual_scale", sizes[1], z, "z");
  check.vector(dresidual_scale, "dresidual_scale", sizes[1], z, "z");
  check.vector(dresidual_shift, "dresidual_shift", sizes[1], z, "z");
  const bool mapped = check.together({&residual, &residual_scale}, "residual and residual_scale");
  check.given_with(residual_center, "residual_center", mapped, "residual_scale");
  check.given_with(dresidual, "dresidual", out.has_value(), "out");
  check.given_with(residual, "residual", out.has_value(), "out");
  check.together({&dresidual_scale, &dresidual_shift}, "dresidual_scale and dresidual_shift");
  check.given_with(dresidual_scale, "dresidual_scale", mapped, "residual_scale");
}

inline void check_gated_affine_bwd(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                                   const OptionalTensor& shift, const OptionalTensor& dout, const OptionalTensor& out,
                                   const OptionalTensor& gate, const OptionalTensor& added, const Tensor& dz,
                                   const OptionalTensor& dscale, const OptionalTensor& dshift, bool channels_last) {
  const Checks check("gated_affine_bwd");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine_if_given(check, center, scale, shift, z);
  check_image_if_given(check, dout, "dout", z, channels_last);
  check_image_if_given(check, out, "out", z, channels_last);
  check_of_images(check, gate, "gate", z);
  check_of_images(check, added, "added", z);
  check.image(dz, "dz", sizes, z, "z", channels_last);
  check.vector(dscale, "dscale", sizes[1], z, "z");
  check.vector(dshift, "dshift", sizes[1], z, "z");
  const bool gated = check.together({&dout, &gate}, "dout and gate");
  check.given_with(out, "out", gated, "dout");
  check.together({&dscale, &dshift}, "dscale and dshift");
}

// The pool's output is ((H - 1) / 2 + 1, (W - 1) / 2 + 1), as a 3x3 window of stride 2 and padding 1 leaves it.
inline Sizes4 pooled_sizes(const Sizes4& sizes) {
  return {sizes[0], sizes[1], (sizes[2] - 1) / 2 + 1, (sizes[3] - 1) / 2 + 1};
}

inline void check_taps(const Checks& check, const Tensor& taps, const Sizes4& pooled, const Tensor& z,
                       bool channels_last) {
  STD_TORCH_CHECK(taps.scalar_type() == ScalarType::Byte, check.op(), ": expected taps of dtype Byte, got ",
                  toString(taps.scalar_type()), "; give what the forward pass returned");
  check.sizes(taps, "taps", pooled);
  check.same_device(taps, "taps", z, "z");
  check.dense(taps, "taps", channels_last);
}

inline void check_affine_relu_max_pool(const Tensor& z, const OptionalTensor& center, const Tensor& scale,
                                       const Tensor& shift, const Tensor& out, const OptionalTensor& taps,
                                       bool channels_last) {
  const Checks check("affine_relu_max_pool");
  const Sizes4 pooled = pooled_sizes(check_z(check, z, channels_last));
  check_affine(check, center, scale, shift, z);
  check.image(out, "output", pooled, z, "z", channels_last);
  if (taps.has_value()) check_taps(check, *taps, pooled, z, channels_last);
}

inline void check_affine_relu_max_pool_bwd(const Tensor& dout, const Tensor& taps, const Tensor& z,
                                           const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                                           const OptionalTensor& dz, const OptionalTensor& dscale,
                                           const OptionalTensor& dshift, bool channels_last) {
  const Checks check("affine_relu_max_pool_bwd");
  const Sizes4 sizes = check_z(check, z, channels_last);
  check_affine(check, center, scale, shift, z);
  check.image(dout, "dout", pooled_sizes(sizes), z, "z", channels_last);
  check_taps(check, taps, pooled_sizes(sizes), z, channels_last);
  check_image_if_given(check, dz, "dz", z, channels_last);
  check.vector(dscale, "dscale", sizes[1], z, "z");
  check.vector(dshift, "dshift", sizes[1], z, "z");
  check.together({&dscale, &dshift}, "dscale and dshift");
}

// From one layout to the other: `out` is dense in channels_last or else NCHW, x the other way round.
inline void check_laid_out(const Tensor& x, const Tensor& out, bool channels_last) {
  const Checks check("laid_out");
  const Sizes4 sizes = check_z(check, x, !channels_last);
  check.image(out, "out", sizes, x, "x", channels_last);
}

// Vectors of one length, float32, on one device.
inline void check_bn_affine(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                            const OptionalTensor& beta, const Tensor& scale, const Tensor& shift) {
  const Checks check("bn_affine");
  const int64_t channels = mean.numel();
  check.vector(mean, "mean", channels, ScalarType::Float, mean, "mean");
  check.vector(var, "var", channels, ScalarType::Float, mean, "mean");
  check.vector(gamma, "gamma", channels, mean, "mean");
  check.vector(beta, "beta", channels, mean, "mean");
  check.vector(scale, "scale", channels, ScalarType::Float, mean, "mean");
  check.vector(shift, "shift", channels, ScalarType::Float, mean, "mean");
}

inline void check_bn_affine_bwd(const Tensor& dscale, const Tensor& dshift, const Tensor& var,
                                const OptionalTensor& gamma, const Tensor& dmean, const Tensor& dvar,
                                const OptionalTensor& dgamma, const OptionalTensor& dbeta) {
  const Checks check("bn_affine_bwd");
  const int64_t channels = dscale.numel();
  check.vector(dscale, "dscale", channels, ScalarType::Float, dscale, "dscale");
  check.vector(dshift, "dshift", channels, ScalarType::Float, dscale, "dscale");
  check.vector(var, "var", channels, ScalarType::Float, dscale, "dscale");
  check.vector(gamma, "gamma", channels, dscale, "dscale");
  check.vector(dmean, "dmean", channels, ScalarType::Float, dscale, "dscale");
  check.vector(dvar, "dvar", channels, ScalarType::Float, dscale, "dscale");
  check.vector(dgamma, "dgamma", channels, dscale, "dscale");
  check.vector(dbeta, "dbeta", channels, dscale, "dscale");
  check.together({&gamma, &dgamma, &dbeta}, "gamma, dgamma and dbeta");
}

}  // namespace resnext
