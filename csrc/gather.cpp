#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fused_optim {

namespace {

// What gather() returns for a param that is not stepped.
constexpr const char* NO_GRAD = "";

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

// A param's state, borrowed or null: among so few keys, an interned one is found sooner by looking
// at each.
PyObject* item(PyObject* states, PyObject* wanted) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(states, &position, &key, &value))
    if (key == wanted) return value;
  return get_item(states, wanted);
}

const char* noun_of(int stream) {
  return stream == PARAM ? "the param" : stream == GRAD ? "the grad" : "a state";
}

}  // namespace

Candidate::Candidate(Group& group, int64_t position, size_t number, PyObject* param, Hint& hint,
                     Work& work)
    : group(group),
      number(number),
      param(param),
      hint(hint),
      held(work.held.emplace_back()),
      task(work.tasks.emplace_back()),
      variant(group.variant) {
  held.origin = group.origin(position);
  held.param = Ref::share(param);
}

std::string Candidate::where() const {
  return "param " + std::to_string(held.origin.index) + " of group " +
         std::to_string(held.origin.group) + ": ";
}

unsigned Gatherer::run() {
  memory_.hold = true;
  memory_.states.begin();
  memory_.averages.begin();
  work_.state = get_attr(request_.optimizer, names.state);
  work_.all_averages = get_attr(request_.optimizer, names._averages);
  if (!PyDict_Check(work_.state)) raise(PyExc_TypeError, "optimizer.state must be a dict");
  std::vector<Hint>& hints = memory_.hints;
  size_t number = 0;
  const Ref held_groups = Ref::share(request_.groups);
  PyObject* const groups = held_groups;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); g++) {
    Group group(PyList_GET_ITEM(groups, g), g, number, schema_, request_.optimizer,
                request_.device_types);
    PyObject* found = get_item(group.dict, names.params);
    if (found == nullptr) raise(PyExc_KeyError, "params");
    const Ref held_params = Ref::own(PySequence_Fast(found, "params must be a list"));
    PyObject* const params = held_params;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); i++, number++) {
      if (number >= hints.size()) {
        hints.resize(number + 1);
        memory_.hold = false;
      }
      // A cold tensor costs a dozen cache misses in a row; asked for four tensors ahead, they
      // overlap (2,000 tensors: 1.5 us each without, 0.9 us with).
      if (number + 4 < hints.size()) hints[number + 4].fetch();
      Candidate c(group, i, number, PySequence_Fast_GET_ITEM(params, i), hints[number], work_);
      const char* reason = gather(c);
      work_.leaves_averages |= c.average >= 0 && (reason || !work_.averages[c.average].in_kernel);
      if (reason == nullptr) continue;
      if (c.average >= 0) work_.averages[c.average].in_kernel = false;
      if (reason != NO_GRAD) work_.fall_back(c.held.origin, reason);
      work_.held.pop_back();
      work_.tasks.pop_back();
    }
    if (group.stock_reason == nullptr && group.knows_lr())
      lowest_lr_ = std::min(lowest_lr_, group.options[schema_.lr]);
  }
  if (number != hints.size()) {
    hints.resize(number);
    memory_.hold = false;
  }
  memory_.states.end();
  memory_.averages.end();
  move_overlapping_to_stock();
  for (Task& task : work_.tasks) {
    if (task.device < 0) task.slice.hypers = work_.hypers.data() + task.hypers;
    if (task.packing >= 0) task.slice.packing = &work_.packings[task.packing];
  }
  if (!request_.asks(DRY_RUN)) warn_of_negative_lr(lowest_lr_);
  unsigned bits = request_.bits & (SCALES | SKIP_ON_DEVICE | MEASURES);
  if (work_.n_on_devices > 0) bits |= DEVICES;
  if (work_.fallbacks != nullptr) bits |= FALLBACKS;
  if (work_.leaves_averages) bits |= AVERAGES;
  return bits;
}

const char* Gatherer::gather(Candidate& c) {
  const char* reason = nullptr;
  if (c.group.has_ema) c.average = gather_average(c);
  if ((reason = identify(c)) || (reason = find_states(c)) || (reason = read_states(c)) ||
      (reason = read_step(c)) || (reason = lay_out(c)))
    return reason;
  return complete(c);
}

