// Gathering, third part: a param's scalars, the numbers made of them, and its kernel.
#include <algorithm>
#include <cmath>

#include "gather.h"

namespace fused_optim {

namespace {

bool is_count(double value) {
  return value >= 1 && value <= 9007199254740992.0 && value == std::floor(value);
}

}  // namespace

// The numbers that the step advances: where they are, and those after the step that the host knows.
const char* Gatherer::read_scalars(Candidate& c) {
  const RuleInfo& rule = schema_.rule;
  const View& p = c.views[PARAM];
  const bool skips = request_.asks(SKIP_ON_DEVICE);
  const Scalar* last = nullptr;
  for (size_t i = 0; i < schema_.scalar_keys.size(); i++) {
    Scalar& scalar = c.scalars[i];
    const bool is_hidden = rule.hidden_scalars >> i & 1;
    if (is_hidden) c.numbers[i] = c.fresh && c.used != 0 ? 0 : 1;
    if (is_hidden || (i == STEP && !c.has_step)) continue;
    scalar.key = schema_.scalar_keys[i];
    PyObject* const found = c.scalar(schema_, i);
    if (!scalar.find(found, p)) {
      if (found != nullptr && PyObject_TypeCheck(found, torch.tensor)) check_scalar(c, i, found);
      return i == STEP ? ODD_STEP : ODD_STATE;
    }
    if (last != nullptr && scalar.on_device != last->on_device)
      return "the numbers among the states are on two devices";
    last = &scalar;
    if (!scalar.on_device) c.numbers[i] = scalar.read();
    // The host advances it, and may need options that lie on a device.
    if (i != STEP && !scalar.on_device) c.group.know_options();
  }
  std::copy(std::begin(c.numbers), std::end(c.numbers), c.before);
  rule.advance(c.group.options, c.numbers, c.scalars[STEP].dtype == F32,
               last == nullptr || last->dtype == F32);
  for (size_t i = 0; i < schema_.scalar_keys.size(); i++) {
    Scalar& scalar = c.scalars[i];
    if (scalar.object == nullptr) continue;
    if (!scalar.on_device) c.numbers[i] = scalar.advance(c.numbers[i]);
    if (i == STEP && !scalar.on_device && !is_count(scalar.value)) {
      check_corrections(c);
      return "step is not a whole number";
    }
    if (!scalar.on_device && !fits_float(scalar.value)) return ODD_OPTIONS;
    if (p.device.type == dlpack::CPU && c.on_device) {  // the interpreter: the CPU is the device
      scalar.on_device = c.group.capturable || c.group.fused || skips;
    } else if (!scalar.on_device && c.group.capturable) {
      return "capturable=True, but step is on the CPU";
    } else if (!scalar.on_device && c.on_device && skips) {
      const Ref on_cpu = scalar.object;
      scalar.move(on_cpu, c.param, p, request_.launcher);
    }
  }
  const Scalar& step = c.scalars[STEP];
  c.now.step_data = step.data;
  c.now.objects[MAX_STREAMS + 1] = step.object;
  if (step.data != c.hint.step_data) memory_.hold = false;
  return nullptr;
}

// Raises what stock would raise when it has written, or what would crash it.
void Gatherer::check_scalar(const Candidate& c, size_t scalar, PyObject* tensor) const {
  const auto name = [&] {
    return c.where() + "state '" + schema_.rule.scalar_names[scalar] + "' ";
  };
  View view;
  const bool is_read = is_plain(tensor) && view.read(tensor);
  if (is_read && view.numel() > 0 && view.data == nullptr)
    raise(PyExc_RuntimeError, name() + "has no memory: its storage was freed");
  if (scalar == STEP) return;
  if (!(is_read && view.device.type == dlpack::CPU) && !on_one_device(tensor, c.held.parts[PARAM]))
    raise(PyExc_RuntimeError, name() + "is on another device than the param");
  if (is_read && view.numel() != 1)
    raise(PyExc_RuntimeError,
          name() + "has shape " + describe(view.shape, view.ndim) + ", not that of a number");
}

// Raises if step 0 makes a number that is not finite: stock would write states, then raise. Of
// betas that are tensors it divides by a tensor, which gives infinity; so does an lr that is one,
// in some classes.
void Gatherer::check_corrections(const Candidate& c) const {
  if (c.numbers[STEP] != 0) return;
  for (size_t o = 0; o < schema_.option_keys.size(); o++)
    if (o != schema_.lr && PyObject_TypeCheck(c.group.option_values[o], torch.tensor)) return;
  double hypers[MAX_HYPERS] = {};
  c.group.know_options();
  schema_.rule.prepare(c.group.options, c.numbers, hypers);
  for (double hyper : hypers)
    if (!std::isfinite(hyper))
      raise(PyExc_ZeroDivisionError, c.where() + "step is -1: its bias correction is 0");
}

// A device alone may know whether the states' first step was skipped: the optimizer keeps a number
// there (unsure.py).
void Gatherer::find_hidden(Candidate& c) {
  if (!c.on_device || c.used == 0 || schema_.rule.hidden_scalars == 0 || request_.asks(DRY_RUN))
    return;
  if (unsure_ == nullptr) {
    unsure_ = get_attr(request_.optimizer, names._unsure);
    const Ref begin_step = get_attr(unsure_, names.begin_step);
    is_unsure_ = call_bool(begin_step);
  }
  const bool may_be_skipped = c.fresh && request_.asks(SKIP_ON_DEVICE);
  if (!may_be_skipped && (c.fresh || !is_unsure_)) return;
  for (size_t i = 0; i < schema_.scalar_keys.size(); i++) {
    if (!(schema_.rule.hidden_scalars >> i & 1)) continue;
    PyObject* const state = item(c.held.states, schema_.state_keys[0]);
    const Ref number = Ref::own(PyObject_CallMethodObjArgs(
        unsure_, names.number_of, state, may_be_skipped ? Py_True : Py_False, nullptr));
    if (number != Py_None && c.scalars[i].find(number, c.views[PARAM]))
      c.scalars[i].on_device = true;  // the interpreter's device is the CPU
  }
}

// Its numbers and its kernel: the task is complete.
const char* Gatherer::complete(Candidate& c) {
  Group& group = c.group;
  Task& task = c.task;
  find_hidden(c);
  const bool by_address =
      c.on_device && group.has_addresses && c.views[PARAM].device == group.option_device;
  if (!by_address) group.know_options();
  Average* average = c.held.average >= 0 ? &work_.averages[c.held.average] : nullptr;
  bool prepared = by_address || (average != nullptr && average->n_averaged.on_device);
  for (const Scalar& scalar : c.scalars) prepared |= scalar.on_device;
  if (average != nullptr && average->entry != nullptr && c.on_device && prepared)
    count_on_device(*average, c.views[PARAM]);
  if (!prepared && !prepare(c)) return ODD_OPTIONS;
  c.now.packs = c.packed.packing.packs();
  memory_.hold = memory_.hold && c.now.packs == c.hint.packs;
  if (c.now.packs) {
    c.packed.draw(group.seed, group.ordinal(c.held.origin), c.numbers[STEP]);
    task.packing = static_cast<int>(work_.packings.size());
    work_.packings.push_back(c.packed.packing);
    task.slice.remainder = c.packed.remainder;
    task.slice.packing = &c.packed.packing;
    for (int s = 0; s < MAX_STREAMS; s++) {
      c.now.extras[s] = task.slice.extra(s);
      memory_.hold = memory_.hold && c.now.extras[s] == c.hint.extras[s];
    }
    c.held.others = std::move(c.packed.held);
  }
  c.on_device ? complete_on_device(c, by_address, prepared) : complete_on_cpu(c);
  task.slice.grad_sign = group.grad_sign;
  task.slice.clip = 1;
  task.slice.grad_write = request_.grad_write();
  task.is_sharded = !is_plain(c.held.grad);
  work_.n_on_devices += c.on_device;
  work_.has_new_states |= c.held.created != nullptr;
  c.now.impls[MAX_STREAMS] = c.scalars[STEP].impl;
  c.held.first_scalar = work_.scalars.size();
  for (Scalar& scalar : c.scalars) {
    if (scalar.object == nullptr) continue;
    work_.has_new_states |= scalar.moved;
    work_.scalars.push_back(std::move(scalar));
  }
  c.held.n_scalars = work_.scalars.size() - c.held.first_scalar;
  // The ranges in `written` name tasks by their number.
  const size_t t = work_.tasks.size() - 1;
  memory_.hold =
      memory_.hold && t < memory_.written_by.size() && memory_.written_by[t] == c.held.origin;
  task.known_grad = c.now.data[GRAD] == c.hint.data[GRAD] && c.now.numel == c.hint.numel;
  c.now.position = c.hint.position;
  c.now.average_position = c.hint.average_position;
  c.now.output_position = c.hint.output_position;
  c.now.objects[MAX_STREAMS] = c.held.states;
  c.hint = c.now;
  return nullptr;
}

// Its hypers, made by the host. Returns false if float32 does not hold them: with a
// bias correction of 0, say, stock raises, or steps with it.
bool Gatherer::prepare(Candidate& c) {
  Group::Prepared& latest = c.group.prepared;
  const auto& given = schema_.rule.prepares_before ? c.before : c.numbers;
  if (!std::equal(std::begin(given), std::end(given), latest.scalars)) {
    latest.hypers = static_cast<int64_t>(work_.hypers.size());
    work_.hypers.resize(work_.hypers.size() + MAX_HYPERS);
    double* hypers = work_.hypers.data() + latest.hypers;
    schema_.rule.prepare(c.group.options, given, hypers);
    latest.fits = std::all_of(hypers, hypers + MAX_HYPERS, fits_float);
    std::copy(std::begin(given), std::end(given), latest.scalars);
  }
  return latest.fits;
}

void Gatherer::complete_on_cpu(Candidate& c) {
  const Packing& packing = c.packed.packing;
  const Dtype* dtypes = c.task.slice.dtypes;
  const Dtype dtype = dtypes[PARAM];
  bool all_same = true, masters = true;
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(c.task.streams >> s & 1)) continue;
    all_same &= dtypes[s] == dtype;
    masters &= dtypes[s] == F32 || s == GRAD || s == EMA;
  }
  const KernelForm form =
      packing.packs() ? all_same && dtype == BF16 && packing.in_pairs() ? PACKED_BF16 : PACKED
      : !all_same     ? masters ? MASTERS : MIXED
      : dtype == F32  ? ALL_F32
      : dtype == F64  ? ALL_F64
      : dtype == BF16 ? ALL_BF16
                      : ALL_F16;
  c.task.kernel = current_isa().kernels[schema_.rule_index][form][c.used];
  c.task.hypers = c.group.prepared.hypers;
}

