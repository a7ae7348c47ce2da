// One step as a whole: what the gatherer found is checked for shared memory, handed to whom it
// belongs, and committed.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "gather.h"

namespace fused_optim {

Plan::Plan(const std::string& rule)
    : rule_([&]() -> const RuleInfo& {
        for (const RuleInfo& info : rules())
          if (rule == info.name) return info;
        throw std::invalid_argument("no rule is called '" + rule + "'");
      }()) {
  rule_index_ = static_cast<int>(&rule_ - rules().data());
  for (const char* name : rule_.option_names) {
    const char* dot = std::strchr(name, '.');
    const std::string key = dot ? std::string(name, dot) : name;
    option_keys_.push_back(interned(key.c_str()));
    option_items_.push_back(dot ? std::atoi(dot + 1) : -1);
  }
  for (const char* name : rule_.state_names) {
    state_keys_.push_back(interned(name));
    scale_keys_.push_back(interned((std::string(name) + "_scale").c_str()));
  }
}

Plan::~Plan() {
  release();
  Py_XDECREF(fallbacks_);
  for (const auto& [batch, object] : batches_) Py_DECREF(object);
  for (const auto& [batch, object] : grad_batches_) Py_DECREF(object);
  for (PyObject* key : option_keys_) Py_DECREF(key);
  for (PyObject* key : state_keys_) Py_DECREF(key);
  for (PyObject* key : scale_keys_) Py_DECREF(key);
}

PyObject* Plan::hold(PyObject* owned) {
  held_.push_back(owned);
  return owned;
}

void Plan::release() {
  // Swapped out first: a destructor may run Python code.
  std::vector<PyObject*> held;
  std::vector<Pending> pending;
  std::vector<EmaTask> ema_tasks;
  held.swap(held_);
  pending.swap(pending_);
  ema_tasks.swap(ema_tasks_);
  for (PyObject* object : held) Py_DECREF(object);
  for (const Pending& states : pending) {
    Py_DECREF(states.param);
    Py_DECREF(states.states);
  }
  for (const EmaTask& ema : ema_tasks) {
    Py_DECREF(ema.param);
    Py_DECREF(ema.entry);
    Py_DECREF(ema.tensor);
    Py_DECREF(ema.count);
  }
  held.clear();
  if (held_.empty()) held_.swap(held);  // keep the memory
  tasks_.clear();
  origins_.clear();
  params_.clear();
  grads_.clear();
  layouts_.clear();
  packings_.clear();
  norm_tasks_.clear();
  hypers_.clear();
  steps_.clear();
  device_tasks_.clear();
  keys_.clear();
  rows_.clear();
  to_stage_.clear();
  pending_task_.clear();
  moved_steps_.clear();
  states_.end();
  emas_.end();
}

namespace {

// That a kernel reads and writes for one tensor; a step count is not worth counting.
int64_t moved_nbytes(const Task& task, const Packing* packing) {
  int64_t nbytes = 0;
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) continue;
    const int times = task.written >> s & 1 ? 2 : 1;
    nbytes += times * task.slice.numel * ITEMSIZE[task.slice.dtypes[s]];
    if (packing == nullptr) continue;
    if (packing->scales[s] != nullptr) nbytes += times * ((task.slice.numel + 63) / 64) * 2;
    if (s == PARAM && task.slice.remainder != nullptr)
      nbytes += times * task.slice.numel * (packing->storage[PARAM] == SPLIT8 ? 1 : 2);
  }
  return nbytes;
}

}  // namespace

PyObject* Plan::explain(PyObject* groups, PyObject* state, const StepContext& context) {
  struct Release {
    Plan& plan;
    ~Release() { plan.release(); }
  } release_at_end{*this};
  release();
  Py_CLEAR(fallbacks_);
  gather(groups, state, context);
  PyObject* served = hold(check(PyList_New(0)));
  for (size_t t = 0; t < tasks_.size(); t++) {
    const Task& task = tasks_[t];
    const Packing* packing = task.packing >= 0 ? &packings_[task.packing] : nullptr;
    PyObject* entry = hold(check(Py_BuildValue(
        "(LLOLOO)", static_cast<long long>(origins_[t].group),
        static_cast<long long>(origins_[t].index), task.device >= 0 ? Py_True : Py_False,
        static_cast<long long>(moved_nbytes(task, packing)),
        task.streams >> EMA & 1 ? Py_True : Py_False, task.layout >= 0 ? Py_True : Py_False)));
    if (PyList_Append(served, entry) != 0) throw PythonError();
  }
  return check(Py_BuildValue("(OO)", served, fallbacks_ == nullptr ? Py_None : fallbacks_));
}