// What it is, and who may step it.
const char* Gatherer::identify(Candidate& c) {
  if (!is_plain(c.param) && !PyObject_TypeCheck(c.param, torch.tensor))
    raise(PyExc_TypeError, c.where() + "not a tensor");
  Ref& part = c.held.parts[PARAM] = part_of(c.param, c.param);
  c.held.grad = Ref::own(part == nullptr ? PyObject_GetAttrString(c.param, "grad")
                                         : torch.grad->get(c.param, torch.grad->closure));
  if (c.held.grad == Py_None) return NO_GRAD;
  if (c.group.stock_reason != nullptr) return c.group.stock_reason;
  if (part == nullptr) return "a tensor subclass";
  Ref& grad_part = c.held.parts[GRAD] = part_of(c.held.grad, c.param);
  if (grad_part == nullptr)
    return is_dtensor(c.param) ? "the grad is sharded otherwise than the param"
                               : "a tensor subclass";
  View& p = c.views[PARAM];
  View& g = c.views[GRAD];
  if (!p.read(part)) return "the param is not a strided tensor";
  if (!g.read(grad_part)) return "the grad is not a strided tensor";
  const auto served = [&](const View& view) {
    return view.device.type == dlpack::CPU || request_.serves(view.device);
  };
  if (!served(p) && !served(g)) return "no kernel for this device";
  if (p.device != g.device)
    raise(PyExc_RuntimeError, c.where() + "param and grad are on two devices");
  c.on_device = request_.serves(p.device);
  if (c.group.capturable && !c.on_device) return "capturable=True";
  if (!p.same_shape(g))
    raise(PyExc_RuntimeError, c.where() + "the grad has shape " + describe(g.shape, g.ndim) +
                                  ", the param " + describe(p.shape, p.ndim));
  if (p.complex || g.complex) return "a complex tensor";
  if (p.dtype == N_DTYPES || g.dtype == N_DTYPES) return "no kernel for this dtype";
  // A lazy negation is a bit that DLPack does not show.
  if (call_bool(torch.is_neg, grad_part)) return "the grad is lazily negated";
  return nullptr;
}

// The dict of its states: the one there is, or new ones that enter it when the step can no longer
// fail.
const char* Gatherer::find_states(Candidate& c) {
  const View& p = c.views[PARAM];
  const Place place = c.group.has_formats ? memory_.places.find(c.param, p, c.number) : Place{};
  c.used = schema_.rule.states(c.variant);
  c.has_formats = c.group.has_formats && p.dtype != F64 && place.numel > 0;
  c.has_step =
      schema_.rule.has_step || (c.has_formats && needs_random_bits(c.group.master, p.dtype));
  if (c.used == 0 && !c.has_step && !(c.has_formats && c.group.master != PLAIN)) return nullptr;

  PyObject* known = memory_.states.find(work_.state, c.param, c.hint.position);
  if (known != nullptr && !PyDict_Check(known)) return "the state is not a dict";
  c.fresh = known == nullptr || PyDict_GET_SIZE(known) == 0;
  if (!c.fresh && c.used != 0 && schema_.rule.first_step_variant != 0) {
    PyObject* first = item(known, schema_.state_keys[0]);
    c.fresh = first == nullptr || first == Py_None;
  }
  if (c.has_formats && !c.fresh && c.used != 0 &&
      !(schema_.rule.has_step && PyDict_Contains(known, names.step) != 0)) {
    c.fresh = true;  // but for a remainder, say
    for (PyObject* key : schema_.state_keys) c.fresh = c.fresh && PyDict_Contains(known, key) == 0;
  }
  const auto make = [&](PyObject* method, PyObject* last) {
    c.held.states = c.held.created = Ref::own(PyObject_CallMethodObjArgs(
        request_.optimizer, method, c.param, static_cast<PyObject*>(c.group.dict), last, nullptr));
    if (!PyDict_Check(static_cast<PyObject*>(c.held.states)))
      raise(PyExc_TypeError, "the states of a param must be a dict");
    memory_.hold = false;
  };
  if (known == nullptr && PyDict_CheckExact(static_cast<PyObject*>(work_.state)) &&
      !request_.asks(DRY_RUN)) {
    PyErr_SetObject(PyExc_KeyError, c.param);  // as stock: only a defaultdict makes an entry
    throw PythonError();
  }
  if (c.fresh) {
    make(names._create_states, request_.asks(SKIP_ON_DEVICE) ? Py_True : Py_False);
    if (c.used != 0 && (!c.on_device || !request_.asks(SKIP_ON_DEVICE)))
      c.variant |= schema_.rule.first_step_variant;
  } else {
    c.held.states = Ref::share(known);
  }
  if (!c.has_formats) return nullptr;
  const auto fit = [&] { return c.packed.read(c.group, c.param, p, place, c.used, c.held.states); };
  if (fit()) return nullptr;
  if (!c.fresh) {
    const Ref others = c.held.states;
    make(names._convert_states, others);
    c.held.converted = true;
    if (fit()) return nullptr;
  }
  return "states of another layout than the param's";
}

