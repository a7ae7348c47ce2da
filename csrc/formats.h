// Codecs of the stored formats, which take fewer bits than a stream's dtype would, or more: a scale
// block of elements between memory and float32. The same arithmetic as in
// triton_kernels/formats.py. Included inside a namespace, like dtypes.h.

constexpr uint32_t INF = 0x7f800000u, MAGNITUDE = 0x7fffffffu;
constexpr uint32_t F16_NORMAL = 0x38800000u;    // 2^-14, the smallest normal float16
constexpr uint32_t F16_OVERFLOW = 0x47800000u;  // 2^16
constexpr uint32_t F16_BIAS = 0x38000000u;      // float32's exponent bias less float16's

// 16 random bits for each of the SCALE_BLOCK elements from `first` on, a multiple of 32: a hash of
// key and index, as good as its two rounds (C. Wellons, "lowbias32"); each serves two elements of a
// block of 32.
struct Random {
  uint32_t start, key1;
  Random(const uint32_t* key, int64_t first) {
    const uint64_t n = static_cast<uint64_t>(first) / 2;
    start = uint32_t(n) + key[0] + uint32_t(n >> 32) * 0x9e3779b9u;
    key1 = key[1];
  }
  // Bits for LANES elements from the k-th on. If k is constant, the compiler sees that k + 16 has
  // the same hash.
  inline Bits operator()(int k) const {
    static constexpr uint32_t index[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Bits x = hash(index, k / 32 * 16 + k % 16);
    return k & 16 ? x >> 16 : x & 0xffffu;
  }
  // Bits for 32 elements in the order of pairs: the first of each pair of neighbours, the second of
  // each.
  inline void pairs(Bits* firsts, Bits* seconds) const {
#if defined(FUSED_OPTIM_AVX512)
    static constexpr uint32_t index[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) static constexpr uint16_t halves[] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                      22, 24, 26, 28, 30, 1,  3,  5,  7,  9,  11,
                                                      13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const Bits drawn =
        Bits(_mm512_permutexvar_epi16(_mm512_load_si512(halves), (__m512i)hash(index, 0)));
    firsts[0] = drawn & 0xffffu;
    seconds[0] = drawn >> 16;
#else
    static constexpr uint32_t index[] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    constexpr int half = 8 / LANES;
    for (int j = 0; j < half; j++) {
      const Bits x = hash(index + j * LANES, 0), y = hash(index + 8 + j * LANES, 0);
      firsts[j] = x & 0xffffu;
      firsts[half + j] = x >> 16;
      seconds[j] = y & 0xffffu;
      seconds[half + j] = y >> 16;
    }
#endif
  }
  inline void fill(uint32_t* random) const {
    for (int k = 0; k < SCALE_BLOCK; k += LANES) {
      const Bits some = (*this)(k);
      std::memcpy(random + k, &some, sizeof(some));
    }
  }

 private:
  inline Bits hash(const uint32_t* index, int from) const {
    Bits x;
    std::memcpy(&x, index, sizeof(x));
    x += start + uint32_t(from);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15 ^ (key1 ^ key1 >> 15);  // of x ^ key1
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
  }
};

// Random, from any element on: a shard may begin within a scale block.
struct RandomFromAnywhere {
  alignas(64) uint32_t drawn[2 * SCALE_BLOCK];
  int within;
  RandomFromAnywhere(const uint32_t* key, int64_t first)
      : within(static_cast<int>(first % SCALE_BLOCK)) {
    Random(key, first - within).fill(drawn);
    Random(key, first - within + SCALE_BLOCK).fill(drawn + SCALE_BLOCK);
  }
  inline Bits operator()(int k) const {
    Bits x;
    std::memcpy(&x, drawn + within + k, sizeof(x));
    return x;
  }
  inline void fill(uint32_t* random) const {
    std::memcpy(random, drawn + within, SCALE_BLOCK * sizeof(uint32_t));
  }
};

// Rounded up to bfloat16, at least `smallest`; 0 stays 0. Not negative.
inline float scale_of(float largest, float share, float smallest) {
  if (largest == 0) return 0;
  const float scale = from_bits((bits_of(largest * share) + 0xffffu) & 0xffff0000u);
  return scale > smallest ? scale : smallest;
}

// The largest magnitude's bits; INF or more if some element is not finite.
inline uint32_t largest_of(const float* values) {
  uint32_t largest = 0;
#pragma GCC unroll 1
  for (int k = 0; k < SCALE_BLOCK; k++) {
    const uint32_t magnitude = bits_of(values[k]) & MAGNITUDE;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Copies the values, with 0 for those that are not finite.
inline void finite_of(const float* values, float* finite) {
  for (int k = 0; k < SCALE_BLOCK; k++)
    finite[k] = (bits_of(values[k]) & MAGNITUDE) < INF ? values[k] : 0.0f;
}

// A block by a codec below.
template <class Codec, class Draw>
inline void encode_block(const float* from, float inverse, const Draw& random,
                         typename Codec::Code* to) {
#pragma GCC unroll 4
  for (int i = 0; i < SCALE_BLOCK; i += 4 * LANES) {
    Ints parts[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      const int k = i + part * LANES;
      parts[part] = Codec::code(load_floats(from + k), inverse, [&] { return random(k); });
    }
    Codec::pack(parts, to + i);
  }
}

// A scale's sign says that some codes of its block stand for NaN or an infinity. Almost no block
// has them, and the others need no search.

// Signed and linear, for what is like a momentum. Codes: -128 NaN, -127 and 127 the infinities.
struct Signed8 {
  using Code = int8_t;
  static constexpr Storage storage = SIGNED8;
  static constexpr Dtype dtype = I8;
  static constexpr float share = 1.0f / 126, smallest = 7.52316384526264e-37f;  // 2^-120
  static inline Floats value(Ints code, float size) {
    return __builtin_convertvector(code, Floats) * size;
  }
  // Of a product just above 126 that is 126.
  template <class Draw>
  static inline Ints code(Floats value, float inverse, const Draw&) {
    return nearest(value * inverse);
  }
  static inline void pack(const Ints (&parts)[4], int8_t* to) { pack8(parts, to); }
  static inline void decode(const int8_t* __restrict codes, float scale, float* __restrict to) {
    const float size = std::fabs(scale);
#pragma GCC unroll 1
    for (int k = 0; k < SCALE_BLOCK; k++) to[k] = float(int32_t(codes[k])) * size;
    if (std::signbit(scale))
      for (int k = 0; k < SCALE_BLOCK; k++) {
        if (codes[k] == -128) to[k] = from_bits(0x7fc00000u);
        if (codes[k] == -127) to[k] = from_bits(0x80000000u | INF);
        if (codes[k] == 127) to[k] = from_bits(INF);
      }
  }
  // Returns the scale.
  static inline float encode(const float* from, int8_t* codes) {
    const uint32_t largest = largest_of(from);
    if (largest >= INF) return encode_special(from, codes);
    return encode_finite(from, from_bits(largest), codes);
  }

 private:
  static inline float encode_finite(const float* from, float largest, int8_t* codes) {
    const float scale = scale_of(largest, share, smallest);
    const float inverse = scale == 0 ? 0 : 1 / scale;
    encode_block<Signed8>(from, inverse, [](int) { return 0; }, codes);  // draws nothing
    return scale;
  }
  __attribute__((noinline)) static float encode_special(const float* from, int8_t* codes) {
    alignas(64) float finite[SCALE_BLOCK];
    finite_of(from, finite);
    const float scale = encode_finite(finite, from_bits(largest_of(finite)), codes);
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const uint32_t bits = bits_of(from[k]), magnitude = bits & MAGNITUDE;
      if (magnitude >= INF) codes[k] = magnitude > INF ? -128 : bits >> 31 ? -127 : 127;
    }
    return -scale;
  }
};

// The square root, unsigned, rounded stochastically, for what is like a second moment. Codes: 254
// NaN (of a negative number too: so is its root), 255 infinity; what is not 0 has a code that is
// not 0. `encode` takes roots: in a step, the rule has computed them.
struct Root8 {
  using Code = uint8_t;
  static constexpr Storage storage = ROOT8;
  static constexpr Dtype dtype = U8;
  static constexpr float share = 1.0f / 253, smallest = 5.293955920339377e-23f;  // 2^-74
  static inline Floats value(Ints code, float size) {
    const Floats root = __builtin_convertvector(code, Floats) * size;
    return root * root;
  }
  // Up to 254, where 253 is meant.
  template <class Draw>
  static inline Ints code(Floats root, float inverse, const Draw& draw) {
    const Floats up = __builtin_convertvector(Ints(draw()), Floats) * 1.52587890625e-5f;  // 2^-16
    const Ints code = __builtin_convertvector(root * inverse + up, Ints);
    return larger(code, smaller(Ints(root), Ints{} + 1));  // of what is not 0, at least 1
  }
  static inline void pack(const Ints (&parts)[4], uint8_t* to) { pack8<253>(parts, to); }
  static inline void decode(const uint8_t* __restrict codes, float scale, float* __restrict to) {
    const float size = std::fabs(scale);
#pragma GCC unroll 1
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const float root = float(int32_t(codes[k])) * size;
      to[k] = root * root;
    }
    if (std::signbit(scale))
      for (int k = 0; k < SCALE_BLOCK; k++) {
        if (codes[k] == 254) to[k] = from_bits(0x7fc00000u);
        if (codes[k] == 255) to[k] = from_bits(INF);
      }
  }
  template <class Draw>
  static inline float encode(const float* roots, const Draw& random, uint8_t* codes) {
    const uint32_t largest = largest_of(roots);
    if (largest >= INF) return encode_special(roots, random, codes);
    return encode_finite(roots, from_bits(largest), random, codes);
  }

 private:
  template <class Draw>
  static inline float encode_finite(const float* roots, float largest, const Draw& random,
                                    uint8_t* codes) {
    const float scale = scale_of(largest, share, smallest);
    const float inverse = scale == 0 ? 0 : 1 / scale;
    encode_block<Root8>(roots, inverse, random, codes);
    return scale;
  }
  template <class Draw>
  __attribute__((noinline)) static float encode_special(const float* roots, const Draw& random,
                                                        uint8_t* codes) {
    alignas(64) float finite[SCALE_BLOCK];
    finite_of(roots, finite);
    const float scale = encode_finite(finite, from_bits(largest_of(finite)), random, codes);
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const uint32_t magnitude = bits_of(roots[k]) & MAGNITUDE;
      if (magnitude >= INF) codes[k] = magnitude == INF ? 255 : 254;
    }
    return -scale;
  }
};

