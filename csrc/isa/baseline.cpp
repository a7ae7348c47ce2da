// The instruction set every machine of this architecture has (SSE2 on x86-64, NEON on aarch64).
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

#include "../apply.inl"

namespace fused_optim {
static bool always() { return true; }
#if defined(__aarch64__)
FUSED_OPTIM_ISA_TABLE(neon, always)
#else
FUSED_OPTIM_ISA_TABLE(baseline, always)
#endif
}  // namespace fused_optim
