// Python objects -> plain descriptors, in one walk over param_groups and state. What includes this
// or view.h is all that uses the CPython API and DLPack.
#pragma once

#include <Python.h>

#include <array>
#include <cfloat>
#include <cmath>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "batch.h"
#include "dispatch.h"
#include "norm.h"
#include "overlap.h"
#include "parallel.h"
#include "view.h"

namespace fused_optim {

// How a step goes on beside the groups and the state. Borrowed references.
struct StepContext {
  PyObject* create_state;  // (param, group) -> dict of a tensor's first states, not yet in `state`
  // (param, group, states) -> dict of the states in the formats that the group asks for, not yet in
  // `state`; None: there is no such state any more.
  PyObject* convert_state;
  PyObject* place_of;   // DTensor -> (numel, first), a Place; if it has formats
  PyObject* run_stock;  // (list of (group index, param index, reason)) -> None; if there are any
  // What serves tensors on devices (fused_optim.triton_kernels.launch.Launcher), or None; and the
  // DLPack device types that it serves, as bits.
  PyObject* launcher;
  unsigned device_types;
  int num_threads;
  double grad_scale;     // divides the grads; 0: none that the host knows
  bool scale_on_device;  // there is one, but the host does not know it
  bool skip_on_device;   // whether the step is skipped is not known to the host
  PyObject* resolve;     // () -> the grad scale (0: none), or None if the step is skipped
  // (sum of the squares of the CPU tasks' grads, whether one of them is not finite, fallbacks or
  // None, launcher if it has tasks, else None, whether the host has to know the outcome, list of
  // those of the tasks' grads that are DTensors, which no sum here includes) -> the coefficient
  // that clips the CPU tasks' grads, or None if the host knows that the step is skipped. None:
  // nothing is measured.
  PyObject* measured;
  bool writes_clipped, zeroes;  // what is left in the grads
  PyObject* emas;               // dict: param -> [ema, n_averaged]
  PyObject* create_ema;  // (param, group, old entry or None) -> such an entry, not yet in `emas`

  bool measures() const { return measured != Py_None; }
  bool scales() const { return grad_scale != 0 || scale_on_device; }
  GradWrite grad_write() const {
    return zeroes ? ZEROED : writes_clipped ? CLIPPED : scales() ? UNSCALED : KEPT;
  }
};

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
  std::unordered_map<PyObject*, Py_ssize_t> index_;  // compared, never dereferenced
  Py_ssize_t indexed_ = 0;                           // the dict's size then
};

// Of the keys for one stream of one param (its number among all), and of its random bits in one
// step.
uint64_t random_seed(uint64_t seed, uint64_t param, int stream);
void random_key(uint64_t random_seed, uint64_t step, uint32_t* key);

// What a stream of a contiguous tensor stands for, without a step: fills `values` with slice.numel
// of them, or the stream (with its scales or its remainder) from them.
void unpack(const Slice& slice, int stream, float* values, int num_threads);
void pack(const Slice& slice, int stream, const float* values, int num_threads);

inline bool fits_float(double value) { return std::abs(value) <= FLT_MAX; }

// Why torch.optim's code steps a group whose options no kernel takes as it does.
constexpr const char* ODD_OPTIONS = "an option that is no number in float32's range";

// One optimizer's step. Between two steps it keeps memory to work in and hints where to look first;
// hints are compared, never dereferenced, so that nothing of the last step is trusted.
class Plan {
 public:
  explicit Plan(const std::string& rule);  // std::invalid_argument if there is no such rule
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Validates everything, calls run_stock(fallbacks) for the tensors no kernel serves, then runs
  // the kernels, which cannot fail. Raises PythonError before anything is written. Returns (tensors
  // stepped on the CPU, tensors stepped on devices, fallbacks or None, list of (param, EMA entry,
  // weight) that no kernel has averaged or None); all 0 and None if the step was skipped. A new
  // reference.
  PyObject* step(PyObject* groups, PyObject* state, const StepContext& context);

  // What step() would do, without doing it: (list of (group index, param index, whether on a
  // device, bytes that its kernel reads and writes, whether it averages, whether its streams lie in
  // several orders), fallbacks or None). A new reference.
  PyObject* explain(PyObject* groups, PyObject* state, const StepContext& context);

