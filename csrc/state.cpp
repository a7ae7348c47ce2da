// Where a param's entry is found in a dict, and how many steps it has seen.
#include <cmath>

#include "gather.h"

namespace fused_optim {

PyObject* Finder::find(PyObject* dict, PyObject* param, Py_ssize_t& position) {
  PyObject *key, *value;
  const auto is_at = [&](Py_ssize_t start) {
    Py_ssize_t next = start;
    if (!PyDict_Next(dict, &next, &key, &value) || key != param) return false;
    position = start;
    cursor_ = next;
    return true;
  };
  if (is_at(position) || is_at(cursor_)) return value;
  // Python code may have run since the index was made: what it finds is looked at.
  auto found = index_.find(param);
  if (found != index_.end() ? is_at(found->second) : PyDict_GET_SIZE(dict) == indexed_)
    return found != index_.end() ? value : nullptr;
  index_.clear();
  indexed_ = PyDict_GET_SIZE(dict);
  Py_ssize_t next = 0, start = 0;
  while (PyDict_Next(dict, &next, &key, &value)) {
    index_[key] = start;
    start = next;
  }
  found = index_.find(param);
  return found != index_.end() && is_at(found->second) ? value : nullptr;
}

// False if stock must handle this step tensor.
bool Plan::read_step(PyObject* step, const View& param, const char*& reason, Hint& hint,
                     StepWrite& write) {
  View view;
  reason = "step is not a float tensor with one element on the CPU or the param's device";
  if (step == nullptr || !is_plain(step) || !view.read(step) || view.numel() != 1 ||
      (view.device.type != dlpack::CPU && view.device != param.device) ||
      (view.dtype != F32 && view.dtype != F64) || view.data == nullptr)
    return false;
  hint.impls[MAX_STREAMS] = view.shape;
  hint.step_data = view.data;
  write.data = view.data;
  write.dtype = view.dtype;
  write.on_device = view.device.type != dlpack::CPU;
  if (write.on_device) return true;
  if (view.dtype == F32)
    write.value = *static_cast<float*>(view.data) + 1.0f;  // saturates at 2^24, as stock's does
  else
    write.value = *static_cast<double*>(view.data) + 1.0;
  if (!(write.value >= 1 && write.value <= 9007199254740992.0) ||
      write.value != std::floor(write.value)) {
    reason = "step is not a whole number";
    return false;
  }
  return true;
}

}  // namespace fused_optim
