#include "storage.h"

#include "group.h"

namespace fused_optim {

namespace {

uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Finds a state or a remainder; null for None too.
PyObject* find(PyObject* states, PyObject* key) {
  PyObject* value = get_item(states, key);
  return value == Py_None ? nullptr : value;
}

bool lies_alike(const View& view, const View& p) {
  return view.same_shape(p) && view.same_strides(p) && view.device == p.device;
}

bool has_memory(PyObject* tensor, const View& view) {
  return view.numel() == 0 || (view.data != nullptr && storage_holds(tensor, view));
}

}  // namespace

uint64_t random_seed(uint64_t seed, uint64_t param, int stream) {
  return splitmix(splitmix(splitmix(seed) ^ param) ^ static_cast<uint64_t>(stream));
}

// triton_kernels/formats.py has the same.
void random_key(uint64_t random_seed, uint64_t step, uint32_t* key) {
  const uint64_t k = splitmix(random_seed ^ step);
  key[0] = static_cast<uint32_t>(k);
  key[1] = static_cast<uint32_t>(k >> 32);
}

Stored storage_of(StateFormat format, StateKind kind, Dtype param, int64_t numel) {
  if (format == STATE_AS_STOCK) return {PLAIN, param};
  if (kind != EXACT && format == STATE_BF16) return {kind == SQUARE ? STOCHASTIC : PLAIN, BF16};
  if (kind != EXACT && format == STATE_INT8 && numel >= SMALLEST_INT8)
    return kind == SQUARE ? Stored{ROOT8, U8} : Stored{SIGNED8, I8};
  return {PLAIN, F32};
}

bool Packed::read(const Group& group, PyObject* param, const View& p, const Place& place,
                  unsigned used, PyObject* states) {
  packing = {};
  remainder = nullptr;
  held.clear();
  packing.offset = place.first;
  if (!read_remainder(group, param, p, states)) return false;
  if ((group.schema.rule.has_step || needs_random_bits(group.master, p.dtype)) &&
      find(states, names.step) == nullptr)
    return false;
  for (size_t s = 0; s < group.schema.state_keys.size(); s++)
    if ((used >> s & 1) && !read_state(group, s, param, p, place, states)) return false;
  return true;
}

bool Packed::read_remainder(const Group& group, PyObject* param, const View& p, PyObject* states) {
  const bool half = p.dtype == BF16 || p.dtype == F16;
  const bool splits = half && (group.master == SPLIT8 || group.master == SPLIT16);
  PyObject* rest = find(states, names.param_remainder);
  if (splits != (rest != nullptr)) return false;
  if (half) packing.storage[PARAM] = group.master;
  if (!splits) return true;
  View view;
  const Ref part = part_of(rest, param);
  if (part == nullptr || !view.read(part) || !lies_alike(view, p) ||
      view.whole != (group.master == SPLIT8 ? I8 : I16) || !has_memory(part, view))
    return false;
  remainder = view.data;
  held.push_back(part);
  return true;
}

bool Packed::read_state(const Group& group, size_t s, PyObject* param, const View& p,
                        const Place& place, PyObject* states) {
  PyObject* tensor = find(states, group.schema.state_keys[s]);
  View view;
  const Ref part = tensor == nullptr ? Ref() : part_of(tensor, param);
  if (part == nullptr || !view.read(part) || !view.same_shape(p) || view.device != p.device)
    return true;  // the gatherer says what is wrong
  const StateKind kind = group.schema.rule.state_kinds[s];
  const Stored wanted = storage_of(group.state_format, kind, p.dtype, place.numel);
  const bool is_scaled = has_scales(wanted.storage);
  PyObject* scale = find(states, group.schema.scale_keys[s]);
  if (is_scaled != (scale != nullptr) ||
      (view.dtype == N_DTYPES ? view.whole : view.dtype) != wanted.dtype ||
      (wanted.storage != PLAIN && !lies_alike(view, p)))
    return false;
  packing.storage[STATES + s] = wanted.storage;
  if (!is_scaled) return true;
  View scales;
  if (!is_plain(scale) || !scales.read(scale) || scales.dtype != BF16 || scales.ndim != 1 ||
      !scales.contiguous() || scales.shape[0] != n_scales(p.numel()) || scales.device != p.device ||
      !has_memory(scale, scales))
    return false;
  packing.scales[STATES + s] = static_cast<uint16_t*>(scales.data);
  held.push_back(Ref::share(scale));
  return true;
}

void Packed::draw(uint64_t seed, uint64_t ordinal, double step) {
  for (int s = 0; s < MAX_STREAMS; s++) {
    packing.seeds[s] = random_seed(seed, ordinal, s);
    random_key(packing.seeds[s], static_cast<uint64_t>(step), packing.keys[s]);
  }
}

}  // namespace fused_optim
