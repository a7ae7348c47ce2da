// Formats of a kernel in which some stream is packed, and of one packed stream by itself. Included inside a
// namespace, like packed.h.

// In pieces: GCC would call memmove for all.
inline void copy(const float* __restrict from, float* __restrict to) {
  for (int k = 0; k < GROUP; k += TILE) std::memcpy(to + k, from + k, TILE * sizeof(float));
}

// Formats of a kernel in which some stream is packed. Out of line: once per instruction set.
struct Packed {
  using compute = float;
  static constexpr bool rounds = true;
  static constexpr int tile = GROUP;
  // Where the kernel works on the param: where it lies, if it is float32. (For the states, copies are faster.)
  static inline float* param_at(const Slice& slice, int64_t i, float* buffer) {
    return slice.dtypes[PARAM] == F32 ? static_cast<float*>(slice.streams[PARAM]) + i : buffer;
  }
  static int itemsize(Dtype dtype) { return ITEMSIZE[dtype]; }

  __attribute__((noinline)) static void load(const Slice& slice, int s, int64_t i, float* to) {
    const Packing& packing = *slice.packing;
    const Storage storage = packing.storage[s];
    if (storage == SIGNED8 || storage == ROOT8) {
      const float scale = bf16_to_float(packing.scales[s][(slice.first + i) / GROUP]);
      const char* codes = static_cast<const char*>(slice.streams[s]) + i;
      if (storage == SIGNED8)
        Signed8::load(reinterpret_cast<const int8_t*>(codes), scale, to);
      else
        Root8::load(reinterpret_cast<const uint8_t*>(codes), scale, to);
    } else if (storage == SPLIT8 || storage == SPLIT16) {
      const auto* upper = static_cast<const uint16_t*>(slice.streams[s]) + i;
      const auto* rest8 = static_cast<const int8_t*>(slice.remainder);
      const auto* rest16 = static_cast<const int16_t*>(slice.remainder);
      if (slice.dtypes[s] == BF16)
        storage == SPLIT8 ? SplitBF16<int8_t>::load(upper, rest8 + i, to)
                          : SplitBF16<int16_t>::load(upper, rest16 + i, to);
      else
        storage == SPLIT8 ? SplitF16<int8_t>::load(upper, rest8 + i, to)
                          : SplitF16<int16_t>::load(upper, rest16 + i, to);
    } else {
      load_stored(slice, s, i, to);
    }
  }
  // What someone sees who does not know of remainders.
  static inline void load_stored(const Slice& slice, int s, int64_t i, float* to) {
    if (slice.dtypes[s] == F32) return copy(static_cast<const float*>(slice.streams[s]) + i, to);
    if (slice.dtypes[s] == BF16) {
      const uint16_t* const from = static_cast<const uint16_t*>(slice.streams[s]) + i;
#pragma GCC unroll 1
      for (int k = 0; k < GROUP; k++) to[k] = bf16_to_float(from[k]);
      return;
    }
    for (int k = 0; k < GROUP; k += TILE)
      Mixed::load(slice, s, i + k, to + k);
  }
  __attribute__((noinline)) static void store(const Slice& slice, int s, int64_t i, const float* from) {
    const Packing& packing = *slice.packing;
    const Storage storage = packing.storage[s];
    if (storage == PLAIN) {
      if (slice.dtypes[s] == F32) return copy(from, static_cast<float*>(slice.streams[s]) + i);
      if (slice.dtypes[s] == BF16)
        return store_nearest_bf16(from, static_cast<uint16_t*>(slice.streams[s]) + i);
      for (int k = 0; k < GROUP; k += TILE)
        Mixed::store(slice, s, i + k, from + k);
      return;
    }
    alignas(64) uint32_t random[GROUP];
    const bool is_random = storage != SIGNED8 && storage != SPLIT16;
    if (is_random) random_of(packing.keys[s], packing.offset + slice.first + i, random);
    auto* const wide = static_cast<uint16_t*>(slice.streams[s]) + i;
    char* const codes = static_cast<char*>(slice.streams[s]) + i;
    auto* const rest8 = static_cast<int8_t*>(slice.remainder);
    auto* const rest16 = static_cast<int16_t*>(slice.remainder);
    const bool is_bf16 = slice.dtypes[s] == BF16;
    switch (storage) {
      case SIGNED8:
      case ROOT8: {
        const float scale = storage == SIGNED8
                                ? Signed8::store(from, reinterpret_cast<int8_t*>(codes))
                                : Root8::store(from, reinterpret_cast<uint8_t*>(codes), random);
        packing.scales[s][(slice.first + i) / GROUP] = uint16_t(bits_of(scale) >> 16);
        return;
      }
      case STOCHASTIC:
        return is_bf16 ? store_stochastic_bf16(from, random, wide)
                       : store_stochastic_f16(from, random, wide);
      case SPLIT8:
        return is_bf16 ? SplitBF16<int8_t>::store(from, random, wide, rest8 + i)
                       : SplitF16<int8_t>::store(from, random, wide, rest8 + i);
      default:
        return is_bf16 ? SplitBF16<int16_t>::store(from, random, wide, rest16 + i)
                       : SplitF16<int16_t>::store(from, random, wide, rest16 + i);
    }
  }
};

// One stream by itself, numel elements from the tensor's element slice.first on: for what is not a step.
inline void load_stream(const Slice& slice, int s, float* values) {
  for (int64_t i = 0; i < slice.numel; i += GROUP) Packed::load(slice, s, i, values + i);
}
inline void store_stream(const Slice& slice, int s, const float* values) {
  for (int64_t i = 0; i < slice.numel; i += GROUP) Packed::store(slice, s, i, values + i);
}
