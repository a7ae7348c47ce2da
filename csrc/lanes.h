// A register of 32-bit numbers and how several are packed into narrower ones. GCC 12 vectorises
// arithmetic well but not what narrows in the same loop, so the codecs of formats.h say it register
// by register, in the vector types that GCC and Clang have for every instruction set. Included
// inside a namespace, like dtypes.h. (16 lanes instead of 8 take 11% off AdamW with int8 states
// and 15% with bfloat16 ones, in the cache of an AMD EPYC.)
#if defined(FUSED_OPTIM_AVX512)
constexpr int LANES = 16;
#elif defined(FUSED_OPTIM_F16C)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));
typedef int8_t Bytes __attribute__((vector_size(LANES * 2)));  // of as many as Shorts
typedef float Floats __attribute__((vector_size(LANES * 4)));

inline Floats load_floats(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

// 16 bits, or the upper 8 of them.
template <class S>
inline Shorts load_shorts(const S* from) {
  if constexpr (sizeof(S) == 1) {
    Bytes upper;
    std::memcpy(&upper, from, sizeof(upper));
    return __builtin_convertvector(upper, Shorts) << 8;
  } else {
    Shorts values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  }
}
template <class S>
inline void store_shorts(Shorts values, S* to) {
  if constexpr (sizeof(S) == 2) {
    std::memcpy(to, &values, sizeof(values));
  } else {
#if defined(FUSED_OPTIM_AVX512)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8((__m512i)(values >> 8)));
#elif defined(FUSED_OPTIM_F16C)
    const __m256i upper = (__m256i)(values >> 8);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(upper),
                                                   _mm256_extracti128_si256(upper, 1)));
#else
    for (int k = 0; k < 2 * LANES; k++) to[k] = S(values[k] >> 8);
#endif
  }
}

// Signed. (GCC 12 would compare with 1 by another instruction, and then choose.)
inline Ints smaller(Ints a, Ints b) {
#if defined(FUSED_OPTIM_AVX512)
  return Ints(_mm512_min_epi32((__m512i)a, (__m512i)b));
#elif defined(FUSED_OPTIM_F16C)
  return Ints(_mm256_min_epi32((__m256i)a, (__m256i)b));
#else
  return a < b ? a : b;
#endif
}
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// To the nearest integer, to even; of numbers below 2^22.
inline Ints nearest(Floats values) {
#if defined(FUSED_OPTIM_AVX512)
  return Ints(_mm512_cvtps_epi32((__m512)values));
#elif defined(FUSED_OPTIM_F16C)
  return Ints(_mm256_cvtps_epi32((__m256)values));
#else
  return (Ints(values + 12582912.0f) << 8) >> 8;  // 1.5 * 2^23
#endif
}

// The largest of a's lanes in the first half of the result's lanes, the largest of b's in the
// second.
template <size_t... K>
inline Ints largest_lanes(Ints a, Ints b, std::index_sequence<K...>) {
  constexpr int HALF = LANES / 2;
  Ints lanes = larger(__builtin_shufflevector(a, b, (K < HALF ? K : K + HALF)...),
                      __builtin_shufflevector(a, b, (K < HALF ? K + HALF : K + LANES)...));
  if constexpr (HALF > 4) lanes = larger(lanes, __builtin_shufflevector(lanes, lanes, (K ^ 4)...));
  if constexpr (HALF > 2) lanes = larger(lanes, __builtin_shufflevector(lanes, lanes, (K ^ 2)...));
  return larger(lanes, __builtin_shufflevector(lanes, lanes, (K ^ 1)...));
}

