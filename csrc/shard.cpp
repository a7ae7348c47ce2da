// DTensors: each process steps the plain tensor that it holds of them.
#include "gather.h"

namespace fused_optim {

namespace {

// Null until someone has imported torch.distributed.tensor, without which there are none.
PyTypeObject* dtensor_type() {
  static PyTypeObject* type = nullptr;
  if (type != nullptr) return type;
  PyObject* name = check(PyUnicode_FromString("torch.distributed.tensor"));
  PyObject* module = PyImport_GetModule(name);
  Py_DECREF(name);
  PyObject* found = module == nullptr ? nullptr : PyObject_GetAttrString(module, "DTensor");
  Py_XDECREF(module);
  if (found == nullptr)
    PyErr_Clear();
  else if (PyType_Check(found))
    type = reinterpret_cast<PyTypeObject*>(found);  // stays
  return type;
}

// Whether both have equal attributes of this name in their specs.
bool agree(PyObject* a, PyObject* b, PyObject* name) {
  PyObject* of_a = check(PyObject_GetAttr(a, name));
  PyObject* of_b = PyObject_GetAttr(b, name);
  const int equal = of_b == nullptr ? -1 : PyObject_RichCompareBool(of_a, of_b, Py_EQ);
  Py_DECREF(of_a);
  Py_XDECREF(of_b);
  if (equal < 0) throw PythonError();
  return equal;
}

// Whether the tensor is a sum that is yet to be made.
bool is_partial(PyObject* placements) {
  if (!PyTuple_Check(placements)) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(placements); i++)
    if (PyObject_HasAttrString(PyTuple_GET_ITEM(placements, i), "reduce_op")) return true;
  return false;
}

}  // namespace

bool is_dtensor(PyObject* tensor) { return !is_plain(tensor) && Py_TYPE(tensor) == dtensor_type(); }

PyObject* Plan::part_of(PyObject* tensor, PyObject* param) {
  const bool plain = is_plain(tensor);
  if (tensor == param ? plain : is_plain(param)) return plain ? tensor : nullptr;
  if (!is_dtensor(tensor) || !is_dtensor(param)) return nullptr;
  PyObject* spec = hold(check(PyObject_GetAttr(tensor, names.spec)));
  if (tensor == param) {
    if (is_partial(hold(check(PyObject_GetAttr(spec, names.placements))))) return nullptr;
  } else {
    PyObject* wanted = hold(check(PyObject_GetAttr(param, names.spec)));
    if (!agree(spec, wanted, names.placements) || !agree(spec, wanted, names.mesh) ||
        !agree(tensor, param, names.shape))
      return nullptr;
  }
  PyObject* part = hold(check(PyObject_GetAttr(tensor, names.local_tensor)));
  return is_plain(part) ? part : nullptr;
}

Plan::Place Plan::place_of(PyObject* param, const View& part, const StepContext& context) {
  if (is_plain(param)) return {part.numel(), 0};
  PyObject* place = hold(check(PyObject_CallOneArg(context.place_of, param)));
  Place read;
  if (!PyArg_ParseTuple(place, "LL", &read.numel, &read.first)) throw PythonError();
  return read;
}

}  // namespace fused_optim
