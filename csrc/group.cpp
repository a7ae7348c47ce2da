#include "group.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fused_optim {

Schema::Schema(const std::string& name)
    : rule([&]() -> const RuleInfo& {
        for (const RuleInfo& info : rules())
          if (name == info.name) return info;
        throw std::invalid_argument("no rule is called '" + name + "'");
      }()),
      rule_index(static_cast<int>(&rule - rules().data())) {
  for (const char* option : rule.option_names) {
    const char* dot = std::strchr(option, '.');
    const std::string key = dot ? std::string(option, dot) : option;
    if (key == "lr") lr = option_keys.size();
    option_keys.push_back(interned(key.c_str()));
    option_items.push_back(dot ? std::atoi(dot + 1) : -1);
  }
  for (PyObject* key : option_keys)
    option_lengths.push_back(std::count(option_keys.begin(), option_keys.end(), key));
  for (const char* state : rule.state_names) {
    state_keys.push_back(interned(state));
    scale_keys.push_back(interned((std::string(state) + "_scale").c_str()));
  }
  for (const char* scalar : rule.scalar_names) scalar_keys.push_back(interned(scalar));
}

namespace {

// True for a scalar, not an array. Stock decides about other kinds of numbers.
bool is_numpy_number(PyObject* value) {
  const char* type = Py_TYPE(value)->tp_name;
  for (const char* start : {"numpy.float", "numpy.int", "numpy.uint"})
    if (std::strncmp(type, start, std::strlen(start)) == 0) return true;
  return false;
}

bool read_flag(PyObject* value, double& result) {
  const int flag = PyObject_IsTrue(value);
  if (flag < 0) PyErr_Clear();
  result = flag;
  return flag >= 0;
}

bool is_text(PyObject* value, const char* text) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

}  // namespace

Group::Group(PyObject* dict, int64_t position, uint64_t first_ordinal, const Schema& schema,
             PyObject* optimizer, unsigned device_types)
    : schema(schema),
      dict(Ref::share(dict)),
      position(position),
      index(position),
      first_ordinal(first_ordinal) {
  if (!PyDict_Check(dict)) raise(PyExc_TypeError, "a param group must be a dict");
  read_origin();
  if (!averaging.read(dict) || !read_formats()) {
    const Ref number = Ref::own(PyLong_FromLongLong(index));
    Ref::own(PyObject_CallMethodObjArgs(optimizer, names._check_options, dict,
                                        static_cast<PyObject*>(number), nullptr));
    raise(PyExc_ValueError, "an option of param group " + std::to_string(index) + " is invalid");
  }
  if (truth(get_item(dict, names.differentiable)))
    stock_reason = "differentiable=True";
  else if (!read_options(device_types))
    stock_reason = ODD_OPTIONS;
}

// release_gradients() steps some params of a group, and says which.
void Group::read_origin() {
  PyObject* origin = get_item(dict, names._origin);
  if (origin == nullptr) return;
  PyObject* list;
  if (!PyArg_ParseTuple(origin, "LOK", &index, &list, &first_ordinal)) throw PythonError();
  indices = Ref::share(list);
}

Origin Group::origin(int64_t param) const {
  if (indices == nullptr) return {index, param};
  const Ref number = Ref::own(PySequence_GetItem(indices, param));
  return {index, whole_number(number)};
}

