#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace fused_optim {

namespace {

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const dlpack::ExchangeApi* api;
  PyGetSetDef* grad;
  PyObject* is_neg;
  PyObject* is_zerotensor;
  PyObject* increment_version;
} torch;

// Keys of dicts, interned.
struct Names {
  PyObject *params, *step, *maximize, *differentiable, *capturable, *item, *untyped_storage, *nbytes,
      *storage_offset;
} names;

PyObject* check(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

PyObject* interned(const char* name) { return check(PyUnicode_InternFromString(name)); }

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError();
}

std::string describe(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int d = 0; d < ndim; d++) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

const char* name_of(Dtype dtype) {
  constexpr const char* NAMES[] = {"float32", "float64", "bfloat16", "float16", "other"};
  return NAMES[dtype];
}

bool is_plain(PyObject* object) {
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

// What DLPack says about one tensor.
struct View {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int ndim;
  Dtype dtype;  // N_DTYPES: none a kernel reads
  bool cpu, complex;

  // False if the tensor is not a strided array (sparse, say).
  bool read(PyObject* tensor) {
    dlpack::Tensor dl;
    if (torch.api->tensor_from_py_object(tensor, &dl) != 0) {
      PyErr_Clear();
      return false;
    }
    data = static_cast<char*>(dl.data) + dl.byte_offset;
    shape = dl.shape;
    strides = dl.strides;
    ndim = dl.ndim;
    cpu = dl.device.type == dlpack::CPU || dl.device.type == dlpack::CUDA_HOST ||
          dl.device.type == dlpack::ROCM_HOST;
    complex = dl.dtype.code == dlpack::COMPLEX;
    dtype = N_DTYPES;
    if (dl.dtype.lanes == 1 && dl.dtype.code == dlpack::FLOAT)
      dtype = dl.dtype.bits == 32   ? F32
              : dl.dtype.bits == 64 ? F64
              : dl.dtype.bits == 16 ? F16
                                    : N_DTYPES;
    else if (dl.dtype.lanes == 1 && dl.dtype.code == dlpack::BFLOAT && dl.dtype.bits == 16)
      dtype = BF16;
    return true;
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; d++) count *= shape[d];
    return count;
  }
  bool same_shape(const View& other) const {
    return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
  }
  bool same_strides(const View& other) const {
    return std::equal(strides, strides + ndim, other.strides);
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; d--) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  int64_t reach() const {  // elements from `data` to behind the last one; numel() > 0
    int64_t last = 0;
    for (int d = 0; d < ndim; d++) last += (shape[d] - 1) * strides[d];
    return last + 1;
  }
};

bool truth(PyObject* value) {
  const int result = value == nullptr ? 0 : PyObject_IsTrue(value);
  if (result < 0) throw PythonError();
  return result;
}

bool on_one_device(PyObject* a, PyObject* b) {
  PyObject* device_a = check(PyObject_GetAttrString(a, "device"));
  PyObject* device_b = PyObject_GetAttrString(b, "device");
  const int equal = device_b == nullptr ? -1 : PyObject_RichCompareBool(device_a, device_b, Py_EQ);
  Py_DECREF(device_a);
  Py_XDECREF(device_b);
  if (equal < 0) throw PythonError();
  return equal;
}

bool call_bool(PyObject* callable, PyObject* argument) {
  PyObject* result = check(PyObject_CallOneArg(callable, argument));
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  PyObject* scalar = value;
  if (PyObject_TypeCheck(value, torch.tensor))
    scalar = check(PyObject_CallMethodNoArgs(value, names.item));
  else
    Py_INCREF(scalar);
  const double result = PyFloat_AsDouble(scalar);
  Py_DECREF(scalar);
  if (result == -1.0 && PyErr_Occurred()) throw PythonError();
  return result;
}

