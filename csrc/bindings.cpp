// Operator schemas of the extension, and the empty Python module that carries them.
//
// Only LibTorch's stable ABI and Python's limited API are used, so one binary serves every PyTorch from 2.11 and every
// Python from 3.10. Outputs are allocated by the caller (kernels/extension.py); the operators fill them. The CPU
// kernels are registered in csrc/cpu/grouped_conv.cpp, the CUDA kernels, where built, in csrc/cuda.
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
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

// Importing resnext._C loads the shared library, and with it the registrations; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
