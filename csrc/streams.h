// Streams between memory and float32, whatever their storage: forms of a kernel in which some
// stream is packed, and one packed stream by itself. Included inside a namespace, like formats.h.

// How a stream is read and written, SCALE_BLOCK elements from the slice's element i on: functions
// out of line, once per instruction set, chosen once per slice.
using LoadTile = void (*)(const Slice& slice, int s, int64_t i, float* to);
using StoreTile = void (*)(const Slice& slice, int s, int64_t i, const float* from);

inline uint16_t& scale_at(const Slice& slice, int s, int64_t i) {
  return slice.packing->scales[s][(slice.first + i) / SCALE_BLOCK];
}
template <class Draw>
inline Draw random_at(const Slice& slice, int s, int64_t i) {
  return Draw(slice.packing->keys[s], slice.packing->offset + slice.first + i);
}

inline void load_float(const Slice& slice, int s, int64_t i, float* to) {
  const float* const from = at<float>(slice, s, i);
  for (int k = 0; k < SCALE_BLOCK; k += LANES) {  // GCC would call memmove for all
    const Floats some = load_floats(from + k);
    std::memcpy(to + k, &some, sizeof(some));
  }
}
inline void store_float(const Slice& slice, int s, int64_t i, const float* from) {
  for (int k = 0; k < SCALE_BLOCK; k += LANES) {
    const Floats some = load_floats(from + k);
    std::memcpy(at<float>(slice, s, i + k), &some, sizeof(some));
  }
}
inline void load_bf16(const Slice& slice, int s, int64_t i, float* __restrict to) {
  const uint16_t* const from = at<uint16_t>(slice, s, i);
#pragma GCC unroll 1
  for (int k = 0; k < SCALE_BLOCK; k++) to[k] = decode_bf16(from[k]);
}
inline void store_bf16(const Slice& slice, int s, int64_t i, const float* from) {
  encode_nearest_bf16<SCALE_BLOCK>(from, at<uint16_t>(slice, s, i));
}
inline void load_f16(const Slice& slice, int s, int64_t i, float* to) {
  for (int k = 0; k < SCALE_BLOCK; k += TILE) Float16::load(at<uint16_t>(slice, s, i + k), to + k);
}
inline void store_f16(const Slice& slice, int s, int64_t i, const float* from) {
  for (int k = 0; k < SCALE_BLOCK; k += TILE)
    Float16::store(from + k, at<uint16_t>(slice, s, i + k));
}
template <class Draw>
void store_random_bf16(const Slice& slice, int s, int64_t i, const float* from) {
  RandomBF16::encode(from, random_at<Draw>(slice, s, i), at<uint16_t>(slice, s, i));
}
template <class Draw>
void store_random_f16(const Slice& slice, int s, int64_t i, const float* from) {
  encode_stochastic_f16(from, random_at<Draw>(slice, s, i), at<uint16_t>(slice, s, i));
}
inline void load_signed8(const Slice& slice, int s, int64_t i, float* to) {
  Signed8::decode(at<int8_t>(slice, s, i), decode_bf16(scale_at(slice, s, i)), to);
}
inline void store_signed8(const Slice& slice, int s, int64_t i, const float* from) {
  scale_at(slice, s, i) = uint16_t(bits_of(Signed8::encode(from, at<int8_t>(slice, s, i))) >> 16);
}
inline void load_root8(const Slice& slice, int s, int64_t i, float* to) {
  Root8::decode(at<uint8_t>(slice, s, i), decode_bf16(scale_at(slice, s, i)), to);
}
template <class Draw>
void store_root8(const Slice& slice, int s, int64_t i, const float* roots) {
  const float scale = Root8::encode(roots, random_at<Draw>(slice, s, i), at<uint8_t>(slice, s, i));
  scale_at(slice, s, i) = uint16_t(bits_of(scale) >> 16);
}
template <template <class> class Split, class Remainder>
void load_split(const Slice& slice, int s, int64_t i, float* to) {
  Split<Remainder>::decode(at<uint16_t>(slice, s, i),
                           static_cast<const Remainder*>(slice.remainder) + i, to);
}
template <class Draw, template <class> class Split, class Remainder>
void store_split(const Slice& slice, int s, int64_t i, const float* from) {
  Split<Remainder>::encode(from, random_at<Draw>(slice, s, i), at<uint16_t>(slice, s, i),
                           static_cast<Remainder*>(slice.remainder) + i);
}

