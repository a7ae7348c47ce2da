// What a param group says: options as numbers, or where on a device they lie.
#include "gather.h"

namespace fused_optim {

// An option may be a tensor: on a device it is left there if the kernels of that device can read it.
// Only lr, the first option, and items of tuples (betas): the others decide on the variant.
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
  } else {
    group.options[option] = number(value);
  }
  group.option_tensors[option] = value;
}

void Plan::check_lr(const Group& group) {
  const double lr = group.options[0];  // every rule's first option
  if (!(lr >= 0))
    raise(PyExc_ValueError, "Invalid learning rate: " + std::to_string(lr) + " in param group " +
                                std::to_string(group.index));
}

// For tensors elsewhere than the options: the host waits for the device.
void Plan::know_options(Group& group) {
  if (group.numbers_known) return;
  for (size_t o = 0; o < option_keys_.size(); o++)
    if (group.option_addresses[o] != 0) group.options[o] = number(group.option_tensors[o]);
  check_lr(group);
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
  group.grad_sign = truth(get(names.maximize)) ? -1.0 : 1.0;
  for (size_t o = 0; o < option_keys_.size(); o++) {
    PyObject* value = get(option_keys_[o]);
    if (value == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, option_keys_[o]);
      throw PythonError();
    }
    Py_INCREF(value);
    hold(value);
    if (option_items_[o] >= 0) value = hold(check(PySequence_GetItem(value, option_items_[o])));
    read_option(group, o, value, context);
  }
  if (group.option_addresses[0] == 0) check_lr(group);
  group.variant = rule_.variant(group.options);
  group.prepared_step = -1;
}

}  // namespace fused_optim
