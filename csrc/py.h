// Owned Python objects, Python's errors, interned names, and torch's objects that are needed.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace fused_optim {

// A Python exception is set.
struct PythonError {};

inline PyObject* check(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

// A reference that is owned, or none.
class Ref {
 public:
  Ref() = default;
  // Takes over a new reference; raises the PythonError that null stands for.
  static Ref own(PyObject* fresh) { return Ref(check(fresh)); }
  static Ref share(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  Ref(const Ref& other) : object_(other.object_) { Py_XINCREF(object_); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  operator PyObject*() const& { return object_; }
  operator PyObject*() && = delete;  // it would outlive its owner
  // Hands the reference over to the caller.
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  explicit Ref(PyObject* owned) : object_(owned) {}
  PyObject* object_ = nullptr;
};

// Keys of dicts and names of attributes and methods, interned.
// clang-format off
#define FUSED_OPTIM_NAMES(X) \
  X(_averages) X(_check_options) X(_convert_states) X(_create_average) X(_create_states) \
  X(_local_tensor) X(_origin) X(_outputs) X(_spec) X(_unsure) X(begin_step) X(capturable) X(device) X(differentiable) \
  X(ema_decay) X(ema_warmup) X(fused) X(item) X(master) X(maximize) X(mesh) X(nbytes) X(number_of) \
  X(param_remainder) X(params) X(placements) X(rounding_seed) X(scalar) X(shape) \
  X(state) X(state_dtype) X(step) X(storage_offset) X(untyped_storage)
// clang-format on
struct Names {
#define X(name) PyObject* name;
  FUSED_OPTIM_NAMES(X)
#undef X
};
extern Names names;

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const dlpack::ExchangeApi* api;
  PyGetSetDef* grad;
  PyObject* is_neg;
  PyObject* is_zerotensor;
  PyObject *is_inference, *is_inference_mode_enabled;
  PyObject* increment_version;
  PyObject *float32, *bfloat16;
};
extern Torch torch;

// Fills `names` and `torch`, once. Raises PythonError.
void bind_torch();

PyObject* interned(const char* name);
[[noreturn]] void raise(PyObject* type, const std::string& message);

inline Ref get_attr(PyObject* object, PyObject* name) {
  return Ref::own(PyObject_GetAttr(object, name));
}
// The value of a key, borrowed; null if the dict has none.
inline PyObject* get_item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw PythonError();
  return value;
}
inline void append(PyObject* list, PyObject* item) {
  if (PyList_Append(list, item) != 0) throw PythonError();
}
// Borrowed. A function, as a macro would not convert a Ref.
inline PyObject* list_item(PyObject* list, Py_ssize_t i) { return PyList_GET_ITEM(list, i); }
bool truth(PyObject* value);     // value: may be null
double number(PyObject* value);  // value: a number or a tensor with one element
int64_t whole_number(PyObject* value);
bool call_bool(PyObject* callable, PyObject* argument = nullptr);

// Swaps them out first: a destructor may run Python code. Keeps the memory.
template <class T>
void clear_safely(std::vector<T>& owners) {
  std::vector<T> old;
  old.swap(owners);
  old.clear();
  if (owners.empty()) owners.swap(old);
}

inline bool is_plain(PyObject* object) {
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

}  // namespace fused_optim