namespace {

// Schedules overshoot, and torch.optim steps with what they write.
void warn_of_negative_lr(double lr) {
  static bool warned = false;
  if (warned || lr >= -1e-12) return;  // what schedules end with for 0 is rounded to about -1e-18
  warned = true;
  char text[120];
  std::snprintf(
      text, sizeof(text),
      "step() with a negative learning rate, %g, moves uphill, as in torch.optim; said once", lr);
  if (PyErr_WarnEx(PyExc_UserWarning, text, 1) != 0) throw PythonError();
}

}  // namespace

PyObject* Plan::step(PyObject* groups, PyObject* state, const StepContext& context) {
  struct Release {
    Plan& plan;
    ~Release() { plan.release(); }
  } release_at_end{*this};
  release();
  Py_CLEAR(fallbacks_);
  gather(groups, state, context);
  warn_of_negative_lr(lowest_lr_);
  if (!device_tasks_.empty()) {
    stage(context);
    PyObject* grad_write = hold(check(PyLong_FromLong(context.grad_write())));
    PyObject* batches = hold(batch_tasks());
    PyObject* grads = hold(batch_grads(context));
    PyObject* ready = hold(check(PyObject_CallMethodObjArgs(context.launcher, names.ready, batches,
                                                            grads, grad_write, nullptr)));
    if (ready != Py_None) {  // why the kernels cannot run
      std::vector<bool> moved;
      for (const Task& task : tasks_) moved.push_back(task.device >= 0);
      const char* reason = PyUnicode_AsUTF8(ready);
      if (reason == nullptr) throw PythonError();
      move_to_stock(moved, reason);
      device_tasks_.clear();
    }
  }
  if (((context.scale_on_device || context.skip_on_device) && !resolve(context)) ||
      (context.measures() && !measure(context)))
    return check(Py_BuildValue("(iiOO)", 0, 0, Py_None, Py_None));
  if (fallbacks_ != nullptr) Py_DECREF(check(PyObject_CallOneArg(context.run_stock, fallbacks_)));
  Py_ssize_t n_device = 0;
  for (const Task& task : tasks_) n_device += task.device >= 0;
  PyObject* fallbacks = fallbacks_ == nullptr ? Py_None : fallbacks_;
  PyObject* outcome =
      hold(check(Py_BuildValue("(nnOO)", static_cast<Py_ssize_t>(tasks_.size()) - n_device,
                               n_device, fallbacks, hold(not_averaged()))));
  commit(state, context);
  Py_INCREF(outcome);
  return outcome;
}

void Plan::fall_back(int64_t group, int64_t index, const char* reason) {
  if (fallbacks_ == nullptr) fallbacks_ = check(PyList_New(0));
  PyObject* entry = check(
      Py_BuildValue("(LLs)", static_cast<long long>(group), static_cast<long long>(index), reason));
  const int failed = PyList_Append(fallbacks_, entry);
  Py_DECREF(entry);
  if (failed) throw PythonError();
}