struct Packed {
  using compute = float;
  static constexpr bool rounds = true;
  static constexpr bool roots = true, past_caches = false;
  static constexpr int tile = SCALE_BLOCK;
  LoadTile loads[MAX_STREAMS];
  StoreTile stores[MAX_STREAMS];

  explicit Packed(const Slice& slice) {
    const Packing& packing = *slice.packing;
    for (int s = 0; s < MAX_STREAMS; s++) {
      loads[s] = load_of(packing.storage[s], slice.dtypes[s]);
      stores[s] = packing.offset % SCALE_BLOCK == 0
                      ? store_of<Random>(packing.storage[s], slice.dtypes[s])
                      : store_of<RandomFromAnywhere>(packing.storage[s], slice.dtypes[s]);
    }
  }
  static int itemsize(Dtype dtype) { return ITEMSIZE[dtype]; }
  static constexpr int fetched(int) { return 0; }

  // Memory in which the kernel works on a stream: the stream's own for a float32 param, and for a
  // float32 grad that is only read; else the buffer. (For the states, copies are faster.)
  static inline float* place(const Slice& slice, int s, int64_t i, float* buffer) {
    const bool in_place =
        slice.dtypes[s] == F32 && (s == PARAM || (s == GRAD && slice.grad_write == KEPT));
    return in_place ? at<float>(slice, s, i) : buffer;
  }
  inline void load(const Slice& slice, int s, int64_t i, float* to) const {
    loads[s](slice, s, i, to);
  }
  inline void store(const Slice& slice, int s, int64_t i, const float* from) const {
    stores[s](slice, s, i, from);
  }
  // The param as other code reads it, without its remainder.
  static inline void load_stored(const Slice& slice, int s, int64_t i, float* to) {
    load_of(PLAIN, slice.dtypes[s])(slice, s, i, to);
  }

  static LoadTile load_of(Storage storage, Dtype dtype) {
    const bool bf16 = dtype == BF16;
    switch (storage) {
      case SIGNED8:
        return load_signed8;
      case ROOT8:
        return load_root8;
      case SPLIT8:
        return bf16 ? load_split<SplitBF16, int8_t> : load_split<SplitF16, int8_t>;
      case SPLIT16:
        return bf16 ? load_split<SplitBF16, int16_t> : load_split<SplitF16, int16_t>;
      default:
        return dtype == F32 ? load_float : bf16 ? load_bf16 : load_f16;
    }
  }
  template <class Draw>
  static StoreTile store_of(Storage storage, Dtype dtype) {
    const bool bf16 = dtype == BF16;
    switch (storage) {
      case STOCHASTIC:
        return bf16 ? store_random_bf16<Draw> : store_random_f16<Draw>;
      case SIGNED8:
        return store_signed8;
      case ROOT8:
        return store_root8<Draw>;
      case SPLIT8:
        return bf16 ? store_split<Draw, SplitBF16, int8_t> : store_split<Draw, SplitF16, int8_t>;
      case SPLIT16:  // draws nothing
        return bf16 ? store_split<Random, SplitBF16, int16_t>
                    : store_split<Random, SplitF16, int16_t>;
      default:
        return dtype == F32 ? store_float : bf16 ? store_bf16 : store_f16;
    }
  }
};

// Pairs with what it takes to train with masters: streams that are rounded stochastically, and a
// param with a remainder. The bits are those of Packed, payloads of NaN excepted; nothing of 16
// bits is widened or narrowed, and for NaN, whose lower bits are zeros here too, nothing need be
// looked for.
struct PackedPairs : Pairs {
  bool rounds_at_random[MAX_STREAMS];
  Storage param;

