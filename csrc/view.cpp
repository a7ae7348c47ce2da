#include "view.h"

namespace fused_optim {

Torch torch;
Names names;

PyObject* interned(const char* name) { return check(PyUnicode_InternFromString(name)); }

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError();
}

std::string describe(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int d = 0; d < ndim; d++) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

const char* name_of(Dtype dtype) {
  constexpr const char* NAMES[] = {"float32", "float64", "bfloat16", "float16",
                                   "other",   "int8",    "uint8",    "int16"};
  return NAMES[dtype];
}

bool truth(PyObject* value) {
  const int result = value == nullptr ? 0 : PyObject_IsTrue(value);
  if (result < 0) throw PythonError();
  return result;
}

bool on_one_device(PyObject* a, PyObject* b) {
  PyObject* device_a = check(PyObject_GetAttrString(a, "device"));
  PyObject* device_b = PyObject_GetAttrString(b, "device");
  const int equal = device_b == nullptr ? -1 : PyObject_RichCompareBool(device_a, device_b, Py_EQ);
  Py_DECREF(device_a);
  Py_XDECREF(device_b);
  if (equal < 0) throw PythonError();
  return equal;
}

bool call_bool(PyObject* callable, PyObject* argument) {
  PyObject* result = check(argument == nullptr ? PyObject_CallNoArgs(callable)
                                               : PyObject_CallOneArg(callable, argument));
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  PyObject* scalar = value;
  if (PyObject_TypeCheck(value, torch.tensor))
    scalar = check(PyObject_CallMethodNoArgs(value, names.item));
  else
    Py_INCREF(scalar);
  const double result = PyFloat_AsDouble(scalar);
  Py_DECREF(scalar);
  if (result == -1.0 && PyErr_Occurred()) throw PythonError();
  return result;
}

static int64_t call_int(PyObject* object, PyObject* method) {
  PyObject* result = check(PyObject_CallMethodNoArgs(object, method));
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool storage_holds(PyObject* tensor, const View& view) {
  PyObject* storage = check(PyObject_CallMethodNoArgs(tensor, names.untyped_storage));
  int64_t nbytes;
  try {
    nbytes = call_int(storage, names.nbytes);
  } catch (PythonError&) {
    Py_DECREF(storage);
    throw;
  }
  Py_DECREF(storage);
  return (call_int(tensor, names.storage_offset) + view.reach()) *
             ITEMSIZE[view.dtype == N_DTYPES ? view.whole : view.dtype] <=
         nbytes;
}

void bind_torch() {
  names = {interned("params"),
           interned("step"),
           interned("maximize"),
           interned("differentiable"),
           interned("capturable"),
           interned("fused"),
           interned("item"),
           interned("untyped_storage"),
           interned("nbytes"),
           interned("storage_offset"),
           interned("stage"),
           interned("ready"),
           interned("launch"),
           interned("moved"),
           interned("waiting"),
           interned("any_waiting"),
           interned("ema_decay"),
           interned("ema_warmup"),
           interned("counted"),
           interned("state_dtype"),
           interned("master"),
           interned("rounding_seed"),
           interned("param_remainder"),
           interned("param_indices"),
           interned("_local_tensor"),
           interned("_spec"),
           interned("placements"),
           interned("mesh"),
           interned("shape")};
  PyObject* module = check(PyImport_ImportModule("torch"));
  const auto get = [](PyObject* from, const char* name) {
    return check(PyObject_GetAttrString(from, name));
  };
  PyObject* tensor = get(module, "Tensor");
  PyObject* nn = get(module, "nn");
  PyObject* C = get(module, "_C");
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  torch.parameter = reinterpret_cast<PyTypeObject*>(get(nn, "Parameter"));
  torch.is_neg = get(tensor, "is_neg");
  torch.is_zerotensor = get(tensor, "_is_zerotensor");
  torch.is_inference = get(tensor, "is_inference");
  torch.is_inference_mode_enabled = get(module, "is_inference_mode_enabled");
  torch.increment_version = get(C, "_increment_version");
  torch.float32 = get(module, "float32");
  torch.bfloat16 = get(module, "bfloat16");
  PyObject* grad = get(tensor, "grad");
  torch.grad = Py_TYPE(grad) == &PyGetSetDescr_Type
                   ? reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset
                   : nullptr;
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    raise(PyExc_ImportError, "this torch has no DLPack C exchange API (torch >= 2.10 has)");
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::CAPSULE_NAME));
  if (api == nullptr) throw PythonError();
  while (api != nullptr && api->header.major != dlpack::MAJOR_VERSION)
    api = static_cast<const dlpack::ExchangeApi*>(api->header.previous);
  if (api == nullptr || api->tensor_from_py_object == nullptr || torch.grad == nullptr)
    raise(PyExc_ImportError, "this torch offers no DLPack C exchange API of major version 1");
  torch.api = api;
  Py_DECREF(nn);
  Py_DECREF(C);
  Py_DECREF(module);  // the types, functions and the capsule stay for the life of the process
}

}  // namespace fused_optim
