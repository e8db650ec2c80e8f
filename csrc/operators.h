// The operators that a device has: what kernels/extension.py calls, and documents. Results are the caller's memory.
#pragma once

#include "checks.h"

namespace resnext {

struct Operators {
  void (*grouped_conv2d_fwd)(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                             int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last);
  void (*grouped_conv2d_dgrad)(const Tensor& grad, const Tensor& weight, const Tensor& out, int64_t stride_h,
                               int64_t stride_w, int64_t groups, bool channels_last);
  void (*grouped_conv2d_wgrad)(const Tensor& grad, const Tensor& x, const Tensor& out, int64_t stride_h,
                               int64_t stride_w, int64_t groups, bool channels_last);

  // Fused convolutions. `onto` is dx, where it is added to: of 1x1 convolutions, on the CPU.
  void (*conv_stats_fwd)(const Tensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                         const OptionalTensor& shift, const Tensor& weight, const Tensor& z, const OptionalTensor& mean,
                         const OptionalTensor& var, int64_t stride_h, int64_t stride_w, int64_t groups,
                         bool channels_last);
  void (*conv_stats_dgrad)(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                           const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& weight,
                           const OptionalTensor& x, const OptionalTensor& center, const OptionalTensor& scale,
                           const OptionalTensor& shift, const Tensor& dx, const OptionalTensor& dscale,
                           const OptionalTensor& dshift, const OptionalTensor& onto, int64_t stride_h,
                           int64_t stride_w, int64_t groups, bool channels_last);
  void (*conv_stats_wgrad)(const Tensor& dz, const OptionalTensor& z, const OptionalTensor& mean,
                           const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& x,
                           const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift,
                           const Tensor& dw, int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last);
  void (*conv_affine)(const Tensor& x, const Tensor& weight, const OptionalTensor& packed, const OptionalTensor& scale,
                      const OptionalTensor& shift, const OptionalTensor& residual, bool relu, const Tensor& y,
                      int64_t stride_h, int64_t stride_w, int64_t groups, bool channels_last);

  // The parts of batch norm, and the stem's max pool.
  void (*statistics)(const Tensor& z, const Tensor& mean, const Tensor& var, bool channels_last);
  void (*statistics_bwd)(const Tensor& dz, const Tensor& z, const Tensor& mean, const Tensor& dmean, const Tensor& dvar,
                         const Tensor& g, bool channels_last);
  void (*affine_add_relu)(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                          const OptionalTensor& residual, const OptionalTensor& residual_center,
                          const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const Tensor& out,
                          bool channels_last);
  void (*affine_add_relu_bwd)(const Tensor& dout, const OptionalTensor& out, const Tensor& z,
                              const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                              const OptionalTensor& residual, const OptionalTensor& residual_center,
                              const OptionalTensor& residual_scale, const OptionalTensor& dz,
                              const OptionalTensor& dresidual, const OptionalTensor& dscale,
                              const OptionalTensor& dshift, const OptionalTensor& dresidual_scale, bool channels_last);
  void (*affine_relu_max_pool)(const Tensor& z, const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                               const Tensor& out, const OptionalTensor& taps, bool channels_last);
  void (*affine_relu_max_pool_bwd)(const Tensor& dout, const Tensor& taps, const Tensor& z,
                                   const OptionalTensor& center, const Tensor& scale, const Tensor& shift,
                                   const OptionalTensor& dz, const OptionalTensor& dscale, const OptionalTensor& dshift,
                                   bool channels_last);

  // Channel attention: what is called gate, dgate, mean or added is (N, C, 1, 1) in float32.
  void (*affine_mean)(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, bool relu, const Tensor& mean, bool channels_last);
  void (*affine_gate)(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, bool relu, const Tensor& gate, const OptionalTensor& residual,
                      const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                      const OptionalTensor& residual_shift, const Tensor& out, bool channels_last);
  void (*affine_gate_bwd)(const Tensor& dout, const OptionalTensor& out, const Tensor& z, const OptionalTensor& center,
                          const OptionalTensor& scale, const OptionalTensor& shift, bool relu,
                          const OptionalTensor& residual, const OptionalTensor& residual_center,
                          const OptionalTensor& residual_scale, const Tensor& dgate, const OptionalTensor& dresidual,
                          const OptionalTensor& dresidual_scale, const OptionalTensor& dresidual_shift,
                          bool channels_last);
  void (*gated_affine_bwd)(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                           const OptionalTensor& shift, bool relu, const OptionalTensor& dout,
                           const OptionalTensor& out, const OptionalTensor& gate, const OptionalTensor& added,
                           const Tensor& dz, const OptionalTensor& dscale, const OptionalTensor& dshift,
                           bool channels_last);

  // On the CPU only.
  void (*laid_out)(const Tensor& x, const Tensor& out, bool channels_last);
  void (*bn_affine)(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                    const Tensor& scale, const Tensor& shift, double eps);
  void (*bn_affine_bwd)(const Tensor& dscale, const Tensor& dshift, const Tensor& var, const OptionalTensor& gamma,
                        const Tensor& dmean, const Tensor& dvar, const OptionalTensor& dgamma,
                        const OptionalTensor& dbeta, double eps);
  void (*pack_pointwise)(const Tensor& weight, const Tensor& packed);
  void (*pack_winograd)(const Tensor& weight, const Tensor& packed);
  void (*pack_filters)(const Tensor& weight, const Tensor& packed, int64_t groups);
};

namespace cpu {
// Floats of what pack_filters makes, for the active instruction set, of a weight in bfloat16 or another dtype.
int64_t packed_filters_size(int64_t groups, int64_t group_in, int64_t group_out, bool is_bfloat16);
void add_convolutions(Operators& operators);
void add_batch_norm(Operators& operators);
}  // namespace cpu

namespace cuda {
void add_convolutions(Operators& operators);
void add_batch_norm(Operators& operators);
void add_attention(Operators& operators);
}  // namespace cuda

}  // namespace resnext
