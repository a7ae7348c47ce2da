// What the gatherer reads of Python objects: tensors through DLPack, numbers, dict keys.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

#include "dlpack.h"
#include "kernel.h"

namespace fused_optim {

// A Python exception is set.
struct PythonError {};

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const dlpack::ExchangeApi* api;
  PyGetSetDef* grad;
  PyObject* is_neg;
  PyObject* is_zerotensor;
  PyObject* increment_version;
};
extern Torch torch;

// Keys of dicts and names of methods, interned.
struct Names {
  PyObject *params, *step, *maximize, *differentiable, *capturable, *fused, *item, *untyped_storage,
      *nbytes, *storage_offset, *stage, *ready, *launch, *moved, *waiting, *any_waiting;
};
extern Names names;

// Looks up what is needed of torch, once. Raises PythonError.
void bind_torch();

inline PyObject* check(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}
PyObject* interned(const char* name);
[[noreturn]] void raise(PyObject* type, const std::string& message);
std::string describe(const int64_t* shape, int ndim);
const char* name_of(Dtype dtype);

inline bool is_plain(PyObject* object) {
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

struct Device {
  int32_t type, index;  // type: dlpack::CPU also for the host memory that a GPU can read
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// What DLPack says about one tensor.
struct View {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int ndim;
  Dtype dtype;  // N_DTYPES: none a kernel reads
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
  bool same_strides(const View& other) const;
  bool contiguous() const;
  int64_t reach() const;  // elements from `data` to behind the last one; numel() > 0
};

bool truth(PyObject* value);  // of a value that may be null
double number(PyObject* value);  // of a number or a tensor with one element
bool call_bool(PyObject* callable, PyObject* argument);
bool on_one_device(PyObject* a, PyObject* b);
// Whether the tensor's storage holds all its elements (it may have been resized by hand).
bool storage_holds(PyObject* tensor, const View& view);

// torch.promote_types for the dtypes here.
inline Dtype promote(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == F64 || b == F64 ? F64 : F32;
}

}  // namespace fused_optim
