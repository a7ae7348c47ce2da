#include "work.h"

#include <algorithm>

namespace fused_optim {

Range Work::range(size_t t, int s) const {
  const Task& task = tasks[t];
  const auto* data = static_cast<const char*>(task.slice.streams[s]);
  const int64_t reach = task.layout >= 0 ? layouts[task.layout].reach(s) : task.slice.numel;
  return {data, data + reach * ITEMSIZE[task.slice.dtypes[s]], t};
}

void Work::enter_written(size_t t, Written& written) const {
  const Task& task = tasks[t];
  const int64_t numel = task.slice.numel;
  const auto add = [&](const void* memory, int64_t nbytes) {
    const auto* data = static_cast<const char*>(memory);
    if (data != nullptr) written.add({data, data + nbytes, t});
  };
  for (const Scalar& scalar : scalars_of(held[t]))
    if (scalar.key != nullptr)
      add(scalar.data, ITEMSIZE[scalar.dtype]);  // no param can lie in others
  if (numel == 0) return;
  for (int s = 0; s < MAX_STREAMS; s++)
    if (task.written >> s & 1) written.add(range(t, s));
  if (task.packing < 0) return;
  for (int s = 0; s < MAX_STREAMS; s++)
    add(task.slice.extra(s), extra_nbytes(task.slice.packing->storage[s], numel));
}

void Work::fall_back(const Origin& origin, const char* reason) {
  if (fallbacks == nullptr) fallbacks = Ref::own(PyList_New(0));
  const Ref entry = Ref::own(Py_BuildValue("(LLs)", static_cast<long long>(origin.group),
                                           static_cast<long long>(origin.index), reason));
  append(fallbacks, entry);
}

// Hands these tasks over to torch.optim's code.
void Work::drop(const std::vector<bool>& which, const char* reason) {
  size_t kept = 0;
  for (size_t t = 0; t < tasks.size(); t++) {
    if (which[t]) {
      fall_back(held[t].origin, reason);
      if (tasks[t].device >= 0) n_on_devices--;
      if (held[t].average >= 0) averages.leave(held[t].average);
      for (size_t i = 0; i < held[t].n_scalars; i++)
        scalars[held[t].first_scalar + i].data = nullptr;  // stock writes them
    } else if (kept++ != t) {
      tasks[kept - 1] = tasks[t];
      held[kept - 1] = std::move(held[t]);
    }
  }
  tasks.resize(kept);
  held.resize(kept);
}

void Work::clear() {
  clear_safely(held);
  clear_safely(scalars);
  averages.clear();
  tasks.clear();
  layouts.clear();
  packings.clear();
  hypers.clear();
  device_tasks.clear();
  rows.clear();
  fallbacks = state = Ref();
  commit_begun = has_new_states = false;
  n_on_devices = 0;
}

NormTask norm_task(Work& work, size_t t) {
  const Task& task = work.tasks[t];
  const Slice& slice = task.slice;
  // A DTensor's norm includes the parts of other processes: Python sums it (clipping.py).
  const int64_t numel = task.is_sharded ? 0 : slice.numel;
  const NormTask norm = {slice.streams[GRAD], slice.dtypes[GRAD], numel, -1};
  View grad;
  if (task.layout < 0 || numel == 0 || !grad.read(work.held[t].parts[GRAD])) return norm;
  std::vector<Layout> layouts;
  const NormTask own = norm_task(grad, task.device < 0 ? work.layouts : layouts);
  return layouts.empty() ? own : norm;  // a device's copy is dense
}

NormTask norm_task(const View& grad, std::vector<Layout>& layouts) {
  NormTask norm = {grad.data, grad.dtype, grad.numel(), -1};
  const int64_t* strides[MAX_STREAMS] = {};
  strides[GRAD] = grad.strides;
  Layout layout;
  if (norm.numel > 0 && !layout.build(grad.ndim, grad.shape, strides, 1u << GRAD)) {
    norm.layout = static_cast<int>(layouts.size());  // dense in no order
    layouts.push_back(std::move(layout));
  }
  return norm;
}

}  // namespace fused_optim
