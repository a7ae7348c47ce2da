// Streams of a plain dtype: a tile of elements between memory and the compute type. Intrinsics live
// here and in lanes.h and formats.h, each beside its plain twin. Included inside a namespace, like
// rules.h.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// bfloat16 is the upper half of a float32; rounded to nearest even, NaN kept (and made quiet).
inline float decode_bf16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

inline uint32_t round_bits_to_bf16(uint32_t bits) {  // the result in the upper half
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

inline Bits round_to_bf16(Floats value) {  // the result in the lower half
  const Bits exact = Bits(value);
  return (value != value ? exact | 0x400000u : exact + 0x7fffu + (exact >> 16 & 1u)) >> 16;
}

// N values, a multiple of 2 * LANES, in registers.
template <int N>
inline void encode_nearest_bf16(const float* from, uint16_t* to) {
#pragma GCC unroll 4
  for (int k = 0; k < N; k += 2 * LANES)
    pack16(round_to_bf16(load_floats(from + k)), round_to_bf16(load_floats(from + k + LANES)),
           to + k);
}

// The plain twins of F16C. Subnormal halves go through float arithmetic that is exact: a multiple
// of 2^-24 below 2^-14 has at most 10 bits.
inline float decode_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude < 0x0400u) {
    bits = bits_of(float(magnitude) * 5.9604644775390625e-8f);  // 2^-24
  } else if (magnitude < 0x7c00u) {
    bits = (magnitude << 13) + 0x38000000u;  // exponent bias 127 - 15
  } else {
    bits = 0x7f800000u | (magnitude << 13) | (magnitude > 0x7c00u ? 0x00400000u : 0u);
  }
  return from_bits(bits | sign);
}

inline uint16_t encode_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to inf
  if (magnitude < 0x33000000u) return sign;                       // below 2^-25 round to 0
  const int shift = magnitude < 0x38800000u ? 126 - int(magnitude >> 23) : 13;  // 2^-14
  const uint32_t mantissa =
      shift == 13 ? magnitude - 0x38000000u : ((magnitude & 0x7fffffu) | 0x800000u);
  const uint32_t half = 1u << (shift - 1);
  const uint32_t odd = (mantissa >> shift) & 1u;
  return uint16_t(sign | ((mantissa + half - 1 + odd) >> shift));
}

// A stream's memory from the slice's element i on.
template <class S>
inline S* at(const Slice& slice, int s, int64_t i) {
  return static_cast<S*>(slice.streams[s]) + i;
}

template <class S>
struct Direct {  // float32 and float64: stored as computed
  using storage = S;
  using compute = S;
  static inline void load(const S* from, S* to) {
    for (int i = 0; i < TILE; i++) to[i] = from[i];
  }
  static inline void store(const S* from, S* to) {
    for (int i = 0; i < TILE; i++) to[i] = from[i];
  }
};

struct BFloat16 {
  using storage = uint16_t;
  using compute = float;
  static inline void load(const uint16_t* from, float* to) {
    for (int i = 0; i < TILE; i++) to[i] = decode_bf16(from[i]);
  }
  static inline void store(const float* from, uint16_t* to) {
    uint32_t bits[TILE];
    std::memcpy(bits, from, sizeof(bits));
    // GCC 12 unrolls these loops before it can vectorise them, unless told not to; in one loop, it
    // would narrow both sides of the choice first.
#pragma GCC unroll 1
    for (int i = 0; i < TILE; i++) bits[i] = round_bits_to_bf16(bits[i]);
#pragma GCC unroll 1
    for (int i = 0; i < TILE; i++) to[i] = uint16_t(bits[i] >> 16);
  }
};