struct NearestBF16 {
  using Code = uint16_t;
  static constexpr Storage storage = PLAIN;
  static constexpr Dtype dtype = BF16;
  static inline Floats value(Ints code, float) { return Floats(code << 16); }
  template <class Draw>
  static inline Ints code(Floats value, float, const Draw&) {
    return Ints(round_to_bf16(value));
  }
  static inline void pack(const Ints (&parts)[4], uint16_t* to) {
    pack16(Bits(parts[0]), Bits(parts[1]), to);
    pack16(Bits(parts[2]), Bits(parts[3]), to + 2 * LANES);
  }
};

// Rounded up with the probability of the part that is cut off.
struct RandomBF16 : NearestBF16 {
  static constexpr Storage storage = STOCHASTIC;
  template <class Draw>
  static inline Ints code(Floats value, float, const Draw& draw) {
    const Bits exact = Bits(value);
    return Ints((value != value ? exact | 0x400000u : exact + draw()) >> 16);
  }
  template <class Draw>
  static inline void encode(const float* from, const Draw& random, uint16_t* to) {
    encode_block<RandomBF16>(from, 1, random, to);
  }
};

// A multiple of float16's smallest subnormal, 2^-24, below 2^-14; `steps` of it in units of 1 /
// unit.
inline float subnormal_steps(float magnitude, float steps) {
  const float smallest_normal = from_bits(F16_NORMAL);
  return (magnitude < smallest_normal ? magnitude : smallest_normal) * steps;
}