 private:
  // Where a param's state was found, and what it consisted of.
  struct Hint {
    Py_ssize_t position = 0, ema_position = 0;  // of its entries in `state` and `emas`
    void* data[MAX_STREAMS] = {};
    int64_t numel = 0;
    PyObject* objects[MAX_STREAMS + 2] = {};  // param, step, state dict, states: to prefetch
    const void* impls[MAX_STREAMS + 1] = {};  // inside the TensorImpls: to prefetch
    void* step_data = nullptr;
    void* packed[MAX_STATES + 1] = {};  // scales and remainder
  };
  enum StateFormat { STATE_AS_STOCK, STATE_F32, STATE_BF16, STATE_INT8 };
  struct Place {    // of what this process holds of a param
    int64_t numel;  // of the whole param
    int64_t first;  // random bits are drawn as for the elements of the whole from this one on
  };
  struct StepWrite {
    void* data;  // null: no step is counted
    Dtype dtype;
    double value;    // after the step
    bool on_device;  // there it is prepare that reads and advances it
  };
  struct Pending {  // states to be inserted when the step can no longer fail; both references owned
    PyObject* param;
    PyObject* states;
    bool converted;  // None in `states` stands for what has to go
  };
  struct MovedStep {  // a step that has to live on the device from now on; held
    PyObject* states;
    PyObject* step;
    size_t task;
  };
  struct EmaTask {  // one for each param of a group with an EMA; all references held
    PyObject *param, *entry, *tensor;
    bool is_new;    // not yet in `emas`
    double weight;  // if the host knows it
    PyObject*
        count;  // for the entry: the number after the step, or a tensor that the device advances
    int64_t on_device;  // address of that tensor's element, as prepare takes it; 0: the host counts
    double decay;
    bool warmup;
    int64_t task;  // of the param; -1: no kernel averages it
  };
  struct Origin {
    int64_t group, index;
    bool operator==(const Origin& other) const {
      return group == other.group && index == other.index;
    }
  };
  // What a row is made of, for as long as a gather lasts: neighbours mostly have it in common.
  struct RowOrigin {
    int64_t group, hypers;  // hypers: -1 where a device prepares them
    unsigned variant;
    bool by_address;
    double step, ema, ema_warmup;
    bool operator==(const RowOrigin& other) const {
      return group == other.group && hypers == other.hypers && variant == other.variant &&
             by_address == other.by_address && step == other.step && ema == other.ema &&
             ema_warmup == other.ema_warmup;
    }
  };
  struct DeviceTask {
    size_t key, row;                    // in keys_ and rows_
    int64_t step, waiting, n_averaged;  // addresses, see Batch::add
  };
  struct Group {
    PyObject* dict;
    int64_t index;
    const char* stock_reason;  // the whole group goes to stock; null: no
    bool capturable, fused;
    double options[MAX_HYPERS];
    // Options that are tensors on `option_device`: 0 where the number is known.
    int64_t option_addresses[MAX_HYPERS];
    PyObject* option_tensors[MAX_HYPERS];
    Device option_device;
    bool has_addresses, numbers_known;
    double grad_sign;
    bool packs;  // the user has given one of the following
    StateFormat state_format;
    Storage master;
    uint64_t seed;
    PyObject* param_indices;  // of its params among all of the optimizer's; null: in order
    bool has_ema, ema_warmup;
    double ema_decay;
    unsigned variant;
    double prepared_step;  // what `hypers` were prepared for; -1: none yet
    int64_t hypers;        // index of the group's latest entry of hypers_
    bool hypers_fit;       // into float32, all of these
  };

