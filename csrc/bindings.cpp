// The Python module: the operators as functions of tensors, and memory for their results.
//
// Tensors come by DLPack's exchange interface, a table of C functions that PyTorch publishes. A call by PyTorch's
// dispatcher costs several times as much, and beside small convolutions that counts; what the dispatcher is for
// happens above, in the operators that kernels/ops.py and fused_ops.py define.
//
// Only DLPack, LibTorch's stable ABI and Python's limited API are used, so one binary serves every PyTorch from 2.11
// and every Python from 3.10.
#include <Python.h>

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "dlpack.h"
#include "operators.h"

namespace resnext {
namespace {

const dlpack::Exchange* exchange = nullptr;  // set when the module is imported

struct PythonError {};  // Python has been told already

// Calls work(), which returns a new reference; exceptions become Python's.
template <class Work>
PyObject* guarded(Work work) {
  try {
    return work();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

dlpack::TensorView view_of(PyObject* object) {
  dlpack::TensorView view;
  if (exchange->view(object, &view) != 0) throw PythonError();
  return view;
}

ScalarType dtype_of(const dlpack::DataType& type) {
  if (type.lanes == 1) {
    if (type.code == dlpack::kFloat && type.bits == 64) return ScalarType::Double;
    if (type.code == dlpack::kFloat && type.bits == 32) return ScalarType::Float;
    if (type.code == dlpack::kFloat && type.bits == 16) return ScalarType::Half;
    if (type.code == dlpack::kBFloat && type.bits == 16) return ScalarType::BFloat16;
    if (type.code == dlpack::kUnsigned && type.bits == 8) return ScalarType::Byte;
  }
  STD_TORCH_CHECK(false, "resnext._C: expected floating-point numbers or bytes, got DLPack type ", int{type.code},
                  " of ", int{type.bits}, " bits; cast the tensor");
}

// A tensor on the memory of the object's, for as long as that lives.
Tensor tensor_of(PyObject* object) {
  const dlpack::TensorView view = view_of(object);
  STD_TORCH_CHECK(view.device.type == dlpack::kCpu || view.device.type == dlpack::kCuda,
                  "resnext._C: expected a tensor on the CPU or a CUDA GPU, got DLPack device ",
                  view.device.type, "; move it");
  const bool on_cpu = view.device.type == dlpack::kCpu;
  int64_t elements = 1;
  for (int i = 0; i < view.dims; ++i) elements *= view.shape[i];
  STD_TORCH_CHECK(view.data != nullptr || elements == 0,
                  "resnext._C: expected a tensor with memory, got one without; clone it");
  using torch::headeronly::DeviceType;
  const size_t dims = view.dims;
  return torch::stable::from_blob(
      static_cast<char*>(view.data) + view.byte_offset, {view.shape, dims}, {view.strides, dims},
      on_cpu ? torch::stable::Device(DeviceType::CPU) : torch::stable::Device(DeviceType::CUDA, view.device.index),
      dtype_of(view.dtype));
}

template <class T>
T argument(PyObject* object) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return tensor_of(object);
  } else if constexpr (std::is_same_v<T, dlpack::TensorView>) {
    return view_of(object);
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    return object == Py_None ? OptionalTensor() : OptionalTensor(tensor_of(object));
  } else if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw PythonError();
    return truth != 0;
  } else {
    static_assert(std::is_same_v<T, int64_t>);
    const int64_t number = PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred() != nullptr) throw PythonError();
    return number;
  }
}

template <class... T, size_t... I>
std::tuple<T...> arguments(PyObject* const* objects, Py_ssize_t count, std::index_sequence<I...>) {
  if (count != sizeof...(T)) {
    PyErr_Format(PyExc_TypeError, "resnext._C: expected %zd arguments, got %zd", Py_ssize_t{sizeof...(T)}, count);
    throw PythonError();
  }
  return {argument<T>(objects[I])...};
}

template <class... T>
std::tuple<T...> arguments(PyObject* const* objects, Py_ssize_t count) {
  return arguments<T...>(objects, count, std::index_sequence_for<T...>{});
}

const Operators& operators_for(const Tensor& tensor) {
  static const Operators cpu_operators = [] {
    Operators operators{};
    cpu::add_convolutions(operators);
    cpu::add_batch_norm(operators);
    return operators;
  }();
  if (!tensor.is_cuda()) return cpu_operators;
  static const Operators cuda_operators = [] {
    Operators operators{};
#ifdef RESNEXT_CUDA
    cuda::add_convolutions(operators);
    cuda::add_batch_norm(operators);
#endif
    return operators;
  }();
  return cuda_operators;
}

// The operator of the first tensor's device.
template <auto kOperator>
struct Function;
template <class... T, void (*Operators::*kOperator)(T...)>
struct Function<kOperator> {
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    return guarded([&] {
      const auto given = arguments<std::decay_t<T>...>(objects, count);
      const auto run = operators_for(std::get<0>(given)).*kOperator;
      STD_TORCH_CHECK(run != nullptr, "resnext._C: expected tensors on a device that has this operator, got others; "
                                      "move them, or build with CUDA (RESNEXT_BUILD_CUDA=1)");
      {
        const WithoutGil released;
        std::apply(run, given);
      }
      return Py_NewRef(Py_None);
    });
  }
};

