// Operator schemas of the extension, and the empty Python module that carries them.
//
// Only LibTorch's stable ABI and Python's limited API are used, so one binary serves every PyTorch from 2.11 and every
// Python from 3.10. Outputs are allocated by the caller (kernels/extension.py); the operators fill them. The CPU
// kernels are registered in csrc/cpu, the CUDA kernels, where built, in csrc/cuda.
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(resnext_C, m) {
  m.def(
      "grouped_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, int stride_h, int stride_w, int "
      "groups, bool channels_last) -> ()");
  m.def(
      "grouped_conv2d_dgrad(Tensor grad, Tensor weight, Tensor(a!) out, int stride_h, int stride_w, int groups, "
      "bool channels_last) -> ()");
  m.def(
      "grouped_conv2d_wgrad(Tensor grad, Tensor x, Tensor(a!) out, int stride_h, int stride_w, int groups, "
      "bool channels_last) -> ()");

  // Fused convolutions and the parts of batch norm (kernels/extension.py documents what they compute).
  m.def(
      "conv_stats_fwd(Tensor x, Tensor? center, Tensor? scale, Tensor? shift, Tensor weight, Tensor(a!) z, "
      "Tensor(b!)? mean, Tensor(c!)? var, int stride_h, int stride_w, int groups, bool channels_last) -> ()");
  m.def(
      "conv_stats_dgrad(Tensor dz, Tensor? z, Tensor? mean, Tensor? dmean, Tensor? dvar, Tensor weight, Tensor? x, "
      "Tensor? center, Tensor? scale, Tensor? shift, Tensor(a!) dx, Tensor(b!)? dscale, Tensor(c!)? dshift, "
      "int stride_h, int stride_w, int groups, bool channels_last) -> ()");
  m.def(
      "conv_stats_wgrad(Tensor dz, Tensor? z, Tensor? mean, Tensor? dmean, Tensor? dvar, Tensor x, Tensor? center, "
      "Tensor? scale, Tensor? shift, Tensor(a!) dw, int stride_h, int stride_w, int groups, bool channels_last) -> ()");
  m.def(
      "conv_affine(Tensor x, Tensor weight, Tensor? packed, Tensor? scale, Tensor? shift, Tensor? residual, bool relu, "
      "Tensor(a!) y, int stride_h, int stride_w, int groups, bool channels_last) -> ()");
  m.def("pack_pointwise(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("statistics(Tensor z, Tensor(a!) mean, Tensor(b!) var, bool channels_last) -> ()");
  m.def(
      "statistics_bwd(Tensor dz, Tensor z, Tensor mean, Tensor dmean, Tensor dvar, Tensor(a!) g, bool channels_last) "
      "-> ()");
  m.def(
      "affine_add_relu(Tensor z, Tensor? center, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor? residual_center, Tensor? residual_scale, Tensor? residual_shift, Tensor(a!) out, bool channels_last) "
      "-> ()");
  m.def(
      "affine_add_relu_bwd(Tensor dout, Tensor? out, Tensor z, Tensor? center, Tensor scale, Tensor shift, "
      "Tensor? residual, Tensor? residual_center, Tensor? residual_scale, Tensor(a!)? dz, Tensor(b!)? dresidual, "
      "Tensor(c!)? dscale, Tensor(d!)? dshift, Tensor(e!)? dresidual_scale, bool channels_last) -> ()");
  m.def(
      "affine_relu_max_pool(Tensor z, Tensor? center, Tensor scale, Tensor shift, Tensor(a!) out, Tensor(b!)? taps, "
      "bool channels_last) -> ()");
  m.def(
      "affine_relu_max_pool_bwd(Tensor dout, Tensor taps, Tensor z, Tensor? center, Tensor scale, Tensor shift, "
      "Tensor(a!)? dz, Tensor(b!)? dscale, Tensor(c!)? dshift, bool channels_last) -> ()");

  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

// Importing resnext._C loads the shared library, and with it the registrations; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
