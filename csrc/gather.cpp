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

}  // namespace

Candidate::Candidate(Group& group, int64_t position, size_t number, PyObject* param, Hint& hint,
                     Work& work, PyObject* lists)
    : group(group),
      number(number),
      param(param),
      lists(lists),
      hint(hint),
      held(work.held.emplace_back()),
      task(work.tasks.emplace_back()) {
  held.origin = group.origin(position);
  held.param = Ref::share(param);
}

std::string Candidate::where() const {
  if (lists != nullptr) return "params[" + std::to_string(held.origin.index) + "]: ";
  return "param " + std::to_string(held.origin.index) + " of group " +
         std::to_string(held.origin.group) + ": ";
}

PyObject* Candidate::listed_grad() const {
  return PyTuple_GET_ITEM(PyTuple_GET_ITEM(lists, 0), held.origin.index);
}

PyObject* Candidate::listed(Py_ssize_t which, size_t index) const {
  PyObject* found =
      PyTuple_GET_ITEM(PyTuple_GET_ITEM(lists, which), static_cast<Py_ssize_t>(index));
  if (found == Py_None || PyTuple_GET_SIZE(found) == 0) return nullptr;
  return PyTuple_GET_ITEM(found, held.origin.index);
}

PyObject* Candidate::state(const Schema& schema, size_t s) const {
  return held.states != nullptr ? item(held.states, schema.state_keys[s]) : listed(1, s);
}

PyObject* Candidate::scalar(const Schema& schema, size_t i) const {
  return lists != nullptr ? listed(2, i) : item(held.states, schema.scalar_keys[i]);
}

unsigned Gatherer::run() {
  memory_.hold = true;
  memory_.states.begin();
  memory_.averages.begin();
  memory_.outputs.begin();
  work_.state = get_attr(request_.optimizer, names.state);
  const Ref averages = get_attr(request_.optimizer, names._averages);
  work_.averages.begin(averages);
  outputs_ = get_attr(request_.optimizer, names._outputs);
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
      Candidate c(group, i, number, PySequence_Fast_GET_ITEM(params, i), hints[number], work_,
                  request_.lists);
      const char* reason = gather(c);
      if (reason == nullptr) continue;
      if (c.average >= 0) work_.averages.leave(c.average);
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
  memory_.outputs.end();
  for (Task& task : work_.tasks) {
    if (task.device < 0) task.slice.hypers = work_.hypers.data() + task.hypers;
    if (task.packing >= 0) task.slice.packing = &work_.packings[task.packing];
  }
  move_overlapping_to_stock();
  if (!request_.asks(DRY_RUN)) warn_of_negative_lr(lowest_lr_);
  unsigned bits = request_.bits & (SCALES | SKIP_ON_DEVICE | MEASURES);
  if (work_.n_on_devices > 0) bits |= DEVICES;
  if (work_.fallbacks != nullptr) bits |= FALLBACKS;
  if (work_.averages.are_left()) bits |= AVERAGES;
  return bits;
}

const char* Gatherer::gather(Candidate& c) {
  if (c.group.averaging.on) c.average = gather_average(c);
  const char* reason = identify(c);
  if (reason == NO_GRAD) return reason;
  if (outputs_ != Py_None) {  // that of what is not stepped is what it was
    const int output = gather_output(c);
    if (c.average < 0)
      c.average = output;
    else if (output >= 0)
      work_.averages.leave(output);
  }
  if (reason != nullptr || (reason = find_states(c)) || (reason = read_states(c)) ||
      (reason = read_scalars(c)) || (reason = lay_out(c)))
    return reason;
  return complete(c);
}