// An uninitialised tensor, of the dtype and on the device of another: (N, C, H, W) as given, dense in one layout or the
// other.
PyObject* allocate(const dlpack::TensorView& like, dlpack::DataType dtype, const int64_t* sizes, int dims, bool channels_last) {
  // PyTorch's allocator knows one order; the tensor is turned afterwards.
  int order[4] = {0, 1, 2, 3};
  if (channels_last) std::swap(order[1], order[3]), std::swap(order[1], order[2]);  // N, H, W, C
  int64_t in_memory[4];
  for (int i = 0; i < dims; ++i) in_memory[i] = sizes[order[i]];
  dlpack::TensorView prototype{};
  prototype.device = like.device;
  prototype.dtype = dtype;
  prototype.dims = dims;
  prototype.shape = in_memory;
  dlpack::OwnedTensor* allocated = nullptr;
  const auto raise = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  if (exchange->allocate(&prototype, &allocated, nullptr, raise) != 0) throw PythonError();
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    allocated->tensor.shape[order[i]] = in_memory[i];
    allocated->tensor.strides[order[i]] = stride;
    stride *= in_memory[i];
  }
  void* tensor = nullptr;
  if (exchange->to_object(allocated, &tensor) != 0) throw PythonError();
  return static_cast<PyObject*>(tensor);
}

PyObject* empty_image(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  return guarded([&] {
    const auto [like, n, c, h, w, channels_last] =
        arguments<dlpack::TensorView, int64_t, int64_t, int64_t, int64_t, bool>(objects, count);
    const int64_t sizes[] = {n, c, h, w};
    return allocate(like, like.dtype, sizes, 4, channels_last);
  });
}

PyObject* empty_vector(PyObject*, PyObject* image) {
  return guarded([&] {
    const dlpack::TensorView like = view_of(image);
    STD_TORCH_CHECK(like.dims > 1, "resnext._C: expected an image (N, C, H, W), got ", like.dims, " dimensions");
    return allocate(like, {dlpack::kFloat, 32, 1}, like.shape + 1, 1, /*channels_last=*/false);
  });
}

PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef RESNEXT_CUDA
  return PyBool_FromLong(1);
#else
  return PyBool_FromLong(0);
#endif
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(cpu::active_kernels().name); });
}

PyObject* set_cpu_capability(PyObject*, PyObject* name) {
  return guarded([&] {
    const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (text == nullptr) throw PythonError();
    cpu::force_capability(text);
    return Py_NewRef(Py_None);
  });
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

#define RESNEXT_OPERATOR(name) {#name, fast(&Function<&Operators::name>::call), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    RESNEXT_OPERATOR(grouped_conv2d_fwd),
    RESNEXT_OPERATOR(grouped_conv2d_dgrad),
    RESNEXT_OPERATOR(grouped_conv2d_wgrad),
    RESNEXT_OPERATOR(conv_stats_fwd),
    RESNEXT_OPERATOR(conv_stats_dgrad),
    RESNEXT_OPERATOR(conv_stats_wgrad),
    RESNEXT_OPERATOR(conv_affine),
    RESNEXT_OPERATOR(pack_pointwise),
    RESNEXT_OPERATOR(statistics),
    RESNEXT_OPERATOR(statistics_bwd),
    RESNEXT_OPERATOR(affine_add_relu),
    RESNEXT_OPERATOR(affine_add_relu_bwd),
    RESNEXT_OPERATOR(affine_relu_max_pool),
    RESNEXT_OPERATOR(affine_relu_max_pool_bwd),
    {"empty_image", fast(&empty_image), METH_FASTCALL, nullptr},
    {"empty_vector", &empty_vector, METH_O, nullptr},
    {"has_cuda", &has_cuda, METH_NOARGS, nullptr},
    {"cpu_capability", &cpu_capability, METH_NOARGS, nullptr},
    {"set_cpu_capability", &set_cpu_capability, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// PyTorch's table of DLPack functions, or null with a Python error.
const dlpack::Exchange* find_exchange() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch == nullptr ? nullptr : PyObject_GetAttrString(torch, "Tensor");
  PyObject* capsule = type == nullptr ? nullptr : PyObject_GetAttrString(type, dlpack::kExchangeAttribute);
  void* table = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule);
  Py_XDECREF(capsule);
  Py_XDECREF(type);
  Py_XDECREF(torch);
  const auto* found = static_cast<const dlpack::Exchange*>(table);
  if (found != nullptr && (found->version.major != dlpack::kMajorVersion || found->view == nullptr)) {
    PyErr_SetString(PyExc_ImportError, "expected PyTorch to speak version 1 of DLPack, got another");
    return nullptr;
  }
  return found;
}

}  // namespace
}  // namespace resnext

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, resnext::methods,
                                   nullptr,               nullptr, nullptr, nullptr};
  resnext::exchange = resnext::find_exchange();
  return resnext::exchange == nullptr ? nullptr : PyModule_Create(&definition);
}