int64_t call_int(PyObject* object, PyObject* method) {
  PyObject* result = check(PyObject_CallMethodNoArgs(object, method));
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

// Whether the tensor's storage holds all its elements (it may have been resized by hand).
bool storage_holds(PyObject* tensor, const View& view) {
  PyObject* storage = check(PyObject_CallMethodNoArgs(tensor, names.untyped_storage));
  int64_t nbytes;
  try {
    nbytes = call_int(storage, names.nbytes);
  } catch (PythonError&) {
    Py_DECREF(storage);
    throw;
  }
  Py_DECREF(storage);
  return (call_int(tensor, names.storage_offset) + view.reach()) * ITEMSIZE[view.dtype] <= nbytes;
}

// torch.promote_types for the dtypes here.
Dtype promote(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == F64 || b == F64 ? F64 : F32;
}

}  // namespace

void bind_torch() {
  names = {interned("params"),     interned("step"),   interned("maximize"),
           interned("differentiable"), interned("capturable"), interned("item"),
           interned("untyped_storage"), interned("nbytes"), interned("storage_offset")};
  PyObject* module = check(PyImport_ImportModule("torch"));
  const auto get = [](PyObject* from, const char* name) {
    return check(PyObject_GetAttrString(from, name));
  };
  PyObject* tensor = get(module, "Tensor");
  PyObject* nn = get(module, "nn");
  PyObject* C = get(module, "_C");
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  torch.parameter = reinterpret_cast<PyTypeObject*>(get(nn, "Parameter"));
  torch.is_neg = get(tensor, "is_neg");
  torch.is_zerotensor = get(tensor, "_is_zerotensor");
  torch.increment_version = get(C, "_increment_version");
  PyObject* grad = get(tensor, "grad");
  torch.grad = Py_TYPE(grad) == &PyGetSetDescr_Type
                   ? reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset
                   : nullptr;
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    raise(PyExc_ImportError, "this torch has no DLPack C exchange API (torch >= 2.10 has)");
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule, dlpack::CAPSULE_NAME));
  if (api == nullptr) throw PythonError();
  while (api != nullptr && api->header.major != dlpack::MAJOR_VERSION)
    api = static_cast<const dlpack::ExchangeApi*>(api->header.previous);
  if (api == nullptr || api->tensor_from_py_object == nullptr || torch.grad == nullptr)
    raise(PyExc_ImportError, "this torch offers no DLPack C exchange API of major version 1");
  torch.api = api;
  Py_DECREF(nn);
  Py_DECREF(C);
  Py_DECREF(module);  // the types, functions and the capsule stay for the life of the process
}

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
  for (const char* name : rule_.state_names) state_keys_.push_back(interned(name));
}

Plan::~Plan() {
  release();
  Py_XDECREF(fallbacks_);
  for (PyObject* key : option_keys_) Py_DECREF(key);
  for (PyObject* key : state_keys_) Py_DECREF(key);
}

PyObject* Plan::hold(PyObject* owned) {
  held_.push_back(owned);
  return owned;
}

void Plan::release() {
  // Swapped out first: a destructor may run Python code.
  std::vector<PyObject*> held;
  std::vector<Pending> pending;
  held.swap(held_);
  pending.swap(pending_);
  for (PyObject* object : held) Py_DECREF(object);
  for (const Pending& states : pending) {
    Py_DECREF(states.param);
    Py_DECREF(states.states);
  }
  held.clear();
  if (held_.empty()) held_.swap(held);  // keep the memory
  tasks_.clear();
  origins_.clear();
  params_.clear();
  layouts_.clear();
  hypers_.clear();
  steps_.clear();
  pending_task_.clear();
  state_index_.clear();
}

PyObject* Plan::step(PyObject* groups, PyObject* state, PyObject* create_state, PyObject* run_stock,
                     int num_threads, double grad_scale) {
  struct Release {
    Plan& plan;
    ~Release() { plan.release(); }
  } release_at_end{*this};
  release();
  Py_CLEAR(fallbacks_);
  gather(groups, state, create_state, grad_scale);
  if (fallbacks_ != nullptr) Py_DECREF(check(PyObject_CallOneArg(run_stock, fallbacks_)));
  const auto n_tasks = static_cast<Py_ssize_t>(tasks_.size());
  PyObject* fallbacks = fallbacks_ == nullptr ? Py_None : fallbacks_;
  PyObject* outcome = hold(check(Py_BuildValue("(nO)", n_tasks, fallbacks)));
  commit(state, num_threads);
  Py_INCREF(outcome);
  return outcome;
}

