#include "batch.h"

#include <algorithm>
#include <cstring>

namespace fused_optim {

bool Row::operator==(const Row& other) const {
  return std::equal(values, values + MAX_HYPERS, other.values) &&
         std::equal(addresses, addresses + MAX_HYPERS, other.addresses) &&
         variant == other.variant && grad_sign == other.grad_sign && step == other.step &&
         ema == other.ema && ema_warmup == other.ema_warmup;
}

void Batch::begin() {
  n_tensors_ = n_rows_ = 0;
  numels.begin();
  tensors.begin();
  steps.begin();
  addresses.begin();
  options.begin();
  hypers.begin();
}

void Batch::add_options(const Row& row) {
  for (double value : row.values) options.add(value);
  options.add(row.variant);
  options.add(row.grad_sign);
  options.add(row.ema);
  options.add(row.step);
  options.add(row.ema_warmup);
  for (int64_t address : row.addresses) addresses.add(address);
}

void Batch::add_hypers(const Row& row) {
  const auto add_whole = [&](int64_t value) {
    hypers.add(static_cast<int32_t>(value));
    if (key.wide()) hypers.add(static_cast<int32_t>(value >> 32));
  };
  const auto add = [&](double value) {
    const auto narrow = static_cast<float>(value);
    int32_t words[2];
    std::memcpy(words, key.wide() ? static_cast<const void*>(&value) : &narrow, key.wide() ? 8 : 4);
    for (int w = 0; w < (key.wide() ? 2 : 1); w++) hypers.add(words[w]);
  };
  for (double value : row.values) add(value);
  add_whole(row.variant);
  add(row.grad_sign);
  add(row.ema);
  const auto step = static_cast<int64_t>(row.step);  // random bits need all of it
  add_whole(step & 0xffffffff);
  add_whole(step >> 32);
}

void Batch::add(const Slice& slice, const Row& row, int64_t step, int64_t waiting,
                int64_t n_averaged) {
  if (last_ == nullptr || (&row != last_ && !(row == *last_))) {
    key.prepared_on_device ? add_options(row) : add_hypers(row);
    n_rows_++;
  }
  last_ = &row;
  // What whole blocks need: wide accesses 16 bytes; random bits, each of which serves two elements
  // of 32, both of these in one block, and in a block numbers with the same upper bits. No block is
  // larger than 2^16.
  bool aligned = true;
  if (key.packed()) {
    const int64_t first = slice.packing->offset, last = first + slice.numel - 1;
    aligned = first % 32 == 0 && (first % (1 << 16) == 0 || first >> 33 == last >> 33);
  }
  for (int s : streams)
    aligned = aligned && (reinterpret_cast<uintptr_t>(slice.streams[s]) & 15) == 0;
  aligned = aligned && (reinterpret_cast<uintptr_t>(slice.remainder) & 15) == 0;
  numels.add(slice.numel);
  tensors.add(aligned ? slice.numel : -slice.numel);
  const auto address = [](const void* memory) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(memory));
  };
  tensors.add(key.prepared_on_device ? n_tensors_
                                     : n_rows_ - 1);  // prepare writes a row per tensor
  for (int s : streams) tensors.add(address(slice.streams[s]));
  if (key.packed()) {
    const Packing& packing = *slice.packing;
    tensors.add(packing.offset);
    for (int s : streams) tensors.add(address(s == PARAM ? slice.remainder : packing.scales[s]));
    for (int s : streams) tensors.add(static_cast<int64_t>(packing.seeds[s]));
  }
  if (key.prepared_on_device) {
    steps.add(step);
    steps.add(waiting);
    steps.add(n_averaged);
    steps.add(n_rows_ - 1);
  }
  n_tensors_++;
}

void Batch::end() {
  last_ = nullptr;
  numels.end();
  tensors.end();
  steps.end();
  addresses.end();
  options.end();
  hypers.end();
  version_ = std::max({numels.version(), tensors.version(), steps.version(), addresses.version(),
                       options.version(), by_value() ? 0 : hypers.version()});
}

void GradBatch::begin() {
  numels.begin();
  grads.begin();
}

void GradBatch::add(const void* grad, int64_t numel, int64_t first_chunk) {
  const bool aligned = (reinterpret_cast<uintptr_t>(grad) & 15) == 0;
  numels.add(numel);
  grads.add(aligned ? numel : -numel);
  grads.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(grad)));
  grads.add(first_chunk);
}

void GradBatch::end() {
  numels.end();
  grads.end();
}

}  // namespace fused_optim
