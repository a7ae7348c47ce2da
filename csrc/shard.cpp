#include "shard.h"

namespace fused_optim {

namespace {

// Null until torch.distributed.tensor is imported: before, there are no DTensors.
PyTypeObject* dtensor_type() {
  static PyTypeObject* type = nullptr;
  if (type != nullptr) return type;
  const Ref name = Ref::own(PyUnicode_FromString("torch.distributed.tensor"));
  PyObject* module = PyImport_GetModule(name);
  if (module == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const Ref owned = Ref::own(module);
  PyObject* found = PyObject_GetAttrString(owned, "DTensor");
  if (found == nullptr)
    PyErr_Clear();
  else if (PyType_Check(found))
    type = reinterpret_cast<PyTypeObject*>(found);  // stays
  return type;
}

// Returns true if both objects have equal attributes of this name.
bool agree(PyObject* a, PyObject* b, PyObject* name) {
  const Ref of_a = get_attr(a, name), of_b = get_attr(b, name);
  const int equal = PyObject_RichCompareBool(of_a, of_b, Py_EQ);
  if (equal < 0) throw PythonError();
  return equal;
}

// Returns true if the processes' parts are yet to be summed up.
bool is_partial(PyObject* placements) {
  if (!PyTuple_Check(placements)) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(placements); i++)
    if (PyObject_HasAttrString(PyTuple_GET_ITEM(placements, i), "reduce_op")) return true;
  return false;
}

}  // namespace

bool is_dtensor(PyObject* tensor) { return !is_plain(tensor) && Py_TYPE(tensor) == dtensor_type(); }

Ref part_of(PyObject* tensor, PyObject* param) {
  const bool plain = is_plain(tensor);
  if (tensor == param ? plain : is_plain(param)) return Ref::share(plain ? tensor : nullptr);
  if (!is_dtensor(tensor) || !is_dtensor(param)) return Ref();
  const Ref spec = get_attr(tensor, names._spec);
  if (tensor == param) {
    const Ref placements = get_attr(spec, names.placements);
    if (is_partial(placements)) return Ref();
  } else {
    const Ref wanted = get_attr(param, names._spec);
    if (!agree(spec, wanted, names.placements) || !agree(spec, wanted, names.mesh) ||
        !agree(tensor, param, names.shape))
      return Ref();
  }
  Ref part = get_attr(tensor, names._local_tensor);
  return is_plain(part) ? part : Ref();
}

void append_with_part(PyObject* list, PyObject* tensor) {
  append(list, tensor);
  if (is_plain(tensor)) return;
  const Ref part = part_of(tensor, tensor);
  if (part != nullptr) append(list, part);
}

Place Places::find(PyObject* param, const View& part, size_t ordinal) {
  if (is_plain(param)) return {part.numel(), 0};
  Ref spec = get_attr(param, names._spec);
  if (ordinal >= known_.size()) known_.resize(ordinal + 1);
  Known& known = known_[ordinal];
  if (known.spec == spec && known.numel == part.numel() && known.contiguous == part.contiguous())
    return known.place;
  const Ref sharding = Ref::own(PyImport_ImportModule("fused_optim.sharding"));
  const Ref place = Ref::own(PyObject_CallMethod(sharding, "place_of", "O", param));
  Place read;
  if (!PyArg_ParseTuple(place, "LL", &read.numel, &read.first)) throw PythonError();
  known = {std::move(spec), part.numel(), part.contiguous(), read};
  return read;
}

}  // namespace fused_optim
