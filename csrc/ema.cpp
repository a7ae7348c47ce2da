// The exponential moving average (EMA) of the params: one more stream of the kernels where they can
// take it.
#include <algorithm>

#include "gather.h"

namespace fused_optim {

void Plan::read_ema(Group& group) {
  PyObject* decay = PyDict_GetItemWithError(group.dict, names.ema_decay);
  if (decay == nullptr && PyErr_Occurred()) throw PythonError();
  if (decay == nullptr || decay == Py_None) return;
  group.has_ema = true;
  try {
    group.ema_decay = number(decay);
  } catch (PythonError&) {
    PyErr_Clear();
    group.ema_decay = -1;
  }
  if (!(group.ema_decay >= 0 && group.ema_decay < 1)) {
    PyErr_Format(PyExc_ValueError,
                 "Invalid ema_decay in param group %zd: %R; it must be in [0, 1) or None",
                 static_cast<Py_ssize_t>(group.index), decay);
    throw PythonError();
  }
  group.ema_warmup = truth(PyDict_GetItemWithError(group.dict, names.ema_warmup));
}

// Whether the average is made for a param like this one, where it is now.
bool Plan::ema_fits(PyObject* ema, PyObject* param) {
  View view, p;
  PyObject *part = part_of(ema, param), *param_part = part_of(param, param);
  if (part != nullptr && param_part != nullptr && view.read(part) && p.read(param_part))
    return view.same_shape(p) && view.device == p.device;
  return true;  // torch says what is wrong
}

// Borrowed until the next one; null if the group has none.
Plan::EmaTask* Plan::gather_ema(Group& group, PyObject* param, const StepContext& context,
                                Hint& hint) {
  PyObject* entry = emas_.find(context.emas, param, hint.ema_position);
  const bool is_new = entry == nullptr || !ema_fits(PyList_GET_ITEM(entry, 0), param);
  if (is_new) {
    entry = check(PyObject_CallFunctionObjArgs(context.create_ema, param, group.dict,
                                               entry == nullptr ? Py_None : entry, nullptr));
    hints_hold_ = false;
  } else {
    Py_INCREF(entry);
  }
  if (!PyList_Check(entry) || PyList_GET_SIZE(entry) != 2)
    raise(PyExc_TypeError, "an EMA entry is a list [ema, n_averaged]");
  PyObject* tensor = PyList_GET_ITEM(entry, 0);
  PyObject* counted = PyList_GET_ITEM(entry, 1);
  Py_INCREF(param);
  Py_INCREF(tensor);
  Py_INCREF(counted);
  ema_tasks_.push_back(
      {param, entry, tensor, is_new, 0, counted, 0, group.ema_decay, group.ema_warmup, -1});
  EmaTask& ema = ema_tasks_.back();
  View p, n;
  PyObject* part = part_of(param, param);
  const bool on_device = context.device_types != 0 && part != nullptr && p.read(part) &&
                         (context.device_types >> p.device.type & 1);
  if (on_device && is_plain(counted) && n.read(counted) && n.device == p.device && n.numel() == 1 &&
      (n.dtype == F32 || n.dtype == F64)) {
    ema.on_device = tagged(n.data, n.dtype);
    return &ema;
  }
  const double n_averaged = number(counted);
  // The first average is the param; the warm-up is that of Abadi et al.'s TensorFlow,
  // tf.train.ExponentialMovingAverage with num_updates.
  double decay = group.ema_decay;
  if (group.ema_warmup) decay = std::min(decay, (1 + n_averaged) / (10 + n_averaged));
  ema.weight = n_averaged == 0 ? 1 : 1 - decay;
  PyObject* count = check(PyLong_FromDouble(n_averaged + 1));
  Py_DECREF(counted);
  ema.count = count;
  if (on_device && (group.capturable || context.skip_on_device)) count_on_device(ema, context);
  return &ema;
}

// From now on the device counts, unless it does already.
void Plan::count_on_device(EmaTask& ema, const StepContext& context) {
  if (ema.on_device != 0) return;
  PyObject* counted = check(PyObject_CallMethodObjArgs(
      context.launcher, names.counted, PyList_GET_ITEM(ema.entry, 1), ema.param, nullptr));
  Py_DECREF(ema.count);
  ema.count = counted;
  View n;
  if (!is_plain(counted) || !n.read(counted) || n.data == nullptr)
    raise(PyExc_TypeError, "counted must return a tensor");
  ema.on_device = tagged(n.data, n.dtype);
}

// A new reference: a list of (param, entry, weight), or None. (decay, warmup) stands for the weight
// where the device counts.
PyObject* Plan::not_averaged() {
  PyObject* left = nullptr;
  for (const EmaTask& ema : ema_tasks_) {
    if (ema.task >= 0) continue;
    if (left == nullptr) left = check(PyList_New(0));
    PyObject* item = ema.on_device != 0 ? Py_BuildValue("(OO(dO))", ema.param, ema.entry, ema.decay,
                                                        ema.warmup ? Py_True : Py_False)
                                        : Py_BuildValue("(OOd)", ema.param, ema.entry, ema.weight);
    const bool failed = item == nullptr || PyList_Append(left, item) != 0;
    Py_XDECREF(item);
    if (failed) {
      Py_DECREF(left);
      throw PythonError();
    }
  }
  if (left == nullptr) {
    left = Py_None;
    Py_INCREF(left);
  }
  return left;
}

// Before the kernels: an average of nothing may be seen, one that is half counted may not.
void Plan::enter_emas(const StepContext& context) {
  for (const EmaTask& ema : ema_tasks_)
    if (ema.is_new && PyObject_SetItem(context.emas, ema.param, ema.entry) != 0)
      throw PythonError();
}

// Those that no kernel averages are counted when they are averaged (fused_optim/ema.py).
void Plan::count_emas() {
  for (const EmaTask& ema : ema_tasks_) {
    if (ema.task < 0 && ema.on_device == 0) continue;
    Py_INCREF(ema.count);
    PyList_SetItem(ema.entry, 1, ema.count);  // cannot fail: gather_ema has seen a list of two
  }
}

}  // namespace fused_optim
