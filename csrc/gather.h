// Python objects -> plain descriptors, in one walk over param_groups and state.
#pragma once

#include "memory.h"
#include "work.h"

namespace fused_optim {

// The kind of step that Python asks gather() for, and the findings that Python has to decide about.
enum Bits : unsigned {
  SCALES = 1,          // the grads are divided by a grad scale
  SKIP_ON_DEVICE = 2,  // the device alone knows whether the step is skipped
  MEASURES = 4,        // the norm of the grads is taken
  WRITES_CLIPPED = 8,  // clipped grads are left in the grads,
  ZEROES = 16,         // or zeros
  DRY_RUN = 32,        // no commit follows
  DEVICES = 64,        // found: tensors that a device's kernels serve,
  FALLBACKS = 128,     // tensors that no kernel serves,
  AVERAGES = 256,      // averages that no kernel moves
};

constexpr std::pair<const char*, Bits> BIT_NAMES[] = {
    {"SCALES", SCALES},     {"SKIP_ON_DEVICE", SKIP_ON_DEVICE},
    {"MEASURES", MEASURES}, {"WRITES_CLIPPED", WRITES_CLIPPED},
    {"ZEROES", ZEROES},     {"DRY_RUN", DRY_RUN},
    {"DEVICES", DEVICES},   {"FALLBACKS", FALLBACKS},
    {"AVERAGES", AVERAGES}};

constexpr const char* ODD_STEP =
    "step is not a float tensor with one element on the CPU or the param's device";
constexpr const char* ODD_STATE = "a state of another type or dtype than torch.optim makes";

// Borrowed references.
struct Request {
  // Has `state`, `_averages`, `_outputs`, and the methods that make first states and averages.
  PyObject* optimizer;
  PyObject* groups;
  PyObject* launcher;     // launches devices' kernels (triton_kernels/launch.py); or None
  unsigned device_types;  // DLPack device types that it serves, as bits
  unsigned bits;
  // (grads, states, scalars, lists) for a call with lists instead of an optimizer's dicts: a tuple
  // of the params' grads; one with such a tuple for each state of the rule, empty if it is not
  // used; one with a tuple, or None, for each of its scalars; and the states' lists, which new ones
  // enter. Null: there is none.
  PyObject* lists = nullptr;

  bool asks(Bits bit) const { return bits & bit; }
  bool serves(const Device& device) const { return device_types >> device.type & 1; }
  GradWrite grad_write() const {
    return asks(ZEROES) ? ZEROED : asks(WRITES_CLIPPED) ? CLIPPED : asks(SCALES) ? UNSCALED : KEPT;
  }
};

// A param's state, borrowed or null: among so few keys, an interned one is found sooner by looking
// at each.
inline PyObject* item(PyObject* states, PyObject* wanted) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(states, &position, &key, &value))
    if (key == wanted) return value;
  return get_item(states, wanted);
}

// The param under way.
struct Candidate {
  Candidate(Group& group, int64_t position, size_t number, PyObject* param, Hint& hint, Work& work,
            PyObject* lists);
  std::string where() const;
  // Its grad's, state's or scalar's entry in the lists, borrowed; null: the list is empty.
  PyObject* listed_grad() const;
  PyObject* listed(Py_ssize_t which, size_t index) const;
  // Borrowed; null: there is none.
  PyObject* state(const Schema& schema, size_t s) const;
  PyObject* scalar(const Schema& schema, size_t i) const;

  Group& group;
  const size_t number;  // among all params of this walk
  PyObject* const param;
  PyObject* const lists;  // the request's
  Hint& hint;             // the last step's; `now` takes its place
  Hint now = {};
  Held& held;  // the work's last ones, which leave it again if no kernel serves the param
  Task& task;
  View views[MAX_STREAMS];
  bool on_device = false;
  int average = -1;          // index into Work::averages
  unsigned used = 0;         // bit s: there is state s
  bool has_formats = false;  // the group asks for formats, and they concern this param
  bool has_step = false;     // the rule counts steps, or random bits need them
  bool fresh = false;        // its states are made now
  Packed packed;
  Scalar scalars[MAX_RULE_SCALARS];
  // Those before and after the step, where the host knows them.
  double before[MAX_RULE_SCALARS] = {}, numbers[MAX_RULE_SCALARS] = {};
};

class Gatherer {
 public:
  Gatherer(const Schema& schema, Memory& memory, Work& work, const Request& request)
      : schema_(schema), memory_(memory), work_(work), request_(request) {}
  // Returns the Bits that Python has to decide about; 0: there is nothing. Raises PythonError.
  // Writes to no tensor, and enters nothing into `state` and `_averages`.
  unsigned run();

 private:
  // Each returns null, or the reason that torch.optim's code has to step the param; NO_GRAD if it
  // is not stepped. Raises where torch.optim would have written before it raises.
  const char* gather(Candidate& c);
  const char* identify(Candidate& c);
  const char* find_states(Candidate& c);
  void make_states(Candidate& c, PyObject* method, PyObject* last);
  const char* read_states(Candidate& c);
  const char* read_scalars(Candidate& c);
  void check_scalar(const Candidate& c, size_t scalar, PyObject* tensor) const;
  void check_corrections(const Candidate& c) const;
  const char* lay_out(Candidate& c);
  const char* check_memory(Candidate& c, int stream);
  const char* order(Candidate& c, const int64_t* const* strides);
  const char* complete(Candidate& c);

  int gather_average(Candidate& c);
  int gather_output(Candidate& c);
  void join_average(Candidate& c);
  void count_on_device(Average& average, const View& p);
  void check_dtypes(const Candidate& c) const;
  void find_hidden(Candidate& c);
  bool prepare(Candidate& c);
  void complete_on_device(Candidate& c, bool by_address, bool prepared);
  void complete_on_cpu(Candidate& c);
  void move_overlapping_to_stock();

  const Schema& schema_;
  Memory& memory_;
  Work& work_;
  const Request& request_;
  double lowest_lr_ = 0;  // among the groups, if negative
  Ref outputs_;           // the optimizer's: None, a dict of the params', or a tuple of all
  // The optimizer's (unsure.py), once asked, and whether it has some number.
  Ref unsure_;
  bool is_unsure_ = false;
};

}  // namespace fused_optim
