// What a param group says: options as numbers, or where on a device they lie.
#include "gather.h"

#include <algorithm>
#include <cstring>

namespace fused_optim {

// An option may be a tensor: on a device it is left there if the kernels of that device can read
// it. Only lr, the first option, and items of tuples (betas): the others decide on the variant.
void Plan::read_option(Group& group, size_t option, PyObject* value, const StepContext& context) {
  View view;
  if ((option == 0 || option_items_[option] >= 0) && is_plain(value) && view.read(value) &&
      (view.device.type != dlpack::CPU || group.capturable) &&
      (context.device_types >> view.device.type & 1) && view.numel() == 1 &&
      (view.dtype == F32 || view.dtype == F64) && view.data != nullptr &&
      (!group.has_addresses || view.device == group.option_device)) {
    group.option_addresses[option] = tagged(view.data, view.dtype);
    group.option_device = view.device;
    group.has_addresses = true;
    group.numbers_known = false;
  } else if (!read_number(option, value, group.options[option])) {
    group.stock_reason = ODD_OPTIONS;
  }
  group.option_tensors[option] = value;
}

namespace {

// A scalar, not an array. Stock decides about other kinds of numbers.
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

}  // namespace

// False if torch.optim's code must see this option: it may take it, or raise.
bool Plan::read_number(size_t option, PyObject* value, double& result) {
  if (PyFloat_CheckExact(value)) return fits_float(result = PyFloat_AS_DOUBLE(value));
  const bool is_flag = rule_.flags >> option & 1;
  if (PyObject_TypeCheck(value, torch.tensor)) {
    View view;
    // Stock takes lr and betas out of tensors with one element, the others out of those without
    // dimensions.
    const bool any_shape = option == 0 || option_items_[option] >= 0;
    if (is_flag || !is_plain(value) || !view.read(value) || view.dtype == N_DTYPES ||
        view.numel() != 1 || (view.ndim > 0 && !any_shape))
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

// For tensors elsewhere than the options: the host waits for the device.
void Plan::know_options(Group& group) {
  if (group.numbers_known) return;
  for (size_t o = 0; o < option_keys_.size(); o++)
    if (group.option_addresses[o] != 0) group.options[o] = number(group.option_tensors[o]);
  lowest_lr_ = std::min(lowest_lr_, group.options[0]);
  group.numbers_known = true;
}

void Plan::read_group(Group& group, const StepContext& context) {
  const auto get = [&](PyObject* key) { return PyDict_GetItemWithError(group.dict, key); };
  read_ema(group);
  read_formats(group);
  if (truth(get(names.differentiable))) {
    if (group.has_ema)
      raise(PyExc_ValueError, "param group " + std::to_string(group.index) +
                                  ": differentiable=True cannot be combined with ema_decay");
    group.stock_reason = "differentiable=True";
    return;
  }
  group.capturable = truth(get(names.capturable));
  group.fused = truth(get(names.fused));
  group.numbers_known = true;
  PyObject* maximize = get(names.maximize);
  double maximizes = 0;
  if (maximize != nullptr && !read_flag(maximize, maximizes)) {
    group.stock_reason = ODD_OPTIONS;
    return;
  }
  group.grad_sign = maximizes != 0 ? -1.0 : 1.0;
  for (size_t o = 0; o < option_keys_.size(); o++) {
    PyObject* value = get(option_keys_[o]);
    if (value == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, option_keys_[o]);
      throw PythonError();
    }
    Py_INCREF(value);
    hold(value);
    if (option_items_[o] >= 0) {  // an item of a pair: betas
      const bool is_pair =
          (PyTuple_Check(value) || PyList_Check(value)) && PySequence_Fast_GET_SIZE(value) == 2;
      if (!is_pair) group.stock_reason = ODD_OPTIONS;
      if (is_pair) value = hold(check(PySequence_GetItem(value, option_items_[o])));
    }
    if (group.stock_reason == nullptr) read_option(group, o, value, context);
    if (group.stock_reason != nullptr) return;
  }
  if (group.option_addresses[0] == 0) lowest_lr_ = std::min(lowest_lr_, group.options[0]);
  group.variant = rule_.variant(group.options);
  group.prepared_step = -1;
}

}  // namespace fused_optim