void Gatherer::complete_on_device(Candidate& c, bool by_address, bool prepared) {
  const Average* average = c.held.average >= 0 ? &work_.averages[c.held.average] : nullptr;
  BatchKey key;
  key.device = c.views[PARAM].device;
  key.prepared_on_device = prepared;
  for (int s = 0; s < MAX_STREAMS; s++) {
    key.dtypes[s] = c.task.streams >> s & 1 ? c.views[s].dtype : N_DTYPES;
    key.storages[s] = c.packed.packing.storage[s];
  }
  RowOrigin row = {c.group.position, prepared ? -1 : c.group.prepared.hypers, by_address, {}, 0, 0};
  DeviceTask on_device = {};
  for (int i = 0; i < MAX_RULE_SCALARS; i++) {
    on_device.scalars[i] = c.scalars[i].address();
    const bool counts = prepared || (i == STEP && c.task.packing >= 0);
    const auto& known = prepared && schema_.rule.prepares_before ? c.before : c.numbers;
    if (counts && !c.scalars[i].on_device) row.scalars[i] = known[i];
  }
  if (average != nullptr) {
    row.ema = prepared ? average->how.decay : average->weight;
    row.ema_warmup = prepared && average->how.warmup;
    if (prepared) on_device.scalars[N_AVERAGED] = average->n_averaged.address();
  }
  on_device.key = work_.rows.enter_key(key);
  on_device.row = work_.rows.enter_row(row, c.group, work_.hypers.data());
  c.task.device = static_cast<int>(work_.device_tasks.size());
  work_.device_tasks.push_back(on_device);
}

}  // namespace fused_optim
