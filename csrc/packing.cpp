// Which streams of a param are packed, and where their scales and remainders lie.
#include <algorithm>
#include <cstring>

#include "gather.h"

namespace fused_optim {

namespace {

uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
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

void Plan::read_formats(Group& group) {
  const auto get = [&](PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(group.dict, key);
    if (value == nullptr && PyErr_Occurred()) throw PythonError();
    return value;
  };
  const auto refuse = [&](const char* name, PyObject* value, const char* accepted) {
    PyErr_Format(PyExc_ValueError, "Invalid %s in param group %zd: %R; it must be %s", name,
                 static_cast<Py_ssize_t>(group.index), value, accepted);
    throw PythonError();
  };
  const auto is = [](PyObject* value, const char* text) {
    return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
  };
  PyObject* state_dtype = get(names.state_dtype);
  PyObject* master = get(names.master);
  group.packs = state_dtype != nullptr || master != nullptr;
  if (!group.packs) return;
  if (state_dtype != nullptr && state_dtype != Py_None) {
    if (state_dtype == torch.float32 || is(state_dtype, "float32"))
      group.state_format = STATE_F32;
    else if (state_dtype == torch.bfloat16 || is(state_dtype, "bfloat16"))
      group.state_format = STATE_BF16;
    else if (is(state_dtype, "int8"))
      group.state_format = STATE_INT8;
    else
      refuse("state_dtype", state_dtype, "torch.float32, torch.bfloat16, \"int8\" or None");
  }
  if (master != nullptr && master != Py_None) {
    if (is(master, "stochastic"))
      group.master = STOCHASTIC;
    else if (is(master, "split8"))
      group.master = SPLIT8;
    else if (is(master, "split16"))
      group.master = SPLIT16;
    else
      refuse("master", master, "\"stochastic\", \"split8\", \"split16\" or None");
  }
  PyObject* seed = get(names.rounding_seed);
  if (seed != nullptr) {
    group.seed = PyLong_Check(seed) ? PyLong_AsUnsignedLongLong(seed) : 0;
    if (!PyLong_Check(seed) || PyErr_Occurred()) {
      PyErr_Clear();
      refuse("rounding_seed", seed, "an int in [0, 2**64)");
    }
  }
  group.param_indices = get(names.param_indices);
  if (group.param_indices != nullptr && !PyList_Check(group.param_indices))
    raise(PyExc_TypeError, "param_indices must be a list");
}

bool Plan::counts_steps(const Group& group, const View& param) const {
  return rule_.has_step || (group.packs && (group.master == STOCHASTIC || group.master == SPLIT8) &&
                            (param.dtype == BF16 || param.dtype == F16));
}

// False if what is in `states` is not what the group asks for.
bool Plan::read_packing(const Group& group, PyObject* param, const View& p, const Place& place,
                        unsigned used, PyObject* states, Packing& packing, void*& remainder) {
  const int64_t numel = p.numel();
  packing.offset = place.first;
  const auto get = [&](PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(states, key);
    if (value == nullptr && PyErr_Occurred()) throw PythonError();
    return value == Py_None ? nullptr : value;
  };
  const auto lies_alike = [&](const View& view) {
    return view.same_shape(p) && view.same_strides(p) && view.device == p.device;
  };
  const auto has_memory = [](PyObject* tensor, const View& view) {
    return view.numel() == 0 || (view.data != nullptr && storage_holds(tensor, view));
  };
  const bool half = p.dtype == BF16 || p.dtype == F16;
  PyObject* rest = get(names.param_remainder);
  const bool splits = half && (group.master == SPLIT8 || group.master == SPLIT16);
  if (splits != (rest != nullptr)) return false;
  if (half) packing.storage[PARAM] = group.master;
  if (splits) {
    View view;
    PyObject* part = part_of(rest, param);
    if (part == nullptr || !view.read(part) || !lies_alike(view) ||
        view.whole != (group.master == SPLIT8 ? I8 : I16) || !has_memory(part, view))
      return false;
    remainder = view.data;
    Py_INCREF(rest);
    hold(rest);
  }
  if (counts_steps(group, p) && get(names.step) == nullptr) return false;
  for (size_t s = 0; s < state_keys_.size(); s++) {
    if (!(used >> s & 1)) continue;
    PyObject* tensor = get(state_keys_[s]);
    View view;
    PyObject* part = tensor == nullptr ? nullptr : part_of(tensor, param);
    if (part == nullptr || !view.read(part) || !view.same_shape(p) || view.device != p.device)
      continue;  // gather_param says what is wrong
    const bool is_square = rule_.square_states >> s & 1;
    PyObject* scale = get(scale_keys_[s]);
    const bool is_int8 = group.state_format == STATE_INT8 && place.numel >= SMALLEST_INT8;
    if (is_int8 != (scale != nullptr)) return false;
    if (is_int8) {
      View scales;
      if (view.whole != (is_square ? U8 : I8) || !lies_alike(view) || !is_plain(scale) ||
          !scales.read(scale) || scales.dtype != BF16 || scales.ndim != 1 || !scales.contiguous() ||
          scales.shape[0] != (numel + SCALE_BLOCK - 1) / SCALE_BLOCK || scales.device != p.device ||
          !has_memory(scale, scales))
        return false;
      packing.storage[STATES + s] = is_square ? ROOT8 : SIGNED8;
      packing.scales[STATES + s] = static_cast<uint16_t*>(scales.data);
      Py_INCREF(scale);
      hold(scale);
    } else if (group.state_format == STATE_BF16) {
      if (view.dtype != BF16 || (is_square && !lies_alike(view))) return false;
      packing.storage[STATES + s] = is_square ? STOCHASTIC : PLAIN;
    } else if (group.state_format != STATE_AS_STOCK) {
      if (view.dtype != F32) return false;
    } else if (view.dtype != p.dtype) {
      return false;
    }
  }
  return true;
}

void Plan::enter_packing(Group& group, int64_t index, uint64_t ordinal, double step,
                         Packing& packing, void* remainder, const Hint& before, Hint& now,
                         Task& task) {
  if (group.param_indices != nullptr && index < PyList_GET_SIZE(group.param_indices))
    ordinal = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(group.param_indices, index));
  if (PyErr_Occurred()) throw PythonError();
  for (int s = 0; s < MAX_STREAMS; s++) {
    packing.seeds[s] = random_seed(group.seed, ordinal, s);
    random_key(packing.seeds[s], static_cast<uint64_t>(step), packing.keys[s]);
  }
  packings_.push_back(packing);
  std::copy(packing.scales + STATES, packing.scales + STATES + MAX_STATES, now.packed);
  now.packed[MAX_STATES] = remainder;
  hints_hold_ =
      hints_hold_ && std::equal(std::begin(now.packed), std::end(now.packed), before.packed);
  task.slice.remainder = remainder;
}

namespace {

// Calls work(part, values) for parts of the stream that are whole blocks, the last one in buffers.
template <class Work>
void for_parts(const Slice& slice, int stream, float* values, bool stores, int num_threads,
               Work work) {
  constexpr int64_t PART = 256 * SCALE_BLOCK;
  const int itemsize = ITEMSIZE[slice.dtypes[stream]];
  const int rest_size = slice.remainder == nullptr                ? 0
                        : slice.packing->storage[PARAM] == SPLIT8 ? 1
                                                                  : 2;
  const int64_t whole = slice.numel / SCALE_BLOCK * SCALE_BLOCK;
  const auto at = [](void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; };
  const size_t n_parts = static_cast<size_t>((whole + PART - 1) / PART);
  spread(n_parts, whole, num_threads, [&](size_t p) {
    Slice part = slice;
    part.first = static_cast<int64_t>(p) * PART;
    part.numel = std::min(PART, whole - part.first);
    part.streams[stream] = at(slice.streams[stream], part.first * itemsize);
    if (rest_size != 0) part.remainder = at(slice.remainder, part.first * rest_size);
    work(part, values + part.first);
  });
  const int64_t rest = slice.numel - whole;
  if (rest == 0) return;
  unsigned char codes[SCALE_BLOCK * 4] = {}, remainders[SCALE_BLOCK * 2] = {};
  float tile[SCALE_BLOCK] = {};
  Slice part = slice;
  part.first = whole;
  part.numel = SCALE_BLOCK;
  part.streams[stream] = codes;
  if (rest_size != 0) part.remainder = remainders;
  char* const stream_end = at(slice.streams[stream], whole * itemsize);
  if (stores) {
    std::memcpy(tile, values + whole, rest * sizeof(float));
    work(part, tile);
    std::memcpy(stream_end, codes, rest * itemsize);
    if (rest_size != 0)
      std::memcpy(at(slice.remainder, whole * rest_size), remainders, rest * rest_size);
  } else {
    std::memcpy(codes, stream_end, rest * itemsize);
    if (rest_size != 0)
      std::memcpy(remainders, at(slice.remainder, whole * rest_size), rest * rest_size);
    work(part, tile);
    std::memcpy(values + whole, tile, rest * sizeof(float));
  }
}

}  // namespace

void unpack(const Slice& slice, int stream, float* values, int num_threads) {
  for_parts(slice, stream, values, false, num_threads,
            [&](const Slice& part, float* to) { current_isa().load_stream(part, stream, to); });
}

void pack(const Slice& slice, int stream, const float* values, int num_threads) {
  for_parts(
      slice, stream, const_cast<float*>(values), true, num_threads,
      [&](const Slice& part, float* from) { current_isa().store_stream(part, stream, from); });
}

}  // namespace fused_optim
