// The Python module: the operators as functions of tensors, which make their results where given a size in their place.
//
// Tensors come by DLPack's exchange interface, a table of C functions that PyTorch publishes. A call by PyTorch's
// dispatcher costs several times as much, and beside small convolutions that counts; what the dispatcher is for
// happens above, in the operators that kernels/ops.py and fused_ops.py define.
//
// Only DLPack, LibTorch's stable ABI and Python's limited API are used, so one binary serves every PyTorch from 2.11
// and every Python from 3.10.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "cpu/winograd_conv.h"
#include "dlpack.h"
#include "grouped_conv.h"
#include "operators.h"

namespace resnext {
namespace {

// Set when the module is imported.
const dlpack::Exchange* exchange = nullptr;
PyObject* float32 = nullptr;  // torch.float32

bool poisons = false;  // for tests: results are full of NaN before an operator fills them

constexpr dlpack::DataType kFloat32 = {dlpack::kFloat, 32, 1};

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

// A tensor on the memory of another, for as long as that lives.
Tensor tensor_of(const dlpack::TensorView& view) {
  STD_TORCH_CHECK(view.device.type == dlpack::kCpu || view.device.type == dlpack::kCuda,
                  "resnext._C: expected a tensor on the CPU or a CUDA GPU, got DLPack device ", view.device.type,
                  "; move it");
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

// Sizes and strides of a new tensor, dense: an image (N, C, H, W) or weight in either layout, or a vector.
struct Shape {
  Shape(const int64_t* given, int dims, bool channels_last) : dims(dims) {
    constexpr int kNchw[4] = {0, 1, 2, 3};
    constexpr int kNhwc[4] = {0, 2, 3, 1};
    const int* order = channels_last ? kNhwc : kNchw;
    int64_t stride = 1;
    for (int i = dims - 1; i >= 0; --i) {
      in_memory[i] = sizes[order[i]] = given[order[i]];
      strides[order[i]] = stride;
      stride *= in_memory[i];
    }
  }

  int dims;
  int64_t sizes[4], strides[4], in_memory[4];  // the last: sizes in the order of memory
};

// PyTorch's allocator by DLPack, which knows one layout: the tensor is turned afterwards.
PyObject* allocate_on_cpu(Shape shape, dlpack::DataType dtype) {
  dlpack::TensorView prototype{};
  prototype.device.type = dlpack::kCpu;
  prototype.dtype = dtype;
  prototype.dims = shape.dims;
  prototype.shape = shape.in_memory;
  dlpack::OwnedTensor* allocated = nullptr;
  const auto raise = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  if (exchange->allocate(&prototype, &allocated, nullptr, raise) != 0) throw PythonError();
  std::copy_n(shape.sizes, shape.dims, allocated->tensor.shape);
  std::copy_n(shape.strides, shape.dims, allocated->tensor.strides);
  void* tensor = nullptr;
  if (exchange->to_object(allocated, &tensor) != 0) throw PythonError();
  return static_cast<PyObject*>(tensor);
}

// The GPU's allocator must know a tensor's memory as its own, for Tensor.record_stream. `dtype`: null for that of
// `like`.
PyObject* allocate_like(PyObject* like, const Shape& shape, PyObject* dtype) {
  const auto tuple = [&](const int64_t* numbers) {
    PyObject* result = PyTuple_New(shape.dims);
    for (int i = 0; result != nullptr && i < shape.dims; ++i) {
      PyTuple_SetItem(result, i, PyLong_FromLongLong(numbers[i]));
    }
    return result;
  };
  PyObject* const method = PyObject_GetAttrString(like, "new_empty_strided");
  PyObject* const positional = Py_BuildValue("(NN)", tuple(shape.sizes), tuple(shape.strides));
  PyObject* const named = dtype == nullptr ? Py_BuildValue("{}") : Py_BuildValue("{s:O}", "dtype", dtype);
  PyObject* tensor = nullptr;
  if (method != nullptr && positional != nullptr && named != nullptr) tensor = PyObject_Call(method, positional, named);
  Py_XDECREF(named);
  Py_XDECREF(positional);
  Py_XDECREF(method);
  if (tensor == nullptr) throw PythonError();
  return tensor;
}

int64_t integer(PyObject* object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred() != nullptr) throw PythonError();
  return number;
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw PythonError();
  return value != 0;
}

// The arguments of a call, and the results that are made for it. In place of a tensor stands the size of a new one:
// four numbers, of the first tensor's dtype, dense in the layout that the last argument tells; a fifth that is true for
// float32, and a sixth that tells the layout instead; or one number, float32.
class Call {
 public:
  Call(PyObject* const* objects, Py_ssize_t count) : objects_(objects), count_(count) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (int i = 0; i < made_; ++i) Py_DECREF(results_[i]);
  }

