#include "tables.h"

#include <algorithm>
#include <cstring>

#include "norm.h"
#include "work.h"

namespace fused_optim {

bool Row::operator==(const Row& other) const {
  return std::equal(values, values + MAX_OPTIONS, other.values) &&
         std::equal(addresses, addresses + MAX_TENSOR_OPTIONS, other.addresses) &&
         std::equal(scalars, scalars + MAX_RULE_SCALARS, other.scalars) &&
         grad_sign == other.grad_sign && ema == other.ema && ema_warmup == other.ema_warmup;
}

void Batch::begin() {
  n_tensors_ = n_rows_ = 0;
  numels.begin();
  tensors.begin();
  scalars.begin();
  addresses.begin();
  options.begin();
  hypers.begin();
}

void Batch::add_options(const Row& row) {
  for (double value : row.values) options.add(value);
  options.add(row.grad_sign);
  options.add(row.ema);
  options.add(row.ema_warmup);
  for (double scalar : row.scalars) options.add(scalar);
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
  for (int i = 0; i < MAX_HYPERS; i++) add(row.values[i]);
  add(row.grad_sign);
  add(row.ema);
  const auto step = static_cast<int64_t>(row.scalars[STEP]);  // random bits need all of it
  add_whole(step & 0xffffffff);
  add_whole(step >> 32);
}

void Batch::add(const Slice& slice, const Row& row, const int64_t* of_scalars) {
  if (last_ == nullptr || (&row != last_ && !(row == *last_))) {
    key.prepared_on_device ? add_options(row) : add_hypers(row);
    n_rows_++;
  }
  last_ = &row;
  // Whole blocks need streams on 16 bytes, for wide accesses. For random bits, of which one draw
  // serves two elements of 32, they need both in one block, and numbers with the same upper bits in
  // a block. No block is larger than 2^16.
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
    for (int s : streams) tensors.add(address(slice.extra(s)));
    for (int s : streams) tensors.add(static_cast<int64_t>(packing.seeds[s]));
  }
  if (key.prepared_on_device) {
    for (int i = 0; i < n_scalars_; i++) scalars.add(of_scalars[i]);
    scalars.add(of_scalars[N_AVERAGED]);
    scalars.add(n_rows_ - 1);
  }
  n_tensors_++;
}

void Batch::end() {
  last_ = nullptr;
  numels.end();
  tensors.end();
  scalars.end();
  addresses.end();
  options.end();
  hypers.end();
  version_ = std::max({numels.version(), tensors.version(), scalars.version(), addresses.version(),
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

size_t DeviceRows::enter_key(const BatchKey& key) {
  if (keys.empty() || !(keys.back() == key)) keys.push_back(key);
  return keys.size() - 1;
}

size_t DeviceRows::enter_row(const RowOrigin& origin, const Group& group, const double* hypers) {
  if (!rows.empty() && last == origin) return rows.size() - 1;
  last = origin;
  Row row = {};
  if (origin.hypers < 0)
    std::copy(group.options, group.options + MAX_OPTIONS, row.values);
  else
    std::copy(hypers + origin.hypers, hypers + origin.hypers + MAX_HYPERS, row.values);
  if (origin.by_address)
    std::copy(group.option_addresses, group.option_addresses + MAX_TENSOR_OPTIONS, row.addresses);
  row.grad_sign = group.grad_sign;
  std::copy(origin.scalars.begin(), origin.scalars.end(), row.scalars);
  row.ema = origin.ema;
  row.ema_warmup = origin.ema_warmup;
  rows.push_back(row);
  return rows.size() - 1;
}

namespace {

// The batch that fits, made if there is none, and begun for this step.
template <class B, class Fits, class... Args>
B& batch_for(std::vector<std::pair<std::shared_ptr<B>, Ref>>& known, const Fits& fits,
             const Args&... args) {
  for (const auto& [batch, object] : known)
    if (fits(*batch)) return *batch;
  auto fresh = std::make_shared<B>(args...);
  fresh->begin();
  known.emplace_back(fresh, to_python(fresh));
  return *fresh;
}

// Ends all batches; a list of those that have tensors.
template <class B>
Ref finish(const std::vector<std::pair<std::shared_ptr<B>, Ref>>& known) {
  const Ref used = Ref::own(PyList_New(0));
  for (const auto& [batch, object] : known) {
    batch->end();
    if (!batch->numels.current().empty()) append(used, object);
  }
  return used;
}

}  // namespace

Ref Tables::batches(const Work& work, const RuleInfo& rule) {
  const int n_states = static_cast<int>(rule.state_names.size());
  const int n_scalars = std::max(static_cast<int>(rule.scalar_names.size()), 2);  // as prepare.py
  for (const auto& [batch, object] : batches_) batch->begin();
  Batch* batch = nullptr;
  size_t last_key = 0;
  for (const Task& task : work.tasks) {
    if (task.device < 0) continue;
    const DeviceTask& on_device = work.device_tasks[task.device];
    if (batch == nullptr || last_key != on_device.key) {
      const BatchKey& key = work.rows.keys[last_key = on_device.key];
      const auto fits = [&](const Batch& known) { return known.key == key; };
      batch = &batch_for(batches_, fits, key, n_states, n_scalars);
    }
    batch->add(task.slice, work.rows.rows[on_device.row], on_device.scalars);
  }
  return finish(batches_);
}

Ref Tables::grads(Work& work) {
  for (const auto& [batch, object] : grads_) batch->begin();
  std::vector<std::pair<Device, int64_t>> n_chunks;
  for (size_t t = 0; t < work.tasks.size(); t++) {
    if (work.tasks[t].device < 0) continue;
    const Device device = work.rows.keys[work.device_tasks[work.tasks[t].device].key].device;
    const NormTask task = norm_task(work, t);
    const auto fits = [&](const GradBatch& known) {
      return known.device == device && known.dtype == task.dtype;
    };
    GradBatch& batch = batch_for(grads_, fits, device, task.dtype);
    auto on_device = std::find_if(n_chunks.begin(), n_chunks.end(),
                                  [&](const auto& count) { return count.first == device; });
    if (on_device == n_chunks.end()) on_device = n_chunks.insert(on_device, {device, 0});
    batch.add(task.grad, task.numel, on_device->second);
    on_device->second += (task.numel + NORM_CHUNK - 1) / NORM_CHUNK;
  }
  return finish(grads_);
}

}  // namespace fused_optim