// Widened to 32 bits each.
inline Ints load_wide(const int8_t* from) {
#if defined(FUSED_OPTIM_AVX512)
  return Ints(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(FUSED_OPTIM_F16C)
  return Ints(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Ints values;
  for (int k = 0; k < LANES; k++) values[k] = from[k];
  return values;
#endif
}
inline Ints load_wide(const uint8_t* from) {
#if defined(FUSED_OPTIM_AVX512)
  return Ints(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(FUSED_OPTIM_F16C)
  return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Ints values;
  for (int k = 0; k < LANES; k++) values[k] = from[k];
  return values;
#endif
}
inline Ints load_wide(const uint16_t* from) {
#if defined(FUSED_OPTIM_AVX512)
  return Ints(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(FUSED_OPTIM_F16C)
  return Ints(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
  Ints values;
  for (int k = 0; k < LANES; k++) values[k] = from[k];
  return values;
#endif
}

// The lower halves, of numbers that are below 2^16.
inline void pack16(Bits first, Bits second, uint16_t* to) {
#if defined(FUSED_OPTIM_AVX512)
  const __m512i packed =
      _mm512_packus_epi32((__m512i)first, (__m512i)second);  // each 128 bits by themselves
  _mm512_storeu_si512(to,
                      _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed));
#elif defined(FUSED_OPTIM_F16C)
  const __m256i packed =
      _mm256_packus_epi32((__m256i)first, (__m256i)second);  // each 128 bits by themselves
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0b11'01'10'00));
#else
  for (int k = 0; k < LANES; k++) to[k] = uint16_t(first[k]);
  for (int k = 0; k < LANES; k++) to[LANES + k] = uint16_t(second[k]);
#endif
}

// Numbers that fit into 8 bits; larger ones than LARGEST become that.
template <int LARGEST = 255>
inline void pack8(const Ints (&parts)[4], uint8_t* to) {
#if defined(FUSED_OPTIM_AVX512)
  __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)parts[0], (__m512i)parts[1]),
                                       _mm512_packs_epi32((__m512i)parts[2], (__m512i)parts[3]));
  if (LARGEST < 255) packed = _mm512_min_epu8(packed, _mm512_set1_epi8(char(LARGEST)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, packed));
#elif defined(FUSED_OPTIM_F16C)
  __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32((__m256i)parts[0], (__m256i)parts[1]),
                                       _mm256_packs_epi32((__m256i)parts[2], (__m256i)parts[3]));
  if (LARGEST < 255) packed = _mm256_min_epu8(packed, _mm256_set1_epi8(char(LARGEST)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(packed, order));
#else
  for (int part = 0; part < 4; part++)
    for (int k = 0; k < LANES; k++)
      to[part * LANES + k] = uint8_t(parts[part][k] > LARGEST ? LARGEST : parts[part][k]);
#endif
}
inline void pack8(const Ints (&parts)[4], int8_t* to) {
#if defined(FUSED_OPTIM_AVX512)
  const __m512i packed =
      _mm512_packs_epi16(_mm512_packs_epi32((__m512i)parts[0], (__m512i)parts[1]),
                         _mm512_packs_epi32((__m512i)parts[2], (__m512i)parts[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, packed));
#elif defined(FUSED_OPTIM_F16C)
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32((__m256i)parts[0], (__m256i)parts[1]),
                         _mm256_packs_epi32((__m256i)parts[2], (__m256i)parts[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(packed, order));
#else
  for (int part = 0; part < 4; part++)
    for (int k = 0; k < LANES; k++) to[part * LANES + k] = int8_t(parts[part][k]);
#endif
}

// Writes 64 bytes to where a cache line begins, past the caches: memory does not read the line
// first. Other threads see them behind a fence.
inline void write_past_caches(const void* from, void* to) {
#if defined(FUSED_OPTIM_AVX512)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(FUSED_OPTIM_F16C)
  for (int k = 0; k < 2; k++)
    _mm256_stream_si256((__m256i*)to + k, _mm256_loadu_si256((const __m256i*)from + k));
#else
  std::memcpy(to, from, 64);
#endif
}
inline void fence_past_caches() {
#if defined(FUSED_OPTIM_AVX512) || defined(FUSED_OPTIM_F16C)
  _mm_sfence();
#endif
}