// Tensors that share memory must be stepped one after the other, as stock does, unless the shared
// memory is only read (two params with one grad). What was compared in the last step and has not
// moved is not compared again.
void Plan::move_overlapping_to_stock(bool anew) {
  const auto range_of = [&](size_t t, int s) {
    const Task& task = tasks_[t];
    const auto* data = static_cast<const char*>(task.slice.streams[s]);
    const int64_t reach = task.layout >= 0 ? layouts_[task.layout].reach(s) : task.slice.numel;
    return Range{data, data + reach * ITEMSIZE[task.slice.dtypes[s]], t};
  };
  const auto add_packing = [&](size_t t) {
    const Packing& packing = packings_[tasks_[t].packing];
    const int64_t numel = tasks_[t].slice.numel;
    for (uint16_t* scales : packing.scales)
      if (scales != nullptr) {
        const auto* data = reinterpret_cast<const char*>(scales);
        written_.add({data, data + (numel + 63) / 64 * 2, t});
      }
    const auto* rest = static_cast<const char*>(tasks_[t].slice.remainder);
    if (rest != nullptr)
      written_.add({rest, rest + numel * (packing.storage[PARAM] == SPLIT8 ? 1 : 2), t});
  };
  std::vector<bool> overlaps;
  const auto mark = [&](size_t task) {
    overlaps.resize(tasks_.size());
    overlaps[task] = true;
  };
  anew |= !(written_by_ == origins_);  // its ranges name tasks by their number
  if (anew) {
    written_by_ = origins_;
    written_.clear();
    for (size_t t = 0; t < tasks_.size(); t++) {
      if (steps_[t].data != nullptr) {
        const auto* data = static_cast<const char*>(steps_[t].data);
        written_.add({data, data + ITEMSIZE[steps_[t].dtype], t});
      }
      for (int s = 0; s < MAX_STREAMS && tasks_[t].slice.numel > 0; s++)
        if (tasks_[t].written >> s & 1) written_.add(range_of(t, s));
      if (tasks_[t].packing >= 0 && tasks_[t].slice.numel > 0) add_packing(t);
    }
    written_.sort(mark);
  }
  for (size_t t = 0; t < tasks_.size(); t++) {
    const Task& task = tasks_[t];
    if ((task.known_grad && !anew) || (task.written >> GRAD & 1) || task.slice.numel == 0) continue;
    written_.find(range_of(t, GRAD), mark);
  }
  if (overlaps.empty()) return;
  move_to_stock(overlaps, "memory shared with another tensor");
  hints_.clear();  // look again next time
}

void Plan::move_to_stock(const std::vector<bool>& which, const char* reason) {
  std::vector<int64_t> moved(tasks_.size());
  size_t kept = 0;
  for (size_t t = 0; t < tasks_.size(); t++) {
    if (which[t]) {
      fall_back(origins_[t].group, origins_[t].index, reason);
      moved[t] = -1;
      continue;
    }
    moved[t] = static_cast<int64_t>(kept);
    tasks_[kept] = tasks_[t];
    origins_[kept] = origins_[t];
    params_[kept] = params_[t];
    grads_[kept] = grads_[t];
    if (!norm_tasks_.empty()) norm_tasks_[kept] = norm_tasks_[t];
    steps_[kept] = steps_[t];
    kept++;
  }
  tasks_.resize(kept);
  origins_.resize(kept);
  params_.resize(kept);
  grads_.resize(kept);
  if (!norm_tasks_.empty()) norm_tasks_.resize(kept);
  for (EmaTask& ema : ema_tasks_)
    if (ema.task >= 0) ema.task = moved[ema.task];
  steps_.resize(kept);
  std::vector<Pending> pending;
  std::vector<int64_t> pending_task;
  for (size_t i = 0; i < pending_.size(); i++) {
    if (moved[pending_task_[i]] >= 0) {
      pending.push_back(pending_[i]);
      pending_task.push_back(moved[pending_task_[i]]);
    } else {
      Py_DECREF(pending_[i].param);
      hold(pending_[i].states);
    }
  }
  pending_.swap(pending);
  pending_task_.swap(pending_task);
  std::vector<MovedStep> moved_steps;
  for (const MovedStep& step : moved_steps_)
    if (moved[step.task] >= 0)
      moved_steps.push_back({step.states, step.step, static_cast<size_t>(moved[step.task])});
  moved_steps_.swap(moved_steps);
}

// Whether the host has to know if the step is skipped because it counts what some EMA is made of.
bool Plan::host_counts() const {
  for (const EmaTask& ema : ema_tasks_)
    if (ema.on_device == 0) return true;
  return false;
}

// Lets the host wait for the grad scale and for whether to skip, if something it runs needs them.
// False: the step is skipped.
bool Plan::resolve(const StepContext& context) {
  bool needed = fallbacks_ != nullptr || (context.skip_on_device && host_counts());
  for (const Task& task : tasks_) needed |= task.device < 0;
  if (!needed) return true;
  PyObject* grad_scale = hold(check(PyObject_CallNoArgs(context.resolve)));
  if (grad_scale == Py_None) return false;
  const double value = number(grad_scale);
  for (Task& task : tasks_)
    if (task.device < 0) {
      task.slice.grad_scale = value;
      if (value == 0 && task.slice.grad_write == UNSCALED) task.slice.grad_write = KEPT;
    }
  return true;
}

