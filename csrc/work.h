// One step's work between gather and commit: for each tensor that a kernel serves, what the kernel
// gets (Task, which knows nothing of Python) and the Python objects that it keeps alive (Held).
#pragma once

#include <vector>

#include "group.h"
#include "norm.h"
#include "overlap.h"
#include "parallel.h"
#include "tables.h"

namespace fused_optim {

struct Held {
  Origin origin;
  Ref param, grad;          // as the user has them
  Ref parts[MAX_STREAMS];   // plain tensors: those, or what this process holds of them
  std::vector<Ref> others;  // scales, a remainder, copies in another order
  Ref states;               // the param's dict
  Ref created;              // states that enter it when the step can no longer fail,
  bool converted = false;   // they have None for keys that have to go
  size_t first_scalar = 0, n_scalars = 0;  // in Work::scalars
  int average = -1;                        // index into Work::averages, if the kernel moves it
};

struct Work {
  std::vector<Task> tasks;
  std::vector<Held> held;  // one for each task, until commit() drops the devices' tasks
  std::vector<Scalar> scalars;
  std::vector<Layout> layouts;
  std::vector<Packing> packings;
  std::vector<double> hypers;
  Averages averages;
  std::vector<DeviceTask> device_tasks;
  DeviceRows rows;
  Ref fallbacks;  // list of (group index, param index, reason); none if there are none
  Ref state;      // the optimizer's
  bool commit_begun = false;
  // Counted on the way, as many tasks do not fit into a cache together.
  int64_t n_on_devices = 0;
  bool has_new_states = false;  // some task has `created` states, or a scalar that has moved

  // The memory from a stream's first element to its last one; enters all that a task writes.
  Range range(size_t task, int stream) const;
  void enter_written(size_t task, Written& written) const;
  void fall_back(const Origin& origin, const char* reason);
  // The scalars of a task, as `for` takes them.
  struct ScalarRange {
    const Scalar *first, *last;
    const Scalar* begin() const { return first; }
    const Scalar* end() const { return last; }
  };
  ScalarRange scalars_of(const Held& held) const {
    const Scalar* first = scalars.data() + held.first_scalar;
    return {first, first + held.n_scalars};
  }
  void drop(const std::vector<bool>& which, const char* reason);
  void clear();
};

// The grad of one task, for the norm of all grads; any tensor, with its layout where it needs one.
NormTask norm_task(Work& work, size_t task);
NormTask norm_task(const View& grad, std::vector<Layout>& layouts);

}  // namespace fused_optim