struct Float16 {
  using storage = uint16_t;
  using compute = float;
// Plain C++ is 6 to 10 times slower here (measured, AVX2, GCC 12). A tile is converted in registers
// as wide as the rule's: a wide load from two narrower stores would wait for the stores to retire.
#if defined(FUSED_OPTIM_AVX512)
  static inline void load(const uint16_t* from, float* to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
  }
  static inline void store(const float* from, uint16_t* to) {
    _mm256_storeu_si256((__m256i*)to,
                        _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(FUSED_OPTIM_F16C)
  static inline void load(const uint16_t* from, float* to) {
    for (int i = 0; i < TILE; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  }
  static inline void store(const float* from, uint16_t* to) {
    for (int i = 0; i < TILE; i += 8)
      _mm_storeu_si128((__m128i*)(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static inline void load(const uint16_t* from, float* to) {
    for (int i = 0; i < TILE; i++) to[i] = decode_f16(from[i]);
  }
  static inline void store(const float* from, uint16_t* to) {
    for (int i = 0; i < TILE; i++) to[i] = encode_f16(from[i]);
  }
#endif
};

// Forms of a kernel (KernelForm): the dtype of a stream is a constant, or (Mixed) a uniform switch.
// They load and store `tile` elements, from the slice's element i on. `fetched` is how many bytes
// of each element of a stream are prefetched: none where what that costs in instructions is more
// than it saves (Mixed: 29%, Packed: 2 to 9%, on 2 threads of an Intel Xeon).
template <class Stored>
struct Uniform {
  using compute = typename Stored::compute;
  using storage = typename Stored::storage;
  static constexpr bool rounds = !std::is_same<storage, compute>::value;
  static constexpr int tile = TILE;
  static constexpr int itemsize(Dtype) { return sizeof(storage); }
  static constexpr int fetched(int) { return sizeof(storage); }
  static constexpr bool roots = false, past_caches = false;
  explicit Uniform(const Slice&) {}
  static inline compute* place(const Slice&, int, int64_t, compute* buffer) { return buffer; }
  static inline void load_tile(const void* stream, int64_t i, Dtype, compute* to) {
    Stored::load(static_cast<const storage*>(stream) + i, to);
  }
  static inline void load(const Slice& slice, int s, int64_t i, compute* to) {
    Stored::load(static_cast<const storage*>(slice.streams[s]) + i, to);
  }
  static inline void load_stored(const Slice& slice, int s, int64_t i, compute* to) {
    load(slice, s, i, to);
  }
  static inline void store(const Slice& slice, int s, int64_t i, const compute* from) {
    Stored::store(from, static_cast<storage*>(slice.streams[s]) + i);
  }
};

// All streams bfloat16. A rule does not mind the order of elements: a tile has the first of each
// pair of neighbours, then the second of each, so that nothing is widened or narrowed. Every NaN
// comes from a bfloat16 or is the default one: its lower 16 bits are zeros, so rounding leaves it
// as it is (a signalling one too, where no arithmetic has made it quiet: the maximum of AMSGrad).
// AdamW in the cache, on one thread of an AMD EPYC: 0.53 ns per element instead of 0.82 with
// AVX-512, 0.76 instead of 1.13 with AVX2. (With AVX-512, tiles of 64 take 3% less than of 32.)
struct Pairs {
  using compute = float;
  static constexpr bool rounds = true;
  static constexpr int tile = LANES == 16 ? 4 * TILE : 2 * TILE, words = tile / 2;
  static constexpr int itemsize(Dtype) { return 2; }
  static constexpr int fetched(int) { return 2; }
  static constexpr bool roots = false, past_caches = false;
  explicit Pairs(const Slice&) {}
  static inline float* place(const Slice&, int, int64_t, float* buffer) { return buffer; }
  static inline void load(const Slice& slice, int s, int64_t i, float* to) {
    const auto from = static_cast<const uint16_t*>(slice.streams[s]) + i;
    const auto word = [from](int k) {
      uint32_t pair;
      std::memcpy(&pair, from + 2 * k, sizeof(pair));
      return pair;
    };
#pragma GCC unroll 4
    for (int k = 0; k < words; k++) to[k] = from_bits(word(k) << 16);
#pragma GCC unroll 4
    for (int k = 0; k < words; k++) to[words + k] = from_bits(word(k) & 0xffff0000u);
  }
  static inline void load_stored(const Slice& slice, int s, int64_t i, float* to) {
    load(slice, s, i, to);
  }
  static inline void store(const Slice& slice, int s, int64_t i, const float* from) {
    const auto to = static_cast<uint16_t*>(slice.streams[s]) + i;
    const auto rounded = [from](int k) {
      const uint32_t bits = bits_of(from[k]);
      return bits + 0x7fffu + (bits >> 16 & 1u);
    };
#pragma GCC unroll 4
    for (int k = 0; k < words; k++) {
      const uint32_t pair = rounded(k) >> 16 | (rounded(words + k) & 0xffff0000u);
      std::memcpy(to + 2 * k, &pair, sizeof(pair));
    }
  }
};

struct Mixed {
  using compute = float;
  static constexpr bool rounds = true;
  static constexpr int tile = TILE;
  static int itemsize(Dtype dtype) { return ITEMSIZE[dtype]; }
  static constexpr int fetched(int) { return 0; }
  static constexpr bool roots = false, past_caches = false;
  explicit Mixed(const Slice&) {}
  static inline float* place(const Slice&, int, int64_t, float* buffer) { return buffer; }
  static inline void load_tile(const void* stream, int64_t i, Dtype dtype, float* to) {
    if (dtype == F32)
      Direct<float>::load(static_cast<const float*>(stream) + i, to);
    else if (dtype == BF16)
      BFloat16::load(static_cast<const uint16_t*>(stream) + i, to);
    else
      Float16::load(static_cast<const uint16_t*>(stream) + i, to);
  }
  static inline void store_tile(const float* from, void* stream, int64_t i, Dtype dtype) {
    if (dtype == F32)
      Direct<float>::store(from, static_cast<float*>(stream) + i);
    else if (dtype == BF16)
      BFloat16::store(from, static_cast<uint16_t*>(stream) + i);
    else
      Float16::store(from, static_cast<uint16_t*>(stream) + i);
  }
  static inline void load(const Slice& slice, int s, int64_t i, float* to) {
    load_tile(slice.streams[s], i, slice.dtypes[s], to);
  }
  static inline void load_stored(const Slice& slice, int s, int64_t i, float* to) {
    load(slice, s, i, to);
  }
  static inline void store(const Slice& slice, int s, int64_t i, const float* from) {
    store_tile(from, slice.streams[s], i, slice.dtypes[s]);
  }
};

// Param and states are float32: what engines keep in the host's memory for a model of 16 bits.
// AdamW with bfloat16 grads and outputs takes as long as with float32 grads and no outputs, 1.4
// times as long in Mixed (2 threads of an Intel Xeon).
struct Masters : Mixed {
  static constexpr bool rounds = false;
  static constexpr int tile = 2 * TILE;
  const bool past_caches;
  const int grad_size, ema_size;
  explicit Masters(const Slice& slice)
      : Mixed(slice),
        past_caches(goes_past_caches(slice)),
        grad_size(ITEMSIZE[slice.dtypes[GRAD]]),
        ema_size(ITEMSIZE[slice.dtypes[EMA]]) {}
  ~Masters() {
    if (past_caches) fence_past_caches();
  }
  inline int fetched(int s) const { return s == GRAD ? grad_size : s == EMA ? ema_size : 4; }
  static inline void load(const Slice& slice, int s, int64_t i, float* to) {
    if (is_float32(s))
      copy(at<float>(slice, s, i), to);
    else
      for (int k = 0; k < tile; k += TILE) Mixed::load(slice, s, i + k, to + k);
  }
  inline void store(const Slice& slice, int s, int64_t i, const float* from) const {
    if (is_float32(s))
      copy(from, at<float>(slice, s, i));
    else if (slice.dtypes[s] == F32)
      Mixed::store(slice, s, i, from), Mixed::store(slice, s, i + TILE, from + TILE);
    else {
      alignas(64) uint16_t line[tile];
      if (slice.dtypes[s] == BF16)
        encode_nearest_bf16<tile>(from, line);
      else
        for (int k = 0; k < tile; k += TILE) Float16::store(from + k, line + k);
      if (s == EMA && past_caches)
        write_past_caches(line, at<uint16_t>(slice, s, i));
      else
        std::memcpy(at<uint16_t>(slice, s, i), line, sizeof(line));
    }
  }

 private:
  static constexpr bool is_float32(int s) { return s != GRAD && s != EMA; }
  static inline void copy(const float* from, float* to) {
    for (int k = 0; k < tile; k += LANES) {
      const Floats some = load_floats(from + k);
      std::memcpy(to + k, &some, sizeof(some));
    }
  }
  // Large outputs are read later, or by another device.
  static bool goes_past_caches(const Slice& slice) {
    return slice.ema_weight == 1 && slice.numel >= 16384 && ITEMSIZE[slice.dtypes[EMA]] == 2 &&
           reinterpret_cast<uintptr_t>(slice.streams[EMA]) % 64 == 0;
  }
};
