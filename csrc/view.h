// Tensors, as DLPack shows them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernel.h"
#include "py.h"

namespace fused_optim {

std::string describe(const int64_t* shape, int ndim);
const char* name_of(Dtype dtype);

struct Device {
  int32_t type, index;  // type: dlpack::CPU also for the host memory that a GPU can read
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// One tensor's memory, as DLPack describes it.
struct View {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int ndim;
  Dtype dtype;  // a float's; N_DTYPES: none a kernel reads
  Dtype whole;  // a whole number's; else N_DTYPES
  Device device;
  bool complex;

  // False if the tensor is not a strided array (sparse, say).
  bool read(PyObject* tensor);
  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; d++) count *= shape[d];
    return count;
  }
  bool same_shape(const View& other) const;
  bool same_strides(const View& other) const;  // for views of the same shape
  bool contiguous() const;
  int64_t reach() const;  // elements from `data` to behind the last one; numel() > 0
};

// Inline: read five times per tensor and step.
inline bool View::read(PyObject* tensor) {
  dlpack::Tensor dl;
  if (torch.api->tensor_from_py_object(tensor, &dl) != 0) {
    PyErr_Clear();
    return false;
  }
  data = static_cast<char*>(dl.data) + dl.byte_offset;
  shape = dl.shape;
  strides = dl.strides;
  ndim = dl.ndim;
  device = {dl.device.type, dl.device.id};
  if (device.type == dlpack::CUDA_HOST || device.type == dlpack::ROCM_HOST)
    device.type = dlpack::CPU;
  if (device.type == dlpack::CPU) device.index = 0;
  complex = dl.dtype.code == dlpack::COMPLEX;
  dtype = whole = N_DTYPES;
  if (dl.dtype.lanes == 1 && dl.dtype.code == dlpack::FLOAT)
    dtype = dl.dtype.bits == 32   ? F32
            : dl.dtype.bits == 64 ? F64
            : dl.dtype.bits == 16 ? F16
                                  : N_DTYPES;
  else if (dl.dtype.lanes == 1 && dl.dtype.code == dlpack::BFLOAT && dl.dtype.bits == 16)
    dtype = BF16;
  else if (dl.dtype.lanes == 1 && dl.dtype.code <= dlpack::UINT && dl.dtype.bits <= 16)
    whole = dl.dtype.code == dlpack::UINT ? (dl.dtype.bits == 8 ? U8 : N_DTYPES)
            : dl.dtype.bits == 8          ? I8
            : dl.dtype.bits == 16         ? I16
                                          : N_DTYPES;
  return true;
}

inline bool View::same_shape(const View& other) const {
  return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
}

inline bool View::same_strides(const View& other) const {
  for (int d = 0; d < ndim; d++)
    if (strides[d] != other.strides[d] && shape[d] > 1) return false;
  return true;
}

inline bool View::contiguous() const {
  int64_t expected = 1;
  for (int d = ndim - 1; d >= 0; d--) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

inline int64_t View::reach() const {
  int64_t last = 0;
  for (int d = 0; d < ndim; d++) last += (shape[d] - 1) * strides[d];
  return last + 1;
}

bool on_one_device(PyObject* a, PyObject* b);
// Returns true if the storage holds all the tensor's elements (it may have been resized by hand).
bool storage_holds(PyObject* tensor, const View& view);

// torch.promote_types for the dtypes here.
inline Dtype promote(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == F64 || b == F64 ? F64 : F32;
}

}  // namespace fused_optim
