// The exponential moving average (EMA) of the params: one more stream of the kernels where they can take it.
#include <algorithm>

#include "gather.h"

namespace fused_optim {

void Plan::read_ema(Group& group) {
  PyObject* decay = PyDict_GetItemWithError(group.dict, names.ema_decay);
  if (decay == nullptr && PyErr_Occurred()) throw PythonError();
  if (decay == nullptr || decay == Py_None) return;
  group.has_ema = true;
  group.ema_decay = number(decay);
  if (!(group.ema_decay >= 0 && group.ema_decay < 1))
    raise(PyExc_ValueError, "Invalid ema_decay: " + std::to_string(group.ema_decay) +
                                " in param group " + std::to_string(group.index) +
                                "; it must be in [0, 1)");
  group.ema_warmup = truth(PyDict_GetItemWithError(group.dict, names.ema_warmup));
}

// Whether the average is made for a param like this one, where it is now.
static bool fits(PyObject* ema, PyObject* param) {
  View view, p;
  if (is_plain(ema) && is_plain(param) && view.read(ema) && p.read(param))
    return view.same_shape(p) && view.device == p.device;
  return true;  // torch says what is wrong
}

// Borrowed until the next one; null if the group has none.
Plan::EmaTask* Plan::gather_ema(Group& group, PyObject* param, const StepContext& context,
                                Hint& hint) {
  PyObject* entry = emas_.find(context.emas, param, hint.ema_position);
  const bool is_new = entry == nullptr || !fits(PyList_GET_ITEM(entry, 0), param);
  if (is_new) {
    entry = check(PyObject_CallFunctionObjArgs(context.create_ema, param, group.dict,
                                               entry == nullptr ? Py_None : entry, nullptr));
    states_.forget();  // Python code has run
    emas_.forget();
    hints_hold_ = false;
  } else {
    Py_INCREF(entry);
  }
  if (!PyList_Check(entry) || PyList_GET_SIZE(entry) != 2)
    raise(PyExc_TypeError, "an EMA entry is a list [ema, n_averaged]");
  PyObject* tensor = PyList_GET_ITEM(entry, 0);
  const double n_averaged = number(PyList_GET_ITEM(entry, 1));
  // The first average is the param; the warm-up is that of Abadi et al.'s TensorFlow,
  // tf.train.ExponentialMovingAverage with num_updates.
  double decay = group.ema_decay;
  if (group.ema_warmup) decay = std::min(decay, (1 + n_averaged) / (10 + n_averaged));
  const double weight = n_averaged == 0 ? 1 : 1 - decay;
  PyObject* count = check(PyLong_FromDouble(n_averaged + 1));
  Py_INCREF(param);
  Py_INCREF(tensor);
  ema_tasks_.push_back({param, entry, tensor, is_new, weight, count, -1});
  return &ema_tasks_.back();
}

// A new reference: a list of (param, entry, weight), or None.
PyObject* Plan::not_averaged() {
  PyObject* left = nullptr;
  for (const EmaTask& ema : ema_tasks_) {
    if (ema.task >= 0) continue;
    if (left == nullptr) left = check(PyList_New(0));
    PyObject* item = Py_BuildValue("(OOd)", ema.param, ema.entry, ema.weight);
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

void Plan::count_emas() {
  for (const EmaTask& ema : ema_tasks_) {
    Py_INCREF(ema.count);
    PyList_SetItem(ema.entry, 1, ema.count);  // cannot fail: gather_ema has seen a list of two
  }
}

}  // namespace fused_optim