void Plan::gather(PyObject* groups, PyObject* state, PyObject* create_state, double grad_scale) {
  hints_hold_ = true;
  cursor_ = 0;
  size_t ordinal = 0;
  Py_INCREF(groups);
  hold(groups);
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); g++) {
    Group group = {};
    group.index = g;
    group.dict = PyList_GET_ITEM(groups, g);
    if (!PyDict_Check(group.dict)) raise(PyExc_TypeError, "a param group must be a dict");
    Py_INCREF(group.dict);
    hold(group.dict);
    read_group(group);
    PyObject* params = PyDict_GetItemWithError(group.dict, names.params);
    if (params == nullptr) raise(PyExc_KeyError, "params");
    params = hold(check(PySequence_Fast(params, "params must be a list")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); i++, ordinal++) {
      if (ordinal >= hints_.size()) {
        hints_.resize(ordinal + 1);
        hints_hold_ = false;
      }
      // A cold tensor costs a dozen cache misses in a row; asked for four tensors ahead, they overlap
      // (2,000 tensors: 1.5 us each without, 0.9 us with).
      if (ordinal + 4 < hints_.size()) {
        const Hint& ahead = hints_[ordinal + 4];
        for (PyObject* object : ahead.objects) prefetch(object);
        for (const void* impl : ahead.impls) {
          prefetch(impl, -64);
          prefetch(impl);
          prefetch(impl, 64);
        }
        prefetch(ahead.step_data);
      }
      gather_param(group, i, PySequence_Fast_GET_ITEM(params, i), state, create_state, grad_scale,
                   hints_[ordinal]);
    }
  }
  if (ordinal != hints_.size()) {
    hints_.resize(ordinal);
    hints_hold_ = false;
  }
  move_overlapping_to_stock(!hints_hold_ || grad_scale != 0);
  for (Task& task : tasks_) task.slice.hypers = hypers_.data() + task.hypers;
}

void Plan::read_group(Group& group) {
  const auto get = [&](PyObject* key) { return PyDict_GetItemWithError(group.dict, key); };
  if (truth(get(names.differentiable))) {
    group.stock_reason = "differentiable=True";
    return;
  }
  if (truth(get(names.capturable))) {
    group.stock_reason = "capturable=True";
    return;
  }
  group.grad_sign = truth(get(names.maximize)) ? -1.0 : 1.0;
  for (size_t o = 0; o < option_keys_.size(); o++) {
    PyObject* value = get(option_keys_[o]);
    if (value == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, option_keys_[o]);
      throw PythonError();
    }
    Py_INCREF(value);
    hold(value);
    if (option_items_[o] >= 0) value = hold(check(PySequence_GetItem(value, option_items_[o])));
    group.options[o] = number(value);
  }
  const double lr = group.options[0];  // every rule's first option
  if (!(lr >= 0))
    raise(PyExc_ValueError, "Invalid learning rate: " + std::to_string(lr) + " in param group " +
                                std::to_string(group.index));
  group.variant = rule_.variant(group.options);
  group.prepared_step = -1;
}

void Plan::fall_back(int64_t group, int64_t index, const char* reason) {
  if (fallbacks_ == nullptr) fallbacks_ = check(PyList_New(0));
  PyObject* entry = check(Py_BuildValue("(LLs)", static_cast<long long>(group),
                                        static_cast<long long>(index), reason));
  const int failed = PyList_Append(fallbacks_, entry);
  Py_DECREF(entry);
  if (failed) throw PythonError();
}

// Borrowed; null if there is none. torch.Tensor.__hash__ is a Python function, so entries are found
// by position and identity: where it was, else behind the last one found, else by an index.
PyObject* Plan::find_state(PyObject* state, PyObject* param, Hint& hint) {
  PyObject *key, *value;
  for (Py_ssize_t start : {hint.position, cursor_}) {
    Py_ssize_t position = start;
    if (PyDict_Next(state, &position, &key, &value) && key == param) {
      hint.position = start;
      cursor_ = position;
      return value;
    }
  }
  if (state_index_.empty()) {
    Py_ssize_t position = 0, start = 0;
    while (PyDict_Next(state, &position, &key, &value)) {
      state_index_[key] = {start, value};
      start = position;
    }
  }
  const auto found = state_index_.find(param);
  if (found == state_index_.end()) return nullptr;
  hint.position = found->second.first;
  return found->second.second;
}

