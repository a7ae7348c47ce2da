// Python objects -> plain descriptors, in one walk over param_groups and state. With module.cpp the
// only user of the CPython API, and the only user of DLPack.
#pragma once

#include <Python.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "dispatch.h"
#include "dlpack.h"
#include "parallel.h"

namespace fused_optim {

// A Python exception is set.
struct PythonError {};

// What is needed of torch, looked up once. Raises PythonError.
void bind_torch();

// One optimizer's step. Between two steps it keeps memory to work in and hints where to look first;
// hints are compared, never dereferenced, so that nothing of the last step is trusted.
class Plan {
 public:
  explicit Plan(const std::string& rule);  // std::invalid_argument if there is no such rule
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Validates everything, calls run_stock(fallbacks) for the tensors no kernel serves, then runs the
  // kernels, which cannot fail. Raises PythonError before anything is written.
  //   groups        optimizer.param_groups
  //   state         optimizer.state
  //   create_state  (param, group) -> dict of a tensor's first states, not yet in `state`
  //   run_stock     (list of (group index, param index, reason)) -> None; called only if there are any
  //   grad_scale    divides the grads, which are written back; 0: none
  // Returns (number of tensors the kernels stepped, fallbacks or None), a new reference.
  PyObject* step(PyObject* groups, PyObject* state, PyObject* create_state, PyObject* run_stock,
               int num_threads, double grad_scale);

 private:
  // Where a param's state was found, and what it consisted of.
  struct Hint {
    Py_ssize_t position = 0;        // of its entry in `state`, as PyDict_Next takes it
    void* data[MAX_STREAMS] = {};
    int64_t numel = 0;
    PyObject* objects[MAX_STREAMS + 2] = {};  // param, step, state dict, states: to prefetch
    const void* impls[MAX_STREAMS + 1] = {};  // inside the TensorImpls: to prefetch
    void* step_data = nullptr;
  };
  struct StepWrite {
    void* data;
    Dtype dtype;
    double value;
  };
  struct Pending {  // states to be inserted when the step can no longer fail; both references owned
    PyObject* param;
    PyObject* states;
  };
  struct Range {  // memory of one tensor of a task
    const char *begin, *end;
    size_t task;
  };
  struct Origin {
    int64_t group, index;
  };
  struct Group {
    PyObject* dict;
    int64_t index;
    const char* stock_reason;  // the whole group goes to stock; null: no
    double options[MAX_HYPERS];
    double grad_sign;
    unsigned variant;
    double prepared_step;  // what `hypers` were prepared for; -1: none yet
    unsigned prepared_variant;
    int64_t hypers;  // index of the group's latest entry of hypers_
  };

  void gather(PyObject* groups, PyObject* state, PyObject* create_state, double grad_scale);
  void read_group(Group& group);
  void gather_param(Group& group, int64_t index, PyObject* param, PyObject* state,
                    PyObject* create_state, double grad_scale, Hint& hint);
  PyObject* find_state(PyObject* state, PyObject* param, Hint& hint);
  bool read_step(PyObject* step, const char*& reason, Hint& hint, StepWrite& write);
  void move_overlapping_to_stock(bool anew);
  void fall_back(int64_t group, int64_t index, const char* reason);
  void commit(PyObject* state, int num_threads);
  void release();
  PyObject* hold(PyObject* owned);

  const RuleInfo& rule_;
  int rule_index_;
  std::vector<PyObject*> option_keys_, state_keys_;
  std::vector<int> option_items_;  // index into a tuple option; -1: the option is the number

  std::vector<Hint> hints_;
  bool hints_hold_;  // no pointer that is written through has changed since the last step
  Py_ssize_t cursor_;
  std::unordered_map<PyObject*, std::pair<Py_ssize_t, PyObject*>> state_index_;

  std::vector<Range> written_;  // by all tasks, sorted; holds while hints_hold_
  std::vector<const char*> written_reach_;  // the largest end so far

  std::vector<Task> tasks_;
  std::vector<Origin> origins_;  // of each task
  std::vector<PyObject*> params_;  // of each task; held
  std::vector<Layout> layouts_;
  std::vector<double> hypers_;
  std::vector<StepWrite> steps_;  // of each task if the rule has a step
  std::vector<Pending> pending_;
  std::vector<int64_t> pending_task_;
  std::vector<PyObject*> held_;
  PyObject* fallbacks_ = nullptr;
};

}  // namespace fused_optim
