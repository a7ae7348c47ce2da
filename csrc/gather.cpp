#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fused_optim {

void Plan::gather(PyObject* groups, PyObject* state, const StepContext& context) {
  hints_hold_ = true;
  states_.begin();
  emas_.begin();
  any_waiting_ = false;
  lowest_lr_ = 0;
  if (context.launcher != Py_None && rule_.first_step_variant != 0)
    any_waiting_ = truth(hold(check(PyObject_GetAttr(context.launcher, names.any_waiting))));
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
    read_group(group, context);
    PyObject* params = PyDict_GetItemWithError(group.dict, names.params);
    if (params == nullptr) raise(PyExc_KeyError, "params");
    params = hold(check(PySequence_Fast(params, "params must be a list")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); i++, ordinal++) {
      if (ordinal >= hints_.size()) {
        hints_.resize(ordinal + 1);
        hints_hold_ = false;
      }
      // A cold tensor costs a dozen cache misses in a row; asked for four tensors ahead, they
      // overlap (2,000 tensors: 1.5 us each without, 0.9 us with).
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
      gather_param(group, i, ordinal, PySequence_Fast_GET_ITEM(params, i), state, context,
                   hints_[ordinal]);
    }
  }
  if (ordinal != hints_.size()) {
    hints_.resize(ordinal);
    hints_hold_ = false;
  }
  const bool writes_grads = context.grad_write() != KEPT;
  move_overlapping_to_stock(!hints_hold_ || writes_grads || written_grads_);
  written_grads_ = writes_grads;
  for (Task& task : tasks_) {
    if (task.device < 0) task.slice.hypers = hypers_.data() + task.hypers;
    if (task.packing >= 0) task.slice.packing = &packings_[task.packing];
  }
}

// A param's state, borrowed or null: among so few keys, an interned one is found sooner by looking
// at each.
static PyObject* item(PyObject* states, PyObject* wanted) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(states, &position, &key, &value))
    if (key == wanted) return value;
  return PyDict_GetItemWithError(states, wanted);
}

