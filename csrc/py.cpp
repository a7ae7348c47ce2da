#include "py.h"

namespace fused_optim {

Torch torch;
Names names;

PyObject* interned(const char* name) { return check(PyUnicode_InternFromString(name)); }

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError();
}

bool truth(PyObject* value) {
  const int result = value == nullptr ? 0 : PyObject_IsTrue(value);
  if (result < 0) throw PythonError();
  return result;
}

bool call_bool(PyObject* callable, PyObject* argument) {
  const Ref result = Ref::own(argument == nullptr ? PyObject_CallNoArgs(callable)
                                                  : PyObject_CallOneArg(callable, argument));
  return result == Py_True;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const Ref scalar = PyObject_TypeCheck(value, torch.tensor)
                         ? Ref::own(PyObject_CallMethodNoArgs(value, names.item))
                         : Ref::share(value);
  const double result = PyFloat_AsDouble(scalar);
  if (result == -1.0 && PyErr_Occurred()) throw PythonError();
  return result;
}

int64_t whole_number(PyObject* value) {
  const int64_t result = PyLong_AsLongLong(value);
  if (result == -1 && PyErr_Occurred()) throw PythonError();
  return result;
}

void bind_torch() {
#define X(name) names.name = interned(#name);
  FUSED_OPTIM_NAMES(X)
#undef X
  const Ref module = Ref::own(PyImport_ImportModule("torch"));
  const auto get = [](PyObject* from, const char* name) {
    return Ref::own(PyObject_GetAttrString(from, name));
  };
  const Ref nn = get(module, "nn"), C = get(module, "_C");
  const Ref tensor = get(module, "Tensor"), grad = get(tensor, "grad");
  // These references stay for the life of the process.
  torch.tensor = reinterpret_cast<PyTypeObject*>(Ref(tensor).release());
  torch.parameter = reinterpret_cast<PyTypeObject*>(get(nn, "Parameter").release());
  torch.is_neg = get(tensor, "is_neg").release();
  torch.is_zerotensor = get(tensor, "_is_zerotensor").release();
  torch.is_inference = get(tensor, "is_inference").release();
  torch.is_inference_mode_enabled = get(module, "is_inference_mode_enabled").release();
  torch.increment_version = get(C, "_increment_version").release();
  torch.float32 = get(module, "float32").release();
  torch.bfloat16 = get(module, "bfloat16").release();
  if (Py_TYPE(static_cast<PyObject*>(grad)) == &PyGetSetDescr_Type)
    torch.grad = reinterpret_cast<PyGetSetDescrObject*>(Ref(grad).release())->d_getset;
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
}

}  // namespace fused_optim