// To a whole number, up with a probability that is the fraction. (A sum with all of y would be
// rounded.)
inline int32_t randomly(float y, uint32_t random) {
  const int32_t whole = int32_t(y);
  return whole + int32_t(y - float(whole) + float(int32_t(random)) * 1.52587890625e-5f);  // 2^-16
}

template <class Draw>
inline void encode_stochastic_f16(const float* from, const Draw& draw, uint16_t* to) {
  alignas(64) uint32_t random[SCALE_BLOCK];
  draw.fill(random);
  for (int k = 0; k < SCALE_BLOCK; k++) {
    const uint32_t bits = bits_of(from[k]), m = bits & MAGNITUDE;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    const float steps = subnormal_steps(from_bits(m), 16777216.0f);  // 2^24
    const uint32_t rounded = m + (random[k] >> 3);
    uint32_t half = (rounded - F16_BIAS) >> 13;
    if (rounded >= F16_OVERFLOW) half = 0x7c00u;
    if (m < F16_NORMAL) half = uint32_t(randomly(steps, random[k]));
    if (m >= INF) half = m > INF ? 0x7e00u | (m >> 13 & 0x3ffu) : 0x7c00u;
    to[k] = uint16_t(sign | half);
  }
}

// A bfloat16's remainder, or 0 where it must add nothing: beside a number that is not finite, and
// if negative beside a 0, which other code has written: no bits are left to borrow from.
inline Shorts valid_rest(Shorts upper, Shorts rest) {
  const Shorts magnitude = upper & 0x7fff;
  return rest & ~((magnitude >= 0x7f80) | ((magnitude == 0) & (rest < 0)));
}