void Plan::gather_param(Group& group, int64_t index, uint64_t ordinal, PyObject* param,
                        PyObject* state, const StepContext& context, Hint& hint) {
  const auto stock = [&](const char* reason) { fall_back(group.index, index, reason); };
  const auto where = [&] {
    return "param " + std::to_string(index) + " of group " + std::to_string(group.index) + ": ";
  };
  Py_INCREF(param);
  hold(param);
  EmaTask* ema = group.has_ema ? gather_ema(group, param, context, hint) : nullptr;

  if (!is_plain(param) && !PyObject_TypeCheck(param, torch.tensor))
    raise(PyExc_TypeError, where() + "not a tensor");
  PyObject* parts[MAX_STREAMS] = {
      part_of(param, param)};  // plain tensors, where the streams are DTensors
  PyObject* grad =
      hold(check(parts[PARAM] == nullptr ? PyObject_GetAttrString(param, "grad")
                                         : torch.grad->get(param, torch.grad->closure)));
  if (grad == Py_None) return;
  if (group.stock_reason != nullptr) return stock(group.stock_reason);
  if (parts[PARAM] == nullptr) return stock("a tensor subclass");
  parts[GRAD] = part_of(grad, param);
  if (parts[GRAD] == nullptr)
    return stock(is_dtensor(param) ? "the grad is sharded otherwise than the param"
                                   : "a tensor subclass");

  View views[MAX_STREAMS];
  View& p = views[PARAM];
  View& g = views[GRAD];
  if (!p.read(parts[PARAM])) return stock("the param is not a strided tensor");
  if (!g.read(parts[GRAD])) return stock("the grad is not a strided tensor");
  const auto on_device = [&](const View& view) {
    return (context.device_types >> view.device.type & 1) != 0;
  };
  const auto served = [&](const View& view) {
    return view.device.type == dlpack::CPU || on_device(view);
  };
  if (!served(p) && !served(g)) return stock("no kernel for this device");
  if (p.device != g.device)
    raise(PyExc_RuntimeError, where() + "param and grad are on two devices");
  const bool device = on_device(p);
  if (group.capturable && !device) return stock("capturable=True");
  if (!p.same_shape(g))
    raise(PyExc_RuntimeError, where() + "the grad has shape " + describe(g.shape, g.ndim) +
                                  ", the param " + describe(p.shape, p.ndim));
  if (p.complex || g.complex) return stock("a complex tensor");
  if (p.dtype == N_DTYPES || g.dtype == N_DTYPES) return stock("no kernel for this dtype");
  // A lazy negation is a bit that DLPack does not show.
  if (call_bool(torch.is_neg, parts[GRAD])) return stock("the grad is lazily negated");

  // States: those there are, or new ones that enter `state` when the step can no longer fail.
  unsigned variant = group.variant;
  const unsigned used = rule_.states(variant);
  PyObject* states = nullptr;
  bool fresh = false, pends = false;
  const Place place = group.packs ? place_of(param, p, context) : Place{};
  const bool packs = group.packs && p.dtype != F64 && place.numel > 0;
  const bool has_step = packs ? counts_steps(group, p) : rule_.has_step;
  const auto pend = [&](bool converted) {
    Py_INCREF(param);
    pending_.push_back({param, states, converted});
    pending_task_.push_back(static_cast<int64_t>(tasks_.size()));
    if (!PyDict_Check(states)) raise(PyExc_TypeError, "the states of a param must be a dict");
    hints_hold_ = false;
    pends = true;
  };
  const auto unpend = [&] {
    Py_DECREF(pending_.back().param);
    Py_DECREF(pending_.back().states);
    pending_.pop_back();
    pending_task_.pop_back();
  };
  Packing packing;  // the rest of it is for those that pack
  std::fill(std::begin(packing.storage), std::end(packing.storage), PLAIN);
  if (packs) packing = {};
  void* remainder = nullptr;
  if (used != 0 || has_step || (packs && group.master != PLAIN)) {
    states = states_.find(state, param, hint.position);
    if (states != nullptr && !PyDict_Check(states)) return stock("the state is not a dict");
    fresh = states == nullptr || PyDict_GET_SIZE(states) == 0;
    if (!fresh && used != 0 && rule_.first_step_variant != 0) {
      PyObject* first = item(states, state_keys_[0]);
      fresh = first == nullptr || first == Py_None;
    }
    if (packs && !fresh && used != 0 &&
        !(rule_.has_step && PyDict_Contains(states, names.step) != 0)) {
      fresh = true;  // but for a remainder, say
      for (PyObject* key : state_keys_) fresh = fresh && PyDict_Contains(states, key) == 0;
    }
    if (fresh) {
      states =
          check(PyObject_CallFunctionObjArgs(context.create_state, param, group.dict, nullptr));
      pend(false);
      if (used != 0 && (!device || !context.skip_on_device)) variant |= rule_.first_step_variant;
    } else {
      Py_INCREF(states);
      hold(states);
    }
    if (packs && !read_packing(group, param, p, place, used, states, packing, remainder)) {
      if (fresh) {
        unpend();
        return stock("states of another layout than the param's");
      }
      states = check(
          PyObject_CallFunctionObjArgs(context.convert_state, param, group.dict, states, nullptr));
      pend(true);
      packing = {};
      if (!read_packing(group, param, p, place, used, states, packing, remainder)) {
        unpend();
        return stock("states of another layout than the param's");
      }
    }
  }
  const auto reject = [&](const char* reason) {
    if (pends) unpend();
    if (!moved_steps_.empty() && moved_steps_.back().task == tasks_.size()) moved_steps_.pop_back();
    if (ema != nullptr) ema->task = -1;
    stock(reason);
  };

  Hint now = {};
  now.position = hint.position;
  now.ema_position = hint.ema_position;
  now.objects[PARAM] = param;
  now.objects[MAX_STREAMS] = states;
  PyObject* state_tensors[MAX_STATES] = {};
  for (size_t s = 0; s < state_keys_.size(); s++) {
    if (!(used >> s & 1)) continue;
    PyObject* tensor = item(states, state_keys_[s]);
    if (tensor == nullptr) return reject("a state is missing");
    if (!PyObject_TypeCheck(tensor,
                            torch.tensor))  // stock would write step and param, then raise this
      raise(PyExc_AttributeError, where() + "state '" + rule_.state_names[s] + "' is a " +
                                      Py_TYPE(tensor)->tp_name + ", not a tensor");
    Py_INCREF(tensor);
    state_tensors[s] = hold(tensor);
    PyObject* const part = parts[STATES + s] = part_of(tensor, param);
    if (part == nullptr)
      return reject(is_dtensor(param) ? "a state is sharded otherwise than the param"
                                      : "a tensor subclass");
    View& view = views[STATES + s];
    const auto name = [&] { return where() + "state '" + rule_.state_names[s] + "' "; };
    if (!view.read(part)) {
      if (!on_one_device(part, parts[PARAM]))
        raise(PyExc_RuntimeError, name() + "is on another device than the param");
      return reject("a state is not a strided tensor");
    }
    if (!view.same_shape(p))
      raise(PyExc_RuntimeError, name() + "has shape " + describe(view.shape, view.ndim) +
                                    ", the param " + describe(p.shape, p.ndim));
    if (view.device != p.device)
      raise(PyExc_RuntimeError, name() + "is on another device than the param");
    const Storage storage = packing.storage[STATES + s];
    if (storage == SIGNED8 || storage == ROOT8) view.dtype = view.whole;
    if (view.dtype == N_DTYPES)  // stock would write step and param, then raise
      raise(PyExc_RuntimeError, name() +
                                    "has a dtype that is none of float32, float64, bfloat16, "
                                    "float16");
    now.objects[STATES + s] = tensor;
  }
  const Dtype grad_dtype = rule_.decays_grad(variant) ? promote(g.dtype, p.dtype) : g.dtype;
  const unsigned lerped = rule_.lerped_states(variant);
  for (size_t s = 0; s < state_keys_.size(); s++)
    if ((lerped >> s & 1) && !(packs && group.state_format != STATE_AS_STOCK) &&
        views[STATES + s].dtype != grad_dtype)
      raise(PyExc_RuntimeError, where() + "state '" + rule_.state_names[s] + "' has dtype " +
                                    name_of(views[STATES + s].dtype) + ", the grad " +
                                    name_of(grad_dtype));
  StepWrite write = {};
  if (has_step) {
    PyObject* step = item(states, names.step);
    const char* reason;
    if (!read_step(step, p, reason, now, write)) {
      double hypers[MAX_HYPERS] = {};
      know_options(group);
      if (write.data != nullptr && write.value == 0) rule_.prepare(group.options, 0, hypers);
      for (double hyper : hypers)
        if (!std::isfinite(hyper))  // stock would write states, then raise
          raise(PyExc_ZeroDivisionError, where() + "step is -1: its bias correction is 0");
      return reject(reason);
    }
    if (p.device.type == dlpack::CPU && device) {  // the interpreter: the CPU is the device
      write.on_device = group.capturable || group.fused || context.skip_on_device;
    } else if (!write.on_device && group.capturable) {
      return reject("capturable=True, but step is on the CPU");
    } else if (!write.on_device && device && context.skip_on_device) {
      PyObject* moved = hold(
          check(PyObject_CallMethodObjArgs(context.launcher, names.moved, step, param, nullptr)));
      moved_steps_.push_back({states, moved, tasks_.size()});
      step = moved;
      if (!read_step(step, p, reason, now, write)) return reject(reason);
    }
    if (now.step_data != hint.step_data) hints_hold_ = false;
    Py_INCREF(step);
    now.objects[MAX_STREAMS + 1] = hold(step);
  }
  // Whether SGD's momentum has started may be known to the device alone.
  int64_t waiting = 0;
  if (device && used != 0 && rule_.first_step_variant != 0 &&
      (fresh ? context.skip_on_device : any_waiting_)) {
    PyObject* address = hold(check(PyObject_CallMethodObjArgs(
        context.launcher, names.waiting, state_tensors[0], fresh ? Py_True : Py_False, nullptr)));
    waiting = PyLong_AsLongLong(address);
    if (waiting == -1 && PyErr_Occurred()) throw PythonError();
  }

  Task task = {};
  task.streams = 0b11 | used << STATES;
  if (ema != nullptr) {
    parts[EMA] = part_of(ema->tensor, param);
    if (parts[EMA] != nullptr && views[EMA].read(parts[EMA]) && views[EMA].dtype != N_DTYPES &&
        views[EMA].same_shape(p) && views[EMA].device == p.device &&
        (views[EMA].dtype == F64) == (p.dtype == F64)) {
      task.streams |= 1u << EMA;
      task.slice.ema_weight = ema->weight;
      now.objects[EMA] = ema->tensor;
      ema->task = static_cast<int64_t>(tasks_.size());
    }
  }
  task.written = task.streams & ~(context.grad_write() == KEPT ? 1u << GRAD : 0u);
  task.layout = -1;
  task.device = -1;
  task.packing = -1;
  for (Storage storage : packing.storage)
    if (storage != PLAIN) task.packing = static_cast<int>(packings_.size());
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
      if (s == GRAD && call_bool(torch.is_zerotensor, parts[GRAD])) return reject("a zero tensor");
      raise(PyExc_RuntimeError, where() +
                                    (s == GRAD    ? "the grad"
                                     : s == PARAM ? "the param"
                                                  : "a state") +
                                    " has no memory: its storage was freed");
    }
    now.data[s] = view.data;
    if (s == GRAD) continue;
    if (view.data == hint.data[s] && numel == hint.numel) continue;
    hints_hold_ = false;
    if (numel > 0 && !storage_holds(parts[s], view))
      raise(PyExc_RuntimeError, where() + (s == PARAM ? "the param" : "a state") +
                                    " is larger than its storage, which was resized");
    if (call_bool(torch.is_neg, parts[s])) return reject("a tensor is lazily negated");
    if (call_bool(torch.is_inference, parts[s])) {
      if (!call_bool(torch.is_inference_mode_enabled))  // torch raises this when it has written
        raise(PyExc_RuntimeError, where() +
                                      "Inplace update to inference tensor outside InferenceMode is "
                                      "not allowed");
      now.data[s] = nullptr;  // the next step may be outside of inference mode
    }
  }
  if (!all_same && any_f64) return reject("float64 mixed with other dtypes");
  if (!one_order && numel > 0) {
    for (int s = 0; s < MAX_STREAMS; s++)
      if ((task.written >> s & 1) && may_overlap_itself(p.ndim, p.shape, strides[s]))
        return reject("elements of one tensor share memory");
    Layout layout;
    if (!layout.build(p.ndim, p.shape, strides, task.streams)) {
      // Scales and random bits follow the order of the memory, in which a device copies the others.
      if (task.packing >= 0 && !(device && p.reach() == numel))
        return reject("a packed tensor, whose grad or states lie in another order");
      hints_hold_ = false;  // strides may have changed although pointers have not
      task.layout = static_cast<int>(layouts_.size());
      layouts_.push_back(std::move(layout));
    }
  }

  const bool by_address = device && group.has_addresses && p.device == group.option_device;
  if (!by_address) know_options(group);
  const bool averages = task.streams >> EMA & 1;
  const bool prepared_on_device =
      by_address || write.on_device || waiting != 0 || (averages && ema->on_device != 0);
  if (averages && device && prepared_on_device) count_on_device(*ema, context);
  if (!prepared_on_device && group.prepared_step != write.value) {
    group.hypers = static_cast<int64_t>(hypers_.size());
    hypers_.resize(hypers_.size() + MAX_HYPERS);
    rule_.prepare(group.options, write.value, hypers_.data() + group.hypers);
    group.prepared_step = write.value;
    // A bias correction of 0, say: stock raises, or steps with it.
    group.hypers_fit = std::all_of(hypers_.begin() + group.hypers, hypers_.end(), fits_float);
  }
  if (!prepared_on_device && !group.hypers_fit) return reject(ODD_OPTIONS);
  if (device) {
    BatchKey key;
    key.device = p.device;
    key.options = variant & rule_.deciding;
    key.prepared_on_device = prepared_on_device;
    for (int s = 0; s < MAX_STREAMS; s++) {
      key.dtypes[s] = task.streams >> s & 1 ? views[s].dtype : N_DTYPES;
      key.storages[s] = packing.storage[s];
    }
    RowOrigin row = {
        group.index, prepared_on_device ? -1 : group.hypers, variant, by_address, 0, 0, 0};
    if ((prepared_on_device || task.packing >= 0) && !write.on_device) row.step = write.value;
    if (averages) row.ema = prepared_on_device ? ema->decay : ema->weight;
    row.ema_warmup = averages && prepared_on_device && ema->warmup;
    task.device = static_cast<int>(device_tasks_.size());
    device_tasks_.push_back({enter_key(key), enter_row(row, group),
                             write.on_device ? tagged(write.data, write.dtype) : 0, waiting,
                             averages && prepared_on_device ? ema->on_device : 0});
    if (task.layout >= 0) std::copy(parts, parts + MAX_STREAMS, to_stage_[task.device].begin());
  } else {
    const bool all_bf16 = all_same && p.dtype == BF16;
    const KernelForm form = task.packing >= 0
                                ? all_bf16 && packing.in_pairs() ? PACKED_BF16 : PACKED
                            : !all_same       ? MIXED
                            : p.dtype == F32  ? ALL_F32
                            : p.dtype == F64  ? ALL_F64
                            : p.dtype == BF16 ? ALL_BF16
                                              : ALL_F16;
    task.kernel = current_isa().kernels[rule_index_][form][variant];
    task.hypers = group.hypers;
  }
  if (task.packing >= 0)
    enter_packing(group, index, ordinal, write.value, packing, remainder, hint, now, task);
  task.slice.numel = numel;
  task.slice.grad_sign = group.grad_sign;
  task.slice.grad_scale = context.grad_scale;
  task.slice.clip = 1;
  task.slice.grad_write = context.grad_write();
  task.known_grad = now.data[GRAD] == hint.data[GRAD] && numel == hint.numel;
  if (context.measures()) {
    // What others hold of a DTensor is in its norm too, which is not a matter of kernels.
    NormTask norm = {g.data, g.dtype, is_dtensor(grad) ? 0 : numel, -1};
    Layout layout;
    if (norm.numel > 0 && task.layout >= 0 && !layout.build(p.ndim, p.shape, strides, 1u << GRAD)) {
      if (device) {
        norm.grad = nullptr;
      } else {
        norm.layout = static_cast<int>(layouts_.size());
        layouts_.push_back(std::move(layout));
      }
    }
    norm_tasks_.push_back(norm);
  }
  hint = now;
  tasks_.push_back(task);
  origins_.push_back({group.index, index});
  params_.push_back(param);
  grads_.push_back(grad);
  steps_.push_back(write);
}

}  // namespace fused_optim
