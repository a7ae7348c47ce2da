// x86-64 with AVX-512 F, VL, BW and DQ (Intel servers since 2017, AMD since Zen 4).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)
namespace fused_optim {
static bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace fused_optim

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,f16c"))), apply_to = function)
#else
// No pop: templates are instantiated at the end of the file and must still be in the region.
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,f16c")
#endif
#define FUSED_OPTIM_AVX512

#if !defined(__clang__)
// GCC 12's own avx512fintrin.h warns wherever it is inlined (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "../apply.inl"

namespace fused_optim {
FUSED_OPTIM_ISA_TABLE(avx512, avx512_supported)
}  // namespace fused_optim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
