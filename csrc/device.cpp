// What the launcher of the kernels on devices gets: tensors in one order, and tables.
#include <algorithm>

#include "gather.h"

namespace fused_optim {

size_t Plan::enter_key(const BatchKey& key) {
  if (keys_.empty() || !(keys_.back() == key)) keys_.push_back(key);
  return keys_.size() - 1;
}

size_t Plan::enter_row(const RowOrigin& origin, const Group& group) {
  if (!rows_.empty() && row_origin_ == origin) return rows_.size() - 1;
  row_origin_ = origin;
  Row row = {};
  const double* values = origin.hypers < 0 ? group.options : hypers_.data() + origin.hypers;
  std::copy(values, values + MAX_HYPERS, row.values);
  if (origin.by_address)
    std::copy(group.option_addresses, group.option_addresses + MAX_HYPERS, row.addresses);
  row.variant = origin.variant;
  row.grad_sign = group.grad_sign;
  row.step = origin.step;
  row.ema = origin.ema;
  row.ema_warmup = origin.ema_warmup;
  rows_.push_back(row);
  return rows_.size() - 1;
}

// A device's kernels want all streams of a tensor in one order. Those of another order go through
// copies, which the launcher makes and, behind the kernels, writes back.
void Plan::stage(const StepContext& context) {
  for (size_t t = 0; t < tasks_.size(); t++) {
    Task& task = tasks_[t];
    if (task.device < 0 || task.layout < 0) continue;
    PyObject* originals = hold(check(PyList_New(0)));
    PyObject* written = hold(check(PyList_New(0)));
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(task.streams >> s & 1)) continue;
      PyObject* is_written = task.written >> s & 1 ? Py_True : Py_False;
      if (PyList_Append(originals, to_stage_.at(task.device)[s]) != 0 ||
          PyList_Append(written, is_written) != 0)
        throw PythonError();
    }
    PyObject* staged = hold(check(
        PyObject_CallMethodObjArgs(context.launcher, names.stage, originals, written, nullptr)));
    Py_ssize_t next = 0;
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(task.streams >> s & 1)) continue;
      View view;
      PyObject* tensor = hold(check(PySequence_GetItem(staged, next++)));
      if (!view.read(tensor)) raise(PyExc_TypeError, "stage must return strided tensors");
      task.slice.streams[s] = view.data;
    }
    task.layout = -1;
    if (!norm_tasks_.empty() && norm_tasks_[t].grad == nullptr)
      norm_tasks_[t].grad = task.slice.streams[GRAD];
  }
}

// The batches of this step, as a list of Python objects; a new reference.
PyObject* Plan::batch_tasks() {
  for (const auto& [batch, object] : batches_) batch->begin();
  const int n_states = static_cast<int>(state_keys_.size());
  Batch* batch = nullptr;
  size_t last_key = 0;
  for (const Task& task : tasks_) {
    if (task.device < 0) continue;
    const DeviceTask& on_device = device_tasks_[task.device];
    if (batch == nullptr || last_key != on_device.key) {
      const BatchKey& key = keys_[last_key = on_device.key];
      batch = nullptr;
      for (const auto& [known, object] : batches_)
        if (known->key == key) batch = known.get();
      if (batch == nullptr) {
        const auto fresh = std::make_shared<Batch>(key, n_states);
        batches_.emplace_back(fresh, to_python(fresh));
        batch = fresh.get();
        batch->begin();
      }
    }
    batch->add(task.slice, rows_[on_device.row], on_device.step, on_device.waiting,
               on_device.n_averaged);
  }
  PyObject* used = check(PyList_New(0));
  for (const auto& [known, object] : batches_) {
    known->end();
    if (known->n_tensors() > 0 && PyList_Append(used, object) != 0) {
      Py_DECREF(used);
      throw PythonError();
    }
  }
  return used;
}

// What the norm of a device's grads is made of, as a list of Python objects: empty if nothing is
// measured. A new reference.
PyObject* Plan::batch_grads(const StepContext& context) {
  for (const auto& [batch, object] : grad_batches_) batch->begin();
  std::vector<std::pair<Device, int64_t>> n_chunks;
  for (size_t t = 0; t < tasks_.size() && context.measures(); t++) {
    if (tasks_[t].device < 0) continue;
    const Device device = keys_[device_tasks_[tasks_[t].device].key].device;
    const NormTask& task = norm_tasks_[t];
    const auto of_task = [&](const auto& known) {
      return known.first->device == device && known.first->dtype == task.dtype;
    };
    auto batch = std::find_if(grad_batches_.begin(), grad_batches_.end(), of_task);
    if (batch == grad_batches_.end()) {
      const auto fresh = std::make_shared<GradBatch>(device, task.dtype);
      batch = grad_batches_.emplace(batch, fresh, to_python(fresh));
      fresh->begin();
    }
    auto on_device = std::find_if(n_chunks.begin(), n_chunks.end(),
                                  [&](const auto& count) { return count.first == device; });
    if (on_device == n_chunks.end()) on_device = n_chunks.insert(on_device, {device, 0});
    batch->first->add(task.grad, task.numel, on_device->second);
    on_device->second += (task.numel + NORM_CHUNK - 1) / NORM_CHUNK;
  }
  PyObject* used = check(PyList_New(0));
  for (const auto& [known, object] : grad_batches_) {
    known->end();
    if (!known->numels.current().empty() && PyList_Append(used, object) != 0) {
      Py_DECREF(used);
      throw PythonError();
    }
  }
  return used;
}

}  // namespace fused_optim
