// The part of DLPack 1.x that reads a tensor without owning it (dlpack.org; the layout is fixed for
// major version 1). Declared here so that building needs no torch and one build serves every torch.
#pragma once

#include <cstdint>

namespace fused_optim::dlpack {

constexpr uint32_t MAJOR_VERSION = 1;
constexpr const char* CAPSULE_NAME = "dlpack_exchange_api";

enum DeviceType : int32_t { CPU = 1, CUDA = 2, CUDA_HOST = 3, ROCM = 10, ROCM_HOST = 11 };
enum TypeCode : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, COMPLEX = 5 };

struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;    // borrowed from the tensor object
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // may be null; -1: Python error set
  void* current_work_stream;
};

}  // namespace fused_optim::dlpack
