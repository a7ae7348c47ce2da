#include "memory.h"

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

}  // namespace fused_optim