// What it is, and who may step it.
const char* Gatherer::identify(Candidate& c) {
  c.now.objects[PARAM] = c.param;
  if (!is_plain(c.param) && !PyObject_TypeCheck(c.param, torch.tensor))
    raise(PyExc_TypeError, c.where() + "not a tensor");
  Ref& part = c.held.parts[PARAM] = part_of(c.param, c.param);
  c.held.grad = c.lists != nullptr ? Ref::share(c.listed_grad())
                : part == nullptr  ? Ref::own(PyObject_GetAttrString(c.param, "grad"))
                                   : Ref::own(torch.grad->get(c.param, torch.grad->closure));
  if (c.lists != nullptr && !PyObject_TypeCheck(static_cast<PyObject*>(c.held.grad), torch.tensor))
    raise(PyExc_TypeError, c.where() + "its grad is not a tensor");
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
  if (!g.read(grad_part)) {
    if (!on_one_device(grad_part, part))
      raise(PyExc_RuntimeError, c.where() + "param and grad are on two devices");
    return "the grad is not a strided tensor";
  }
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
  c.used = c.group.states;
  c.has_formats = c.group.has_formats && p.dtype != F64 && place.numel > 0;
  c.has_step =
      schema_.rule.has_step || (c.has_formats && needs_random_bits(c.group.master, p.dtype));
  if (c.used == 0 && !c.has_step && !(c.has_formats && c.group.master != PLAIN)) return nullptr;
  if (c.lists != nullptr) {
    c.fresh = c.used != 0 && schema_.rule.hidden_scalars != 0 && c.listed(1, 0) == Py_None;
    if (c.fresh) make_states(c, names._create_states, Py_False);
    return nullptr;
  }

  PyObject* known = memory_.states.find(work_.state, c.param, c.hint.position);
  if (known != nullptr && !PyDict_Check(known)) return "the state is not a dict";
  c.fresh = known == nullptr || PyDict_GET_SIZE(known) == 0;
  if (!c.fresh && c.used != 0 && schema_.rule.hidden_scalars != 0) {
    PyObject* first = item(known, schema_.state_keys[0]);
    c.fresh = first == nullptr || first == Py_None;
  }
  if (c.has_formats && !c.fresh && c.used != 0 &&
      !(schema_.rule.has_step && PyDict_Contains(known, names.step) != 0)) {
    c.fresh = true;  // but for a remainder, say
    for (PyObject* key : schema_.state_keys) c.fresh = c.fresh && PyDict_Contains(known, key) == 0;
  }
  if (known == nullptr && PyDict_CheckExact(static_cast<PyObject*>(work_.state)) &&
      !request_.asks(DRY_RUN)) {
    PyErr_SetObject(PyExc_KeyError, c.param);  // as stock: only a defaultdict makes an entry
    throw PythonError();
  }
  if (c.fresh && p.data == nullptr && p.numel() > 0)  // which a first state may copy
    raise(PyExc_RuntimeError, c.where() + "the param has no memory: its storage was freed");
  if (c.fresh)
    make_states(c, names._create_states, request_.asks(SKIP_ON_DEVICE) ? Py_True : Py_False);
  else
    c.held.states = Ref::share(known);
  if (!c.has_formats) return nullptr;
  const auto fit = [&] { return c.packed.read(c.group, c.param, p, place, c.used, c.held.states); };
  if (fit()) return nullptr;
  if (!c.fresh) {
    const Ref others = c.held.states;
    make_states(c, names._convert_states, others);
    c.held.converted = true;
    if (fit()) return nullptr;
  }
  return "states of another layout than the param's";
}

void Gatherer::make_states(Candidate& c, PyObject* method, PyObject* last) {
  c.held.states = c.held.created = Ref::own(PyObject_CallMethodObjArgs(
      request_.optimizer, method, c.param, static_cast<PyObject*>(c.group.dict), last, nullptr));
  if (!PyDict_Check(static_cast<PyObject*>(c.held.states)))
    raise(PyExc_TypeError, "the states of a param must be a dict");
  memory_.hold = false;
}

const char* Gatherer::read_states(Candidate& c) {
  const View& p = c.views[PARAM];
  for (size_t s = 0; s < schema_.state_keys.size(); s++) {
    if (!(c.used >> s & 1)) continue;
    PyObject* tensor = c.state(schema_, s);
    if (c.lists != nullptr && (tensor == nullptr || !PyObject_TypeCheck(tensor, torch.tensor)))
      raise(PyExc_TypeError,
            c.where() + "state '" + schema_.rule.state_names[s] + "' is not a tensor");
    if (tensor == nullptr) return "a state is missing";
    const auto name = [&] { return c.where() + "state '" + schema_.rule.state_names[s] + "' "; };
    if (!PyObject_TypeCheck(tensor, torch.tensor)) return ODD_STATE;
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
    if (has_scales(c.packed.packing.storage[STATES + s])) view.dtype = view.whole;
    if (view.dtype == N_DTYPES) return ODD_STATE;
    c.now.objects[STATES + s] = tensor;
  }
  check_dtypes(c);
  return nullptr;
}

// torch.lerp_ takes states in the grad's dtype alone. Of lists, grads of fewer bits than the param
// are the normal case.
void Gatherer::check_dtypes(const Candidate& c) const {
  const unsigned lerped = schema_.rule.lerped & c.used;
  if (lerped == 0 || c.lists != nullptr ||
      (c.has_formats && c.group.state_format != STATE_AS_STOCK))
    return;
  const Dtype grad = c.views[GRAD].dtype;
  const Dtype wanted =
      schema_.rule.decays_grad(c.group.options) ? promote(grad, c.views[PARAM].dtype) : grad;
  for (size_t s = 0; s < schema_.state_keys.size(); s++)
    if ((lerped >> s & 1) && c.views[STATES + s].dtype != wanted)
      raise(PyExc_RuntimeError, c.where() + "state '" + schema_.rule.state_names[s] +
                                    "' has dtype " + name_of(c.views[STATES + s].dtype) +
                                    ", the grad " + name_of(wanted));
}

}  // namespace fused_optim