// False if stock must handle this step tensor.
bool Plan::read_step(PyObject* step, const char*& reason, Hint& hint, StepWrite& write) {
  View view;
  reason = "step is not a float tensor with one element on the CPU";
  if (step == nullptr || !is_plain(step) || !view.read(step) || !view.cpu || view.numel() != 1 ||
      (view.dtype != F32 && view.dtype != F64) || view.data == nullptr)
    return false;
  if (view.dtype == F32)
    write.value = *static_cast<float*>(view.data) + 1.0f;  // saturates at 2^24, as stock's does
  else
    write.value = *static_cast<double*>(view.data) + 1.0;
  write.data = view.data;
  write.dtype = view.dtype;
  if (!(write.value >= 1 && write.value <= 9007199254740992.0) ||
      write.value != std::floor(write.value)) {
    reason = "step is not a whole number";
    return false;
  }
  hint.impls[MAX_STREAMS] = view.shape;
  hint.step_data = view.data;
  return true;
}

void Plan::gather_param(Group& group, int64_t index, PyObject* param, PyObject* state,
                        PyObject* create_state, double grad_scale, Hint& hint) {
  const auto stock = [&](const char* reason) { fall_back(group.index, index, reason); };
  const auto where = [&] {
    return "param " + std::to_string(index) + " of group " + std::to_string(group.index) + ": ";
  };
  Py_INCREF(param);
  hold(param);

  if (!is_plain(param)) {
    if (!PyObject_TypeCheck(param, torch.tensor)) raise(PyExc_TypeError, where() + "not a tensor");
    PyObject* grad = hold(check(PyObject_GetAttrString(param, "grad")));
    return grad == Py_None ? void() : stock("a tensor subclass");
  }
  PyObject* grad = hold(check(torch.grad->get(param, torch.grad->closure)));
  if (grad == Py_None) return;
  if (group.stock_reason != nullptr) return stock(group.stock_reason);
  if (!is_plain(grad)) return stock("a tensor subclass");

  View views[MAX_STREAMS];
  View& p = views[PARAM];
  View& g = views[GRAD];
  if (!p.read(param)) return stock("the param is not a strided tensor");
  if (!g.read(grad)) return stock("the grad is not a strided tensor");
  if (!p.cpu && !g.cpu) return stock("no kernel for this device");
  if (p.cpu != g.cpu) raise(PyExc_RuntimeError, where() + "param and grad are on two devices");
  if (!p.same_shape(g))
    raise(PyExc_RuntimeError, where() + "the grad has shape " + describe(g.shape, g.ndim) +
                                  ", the param " + describe(p.shape, p.ndim));
  if (p.complex || g.complex) return stock("a complex tensor");
  if (p.dtype == N_DTYPES || g.dtype == N_DTYPES) return stock("no kernel for this dtype");
  // A lazy negation is a bit that DLPack does not show.
  if (call_bool(torch.is_neg, grad)) return stock("the grad is lazily negated");

  // States: those there are, or new ones that enter `state` when the step can no longer fail.
  unsigned variant = group.variant;
  const unsigned used = rule_.states(variant);
  PyObject* states = nullptr;
  bool fresh = false;
  if (used != 0 || rule_.has_step) {
    states = find_state(state, param, hint);
    if (states != nullptr && !PyDict_Check(states)) return stock("the state is not a dict");
    fresh = states == nullptr || PyDict_GET_SIZE(states) == 0;
    if (!fresh && rule_.first_step_variant != 0) {
      PyObject* first = PyDict_GetItemWithError(states, state_keys_[0]);
      fresh = first == nullptr || first == Py_None;
    }
    if (fresh) {
      states = check(PyObject_CallFunctionObjArgs(create_state, param, group.dict, nullptr));
      Py_INCREF(param);
      pending_.push_back({param, states});
      pending_task_.push_back(static_cast<int64_t>(tasks_.size()));
      if (!PyDict_Check(states)) raise(PyExc_TypeError, "create_state must return a dict");
      state_index_.clear();  // Python code has run
      variant |= rule_.first_step_variant;
      hints_hold_ = false;
    } else {
      Py_INCREF(states);
      hold(states);
    }
  }
  const auto reject = [&](const char* reason) {
    if (fresh) {
      Py_DECREF(pending_.back().param);
      Py_DECREF(pending_.back().states);
      pending_.pop_back();
      pending_task_.pop_back();
    }
    stock(reason);
  };

  Hint now = {};
  now.position = hint.position;
  now.objects[PARAM] = param;
  now.objects[MAX_STREAMS] = states;
  PyObject* state_tensors[MAX_STATES] = {};
  for (size_t s = 0; s < state_keys_.size(); s++) {
    if (!(used >> s & 1)) continue;
    PyObject* tensor = PyDict_GetItemWithError(states, state_keys_[s]);
    if (tensor == nullptr) return reject("a state is missing");
    if (!PyObject_TypeCheck(tensor, torch.tensor))  // stock would write step and param, then raise this
      raise(PyExc_AttributeError, where() + "state '" + rule_.state_names[s] + "' is a " +
                                      Py_TYPE(tensor)->tp_name + ", not a tensor");
    if (!is_plain(tensor)) return reject("a tensor subclass");
    Py_INCREF(tensor);
    state_tensors[s] = hold(tensor);
    View& view = views[STATES + s];
    const auto name = [&] { return where() + "state '" + rule_.state_names[s] + "' "; };
    if (!view.read(tensor)) {
      if (!on_one_device(tensor, param))
        raise(PyExc_RuntimeError, name() + "is on another device than the param");
      return reject("a state is not a strided tensor");
    }
    if (!view.same_shape(p))
      raise(PyExc_RuntimeError, name() + "has shape " + describe(view.shape, view.ndim) +
                                    ", the param " + describe(p.shape, p.ndim));
    if (view.cpu != p.cpu) raise(PyExc_RuntimeError, name() + "is on another device than the param");
    if (view.dtype == N_DTYPES)  // stock would write step and param, then raise
      raise(PyExc_RuntimeError, name() + "has a dtype that is none of float32, float64, bfloat16, "
                                         "float16");
    now.objects[STATES + s] = tensor;
  }
  const Dtype grad_dtype = rule_.decays_grad(variant) ? promote(g.dtype, p.dtype) : g.dtype;
  const unsigned lerped = rule_.lerped_states(variant);
  for (size_t s = 0; s < state_keys_.size(); s++)
    if ((lerped >> s & 1) && views[STATES + s].dtype != grad_dtype)
      raise(PyExc_RuntimeError, where() + "state '" + rule_.state_names[s] + "' has dtype " +
                                    name_of(views[STATES + s].dtype) + ", the grad " +
                                    name_of(grad_dtype));
  StepWrite write = {};
  if (rule_.has_step) {
    PyObject* step = PyDict_GetItemWithError(states, names.step);
    const char* reason;
    if (!read_step(step, reason, now, write)) {
      double hypers[MAX_HYPERS] = {};
      if (write.data != nullptr && write.value == 0) rule_.prepare(group.options, 0, hypers);
      for (double hyper : hypers)
        if (!std::isfinite(hyper))  // stock would write states, then raise
          raise(PyExc_ZeroDivisionError, where() + "step is -1: its bias correction is 0");
      return reject(reason);
    }
    if (now.step_data != hint.step_data) hints_hold_ = false;
    Py_INCREF(step);
    now.objects[MAX_STREAMS + 1] = hold(step);
  }

  Task task = {};
  task.streams = 0b11 | used << STATES;
  task.written = 1u << PARAM | (grad_scale != 0 ? 1u << GRAD : 0u) | used << STATES;
  task.layout = -1;
  const int64_t numel = now.numel = p.numel();
  const int64_t* strides[MAX_STREAMS] = {};
  bool all_same = true, any_f64 = false, one_order = p.contiguous();
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) continue;
    const View& view = views[s];
    task.slice.streams[s] = view.data;
    task.slice.dtypes[s] = view.dtype;
    strides[s] = view.strides;
    now.impls[s] = view.shape;
    all_same &= view.dtype == p.dtype;
    any_f64 |= view.dtype == F64;
    one_order = one_order && view.same_strides(p);
    if (numel > 0 && view.data == nullptr) {
      if (s == GRAD && call_bool(torch.is_zerotensor, grad)) return reject("a zero tensor");
      raise(PyExc_RuntimeError, where() + (s == GRAD ? "the grad" : s == PARAM ? "the param" : "a state") +
                                    " has no memory: its storage was freed");
    }
    now.data[s] = view.data;
    if (s == GRAD) continue;
    if (view.data == hint.data[s] && numel == hint.numel) continue;
    hints_hold_ = false;
    PyObject* tensor = s == PARAM ? param : state_tensors[s - STATES];
    if (numel > 0 && !storage_holds(tensor, view))
      raise(PyExc_RuntimeError, where() + (s == PARAM ? "the param" : "a state") +
                                    " is larger than its storage, which was resized");
    if (call_bool(torch.is_neg, tensor)) return reject("a tensor is lazily negated");
  }
  if (!all_same && any_f64) return reject("float64 mixed with other dtypes");
  if (!one_order && numel > 0) {
    for (int s = 0; s < MAX_STREAMS; s++)
      if ((task.written >> s & 1) && may_overlap_itself(p.ndim, p.shape, strides[s]))
        return reject("elements of one tensor share memory");
    Layout layout;
    if (!layout.build(p.ndim, p.shape, strides, task.streams)) {
      hints_hold_ = false;  // strides may have changed although pointers have not
      task.layout = static_cast<int>(layouts_.size());
      layouts_.push_back(std::move(layout));
    }
  }

  const Format format = !all_same          ? MIXED
                        : p.dtype == F32   ? ALL_F32
                        : p.dtype == F64   ? ALL_F64
                        : p.dtype == BF16  ? ALL_BF16
                                           : ALL_F16;
  task.kernel = current_isa().kernels[rule_index_][format][variant];
  if (group.prepared_step != write.value) {
    group.hypers = static_cast<int64_t>(hypers_.size());
    hypers_.resize(hypers_.size() + MAX_HYPERS);
    rule_.prepare(group.options, write.value, hypers_.data() + group.hypers);
    group.prepared_step = write.value;
  }
  task.hypers = group.hypers;
  task.slice.numel = numel;
  task.slice.grad_sign = group.grad_sign;
  task.slice.grad_scale = grad_scale;
  task.known_grad = now.data[GRAD] == hint.data[GRAD] && numel == hint.numel;
  hint = now;
  tasks_.push_back(task);
  origins_.push_back({group.index, index});
  params_.push_back(param);
  if (rule_.has_step) steps_.push_back(write);
}