const char* Gatherer::read_states(Candidate& c) {
  const View& p = c.views[PARAM];
  for (size_t s = 0; s < schema_.state_keys.size(); s++) {
    if (!(c.used >> s & 1)) continue;
    PyObject* tensor = item(c.held.states, schema_.state_keys[s]);
    if (tensor == nullptr) return "a state is missing";
    const auto name = [&] { return c.where() + "state '" + schema_.rule.state_names[s] + "' "; };
    if (!PyObject_TypeCheck(tensor, torch.tensor))  // stock would write step and param, then raise
      raise(PyExc_AttributeError, name() + "is a " + Py_TYPE(tensor)->tp_name + ", not a tensor");
    Ref& part = c.held.parts[STATES + s] = part_of(tensor, c.param);
    if (part == nullptr)
      return is_dtensor(c.param) ? "a state is sharded otherwise than the param"
                                 : "a tensor subclass";
    View& view = c.views[STATES + s];
    if (!view.read(part)) {
      if (!on_one_device(part, c.held.parts[PARAM]))
        raise(PyExc_RuntimeError, name() + "is on another device than the param");
      return "a state is not a strided tensor";
    }
    if (!view.same_shape(p))
      raise(PyExc_RuntimeError, name() + "has shape " + describe(view.shape, view.ndim) +
                                    ", the param " + describe(p.shape, p.ndim));
    if (view.device != p.device)
      raise(PyExc_RuntimeError, name() + "is on another device than the param");
    const Storage storage = c.packed.packing.storage[STATES + s];
    if (storage == SIGNED8 || storage == ROOT8) view.dtype = view.whole;
    if (view.dtype == N_DTYPES)  // stock would write step and param, then raise
      raise(PyExc_RuntimeError,
            name() + "has a dtype that is none of float32, float64, bfloat16, float16");
    c.now.objects[STATES + s] = tensor;
  }
  check_dtypes(c);
  return nullptr;
}

// torch.lerp_ takes states in the grad's dtype alone.
void Gatherer::check_dtypes(const Candidate& c) const {
  const unsigned lerped = schema_.rule.lerped_states(c.variant);
  if (lerped == 0 || (c.has_formats && c.group.state_format != STATE_AS_STOCK)) return;
  const Dtype grad = c.views[GRAD].dtype;
  const Dtype wanted =
      schema_.rule.decays_grad(c.variant) ? promote(grad, c.views[PARAM].dtype) : grad;
  for (size_t s = 0; s < schema_.state_keys.size(); s++)
    if ((lerped >> s & 1) && c.views[STATES + s].dtype != wanted)
      raise(PyExc_RuntimeError, c.where() + "state '" + schema_.rule.state_names[s] +
                                    "' has dtype " + name_of(c.views[STATES + s].dtype) +
                                    ", the grad " + name_of(wanted));
}

