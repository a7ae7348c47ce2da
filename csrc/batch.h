// The tables that a device's kernels read: one batch per launch, kept from step to step so that
// only what has changed is uploaded. Their columns are described in triton_kernels/multi_tensor.py
// and triton_kernels/prepare.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "view.h"

namespace fused_optim {

// What the tensors of one launch have in common.
struct BatchKey {
  Device device;
  std::array<Dtype, MAX_STREAMS> dtypes;  // N_DTYPES: there is no such stream
  std::array<Storage, MAX_STREAMS> storages;
  unsigned options;         // those that decide which states there are
  bool prepared_on_device;  // the host does not know the step, or a hyperparameter
  bool operator==(const BatchKey& other) const {
    return device == other.device && dtypes == other.dtypes && storages == other.storages &&
           options == other.options && prepared_on_device == other.prepared_on_device;
  }
  bool wide() const {  // what is computed in float64
    return std::find(dtypes.begin(), dtypes.end(), F64) != dtypes.end();
  }
  bool packed() const {
    return std::any_of(storages.begin(), storages.end(),
                       [](Storage storage) { return storage != PLAIN; });
  }
};

// An address of a number, as prepare takes it.
inline int64_t tagged(const void* address, Dtype dtype) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(address)) | (dtype == F64 ? 1 : 0);
}

inline int64_t table_versions = 0;  // so far, in the process; under the GIL

template <class T>
class Table {
 public:
  void begin() { next_.clear(); }
  void add(T value) { next_.push_back(value); }
  void end() {
    if (next_ == current_) return;
    current_.swap(next_);
    version_ = ++table_versions;
  }
  const std::vector<T>& current() const { return current_; }
  // A larger number for other contents, in all tables of the process: copies outlive their table.
  int64_t version() const { return version_; }

 private:
  std::vector<T> current_, next_;
  int64_t version_ = 0;
};

// One row of a batch's numbers: hypers, or the options that a device makes them of.
struct Row {
  double values[MAX_HYPERS];
  int64_t addresses[MAX_HYPERS];  // of options that are tensors on the device; 0: the value holds
  unsigned variant;
  double grad_sign, step;  // step: 0 if no number depends on it, or a device knows it
  double ema;              // the EMA's weight, or its decay where a device makes that of it
  double ema_warmup;       // whether that decay is warmed up
  bool operator==(const Row& other) const;
};

class Batch {
 public:
  Batch(const BatchKey& key, int n_states) : key(key) {
    for (int s = 0; s < STATES + n_states; s++) streams.push_back(s);
    streams.push_back(EMA);
  }

  void begin();
  // One more tensor; `row` stays where it is until end(). step, waiting, n_averaged: addresses for
  // prepare, lowest bit set for a float64, or 0.
  void add(const Slice& slice, const Row& row, int64_t step, int64_t waiting, int64_t n_averaged);
  void end();
  int64_t n_tensors() const { return n_tensors_; }
  // Of all that is uploaded: one row of hypers is handed to the kernel by value.
  int64_t version() const { return version_; }
  bool by_value() const { return n_rows_ == 1 && !key.prepared_on_device; }

  const BatchKey key;
  std::vector<int> streams;  // that have a column in `tensors`
  Table<int64_t> numels, tensors, steps, addresses;
  Table<double> options;  // rows of what a device makes hypers of,
  Table<int32_t> hypers;  // or the hypers' bits in the compute type, two words each for a float64

 private:
  void add_options(const Row& row);
  void add_hypers(const Row& row);

  int64_t n_tensors_ = 0, n_rows_ = 0, version_ = 0;
  const Row* last_ = nullptr;  // between begin and end
};

// The grads of one device and dtype, for its norm kernel (triton_kernels/norm.py).
class GradBatch {
 public:
  GradBatch(Device device, Dtype dtype) : device(device), dtype(dtype) {}

  void begin();
  // first_chunk: the number of its first chunk among those of all grads of the device.
  void add(const void* grad, int64_t numel, int64_t first_chunk);
  void end();
  int64_t version() const { return std::max(numels.version(), grads.version()); }

  const Device device;
  const Dtype dtype;
  Table<int64_t> numels, grads;
};

}  // namespace fused_optim
