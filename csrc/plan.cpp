#include "plan.h"

#include <algorithm>

namespace fused_optim {

namespace {

// The bytes that a kernel reads and writes for one tensor, whose EMA may be an output, which is not
// read; a step count is not worth counting.
int64_t moved_nbytes(const Task& task, bool has_output) {
  int64_t nbytes = 0;
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) continue;
    const int times = (task.written >> s & 1) && !(s == EMA && has_output) ? 2 : 1;
    nbytes += times * task.slice.numel * ITEMSIZE[task.slice.dtypes[s]];
    if (task.slice.packing != nullptr)
      nbytes += times * extra_nbytes(task.slice.packing->storage[s], task.slice.numel);
  }
  return nbytes;
}

PyObject* as_bool(bool value) { return value ? Py_True : Py_False; }

void remove_nones(PyObject* dict) {
  std::vector<Ref> keys;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value))
    if (value == Py_None) keys.push_back(Ref::share(key));
  for (const Ref& none : keys)
    if (PyDict_DelItem(dict, none) != 0) throw PythonError();
}

}  // namespace

unsigned Plan::gather(const Request& request) {
  work_.clear();
  state_dicts_.clear();
  grad_write_ = request.grad_write();
  lists_ = Ref::share(request.lists);
  return Gatherer(schema_, memory_, work_, request).run();
}

Ref Plan::tasks() const {
  const Ref found = Ref::own(PyList_New(0));
  for (size_t t = 0; t < work_.tasks.size(); t++) {
    const Task& task = work_.tasks[t];
    const Origin& origin = work_.held[t].origin;
    const int average = work_.held[t].average;
    const bool has_output = average >= 0 && work_.averages[average].entry == nullptr;
    const Ref entry = Ref::own(Py_BuildValue(
        "(LLOLOO)", static_cast<long long>(origin.group), static_cast<long long>(origin.index),
        as_bool(task.device >= 0), static_cast<long long>(moved_nbytes(task, has_output)),
        as_bool((task.streams >> EMA & 1) && !has_output), as_bool(task.layout >= 0)));
    append(found, entry);
  }
  return found;
}

Ref Plan::fallbacks() const {
  return work_.fallbacks == nullptr ? Ref::share(Py_None) : work_.fallbacks;
}

int64_t Plan::n_on_cpu() const {
  return static_cast<int64_t>(work_.tasks.size()) - work_.n_on_devices;
}

Ref Plan::sum_of_squares(int num_threads) {
  std::vector<NormTask> grads;
  grads.reserve(work_.tasks.size());
  const Ref sharded = Ref::own(PyList_New(0));
  for (size_t t = 0; t < work_.tasks.size(); t++) {
    if (work_.tasks[t].is_sharded) append(sharded, work_.held[t].grad);
    if (work_.tasks[t].device < 0) grads.push_back(norm_task(work_, t));
  }
  Sum sum;
  Py_BEGIN_ALLOW_THREADS sum = fused_optim::sum_of_squares(grads, work_.layouts, num_threads);
  Py_END_ALLOW_THREADS return Ref::own(
      Py_BuildValue("(dOO)", sum.squares, as_bool(sum.nonfinite), static_cast<PyObject*>(sharded)));
}

Ref sum_of_squares(PyObject* grads, int num_threads) {
  std::vector<NormTask> tasks;
  std::vector<Layout> layouts;
  std::vector<Ref> held;
  const Ref others = Ref::own(PyList_New(0));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(grads); i++) {
    PyObject* const grad = PyList_GET_ITEM(grads, i);
    View view;
    if (is_plain(grad) && view.read(grad) && view.device.type == dlpack::CPU &&
        view.dtype != N_DTYPES && (view.data != nullptr || view.numel() == 0)) {
      if (view.numel() > 0 && !storage_holds(grad, view))
        raise(PyExc_RuntimeError,
              "grads[" + std::to_string(i) + "] is larger than its storage, which was resized");
      held.push_back(Ref::share(grad));
      tasks.push_back(norm_task(view, layouts));
    } else {
      append(others, grad);
    }
  }
  Sum sum;
  Py_BEGIN_ALLOW_THREADS sum = sum_of_squares(tasks, layouts, num_threads);
  Py_END_ALLOW_THREADS return Ref::own(
      Py_BuildValue("(dO)", sum.squares, static_cast<PyObject*>(others)));
}

Ref Plan::tasks_to_stage() const {
  const Ref found = Ref::own(PyList_New(0));
  for (size_t t = 0; t < work_.tasks.size(); t++) {
    const Task& task = work_.tasks[t];
    if (task.device < 0 || task.layout < 0) continue;
    const Ref originals = Ref::own(PyList_New(0)), written = Ref::own(PyList_New(0));
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(task.streams >> s & 1)) continue;
      append(originals, work_.held[t].parts[s]);
      append(written, as_bool(task.written >> s & 1));
    }
    const Ref entry =
        Ref::own(Py_BuildValue("(nOO)", static_cast<Py_ssize_t>(t),
                               static_cast<PyObject*>(originals), static_cast<PyObject*>(written)));
    append(found, entry);
  }
  return found;
}