const char* Gatherer::read_step(Candidate& c) {
  constexpr const char* NO_NUMBER =
      "step is not a float tensor with one element on the CPU or the param's device";
  const View& p = c.views[PARAM];
  Scalar& step = c.held.step;
  if (!c.has_step) return nullptr;
  if (!step.find(item(c.held.states, names.step), p)) return NO_NUMBER;
  if (!step.on_device && !step.count()) {
    double hypers[MAX_HYPERS] = {};
    c.group.know_options();
    if (step.value == 0) schema_.rule.prepare(c.group.options, 0, hypers);
    for (double hyper : hypers)
      if (!std::isfinite(hyper))  // stock would write states, then raise
        raise(PyExc_ZeroDivisionError, c.where() + "step is -1: its bias correction is 0");
    return "step is not a whole number";
  }
  const bool skips = request_.asks(SKIP_ON_DEVICE);
  if (p.device.type == dlpack::CPU && c.on_device) {  // the interpreter: the CPU is the device
    step.on_device = c.group.capturable || c.group.fused || skips;
  } else if (!step.on_device && c.group.capturable) {
    return "capturable=True, but step is on the CPU";
  } else if (!step.on_device && c.on_device && skips) {
    const Ref on_cpu = step.tensor;
    step.move(on_cpu, c.param, p, request_.launcher);
    c.held.step_moved = true;
  }
  c.now.step_data = step.data;
  c.now.objects[MAX_STREAMS + 1] = step.tensor;
  if (step.data != c.hint.step_data) memory_.hold = false;
  return nullptr;
}

// The device alone may know whether SGD's momentum has started.
void Gatherer::find_started(Candidate& c) {
  if (!c.on_device || c.used == 0 || schema_.rule.first_step_variant == 0 ||
      !request_.asks(c.fresh ? SKIP_ON_DEVICE : SOME_WAIT))
    return;
  PyObject* const momentum = item(c.held.states, schema_.state_keys[0]);
  const Ref started = Ref::own(PyObject_CallMethodObjArgs(
      request_.launcher, names.started, momentum, c.fresh ? Py_True : Py_False, nullptr));
  if (started != Py_None && c.started.find(started, c.views[PARAM])) c.started.on_device = true;
}

// Its streams, and the order in which their elements are visited.
const char* Gatherer::lay_out(Candidate& c) {
  const View& p = c.views[PARAM];
  Task& task = c.task;
  task.layout = task.device = task.packing = -1;
  task.streams = 0b11 | c.used << STATES;
  if (c.average >= 0) {
    Average& average = work_.averages[c.average];
    View& view = c.views[EMA];
    Ref& part = c.held.parts[EMA] = part_of(average.tensor, c.param);
    average.in_kernel = part != nullptr && view.read(part) && view.dtype != N_DTYPES &&
                        view.same_shape(p) && view.device == p.device &&
                        (view.dtype == F64) == (p.dtype == F64);
    if (average.in_kernel) {
      task.streams |= 1u << EMA;
      task.slice.ema_weight = average.weight;
      c.held.average = c.average;
      c.now.objects[EMA] = average.tensor;
    }
  }
  task.written = task.streams & ~(request_.grad_write() == KEPT ? 1u << GRAD : 0u);
  const int64_t numel = c.now.numel = task.slice.numel = p.numel();
  const int64_t* strides[MAX_STREAMS] = {};
  bool all_same = true, any_f64 = false, one_order = p.contiguous();
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) continue;
    const View& view = c.views[s];
    task.slice.streams[s] = view.data;
    task.slice.dtypes[s] = view.dtype;
    strides[s] = view.strides;
    c.now.impls[s] = view.shape;
    all_same &= view.dtype == p.dtype;
    any_f64 |= view.dtype == F64;
    one_order = one_order && view.same_strides(p);
    if (const char* reason = check_memory(c, s)) return reason;
  }
  if (!all_same && any_f64) return "float64 mixed with other dtypes";
  return one_order || numel == 0 ? nullptr : order(c, strides);
}