  template <class T>
  T get(size_t index) {
    PyObject* const object = objects_[index];
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      return object == Py_None ? OptionalTensor() : OptionalTensor(get<Tensor>(index));
    } else if constexpr (std::is_same_v<T, Tensor>) {
      if (PyTuple_Check(object) == 0 && PyLong_Check(object) == 0) return tensor_of(view_of(object));
      const Tensor result = tensor_of(view_of(make(object)));
      return poisons ? torch::stable::fill_(result, NAN) : result;
    } else if constexpr (std::is_same_v<T, bool>) {
      return truth(object);
    } else if constexpr (std::is_same_v<T, double>) {
      const double number = PyFloat_AsDouble(object);
      if (number == -1.0 && PyErr_Occurred() != nullptr) throw PythonError();
      return number;
    } else {
      static_assert(std::is_same_v<T, int64_t>);
      return integer(object);
    }
  }

  // None, the only result, or a tuple of all.
  PyObject* results() {
    if (made_ == 0) return Py_NewRef(Py_None);
    if (made_ == 1) return results_[--made_];
    PyObject* all = PyTuple_New(made_);
    if (all == nullptr) throw PythonError();
    const int count = std::exchange(made_, 0);
    for (int i = 0; i < count; ++i) PyTuple_SetItem(all, i, results_[i]);
    return all;
  }

 private:
  static constexpr int kMost = 8;

  PyObject* make(PyObject* size) {
    STD_TORCH_CHECK(made_ < kMost, "resnext._C: expected fewer results");
    int64_t sizes[4];
    const bool vector = PyLong_Check(size) != 0;
    bool wide = vector, channels_last = false;
    if (vector) {
      sizes[0] = integer(size);
    } else {
      const Py_ssize_t count = PyTuple_Size(size);
      STD_TORCH_CHECK(count >= 4 && count <= 6, "resnext._C: expected a size (N, C, H, W), got ", count, " numbers");
      for (int i = 0; i < 4; ++i) sizes[i] = integer(PyTuple_GetItem(size, i));
      wide = count > 4 && truth(PyTuple_GetItem(size, 4));
      channels_last = truth(count == 6 ? PyTuple_GetItem(size, 5) : objects_[count_ - 1]);
    }
    const Shape shape(sizes, vector ? 1 : 4, channels_last);
    const dlpack::TensorView like = view_of(objects_[0]);
    PyObject* const result = like.device.type != dlpack::kCpu
                                 ? allocate_like(objects_[0], shape, wide ? float32 : nullptr)
                                 : allocate_on_cpu(shape, wide ? kFloat32 : like.dtype);
    return results_[made_++] = result;
  }

  PyObject* const* objects_;
  Py_ssize_t count_;
  PyObject* results_[kMost];
  int made_ = 0;
};

template <class... T, size_t... I>
std::tuple<T...> arguments(Call& call, std::index_sequence<I...>) {
  return {call.get<T>(I)...};
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
    cuda::add_attention(operators);
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
      if (count != sizeof...(T)) {
        PyErr_Format(PyExc_TypeError, "resnext._C: expected %d arguments, got %zd", int{sizeof...(T)}, count);
        throw PythonError();
      }
      Call call(objects, count);
      const auto given = arguments<std::decay_t<T>...>(call, std::index_sequence_for<T...>{});
      const auto run = operators_for(std::get<0>(given)).*kOperator;
      STD_TORCH_CHECK(run != nullptr,
                      "resnext._C: expected tensors on a device that has this operator, got others; "
                      "move them, or build with CUDA (RESNEXT_BUILD_CUDA=1)");
      {
        const WithoutGil released;
        std::apply(run, given);
      }
      return call.results();
    });
  }
};

PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef RESNEXT_CUDA
  return PyBool_FromLong(1);
#else
  return PyBool_FromLong(0);
#endif
}

