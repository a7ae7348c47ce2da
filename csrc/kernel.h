// What the loop (apply.inl) is called with, and the kernels of one instruction set.
#pragma once

#include <cstdint>

namespace fused_optim {

constexpr int MAX_STATES = 3;
constexpr int MAX_STREAMS = 2 + MAX_STATES;  // param, grad, states
constexpr int PARAM = 0, GRAD = 1, STATES = 2;
constexpr int MAX_HYPERS = 8;
constexpr int MAX_VARIANTS = 16;
constexpr int TILE = 16;  // elements; one AVX-512 register, two AVX2 registers of float32

// How one stream is stored. The values index ITEMSIZE.
enum Dtype : uint8_t { F32, F64, BF16, F16, N_DTYPES };
constexpr int ITEMSIZE[N_DTYPES] = {4, 8, 2, 2};

// How a kernel reads its streams: all of one dtype, or any mix of the three that compute in float32.
enum Format : uint8_t { ALL_F32, ALL_F64, ALL_BF16, ALL_F16, MIXED, N_FORMATS };

// A run of elements of one tensor, contiguous in every stream.
struct Slice {
  void* streams[MAX_STREAMS];
  Dtype dtypes[MAX_STREAMS];
  int64_t numel;
  const double* hypers;  // the rule's Hypers<double>
  double grad_sign;      // -1 if maximizing, else 1
  double grad_scale;     // grads are divided by it and written back; 0: leave grads alone
};

using Kernel = void (*)(const Slice&);

// Asks for the cache line at `base + offset`, which need not be the address of anything.
inline void prefetch(const void* base, int64_t offset = 0) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + offset));
#endif
}

enum RuleId : int;
constexpr int MAX_RULES = 8;

struct Isa {
  const char* name;
  bool (*supported)();
  Kernel kernels[MAX_RULES][N_FORMATS][MAX_VARIANTS];  // null where the variant is not valid
  Kernel probe[MAX_STATES + 1];  // streams += grad, by number of states: the benchmark's roof
};

}  // namespace fused_optim