// A bfloat16 param with the bits that it lacks of a float32 beside it: all 16, or the upper 8 of
// them, the last of these rounded stochastically. Rounded to nearest, ties away from zero, so
// `upper + remainder` is exact.
template <class Remainder>
struct SplitBF16 {
  static constexpr int cut = 16 - 8 * sizeof(Remainder);  // bits that are not kept
  static inline void decode(const uint16_t* __restrict upper, const Remainder* __restrict remainder,
                            float* __restrict to) {
    // In 16 bits first: a register holds twice as many. (By valid_rest, AdamW with split8 and int8
    // is 5% slower.)
    alignas(64) int16_t rest[SCALE_BLOCK];
#pragma GCC unroll 1
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const int16_t magnitude = upper[k] & 0x7fff, stored = remainder[k];
      const bool alone = (magnitude >= 0x7f80) | ((magnitude == 0) & (stored < 0));
      rest[k] = alone ? int16_t(0) : stored;
    }
#pragma GCC unroll 1
    for (int k = 0; k < SCALE_BLOCK; k++)
      to[k] = from_bits((uint32_t(upper[k]) << 16) + uint32_t(int32_t(rest[k]) * (1 << cut)));
  }
  // PAYLOADS: a NaN may have lower bits that are not 0.
  template <bool PAYLOADS>
  static inline void split(Floats value, Bits random, Bits& high, Ints& rest) {
    const Bits exact = Bits(value);
    const Bits kept = cut == 0 ? exact : exact + (random >> 8);
    const Bits rounded = kept + 0x8000u;
    high = (PAYLOADS ? value != value ? exact | 0x400000u : rounded : rounded) >> 16;
    // Below the nearest upper part it counts down from it: two's complement.
    const Bits below = cut == 0 ? kept & 0xffffu : kept >> 8 & 0xffu;
    rest = Ints(Ints(high & 0x7fffu) >= 0x7f80 ? 0u : below);
  }
  template <class Draw>
  static inline void encode(const float* from, const Draw& draw, uint16_t* upper,
                            Remainder* remainder) {
#pragma GCC unroll 4
    for (int i = 0; i < SCALE_BLOCK; i += 4 * LANES) {
      Bits highs[4];
      Ints rests[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const int k = i + part * LANES;
        const Bits random = cut == 0 ? Bits{} : draw(k);
        split<true>(load_floats(from + k), random, highs[part], rests[part]);
      }
      pack16(highs[0], highs[1], upper + i);
      pack16(highs[2], highs[3], upper + i + 2 * LANES);
      if constexpr (cut == 0) {
        pack16(Bits(rests[0]), Bits(rests[1]), reinterpret_cast<uint16_t*>(remainder) + i);
        pack16(Bits(rests[2]), Bits(rests[3]),
               reinterpret_cast<uint16_t*>(remainder) + i + 2 * LANES);
      } else {
        pack8(rests, reinterpret_cast<uint8_t*>(remainder) + i);
      }
    }
  }
};