  void gather(PyObject* groups, PyObject* state, const StepContext& context);
  void read_group(Group& group, const StepContext& context);
  void read_ema(Group& group);
  void read_formats(Group& group);
  bool counts_steps(const Group& group, const View& param) const;
  bool read_packing(const Group& group, PyObject* param, const View& view, const Place& place,
                    unsigned used, PyObject* states, Packing& packing, void*& remainder);
  // What this process holds of a param or of another tensor of its sharding: the tensor itself if
  // both are plain; null if it is another kind of tensor, or sharded otherwise. Lives to the end of
  // the step.
  PyObject* part_of(PyObject* tensor, PyObject* param);
  Place place_of(PyObject* param, const View& part, const StepContext& context);
  bool ema_fits(PyObject* ema, PyObject* param);
  // Random bits' keys of a packed task.
  void enter_packing(Group& group, int64_t index, uint64_t ordinal, double step, Packing& packing,
                     void* remainder, const Hint& before, Hint& now, Task& task);
  void read_option(Group& group, size_t option, PyObject* value, const StepContext& context);
  bool read_number(size_t option, PyObject* value, double& result);
  void know_options(Group& group);
  void gather_param(Group& group, int64_t index, uint64_t ordinal, PyObject* param, PyObject* state,
                    const StepContext& context, Hint& hint);
  EmaTask* gather_ema(Group& group, PyObject* param, const StepContext& context, Hint& hint);
  void count_on_device(EmaTask& ema, const StepContext& context);
  bool read_step(PyObject* step, const View& param, const char*& reason, Hint& hint,
                 StepWrite& write);
  void move_overlapping_to_stock(bool anew);
  void move_to_stock(const std::vector<bool>& which, const char* reason);
  void fall_back(int64_t group, int64_t index, const char* reason);
  size_t enter_key(const BatchKey& key);
  size_t enter_row(const RowOrigin& origin, const Group& group);
  void stage(const StepContext& context);
  PyObject* batch_tasks();
  PyObject* batch_grads(const StepContext& context);
  bool host_counts() const;
  bool resolve(const StepContext& context);
  bool measure(const StepContext& context);
  PyObject* not_averaged();
  void enter_emas(const StepContext& context);
  void count_emas();
  void commit(PyObject* state, const StepContext& context);
  void release();
  PyObject* hold(PyObject* owned);

  const RuleInfo& rule_;
  int rule_index_;
  std::vector<PyObject*> option_keys_, state_keys_, scale_keys_;
  std::vector<int> option_items_;  // index into a tuple option; -1: the option is the number

  std::vector<Hint> hints_;
  bool hints_hold_;       // no pointer that is written through has changed since the last step
  double lowest_lr_ = 0;  // of the groups, if negative
  bool any_waiting_;      // the launcher knows momentum that may not have started
  Finder states_, emas_;

  std::vector<Origin> written_by_;
  bool written_grads_ = false;  // the last step wrote grads
  Written written_;             // by all tasks; holds while hints_hold_

  std::vector<Task> tasks_;
  std::vector<Origin> origins_;            // of each task
  std::vector<PyObject*> params_, grads_;  // of each task; held
  std::vector<Layout> layouts_;
  std::vector<Packing> packings_;
  // Of each task, if grads are measured. A null grad: the device's copy of it, to be staged.
  std::vector<NormTask> norm_tasks_;
  std::vector<EmaTask> ema_tasks_;
  std::vector<double> hypers_;
  std::vector<StepWrite> steps_;  // of each task
  std::vector<DeviceTask> device_tasks_;
  std::vector<BatchKey> keys_;
  std::vector<Row> rows_;
  RowOrigin row_origin_;  // of the last one
  // Of tasks that are to be staged, by their number then: all streams; held.
  std::unordered_map<int, std::array<PyObject*, MAX_STREAMS>> to_stage_;
  // Of all steps so far, each with the Python object that stands for it; owned.
  std::vector<std::pair<std::shared_ptr<Batch>, PyObject*>> batches_;
  std::vector<std::pair<std::shared_ptr<GradBatch>, PyObject*>> grad_batches_;
  std::vector<Pending> pending_;
  std::vector<int64_t> pending_task_;
  std::vector<MovedStep> moved_steps_;
  std::vector<PyObject*> held_;
  PyObject* fallbacks_ = nullptr;
};

// A Python object that stands for the batch (module.cpp knows how). A new reference.
PyObject* to_python(const std::shared_ptr<Batch>& batch);
PyObject* to_python(const std::shared_ptr<GradBatch>& batch);

}  // namespace fused_optim