// A stream whose memory is where the last step saw it is not looked at again; a grad's is always
// new.
const char* Gatherer::check_memory(Candidate& c, int s) {
  const View& view = c.views[s];
  PyObject* const part = c.held.parts[s];
  const int64_t numel = c.now.numel;
  if (numel > 0 && view.data == nullptr) {
    if (s == GRAD && call_bool(torch.is_zerotensor, part)) return "a zero tensor";
    raise(PyExc_RuntimeError, c.where() + noun_of(s) + " has no memory: its storage was freed");
  }
  c.now.data[s] = view.data;
  if (s == GRAD || (view.data == c.hint.data[s] && numel == c.hint.numel)) return nullptr;
  memory_.hold = false;
  if (numel > 0 && !storage_holds(part, view))
    raise(PyExc_RuntimeError,
          c.where() + noun_of(s) + " is larger than its storage, which was resized");
  if (call_bool(torch.is_neg, part)) return "a tensor is lazily negated";
  if (call_bool(torch.is_inference, part)) {
    if (!call_bool(torch.is_inference_mode_enabled))  // torch raises this when it has written
      raise(PyExc_RuntimeError,
            c.where() + "Inplace update to inference tensor outside InferenceMode is not allowed");
    c.now.data[s] = nullptr;  // the next step may be outside of inference mode
  }
  return nullptr;
}

// A layout for streams that do not lie in one order.
const char* Gatherer::order(Candidate& c, const int64_t* const* strides) {
  const View& p = c.views[PARAM];
  for (int s = 0; s < MAX_STREAMS; s++)
    if ((c.task.written >> s & 1) && may_overlap_itself(p.ndim, p.shape, strides[s]))
      return "elements of one tensor share memory";
  Layout layout;
  if (layout.build(p.ndim, p.shape, strides, c.task.streams)) return nullptr;
  // Scales and random bits follow the order of the memory, in which a device copies the others.
  if (c.packed.packing.packs() && !(c.on_device && p.reach() == c.now.numel))
    return "a packed tensor, whose grad or states lie in another order";
  memory_.hold = false;  // strides may have changed although pointers have not
  c.task.layout = static_cast<int>(work_.layouts.size());
  work_.layouts.push_back(std::move(layout));
  return nullptr;
}

// Its numbers and its kernel: the task is complete.
const char* Gatherer::complete(Candidate& c) {
  Group& group = c.group;
  Task& task = c.task;
  const Scalar& step = c.held.step;
  find_started(c);
  const bool by_address =
      c.on_device && group.has_addresses && c.views[PARAM].device == group.option_device;
  if (!by_address) group.know_options();
  Average* average = c.held.average >= 0 ? &work_.averages[c.held.average] : nullptr;
  const bool prepared = by_address || step.on_device || c.started.on_device ||
                        (average != nullptr && average->n_averaged.on_device);
  if (average != nullptr && c.on_device && prepared) count_on_device(*average, c.views[PARAM]);
  if (!prepared && group.prepared_step != step.value) {
    group.hypers = static_cast<int64_t>(work_.hypers.size());
    work_.hypers.resize(work_.hypers.size() + MAX_HYPERS);
    double* hypers = work_.hypers.data() + group.hypers;
    schema_.rule.prepare(group.options, step.value, hypers);
    group.prepared_step = step.value;
    // A bias correction of 0, say: stock raises, or steps with it.
    group.hypers_fit = std::all_of(hypers, hypers + MAX_HYPERS, fits_float);
  }
  if (!prepared && !group.hypers_fit) return ODD_OPTIONS;
  if (c.packed.packing.packs()) {
    c.packed.draw(group.seed, group.ordinal(c.held.origin), step.value);
    task.packing = static_cast<int>(work_.packings.size());
    work_.packings.push_back(c.packed.packing);
    task.slice.remainder = c.packed.remainder;
    std::copy_n(c.packed.packing.scales + STATES, MAX_STATES, c.now.packed);
    c.now.packed[MAX_STATES] = c.packed.remainder;
    memory_.hold =
        memory_.hold && std::equal(std::begin(c.now.packed), std::end(c.now.packed), c.hint.packed);
    c.held.others = std::move(c.packed.held);
  }
  c.on_device ? complete_on_device(c, by_address, prepared) : complete_on_cpu(c);
  task.slice.grad_sign = group.grad_sign;
  task.slice.clip = 1;
  task.slice.grad_write = request_.grad_write();
  task.is_sharded = !is_plain(c.held.grad);
  work_.n_on_devices += c.on_device;
  work_.has_new_states |= c.held.created != nullptr || c.held.step_moved;
  // The ranges in `written` name tasks by their number.
  const size_t t = work_.tasks.size() - 1;
  memory_.hold =
      memory_.hold && t < memory_.written_by.size() && memory_.written_by[t] == c.held.origin;
  task.known_grad = c.now.data[GRAD] == c.hint.data[GRAD] && c.now.numel == c.hint.numel;
  c.now.position = c.hint.position;
  c.now.average_position = c.hint.average_position;
  c.now.objects[PARAM] = c.param;
  c.now.objects[MAX_STREAMS] = c.held.states;
  c.now.impls[MAX_STREAMS] = step.impl;
  c.hint = c.now;
  return nullptr;
}

