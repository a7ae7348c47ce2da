// Arguments of the loop (apply.inl), and the kernels of one instruction set.
#pragma once

#include <cstdint>

namespace fused_optim {

constexpr int MAX_STATES = 3;
constexpr int PARAM = 0, GRAD = 1, STATES = 2, EMA = STATES + MAX_STATES;
constexpr int MAX_STREAMS = EMA + 1;
constexpr int MAX_HYPERS = 8;
// The options of a rule. Those that may be tensors on a device, lr and the betas, come first.
constexpr int MAX_OPTIONS = 9, MAX_TENSOR_OPTIONS = 8;
// The scalars of a rule, and beside them how many steps went into the EMA.
constexpr int STEP = 0, MAX_RULE_SCALARS = 3, N_AVERAGED = MAX_RULE_SCALARS;
constexpr int MAX_SCALARS = MAX_RULE_SCALARS + 1;
constexpr unsigned STATE_SETS = 1u << MAX_STATES;  // bit i: there is state i
constexpr int TILE = 16;  // elements; one AVX-512 register, two AVX2 registers of float32
// States of 8 bits: elements of one scale; elements of the smallest state that has 8 bits, others
// stay float32.
constexpr int SCALE_BLOCK = 64, SMALLEST_INT8 = 4096;
constexpr int64_t n_scales(int64_t numel) { return (numel + SCALE_BLOCK - 1) / SCALE_BLOCK; }

// The dtype of one stream. The values index ITEMSIZE. Those behind N_DTYPES occur in packed streams
// only.
enum Dtype : uint8_t { F32, F64, BF16, F16, N_DTYPES, I8, U8, I16 };
constexpr int ITEMSIZE[] = {4, 8, 2, 2, 0, 1, 1, 2};

// How a kernel reads its streams: all of one dtype, or any mix of the three that compute in
// float32, in one form with all but grad and EMA in float32; with some of them packed, of any
// dtypes or bfloat16 all of them.
enum KernelForm : uint8_t {
  ALL_F32,
  ALL_F64,
  ALL_BF16,
  ALL_F16,
  MIXED,
  MASTERS,
  PACKED,
  PACKED_BF16,
  N_FORMS
};

// A state is: any number; never negative, like a second moment; or one that no format may round.
enum StateKind : uint8_t { SIGNED, SQUARE, EXACT };

// Meaning of a stream's bits (formats.h): the dtype's own; the same, rounded stochastically; 8 bits
// with a scale, of the value or of its root; a param with a remainder of 8 or 16 bits.
enum Storage : uint8_t { PLAIN, STOCHASTIC, SIGNED8, ROOT8, SPLIT8, SPLIT16 };

// Bytes of a remainder for each element.
constexpr int remainder_itemsize(Storage master) {
  return master == SPLIT8 ? 1 : master == SPLIT16 ? 2 : 0;
}

// Elements are codes of 8 bits, with a scale for each block of them.
constexpr bool has_scales(Storage storage) { return storage == SIGNED8 || storage == ROOT8; }

// Bytes beside a stream: its scales, or a remainder.
constexpr int64_t extra_nbytes(Storage storage, int64_t numel) {
  return has_scales(storage) ? n_scales(numel) * 2 : numel * remainder_itemsize(storage);
}

// For all of a tensor.
struct Packing {
  Storage storage[MAX_STREAMS];
  uint16_t* scales[MAX_STREAMS];  // bfloat16, one for each scale block
  uint64_t seeds[MAX_STREAMS];    // a seed and the step make a stream's key
  uint32_t keys[MAX_STREAMS][2];  // of this step's random bits
  int64_t offset;  // index of the tensor's first element in the whole param, for the random bits

  bool packs() const {
    for (Storage stored : storage)
      if (stored != PLAIN) return true;
    return false;
  }
  // True if PackedPairs can serve it, provided that all streams are bfloat16.
  bool in_pairs() const { return offset % (4 * TILE) == 0; }
};

// A step leaves the grad: as it was, divided by the grad scale, clipped on top, or zeros.
enum GradWrite : uint8_t { KEPT, UNSCALED, CLIPPED, ZEROED };

// A run of elements of one tensor, contiguous in every stream.
struct Slice {
  void* streams[MAX_STREAMS];  // EMA: null without one
  Dtype dtypes[MAX_STREAMS];
  int64_t numel;
  const double* hypers;  // the rule's Hypers<double>
  double grad_sign;      // -1 if maximizing, else 1
  double grad_scale;     // grads are divided by it; 0: there is none
  double clip;           // and multiplied by it
  GradWrite grad_write;
  double ema_weight;       // ema = lerp(ema, param, ema_weight); 1 copies
  const Packing* packing;  // null: all streams are PLAIN
  void* remainder;         // the param's; a stream of its own
  int64_t first;  // index of the run's first element in the tensor; packed: starts a scale block

  // The memory beside a packed stream, see extra_nbytes.
  void* extra(int stream) const { return stream == PARAM ? remainder : packing->scales[stream]; }
  int remainder_itemsize() const {
    return remainder == nullptr ? 0 : fused_optim::remainder_itemsize(packing->storage[PARAM]);
  }
};

using Kernel = void (*)(const Slice&);

// The sum of the squares of a run of at most NORM_CHUNK grads, in float64. It is cut into parts;
// lane l of a part sums every NORM_LANES-th element from the l-th on; then all lanes, part by part,
// are added up by halves: the upper half to the lower one. Another order would give other bits; a
// GPU's program (triton_kernels/norm.py) has the same.
constexpr int NORM_PARTS = 4, NORM_LANES = 128;
constexpr int64_t NORM_PART = 16384, NORM_CHUNK = NORM_PARTS * NORM_PART;
struct Sum {
  double squares;
  bool nonfinite;  // some element is
};
using NormKernel = Sum (*)(const void* grad, Dtype dtype, int64_t numel);

// Asks for the cache line at `base + offset`, which need not be the address of anything.
// Always inline: GCC takes a function that only prefetches for one without effects, and drops its
// calls.
[[gnu::always_inline]] inline void prefetch(const void* base, int64_t offset = 0) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + offset));
#endif
}

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernel (*kernels)[N_FORMS][STATE_SETS];  // of each rule; null: not its states
  NormKernel norm[N_DTYPES];
  void (*load_stream)(const Slice&, int stream, float* values);
  void (*store_stream)(const Slice&, int stream, const float* values);
  Kernel probe[MAX_STATES + 1];  // streams += grad, by number of states: the benchmark's roof
};

}  // namespace fused_optim
