// Launchers of the plain forward and input gradient, and of the forward with a batch norm folded in, for inference.
#include "conv_launch.h"

namespace resnext::cuda {
namespace {

// make_fusion(T{}) is the fusion for elements of type T; fused_tensor, what it reads.
template <Pass kPass, typename MakeFusion>
cudaError_t launch_conv(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* source,
                        const Weight& weight, void* out, const void* fused_tensor, const MakeFusion& make_fusion) {
  if (!axes_fit_int(shape)) {
    return cudaErrorInvalidValue;
  }
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto fusion = make_fusion(element);
    const auto status =
        try_tensor_cores<T, kPass>(shape, dtype, context, source, weight, out, fusion, nullptr, {fused_tensor});
    return status.has_value()
               ? *status
               : launch_direct_conv<T, kPass>(shape, context, source, weight, static_cast<T*>(out), fusion);
  });
}

}  // namespace

cudaError_t launch_fwd(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                       const Weight& weight, const void* bias, void* out) {
  if (bias == nullptr) {
    return launch_conv<Pass::kForward>(shape, dtype, context, x, weight, out, nullptr,
                                       [](auto element) { return PlainFusion<decltype(element)>{}; });
  }
  return launch_conv<Pass::kForward>(shape, dtype, context, x, weight, out, nullptr, [&](auto element) {
    using T = decltype(element);
    return BiasFusion<T>{static_cast<const T*>(bias)};
  });
}

cudaError_t launch_dgrad(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* grad,
                         const Weight& weight, void* out) {
  return launch_conv<Pass::kDgrad>(shape, dtype, context, grad, weight, out, nullptr,
                                   [](auto element) { return PlainFusion<decltype(element)>{}; });
}

cudaError_t launch_conv_affine(const GroupedConvShape& shape, Dtype dtype, const Context& context, const void* x,
                               const Weight& weight, const Affine& affine, const void* residual, bool relu, void* y) {
  return launch_conv<Pass::kForward>(shape, dtype, context, x, weight, y, residual, [&](auto element) {
    using T = decltype(element);
    return AffineFusion<T>{affine, static_cast<const T*>(residual), relu};
  });
}

}  // namespace resnext::cuda
