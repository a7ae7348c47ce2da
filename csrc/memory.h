// Remembers what the last step saw: where to look first, and what need not be compared again. All
// of it is compared with what is there now, never dereferenced: nothing of the last step is
// trusted.
#pragma once

#include <unordered_map>
#include <vector>

#include "group.h"
#include "overlap.h"

namespace fused_optim {

// Finds a param's entry in a dict. torch.Tensor.__hash__ is a Python function, so entries are found
// by position and identity: where it was, else behind the last one found, else by an index.
class Finder {
 public:
  void begin() { cursor_ = 0; }
  void end() {
    index_.clear();
    indexed_ = 0;
  }
  // Borrowed; null if there is none. position: of the entry, as PyDict_Next takes it.
  PyObject* find(PyObject* dict, PyObject* param, Py_ssize_t& position);

 private:
  Py_ssize_t cursor_ = 0;
  std::unordered_map<PyObject*, Py_ssize_t> index_;
  Py_ssize_t indexed_ = 0;  // the dict's size then
};

// The place and the memory of a param's states in the last step.
struct Hint {
  // Its entries in `state`, `_averages` and `_outputs`.
  Py_ssize_t position = 0, average_position = 0, output_position = 0;
  void* data[MAX_STREAMS] = {};
  int64_t numel = 0;
  PyObject* objects[MAX_STREAMS + 2] = {};  // param, states, state dict, step: to prefetch
  const void* impls[MAX_STREAMS + 1] = {};  // inside the TensorImpls: to prefetch
  void* step_data = nullptr;
  bool packs = false;
  void* extras[MAX_STREAMS] = {};  // beside packed streams

  [[gnu::always_inline]] void fetch() const {
    for (PyObject* object : objects) prefetch(object);
    for (const void* impl : impls) {
      prefetch(impl, -64);
      prefetch(impl);
      prefetch(impl, 64);
    }
    prefetch(step_data);
  }
};

struct Memory {
  std::vector<Hint> hints;  // one for each param, in order
  bool hold = true;         // no pointer that is written through has changed since the last step
  Finder states, averages, outputs;
  Places places;
  Written written;  // by all tasks of the last step
  std::vector<Origin> written_by;
  bool wrote_grads = false;
};

}  // namespace fused_optim