PyObject* poison_results(PyObject*, PyObject* wanted) {
  return guarded([&] {
    poisons = truth(wanted);
    return Py_NewRef(Py_None);
  });
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

// Whether Winograd's algorithm is the faster way for "product", "packed_product" or "gradient" of a 3x3 convolution
// with stride 1 in channels_last: (use, batch, C_in, C_out, height, width, groups).
PyObject* winograd_serves(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  return guarded([&] {
    STD_TORCH_CHECK(count == 7, "winograd_serves: expected 7 arguments, got ", count);
    const char* use = PyUnicode_AsUTF8AndSize(objects[0], nullptr);
    if (use == nullptr) throw PythonError();
    int64_t sizes[6];
    for (int i = 0; i < 6; ++i) sizes[i] = integer(objects[i + 1]);
    const auto [batch, in_channels, out_channels, height, width, groups] = sizes;
    const GroupedConvShape shape = make_shape("winograd_serves", {batch, in_channels, height, width}, out_channels,
                                              /*stride_h=*/1, /*stride_w=*/1, groups, /*channels_last=*/true,
                                              /*kernel=*/3);
    return PyBool_FromLong(cpu::winograd_serves(shape, cpu::tile_use(use)) ? 1 : 0);
  });
}

// How many floats pack_filters makes: (C_out, C_in, groups, whether it is bfloat16).
PyObject* packed_filters_size(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  return guarded([&] {
    STD_TORCH_CHECK(count == 4, "packed_filters_size: expected 4 arguments, got ", count);
    const int64_t groups = integer(objects[2]);
    STD_TORCH_CHECK(groups > 0, "packed_filters_size: expected groups, got ", groups);
    const int64_t group_in = integer(objects[1]) / groups;
    return PyLong_FromLongLong(
        cpu::packed_filters_size(groups, group_in, integer(objects[0]) / groups, truth(objects[3])));
  });
}

#define RESNEXT_OPERATOR(name)                                                                            \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function<&Operators::name>::call)), \
   METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    RESNEXT_OPERATOR(grouped_conv2d_fwd),
    RESNEXT_OPERATOR(grouped_conv2d_dgrad),
    RESNEXT_OPERATOR(grouped_conv2d_wgrad),
    RESNEXT_OPERATOR(conv_stats_fwd),
    RESNEXT_OPERATOR(conv_stats_dgrad),
    RESNEXT_OPERATOR(conv_stats_wgrad),
    RESNEXT_OPERATOR(conv_affine),
    RESNEXT_OPERATOR(statistics),
    RESNEXT_OPERATOR(statistics_bwd),
    RESNEXT_OPERATOR(affine_add_relu),
    RESNEXT_OPERATOR(affine_add_relu_bwd),
    RESNEXT_OPERATOR(affine_mean),
    RESNEXT_OPERATOR(affine_gate),
    RESNEXT_OPERATOR(affine_gate_bwd),
    RESNEXT_OPERATOR(gated_affine_bwd),
    RESNEXT_OPERATOR(affine_relu_max_pool),
    RESNEXT_OPERATOR(affine_relu_max_pool_bwd),
    RESNEXT_OPERATOR(laid_out),
    RESNEXT_OPERATOR(bn_affine),
    RESNEXT_OPERATOR(bn_affine_bwd),
    RESNEXT_OPERATOR(pack_pointwise),
    RESNEXT_OPERATOR(pack_winograd),
    RESNEXT_OPERATOR(pack_filters),
    {"packed_filters_size", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&packed_filters_size)),
     METH_FASTCALL, nullptr},
    {"winograd_serves", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&winograd_serves)), METH_FASTCALL,
     nullptr},
    {"has_cuda", &has_cuda, METH_NOARGS, nullptr},
    {"poison_results", &poison_results, METH_O, nullptr},
    {"cpu_capability", &cpu_capability, METH_NOARGS, nullptr},
    {"set_cpu_capability", &set_cpu_capability, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// Finds what PyTorch publishes; false with a Python error.
bool find_exchange() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch == nullptr ? nullptr : PyObject_GetAttrString(torch, "Tensor");
  PyObject* capsule = type == nullptr ? nullptr : PyObject_GetAttrString(type, dlpack::kExchangeAttribute);
  void* table = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule);
  exchange = static_cast<const dlpack::Exchange*>(table);
  float32 = table == nullptr ? nullptr : PyObject_GetAttrString(torch, "float32");
  Py_XDECREF(capsule);
  Py_XDECREF(type);
  Py_XDECREF(torch);
  if (float32 == nullptr) return false;
  if (exchange->version.major == dlpack::kMajorVersion && exchange->view != nullptr) return true;
  PyErr_SetString(PyExc_ImportError, "expected PyTorch to speak version 1 of DLPack, got another");
  return false;
}

}  // namespace
}  // namespace resnext

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, resnext::methods, nullptr, nullptr, nullptr, nullptr};
  return resnext::find_exchange() ? PyModule_Create(&definition) : nullptr;
}
