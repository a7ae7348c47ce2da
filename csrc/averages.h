// The exponential moving averages (EMA) of the params, and the outputs, which are copies: one more
// stream of the kernels where they can take it.
#pragma once

#include <vector>

#include "scalars.h"

namespace fused_optim {

// What a param group says of averaging.
struct Averaging {
  bool on = false, warmup = false;
  double decay = 0;

  // Returns false if an option is outside its range.
  bool read(PyObject* group);
  // How far the next average moves towards the param.
  double weight(double n_averaged) const;
};

// That of one param.
struct Average {
  Ref param, entry, tensor;  // entry: the list [average, n_averaged]; none: `tensor` is an output
  Averaging how;
  bool is_new = false;  // `_averages` lacks this entry, or has one that no longer fits
  bool in_kernel = false, is_left = false;  // what is left torch moves
  double weight = 0;                        // if the host counts
  Scalar n_averaged;  // if the host counts, its object is Python's number after the step
};

// Those of one step.
class Averages {
 public:
  void begin(PyObject* dict) { dict_ = Ref::share(dict); }  // the optimizer's `_averages`
  PyObject* dict() const { return dict_; }
  int add(Average average);
  Average& operator[](int index) { return all_[index]; }
  const Average& operator[](int index) const { return all_[index]; }
  void leave(int index);  // to torch
  bool are_left() const { return are_left_; }
  bool host_counts() const;
  // (param, EMA entry, weight, or (decay, warmup) where a device counts) of each that is left; of
  // an output (param, output, None).
  Ref left() const;
  // The tensors that kernels write.
  void append_written(PyObject* list) const;
  // Before the kernels: an average of nothing may be seen, one that is half counted may not.
  void enter_new() const;
  void write_counts() const;  // cannot fail
  void clear();

 private:
  Ref dict_;
  std::vector<Average> all_;
  bool are_left_ = false;
};

}  // namespace fused_optim