// Tensors that share memory must be stepped one after the other, as stock does, unless the shared memory
// is only read (two params with one grad). Compared are the ranges from first to last element, so
// interleaved views of one buffer count as sharing. What was compared in the last step and has not
// moved is not compared again.
void Plan::move_overlapping_to_stock(bool anew) {
  const auto range_of = [&](size_t t, int s) {
    const Task& task = tasks_[t];
    const auto* data = static_cast<const char*>(task.slice.streams[s]);
    const int64_t reach = task.layout >= 0 ? layouts_[task.layout].reach(s) : task.slice.numel;
    return Range{data, data + reach * ITEMSIZE[task.slice.dtypes[s]], t};
  };
  std::vector<bool> overlaps;
  bool any = false;
  const auto mark = [&](size_t task) {
    overlaps.resize(tasks_.size());
    overlaps[task] = any = true;
  };
  if (anew) {
    written_.clear();
    for (size_t t = 0; t < tasks_.size(); t++) {
      if (rule_.has_step) {
        const auto* data = static_cast<const char*>(steps_[t].data);
        written_.push_back({data, data + ITEMSIZE[steps_[t].dtype], t});
      }
      for (int s = 0; s < MAX_STREAMS && tasks_[t].slice.numel > 0; s++)
        if (tasks_[t].written >> s & 1) written_.push_back(range_of(t, s));
    }
    std::sort(written_.begin(), written_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (size_t r = 1, widest = 0; r < written_.size(); r++) {
      if (written_[r].begin < written_[widest].end) {
        mark(written_[r].task);
        mark(written_[widest].task);
      }
      if (written_[r].end > written_[widest].end) widest = r;
    }
    written_reach_.clear();
    for (const Range& range : written_)
      written_reach_.push_back(
          written_reach_.empty() ? range.end : std::max(written_reach_.back(), range.end));
  }
  for (size_t t = 0; t < tasks_.size(); t++) {
    const Task& task = tasks_[t];
    if ((task.known_grad && !anew) || (task.written >> GRAD & 1) || task.slice.numel == 0) continue;
    const Range grad = range_of(t, GRAD);
    const auto first = std::upper_bound(written_reach_.begin(), written_reach_.end(), grad.begin);
    for (size_t r = first - written_reach_.begin();
         r < written_.size() && written_[r].begin < grad.end; r++)
      if (written_[r].end > grad.begin) {
        mark(t);
        mark(written_[r].task);
      }
  }
  if (!any) return;

  std::vector<int64_t> moved(tasks_.size());
  size_t kept = 0;
  for (size_t t = 0; t < tasks_.size(); t++) {
    if (overlaps[t]) {
      fall_back(origins_[t].group, origins_[t].index, "memory shared with another tensor");
      moved[t] = -1;
      continue;
    }
    moved[t] = static_cast<int64_t>(kept);
    tasks_[kept] = tasks_[t];
    origins_[kept] = origins_[t];
    params_[kept] = params_[t];
    if (rule_.has_step) steps_[kept] = steps_[t];
    kept++;
  }
  tasks_.resize(kept);
  origins_.resize(kept);
  params_.resize(kept);
  if (rule_.has_step) steps_.resize(kept);
  std::vector<Pending> pending;
  for (size_t i = 0; i < pending_.size(); i++) {
    if (moved[pending_task_[i]] >= 0) {
      pending.push_back(pending_[i]);
    } else {
      Py_DECREF(pending_[i].param);
      hold(pending_[i].states);
    }
  }
  pending_.swap(pending);
  hints_.clear();  // look again next time
}

void Plan::commit(PyObject* state, int num_threads) {
  if (tasks_.empty()) return;
  // Raw-pointer writes are invisible to autograd, so its version counters are bumped by hand.
  PyObject* params = hold(check(PyList_New(static_cast<Py_ssize_t>(params_.size()))));
  for (size_t t = 0; t < params_.size(); t++) {
    Py_INCREF(params_[t]);
    PyList_SET_ITEM(params, static_cast<Py_ssize_t>(t), params_[t]);
  }
  Py_DECREF(check(PyObject_CallOneArg(torch.increment_version, params)));
  std::vector<PyObject*> entries;  // of `state`, for the new states
  for (const Pending& fresh : pending_) {
    entries.push_back(hold(check(PyObject_GetItem(state, fresh.param))));
    if (!PyDict_Check(entries.back())) raise(PyExc_TypeError, "a param's state must be a dict");
  }
  for (const StepWrite& step : steps_) {
    if (step.dtype == F32)
      *static_cast<float*>(step.data) = static_cast<float>(step.value);
    else
      *static_cast<double*>(step.data) = step.value;
  }
  Py_BEGIN_ALLOW_THREADS
  run(tasks_, layouts_, num_threads);
  Py_END_ALLOW_THREADS
  // Only now: another thread must not read a state that is not yet written. The keys are strings, so
  // no Python code runs here, and Ctrl-C waits.
  for (size_t i = 0; i < entries.size(); i++)
    if (PyDict_Update(entries[i], pending_[i].states) != 0) throw PythonError();
}

}  // namespace fused_optim