// The norm pass. False: the step is skipped.
bool Plan::measure(const StepContext& context) {
  std::vector<NormTask> on_cpu;
  PyObject* sharded = hold(check(PyList_New(0)));
  for (size_t t = 0; t < tasks_.size(); t++) {
    if (tasks_[t].device < 0) on_cpu.push_back(norm_tasks_[t]);
    if (!is_plain(grads_[t]) && PyList_Append(sharded, grads_[t]) != 0) throw PythonError();
  }
  Sum sum;
  Py_BEGIN_ALLOW_THREADS sum = sum_of_squares(on_cpu, layouts_, context.num_threads);
  Py_END_ALLOW_THREADS const bool waits =
      !on_cpu.empty() || (context.skip_on_device && (fallbacks_ != nullptr || host_counts()));
  PyObject* clip = hold(check(PyObject_CallFunction(
      context.measured, "dOOOOO", sum.squares, sum.nonfinite ? Py_True : Py_False,
      fallbacks_ == nullptr ? Py_None : fallbacks_,
      on_cpu.size() == tasks_.size() ? Py_None : context.launcher, waits ? Py_True : Py_False,
      sharded)));
  if (clip == Py_None) return false;
  const double value = number(clip);
  for (Task& task : tasks_) task.slice.clip = value;
  return true;
}

// False: a Python exception is set.
static bool remove_nones(PyObject* dict) {
  std::vector<PyObject*> keys;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value))
    if (value == Py_None) keys.push_back(key);
  for (PyObject* none : keys)
    if (PyDict_DelItem(dict, none) != 0) return false;
  return true;
}

void Plan::commit(PyObject* state, const StepContext& context) {
  enter_emas(context);
  if (tasks_.empty()) return count_emas();
  // Raw-pointer writes are invisible to autograd, so its version counters are bumped by hand.
  PyObject* changed = hold(check(PyList_New(0)));
  const auto change = [&](PyObject* tensor) {
    PyObject* part = part_of(tensor, tensor);
    if (PyList_Append(changed, tensor) != 0 ||
        (part != nullptr && part != tensor && PyList_Append(changed, part) != 0))
      throw PythonError();
  };
  for (size_t t = 0; t < tasks_.size(); t++) {
    change(params_[t]);
    if (tasks_[t].written >> GRAD & 1) change(grads_[t]);
  }
  for (const EmaTask& ema : ema_tasks_)
    if (ema.task >= 0) change(ema.tensor);
  Py_DECREF(check(PyObject_CallOneArg(torch.increment_version, changed)));
  std::vector<PyObject*> entries;  // of `state`, for the new states
  for (const Pending& fresh : pending_) {
    entries.push_back(hold(check(PyObject_GetItem(state, fresh.param))));
    if (!PyDict_Check(entries.back())) raise(PyExc_TypeError, "a param's state must be a dict");
  }
  // If a launch is interrupted (Ctrl-C), the others and the rest of the step still happen, then it
  // raises.
  PyObject *error_type = nullptr, *error = nullptr, *traceback = nullptr;
  if (!device_tasks_.empty()) {
    PyObject* launched = PyObject_CallMethodNoArgs(context.launcher, names.launch);
    if (launched == nullptr) PyErr_Fetch(&error_type, &error, &traceback);
    Py_XDECREF(launched);
    tasks_.erase(std::remove_if(tasks_.begin(), tasks_.end(),
                                [](const Task& task) { return task.device >= 0; }),
                 tasks_.end());
  }
  for (const StepWrite& step : steps_) {
    if (step.on_device || step.data == nullptr) continue;
    if (step.dtype == F32)
      *static_cast<float*>(step.data) = static_cast<float>(step.value);
    else
      *static_cast<double*>(step.data) = step.value;
  }
  Py_BEGIN_ALLOW_THREADS run(tasks_, layouts_, context.num_threads);
  Py_END_ALLOW_THREADS for (const MovedStep& moved :
                            moved_steps_) if (PyDict_SetItem(moved.states, names.step,
                                                             moved.step) != 0) throw PythonError();
  // Only now: another thread must not read a state that is not yet written. The keys are strings,
  // so no Python code runs here, and Ctrl-C waits.
  for (size_t i = 0; i < entries.size(); i++)
    if (PyDict_Update(entries[i], pending_[i].states) != 0 ||
        (pending_[i].converted && !remove_nones(entries[i])))
      throw PythonError();
  count_emas();
  if (error_type != nullptr) {
    PyErr_Restore(error_type, error, traceback);
    throw PythonError();
  }
}

}  // namespace fused_optim
