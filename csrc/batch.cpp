#include "batch.h"

#include <algorithm>

namespace fused_optim {

bool Row::operator==(const Row& other) const {
  return std::equal(values, values + MAX_HYPERS, other.values) &&
         std::equal(addresses, addresses + MAX_HYPERS, other.addresses) &&
         variant == other.variant && grad_sign == other.grad_sign && step == other.step;
}

void Batch::begin() {
  n_tensors_ = n_rows_ = 0;
  numels.begin();
  tensors.begin();
  steps.begin();
  addresses.begin();
  numbers.begin();
}

void Batch::add(const Slice& slice, const Row& row, int64_t step, int64_t waiting) {
  if (n_rows_ == 0 || !(row == last_)) {
    for (double value : row.values) numbers.add(value);
    numbers.add(row.variant);
    numbers.add(row.grad_sign);
    if (key.prepared_on_device) {
      numbers.add(row.step);
      for (int64_t address : row.addresses) addresses.add(address);
    }
    last_ = row;
    n_rows_++;
  }
  bool aligned = true;  // wide accesses need 16 bytes
  for (int s = 0; s < n_streams_; s++)
    aligned = aligned && (reinterpret_cast<uintptr_t>(slice.streams[s]) & 15) == 0;
  numels.add(slice.numel);
  tensors.add(aligned ? slice.numel : -slice.numel);
  tensors.add(key.prepared_on_device ? n_tensors_ : n_rows_ - 1);  // prepare writes a row per tensor
  for (int s = 0; s < n_streams_; s++)
    tensors.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(slice.streams[s])));
  if (key.prepared_on_device) {
    steps.add(step);
    steps.add(waiting);
    steps.add(n_rows_ - 1);
  }
  n_tensors_++;
}

void Batch::end() {
  numels.end();
  tensors.end();
  steps.end();
  addresses.end();
  numbers.end();
}

}  // namespace fused_optim
