// x86-64 with AVX2 and F16C (Intel since 2013, AMD since 2015).
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
static bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}
}  // namespace fused_optim

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
// No pop: templates are instantiated at the end of the file and must still be in the region.
#pragma GCC target("avx2,f16c")
#endif
#define FUSED_OPTIM_F16C

#include "../apply.inl"

namespace fused_optim {
FUSED_OPTIM_ISA_TABLE(avx2, avx2_supported)
}  // namespace fused_optim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
