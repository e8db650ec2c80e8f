// The part of DLPack's binary interface that bindings.cpp needs, version 1: structures whose layout is fixed by
// https://dmlc.github.io/dlpack/latest/c_api.html. (PyTorch's own copy may not be included beside its stable ABI.)
#pragma once

#include <cstdint>

namespace resnext::dlpack {

constexpr uint32_t kMajorVersion = 1;

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
struct Device {
  int32_t type;
  int32_t index;
};

enum TypeCode : uint8_t { kUnsigned = 1, kFloat = 2, kBFloat = 4 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;  // 1, but for vectors
};

struct TensorView {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct OwnedTensor {
  Version version;
  void* owner;
  void (*deleter)(OwnedTensor* self);
  uint64_t flags;
  TensorView tensor;
};

// What a framework publishes, as the capsule `kExchangeCapsule` in `kExchangeAttribute` of its tensor type. Functions
// return 0, or -1 with a Python error; `set_error` is told instead where it is an argument. None of them waits for a
// GPU.
constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
struct Exchange {
  Version version;
  Exchange* older;
  int (*allocate)(const TensorView* like, OwnedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*own)(void* object, OwnedTensor** out);
  int (*to_object)(OwnedTensor* tensor, void** object);  // takes the tensor over
  int (*view)(void* object, TensorView* out);            // may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace resnext::dlpack
