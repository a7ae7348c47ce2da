// The tables that a device's kernels read: one batch per launch, kept from step to step so that
// only what has changed is uploaded. Their columns are described in triton_kernels/multi_tensor.py
// and triton_kernels/prepare.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "group.h"

namespace fused_optim {

// The properties that all tensors of one launch share.
struct BatchKey {
  Device device;
  std::array<Dtype, MAX_STREAMS> dtypes;  // N_DTYPES: there is no such stream
  std::array<Storage, MAX_STREAMS> storages;
  bool prepared_on_device;  // the host does not know the step, or a hyperparameter
  bool operator==(const BatchKey& other) const {
    return device == other.device && dtypes == other.dtypes && storages == other.storages &&
           prepared_on_device == other.prepared_on_device;
  }
  bool wide() const {  // the compute type is float64
    return std::find(dtypes.begin(), dtypes.end(), F64) != dtypes.end();
  }
  bool packed() const {
    return std::any_of(storages.begin(), storages.end(),
                       [](Storage storage) { return storage != PLAIN; });
  }
};

inline int64_t table_versions = 0;  // number given so far in the process; under the GIL

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

// One row of a batch's numbers: hypers, or the options from which a device makes them.
struct Row {
  double values[MAX_OPTIONS];
  int64_t addresses[MAX_TENSOR_OPTIONS];  // option tensors on the device; 0: the value holds
  double grad_sign;
  // After the step, or as the rule's prepare takes them; 0 where a device knows it or nobody asks.
  double scalars[MAX_RULE_SCALARS];
  double ema;         // the EMA's weight, or its decay where a device makes the weight
  double ema_warmup;  // 1: that decay is warmed up
  bool operator==(const Row& other) const;
};

static_assert(MAX_OPTIONS >= MAX_HYPERS);

class Batch {
 public:
  Batch(const BatchKey& key, int n_states, int n_scalars) : key(key), n_scalars_(n_scalars) {
    for (int s = 0; s < STATES + n_states; s++) streams.push_back(s);
    streams.push_back(EMA);
  }

  void begin();
  // One more tensor; `row` stays where it is until end(). of_scalars: MAX_SCALARS addresses for
  // prepare, lowest bit set for a float64, or 0.
  void add(const Slice& slice, const Row& row, const int64_t* of_scalars);
  void end();
  int64_t n_tensors() const { return n_tensors_; }
  // The latest version of all that is uploaded; one row of hypers goes to the kernel by value.
  int64_t version() const { return version_; }
  bool by_value() const { return n_rows_ == 1 && !key.prepared_on_device; }

  const BatchKey key;
  std::vector<int> streams;  // that have a column in `tensors`
  Table<int64_t> numels, tensors, scalars, addresses;
  Table<double> options;  // rows from which a device makes hypers,
  Table<int32_t> hypers;  // or the hypers' bits in the compute type, two words each for a float64

 private:
  void add_options(const Row& row);
  void add_hypers(const Row& row);

  const int n_scalars_;
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

// The sources of a row: neighbouring tensors mostly share them.
struct RowOrigin {
  int64_t group, hypers;  // hypers: index in the step's table; -1 where a device prepares them
  bool by_address;
  std::array<double, MAX_RULE_SCALARS> scalars;
  double ema, ema_warmup;
  bool operator==(const RowOrigin& other) const {
    return group == other.group && hypers == other.hypers && by_address == other.by_address &&
           scalars == other.scalars && ema == other.ema && ema_warmup == other.ema_warmup;
  }
};

// The keys and rows of one step's tensors on devices.
struct DeviceRows {
  std::vector<BatchKey> keys;
  std::vector<Row> rows;
  RowOrigin last;  // the last row's

  // Both return the index of an entry that is new or equals the last one.
  size_t enter_key(const BatchKey& key);
  size_t enter_row(const RowOrigin& origin, const Group& group, const double* hypers);
  void clear() {
    keys.clear();
    rows.clear();
  }
};

struct DeviceTask {
  size_t key, row;               // in DeviceRows
  int64_t scalars[MAX_SCALARS];  // addresses, see Batch::add
};

struct Work;

// Keeps the batches of all steps so far, each with its Python object.
class Tables {
 public:
  // Both return a list of those that this step needs.
  Ref batches(const Work& work, const RuleInfo& rule);
  Ref grads(Work& work);  // for the norm

 private:
  std::vector<std::pair<std::shared_ptr<Batch>, Ref>> batches_;
  std::vector<std::pair<std::shared_ptr<GradBatch>, Ref>> grads_;
};

// Makes the batch's Python object (module.cpp).
Ref to_python(const std::shared_ptr<Batch>& batch);
Ref to_python(const std::shared_ptr<GradBatch>& batch);

}  // namespace fused_optim