  explicit PackedPairs(const Slice& slice) : Pairs(slice), param(slice.packing->storage[PARAM]) {
    for (int s = 0; s < MAX_STREAMS; s++)
      rounds_at_random[s] = slice.packing->storage[s] == STOCHASTIC;
  }
  inline void load(const Slice& slice, int s, int64_t i, float* to) const {
    if (s == PARAM && param == SPLIT16)
      load_split<int16_t>(slice, i, to);
    else if (s == PARAM && param == SPLIT8)
      load_split<int8_t>(slice, i, to);
    else
      Pairs::load(slice, s, i, to);
  }
  inline void store(const Slice& slice, int s, int64_t i, const float* from) const {
    if (s == PARAM && param == SPLIT16)
      store_split<int16_t>(slice, i, from);
    else if (s == PARAM && param == SPLIT8)
      store_split<int8_t>(slice, i, from);
    else if (rounds_at_random[s])
      store_random(slice, s, i, from);
    else
      Pairs::store(slice, s, i, from);
  }

 private:
  template <class Remainder>
  static inline void load_split(const Slice& slice, int64_t i, float* to) {
    for (int k = 0; k < words; k += LANES) {
      const Shorts upper = load_shorts(at<uint16_t>(slice, PARAM, i) + 2 * k);
      const Shorts rest =
          valid_rest(upper, load_shorts(static_cast<Remainder*>(slice.remainder) + i + 2 * k));
      const Floats first = Floats((Bits(upper) << 16) + Bits(Ints(Bits(rest) << 16) >> 16));
      const Floats second = Floats((Bits(upper) & 0xffff0000u) + Bits(Ints(rest) >> 16));
      std::memcpy(to + k, &first, sizeof(first));
      std::memcpy(to + words + k, &second, sizeof(second));
    }
  }
  template <class Remainder>
  static inline void store_split(const Slice& slice, int64_t i, const float* from) {
    Bits firsts[words / LANES] = {}, seconds[words / LANES] = {};
    if (sizeof(Remainder) == 1) draw(slice, PARAM, i, firsts, seconds);
    for (int k = 0; k < words; k += LANES) {
      const Bits first = Bits(load_floats(from + k)) + (firsts[k / LANES] >> 8);
      const Bits second = Bits(load_floats(from + words + k)) + (seconds[k / LANES] >> 8);
      const Bits upper = (first + 0x8000u) >> 16 | ((second + 0x8000u) & 0xffff0000u);
      const Shorts rest = Shorts((first & 0xffffu) | second << 16);
      const Shorts kept = (Shorts(upper) & 0x7fff) < 0x7f80 ? rest : Shorts{};
      std::memcpy(at<uint16_t>(slice, PARAM, i) + 2 * k, &upper, sizeof(upper));
      store_shorts(kept, static_cast<Remainder*>(slice.remainder) + i + 2 * k);
    }
  }
  static inline void draw(const Slice& slice, int s, int64_t i, Bits* firsts, Bits* seconds) {
    for (int k = 0; k < words; k += TILE)
      random_at<Random>(slice, s, i + 2 * k).pairs(firsts + k / LANES, seconds + k / LANES);
  }
  static inline void store_random(const Slice& slice, int s, int64_t i, const float* from) {
    Bits firsts[words / LANES], seconds[words / LANES];
    draw(slice, s, i, firsts, seconds);
    for (int k = 0; k < words; k += LANES) {
      const Bits first = Bits(load_floats(from + k)) + firsts[k / LANES];
      const Bits second = Bits(load_floats(from + words + k)) + seconds[k / LANES];
      const Bits pair = first >> 16 | (second & 0xffff0000u);
      std::memcpy(at<uint16_t>(slice, s, i) + 2 * k, &pair, sizeof(pair));
    }
  }
};

// One stream by itself, numel elements from the tensor's element slice.first on: for what is not a
// step.
inline void load_stream(const Slice& slice, int s, float* values) {
  const Packed form(slice);
  for (int64_t i = 0; i < slice.numel; i += SCALE_BLOCK) form.load(slice, s, i, values + i);
}
inline void store_stream(const Slice& slice, int s, const float* values) {
  const Packed form(slice);
  alignas(64) float roots[SCALE_BLOCK];
  for (int64_t i = 0; i < slice.numel; i += SCALE_BLOCK) {
    const float* from = values + i;
    if (slice.packing->storage[s] == ROOT8) {
#pragma GCC unroll 1
      for (int k = 0; k < SCALE_BLOCK; k++) roots[k] = std::sqrt(from[k]);
      from = roots;
    }
    form.store(slice, s, i, from);
  }
}
