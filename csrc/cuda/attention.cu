// The CUDA operators of channel attention, in the tensors' own layout.
#include "../batch_norm.h"
#include "../operators.h"
#include "operator.h"

namespace resnext::cuda {
namespace {

void affine_mean(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                 const OptionalTensor& shift, bool relu, const Tensor& mean, bool channels_last) {
  check_affine_mean(z, center, scale, shift, mean, channels_last);
  STD_CUDA_CHECK(launch_affine_mean(image_shape(z, channels_last), kernel_dtype(z), Call(z), z.const_data_ptr(),
                                    affine_of(center, scale, shift), relu, mutable_vector_data(mean)));
}

void affine_gate(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                 const OptionalTensor& shift, bool relu, const Tensor& gate, const OptionalTensor& residual,
                 const OptionalTensor& residual_center, const OptionalTensor& residual_scale,
                 const OptionalTensor& residual_shift, const Tensor& out, bool channels_last) {
  check_affine_gate(z, center, scale, shift, gate, residual, residual_center, residual_scale, residual_shift, out,
                    channels_last);
  STD_CUDA_CHECK(launch_affine_gate(image_shape(z, channels_last), kernel_dtype(z), Call(z), z.const_data_ptr(),
                                    affine_of(center, scale, shift), relu, vector_data(gate), data(residual),
                                    affine_of(residual_center, residual_scale, residual_shift),
                                    out.mutable_data_ptr()));
}

void affine_gate_bwd(const Tensor& dout, const OptionalTensor& out, const Tensor& z, const OptionalTensor& center,
                     const OptionalTensor& scale, const OptionalTensor& shift, bool relu,
                     const OptionalTensor& residual, const OptionalTensor& residual_center,
                     const OptionalTensor& residual_scale, const Tensor& dgate, const OptionalTensor& dresidual,
                     const OptionalTensor& dresidual_scale, const OptionalTensor& dresidual_shift,
                     bool channels_last) {
  check_affine_gate_bwd(dout, out, z, center, scale, shift, residual, residual_center, residual_scale, dgate,
                        dresidual, dresidual_scale, dresidual_shift, channels_last);
  const GateGrads grads{mutable_vector_data(dgate), mutable_data(dresidual), mutable_vector_data(dresidual_scale),
                        mutable_vector_data(dresidual_shift)};
  const void* const other = dresidual_scale.has_value() ? data(residual) : nullptr;
  STD_CUDA_CHECK(launch_affine_gate_bwd(image_shape(z, channels_last), kernel_dtype(z), Call(z),
                                        dout.const_data_ptr(), data(out), z.const_data_ptr(),
                                        affine_of(center, scale, shift), relu, other,
                                        affine_of(residual_center, residual_scale, std::nullopt), grads));
}

void gated_affine_bwd(const Tensor& z, const OptionalTensor& center, const OptionalTensor& scale,
                      const OptionalTensor& shift, bool relu, const OptionalTensor& dout, const OptionalTensor& out,
                      const OptionalTensor& gate, const OptionalTensor& added, const Tensor& dz,
                      const OptionalTensor& dscale, const OptionalTensor& dshift, bool channels_last) {
  check_gated_affine_bwd(z, center, scale, shift, dout, out, gate, added, dz, dscale, dshift, channels_last);
  const GatedGradient gradient{data(dout), data(out), vector_data(gate), vector_data(added)};
  STD_CUDA_CHECK(launch_gated_affine_bwd(image_shape(z, channels_last), kernel_dtype(z), Call(z), z.const_data_ptr(),
                                         affine_of(center, scale, shift), relu, gradient, dz.mutable_data_ptr(),
                                         mutable_vector_data(dscale), mutable_vector_data(dshift)));
}

}  // namespace

void add_attention(Operators& operators) {
  operators.affine_mean = &affine_mean;
  operators.affine_gate = &affine_gate;
  operators.affine_gate_bwd = &affine_gate_bwd;
  operators.gated_affine_bwd = &gated_affine_bwd;
}

}  // namespace resnext::cuda
