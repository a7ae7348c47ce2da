#include <algorithm>

#include "gather.h"

namespace fused_optim {

namespace {

// Returns true if the average has the param's shape and device.
bool fits(PyObject* average, PyObject* param) {
  View view, p;
  const Ref part = part_of(average, param), param_part = part_of(param, param);
  if (part != nullptr && param_part != nullptr && view.read(part) && p.read(param_part))
    return view.same_shape(p) && view.device == p.device;
  return true;  // torch says what is wrong
}

bool is_entry(PyObject* entry) { return PyList_Check(entry) && PyList_GET_SIZE(entry) == 2; }

}  // namespace

bool Averaging::read(PyObject* group) {
  PyObject* given = get_item(group, names.ema_decay);
  if (given == nullptr || given == Py_None) return true;
  on = true;
  try {
    decay = number(given);
  } catch (PythonError&) {
    PyErr_Clear();
    return false;
  }
  warmup = truth(get_item(group, names.ema_warmup));
  return decay >= 0 && decay < 1 && !truth(get_item(group, names.differentiable));
}

// The first average is the param; the warm-up is that of Abadi et al.'s TensorFlow,
// tf.train.ExponentialMovingAverage with num_updates.
double Averaging::weight(double n_averaged) const {
  if (n_averaged == 0) return 1;
  return 1 - (warmup ? std::min(decay, (1 + n_averaged) / (10 + n_averaged)) : decay);
}

int Averages::add(Average average) {
  all_.push_back(std::move(average));
  return static_cast<int>(all_.size()) - 1;
}

void Averages::leave(int index) {
  all_[index].in_kernel = false;
  all_[index].is_left = true;
  are_left_ = true;
}

bool Averages::host_counts() const {
  return std::any_of(all_.begin(), all_.end(), [](const Average& average) {
    return average.entry != nullptr && !average.n_averaged.on_device;
  });
}

Ref Averages::left() const {
  const Ref left = Ref::own(PyList_New(0));
  for (const Average& average : all_) {
    if (!average.is_left) continue;
    PyObject *param = average.param, *entry = average.entry;
    const Ref item = Ref::own(
        entry == nullptr
            ? Py_BuildValue("(OOO)", param, static_cast<PyObject*>(average.tensor), Py_None)
        : average.n_averaged.on_device ? Py_BuildValue("(OO(dO))", param, entry, average.how.decay,
                                                       average.how.warmup ? Py_True : Py_False)
                                       : Py_BuildValue("(OOd)", param, entry, average.weight));
    append(left, item);
  }
  return left;
}

void Averages::append_written(PyObject* list) const {
  for (const Average& average : all_)
    if (average.in_kernel) append_with_part(list, average.tensor);
}

void Averages::enter_new() const {
  for (const Average& average : all_)
    if (average.is_new && PyObject_SetItem(dict_, average.param, average.entry) != 0)
      throw PythonError();
}

void Averages::write_counts() const {
  for (const Average& average : all_)
    if (average.entry != nullptr &&
        (average.in_kernel || average.n_averaged.on_device))  // gather has seen a list of two
      PyList_SetItem(average.entry, 1, Ref(average.n_averaged.object).release());
}

void Averages::clear() {
  dict_ = Ref();
  are_left_ = false;
  clear_safely(all_);
}

// Returns the index of the param's average, made if need be.
int Gatherer::gather_average(Candidate& c) {
  PyObject* known = memory_.averages.find(work_.averages.dict(), c.param, c.hint.average_position);
  if (known != nullptr && !is_entry(known))
    raise(PyExc_TypeError, "an EMA entry is a list [ema, n_averaged]");
  Average average;
  average.param = Ref::share(c.param);
  average.is_new = known == nullptr || !fits(list_item(known, 0), c.param);
  if (average.is_new) {
    average.entry = Ref::own(PyObject_CallMethodObjArgs(
        request_.optimizer, names._create_average, c.param, static_cast<PyObject*>(c.group.dict),
        known == nullptr ? Py_None : known, nullptr));
    memory_.hold = false;
    if (!is_entry(average.entry))
      raise(PyExc_TypeError, "an EMA entry is a list [ema, n_averaged]");
  } else {
    average.entry = Ref::share(known);
  }
  average.tensor = Ref::share(list_item(average.entry, 0));
  average.how = c.group.averaging;
  View p;
  const Ref part = request_.device_types == 0 ? Ref() : part_of(c.param, c.param);
  const bool on_device = part != nullptr && p.read(part) && request_.serves(p.device);
  const Ref count = Ref::share(list_item(average.entry, 1));
  // The interpreter's device is the CPU.
  if (on_device && average.n_averaged.find(count, p) &&
      (average.n_averaged.on_device || p.device.type == dlpack::CPU)) {
    average.n_averaged.on_device = true;
  } else {
    average.n_averaged = {};
    const double n = number(count);
    average.weight = average.how.weight(n);
    average.n_averaged.object = Ref::own(PyLong_FromDouble(n + 1));
    if (on_device && (c.group.capturable || request_.asks(SKIP_ON_DEVICE)))
      count_on_device(average, p);
  }
  return work_.averages.add(std::move(average));
}

// Returns the index of an average that is the param's output; -1: it has none.
int Gatherer::gather_output(Candidate& c) {
  PyObject* output = nullptr;
  if (c.lists != nullptr)
    output = PyTuple_GET_ITEM(static_cast<PyObject*>(outputs_), c.held.origin.index);
  else
    output = memory_.outputs.find(outputs_, c.param, c.hint.output_position);
  if (output == nullptr || output == Py_None) return -1;
  Average copy;
  copy.param = Ref::share(c.param);
  copy.tensor = Ref::share(output);
  copy.weight = 1;
  return work_.averages.add(std::move(copy));
}

// Makes the average a stream of the param's kernel, if one can take it.
void Gatherer::join_average(Candidate& c) {
  Average& average = work_.averages[c.average];
  const View& p = c.views[PARAM];
  View& view = c.views[EMA];
  Ref& part = c.held.parts[EMA] = part_of(average.tensor, c.param);
  const bool is_read = part != nullptr && view.read(part);
  if (is_read && average.entry == nullptr && !view.same_shape(p))
    raise(PyExc_ValueError, c.where() + "its output has shape " + describe(view.shape, view.ndim) +
                                ", the param " + describe(p.shape, p.ndim));
  average.in_kernel = is_read && view.dtype != N_DTYPES && view.same_shape(p) &&
                      view.device == p.device && (view.dtype == F64) == (p.dtype == F64);
  if (!average.in_kernel) return work_.averages.leave(c.average);
  c.task.streams |= 1u << EMA;
  c.task.slice.ema_weight = average.weight;
  c.held.average = c.average;
  c.now.objects[EMA] = average.tensor;
}

// Has the device count from now on, unless it does already.
void Gatherer::count_on_device(Average& average, const View& p) {
  if (average.n_averaged.on_device) return;
  average.n_averaged.move(list_item(average.entry, 1), average.param, p, request_.launcher);
}

}  // namespace fused_optim
