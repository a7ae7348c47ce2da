// Gathering, second part: the streams of a param, their memory and their order.
#include "gather.h"

namespace fused_optim {

namespace {

const char* noun_of(int stream) {
  return stream == PARAM  ? "the param"
         : stream == GRAD ? "the grad"
         : stream == EMA  ? "the average, or output,"
                          : "a state";
}

}  // namespace

// Its streams, and the order in which their elements are visited.
const char* Gatherer::lay_out(Candidate& c) {
  const View& p = c.views[PARAM];
  Task& task = c.task;
  task.layout = task.device = task.packing = -1;
  task.streams = 0b11 | c.used << STATES;
  if (c.average >= 0) join_average(c);
  task.written = task.streams & ~(request_.grad_write() == KEPT ? 1u << GRAD : 0u);
  const int64_t numel = c.now.numel = task.slice.numel = p.numel();
  const int64_t* strides[MAX_STREAMS] = {};
  bool all_same = true, any_f64 = false, one_order = p.contiguous();
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(task.streams >> s & 1)) {
      memory_.hold = memory_.hold && c.hint.data[s] == nullptr;
      continue;
    }
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
  if (s == GRAD || (view.data == c.hint.data[s] && numel == c.hint.numel &&
                    c.now.objects[s] == c.hint.objects[s]))
    return nullptr;
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