void Plan::stage(size_t t, PyObject* copies) {
  Task& task = work_.tasks.at(t);
  Py_ssize_t next = 0;
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) continue;
    View view;
    const Ref copy = Ref::own(PySequence_GetItem(copies, next++));
    if (!is_plain(copy) || !view.read(copy)) raise(PyExc_TypeError, "stage takes strided tensors");
    task.slice.streams[s] = view.data;
    work_.held[t].others.push_back(copy);
  }
}

void Plan::drop_devices(const char* reason) {
  std::vector<bool> which;
  for (const Task& task : work_.tasks) which.push_back(task.device >= 0);
  work_.drop(which, reason);
  work_.device_tasks.clear();
}

void Plan::begin_commit() {
  work_.commit_begun = true;
  work_.averages.enter_new();
  if (work_.tasks.empty()) return;
  // Raw-pointer writes are invisible to autograd, so its version counters are bumped by hand.
  const Ref changed = Ref::own(PyList_New(0));
  for (size_t t = 0; t < work_.tasks.size(); t++) {
    append_with_part(changed, work_.held[t].param);
    if (work_.tasks[t].written >> GRAD & 1) append_with_part(changed, work_.held[t].grad);
  }
  work_.averages.append_written(changed);
  Ref::own(PyObject_CallOneArg(torch.increment_version, changed));
  for (const Held& held : work_.held) {
    if (!work_.has_new_states) break;
    if (held.created == nullptr || lists_ != nullptr) continue;
    state_dicts_.push_back(Ref::own(PyObject_GetItem(work_.state, held.param)));
    if (!PyDict_Check(static_cast<PyObject*>(state_dicts_.back())))
      raise(PyExc_TypeError, "a param's state must be a dict");
  }
}

void Plan::enter_created(const Held& held) const {
  PyObject* const lists = PyTuple_GET_ITEM(static_cast<PyObject*>(lists_), 3);
  for (size_t s = 0; s < schema_.state_keys.size(); s++) {
    PyObject* const state = item(held.created, schema_.state_keys[s]);
    PyObject* const list = PyTuple_GET_ITEM(lists, static_cast<Py_ssize_t>(s));
    if (state != nullptr && held.origin.index < PyList_GET_SIZE(list))
      PyList_SetItem(list, held.origin.index, Ref::share(state).release());
  }
}

Ref Plan::commit(double clip, double grad_scale, int num_threads) {
  struct Release {
    Plan& plan;
    ~Release() { plan.release(); }
  } release_at_end{*this};
  if (!work_.commit_begun) begin_commit();
  const auto n_on_devices = static_cast<Py_ssize_t>(work_.n_on_devices);
  const auto n_on_cpu = static_cast<Py_ssize_t>(work_.tasks.size()) - n_on_devices;
  const Ref left = fallbacks();
  Ref outcome =
      Ref::own(Py_BuildValue("(nnO)", n_on_cpu, n_on_devices, static_cast<PyObject*>(left)));
  std::vector<Task>& tasks = work_.tasks;
  if (n_on_devices > 0)
    tasks.erase(std::remove_if(tasks.begin(), tasks.end(),
                               [](const Task& task) { return task.device >= 0; }),
                tasks.end());
  if (clip != 1 || grad_scale != 0 || grad_write_ == UNSCALED)  // else they are complete
    for (Task& task : tasks) {
      task.slice.clip = clip;
      task.slice.grad_scale = grad_scale;
      if (grad_scale == 0 && task.slice.grad_write == UNSCALED) task.slice.grad_write = KEPT;
    }
  for (const Scalar& scalar : work_.scalars) scalar.write();
  if (!tasks.empty()) {
    Py_BEGIN_ALLOW_THREADS run(tasks, work_.layouts, num_threads);
    Py_END_ALLOW_THREADS
  }
  // Only now: another thread must not read a state that is not yet written. The keys are strings,
  // so no Python code runs here, and Ctrl-C waits.
  size_t next = 0;
  for (const Held& held : work_.held) {
    if (!work_.has_new_states) break;
    for (const Scalar& scalar : work_.scalars_of(held))
      if (scalar.moved && scalar.key != nullptr &&
          PyDict_SetItem(held.states, scalar.key, scalar.object) != 0)
        throw PythonError();
    if (held.created == nullptr) continue;
    if (lists_ != nullptr) {
      enter_created(held);
      continue;
    }
    PyObject* entry = state_dicts_[next++];
    if (PyDict_Update(entry, held.created) != 0) throw PythonError();
    if (held.converted) remove_nones(entry);
  }
  work_.averages.write_counts();
  return outcome;
}

}  // namespace fused_optim