void Gatherer::complete_on_cpu(Candidate& c) {
  const Packing& packing = c.packed.packing;
  const Dtype* dtypes = c.task.slice.dtypes;
  const Dtype dtype = dtypes[PARAM];
  bool all_same = true;
  for (int s = 0; s < MAX_STREAMS; s++)
    if (c.task.streams >> s & 1) all_same &= dtypes[s] == dtype;
  const KernelForm form =
      packing.packs() ? all_same && dtype == BF16 && packing.in_pairs() ? PACKED_BF16 : PACKED
      : !all_same     ? MIXED
      : dtype == F32  ? ALL_F32
      : dtype == F64  ? ALL_F64
      : dtype == BF16 ? ALL_BF16
                      : ALL_F16;
  c.task.kernel = current_isa().kernels[schema_.rule_index][form][c.variant];
  c.task.hypers = c.group.hypers;
}

void Gatherer::complete_on_device(Candidate& c, bool by_address, bool prepared) {
  const Scalar& step = c.held.step;
  const Average* average = c.held.average >= 0 ? &work_.averages[c.held.average] : nullptr;
  BatchKey key;
  key.device = c.views[PARAM].device;
  key.options = c.variant & schema_.rule.deciding;
  key.prepared_on_device = prepared;
  for (int s = 0; s < MAX_STREAMS; s++) {
    key.dtypes[s] = c.task.streams >> s & 1 ? c.views[s].dtype : N_DTYPES;
    key.storages[s] = c.packed.packing.storage[s];
  }
  RowOrigin row = {
      c.group.position, prepared ? -1 : c.group.hypers, c.variant, by_address, 0, 0, 0};
  if ((prepared || c.task.packing >= 0) && !step.on_device) row.step = step.value;
  if (average != nullptr) row.ema = prepared ? average->decay : average->weight;
  row.ema_warmup = average != nullptr && prepared && average->warmup;
  const int64_t n_averaged = average != nullptr && prepared ? average->n_averaged.address() : 0;
  c.task.device = static_cast<int>(work_.device_tasks.size());
  work_.device_tasks.push_back({work_.rows.enter_key(key),
                                work_.rows.enter_row(row, c.group, work_.hypers.data()),
                                step.address(), c.started.address(), n_averaged});
}

// Tensors that share memory must be stepped one after the other, as stock does, unless the shared
// memory is only read (two params with one grad). What was compared in the last step and has not
// moved is not compared again.
void Gatherer::move_overlapping_to_stock() {
  const std::vector<Task>& tasks = work_.tasks;
  std::vector<bool> overlaps;
  const auto mark = [&](size_t task) {
    overlaps.resize(tasks.size());
    overlaps[task] = true;
  };
  const bool writes_grads = request_.grad_write() != KEPT;
  const bool anew = !memory_.hold || writes_grads || memory_.wrote_grads ||
                    memory_.written_by.size() != tasks.size();
  memory_.wrote_grads = writes_grads;
  if (anew) {
    memory_.written.clear();
    memory_.written_by.clear();
    for (size_t t = 0; t < tasks.size(); t++) {
      memory_.written_by.push_back(work_.held[t].origin);
      work_.enter_written(t, memory_.written);
    }
    memory_.written.sort(mark);
  }
  for (size_t t = 0; t < tasks.size(); t++) {
    const Task& task = tasks[t];
    if ((task.known_grad && !anew) || (task.written >> GRAD & 1) || task.slice.numel == 0) continue;
    memory_.written.find(work_.range(t, GRAD), mark);
  }
  if (overlaps.empty()) return;
  work_.drop(overlaps, "memory shared with another tensor");
  memory_.hints.clear();  // look again next time
}

}  // namespace fused_optim