// Returns false if an option of formats has an unknown value.
bool Group::read_formats() {
  PyObject* state_dtype = get_item(dict, names.state_dtype);
  PyObject* given_master = get_item(dict, names.master);
  has_formats = state_dtype != nullptr || given_master != nullptr;
  if (!has_formats) return true;
  if (state_dtype != nullptr && state_dtype != Py_None) {
    if (state_dtype == torch.float32) state_format = STATE_F32;
    if (state_dtype == torch.bfloat16) state_format = STATE_BF16;
    for (StateFormat format : {STATE_F32, STATE_BF16, STATE_INT8})
      if (is_text(state_dtype, STATE_FORMAT_NAMES[format])) state_format = format;
    if (state_format == STATE_AS_STOCK) return false;
  }
  if (given_master != nullptr && given_master != Py_None) {
    for (Storage storage : {STOCHASTIC, SPLIT8, SPLIT16})
      if (is_text(given_master, STORAGE_NAMES[storage])) master = storage;
    if (master == PLAIN) return false;
  }
  PyObject* given_seed = get_item(dict, names.rounding_seed);
  if (given_seed == nullptr) return true;
  if (!PyLong_Check(given_seed)) return false;
  seed = PyLong_AsUnsignedLongLong(given_seed);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// Returns false if torch.optim's code must see some option: it may take it, or raise.
bool Group::read_options(unsigned device_types) {
  capturable = truth(get_item(dict, names.capturable));
  fused = truth(get_item(dict, names.fused));
  PyObject* maximize = get_item(dict, names.maximize);
  double maximizes = 0;
  if (maximize != nullptr && !read_flag(maximize, maximizes)) return false;
  grad_sign = maximizes != 0 ? -1.0 : 1.0;
  for (size_t o = 0; o < schema.option_keys.size(); o++) {
    PyObject* value = get_item(dict, schema.option_keys[o]);
    if (value == nullptr) {
      PyErr_SetObject(PyExc_KeyError, schema.option_keys[o]);
      throw PythonError();
    }
    option_values[o] = Ref::share(value);
    if (schema.option_items[o] >= 0) {
      if (!(PyTuple_Check(value) || PyList_Check(value)) ||
          PySequence_Fast_GET_SIZE(value) != schema.option_lengths[o])
        return false;
      option_values[o] = Ref::own(PySequence_GetItem(value, schema.option_items[o]));
    }
    if (!read_option(o, option_values[o], device_types)) return false;
  }
  states = schema.rule.states(options);
  return true;
}

// A tensor on a device is left there if the kernels of that device can read it.
bool Group::read_option(size_t option, PyObject* value, unsigned device_types) {
  View view;
  if (option < MAX_TENSOR_OPTIONS && schema.may_be_any_tensor(option) && is_plain(value) &&
      view.read(value) && (view.device.type != dlpack::CPU || capturable) &&
      (device_types >> view.device.type & 1) && view.numel() == 1 &&
      (view.dtype == F32 || view.dtype == F64) && view.data != nullptr &&
      (!has_addresses || view.device == option_device)) {
    option_addresses[option] = tagged(view.data, view.dtype);
    option_device = view.device;
    has_addresses = true;
    numbers_known = false;
    return true;
  }
  return read_number(option, value, options[option]);
}

bool Group::read_number(size_t option, PyObject* value, double& result) const {
  if (PyFloat_CheckExact(value)) return fits_float(result = PyFloat_AS_DOUBLE(value));
  const bool is_flag = schema.rule.flags >> option & 1;
  if (PyObject_TypeCheck(value, torch.tensor)) {
    View view;
    if (is_flag || !is_plain(value) || !view.read(value) || view.dtype == N_DTYPES ||
        view.numel() != 1 || (view.ndim > 0 && !schema.may_be_any_tensor(option)))
      return false;
    return fits_float(result = number(value));
  }
  if (is_flag) return read_flag(value, result);
  if (PyBool_Check(value) ||
      !(PyFloat_Check(value) || PyLong_Check(value) || is_numpy_number(value)))
    return false;
  result = PyFloat_AsDouble(value);
  if (result != -1.0 || !PyErr_Occurred()) return fits_float(result);
  PyErr_Clear();  // an int beyond float64's range
  return false;
}

void Group::know_options() {
  if (numbers_known) return;
  for (size_t o = 0; o < schema.option_keys.size(); o++)
    if (option_addresses[o] != 0) options[o] = number(option_values[o]);
  numbers_known = true;
}

}  // namespace fused_optim