// SplitBF16's twin for float16, which lacks 13 bits; below 2^-14 both parts count steps of 2^-24.
template <class Remainder>
struct SplitF16 {
  static constexpr bool is_short = sizeof(Remainder) == 1;
  static constexpr int32_t unit = is_short ? 256 : 65536;  // of the remainder, in a step of 2^-24
  static constexpr float steps = is_short ? 4294967296.0f : 1099511627776.0f;  // 2^32, 2^40
  static inline void decode(const uint16_t* __restrict upper, const Remainder* __restrict remainder,
                            float* __restrict to) {
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const uint32_t sign = uint32_t(upper[k] & 0x8000u) << 16;
      const int32_t half = upper[k] & 0x7fff, rest = remainder[k];
      const int32_t within = rest < -0x1000 ? -0x1000 : rest > 0xfff ? 0xfff : rest;
      const int32_t normal = (half << 13) + int32_t(F16_BIAS) + (is_short ? rest * 32 : within);
      // A remainder that belongs to another value is cut: the nearest float32 stays below the next
      // half.
      const int32_t below = 0x7fff - (half >> 8);
      int32_t subnormal = half * unit + (rest < below ? rest : below);
      subnormal = subnormal < 0 ? 0 : subnormal;
      uint32_t bits = half > 0x400 || (half == 0x400 && rest >= 0)
                          ? uint32_t(normal)
                          : bits_of(float(subnormal) * (1 / steps));
      if (half >= 0x7c00) bits = uint32_t(half << 13) | INF;
      to[k] = from_bits(bits | sign);
    }
  }
  template <class Draw>
  static inline void encode(const float* from, const Draw& draw, uint16_t* upper,
                            Remainder* remainder) {
    alignas(64) uint32_t random[SCALE_BLOCK];
    if (is_short) draw.fill(random);
    for (int k = 0; k < SCALE_BLOCK; k++) {
      const uint32_t bits = bits_of(from[k]), m = bits & MAGNITUDE;
      uint32_t half;
      int32_t rest = 0;
      if (m >= INF) {
        half = m > INF ? 0x7e00u | (m >> 13 & 0x3ffu) : 0x7c00u;
      } else if (m >= F16_NORMAL) {
        const uint32_t kept = is_short ? (m + (random[k] >> 11)) & ~31u : m;
        const uint32_t rounded = (kept + 0x1000u) & ~0x1fffu;
        half = rounded >= F16_OVERFLOW ? 0x7c00u : (rounded - F16_BIAS) >> 13;
        if (rounded < F16_OVERFLOW) rest = int32_t(kept - rounded) / (is_short ? 32 : 1);
      } else {
        const float t = from_bits(m) * steps;
        int32_t count;
        if (is_short) {
          count = randomly(t, random[k]);
        } else {
          count = int32_t(t);
          count += t - float(count) >= 0.5f;
        }
        half = uint32_t((count + unit / 2) / unit);
        rest = count - int32_t(half) * unit;
      }
      upper[k] = uint16_t((bits >> 16 & 0x8000u) | half);
      remainder[k] = Remainder(rest);
    }
  }
};
