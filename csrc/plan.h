// One optimizer's step: gather, then commit; between them Python decides.
#pragma once

#include "gather.h"
#include "norm.h"

namespace fused_optim {

// Over a list of grads. Returns (sum, those that no kernel reads).
Ref sum_of_squares(PyObject* grads, int num_threads);

class Plan {
 public:
  explicit Plan(const std::string& rule) : schema_(rule) {}

  // Validates everything and writes nothing. Returns the Bits to decide about; 0: there is nothing.
  unsigned gather(const Request& request);

  // The findings of gather().
  // (group index, param index, on a device, bytes moved, averages, strided) of each task.
  Ref tasks() const;
  Ref fallbacks() const;  // (group index, param index, reason) each, or None
  Ref averages_left() const { return work_.averages.left(); }
  int64_t n_on_cpu() const;
  // The host counts some average's steps: it must know whether one is skipped.
  bool host_counts() const { return work_.averages.host_counts(); }
  GradWrite grad_write() const { return grad_write_; }
  // Over the CPU tasks' grads. Returns (sum, some element is not finite, DTensors among all grads,
  // which are left to the caller).
  Ref sum_of_squares(int num_threads);

  // For the tasks on devices: streams in several orders go through copies in one.
  Ref tasks_to_stage() const;  // (task, tensors, whether each is written) each
  void stage(size_t task, PyObject* copies);
  Ref batches() { return tables_.batches(work_, schema_.rule); }
  Ref grad_batches() { return tables_.grads(work_); }
  void drop_devices(const char* reason);  // torch.optim's code steps them

  // Enters new averages and raises version counters. commit() does it itself, unless kernels are
  // launched on devices before.
  void begin_commit();
  // Runs the CPU's kernels and completes the step; it cannot fail. The grads are divided by
  // grad_scale (0: not) and multiplied by clip. Returns (tensors stepped on the CPU, on devices,
  // fallbacks or None).
  Ref commit(double clip, double grad_scale, int num_threads);
  void release() {
    work_.clear();
    state_dicts_.clear();
    lists_ = Ref();
  }

 private:
  void enter_created(const Held& held) const;

  const Schema schema_;
  Memory memory_;
  Work work_;
  Tables tables_;
  GradWrite grad_write_ = KEPT;
  std::vector<Ref> state_dicts_;  // of the tasks with new states, in `state`
  Ref lists_;                     // the request's, for new states
};

}  // namespace fused_optim
