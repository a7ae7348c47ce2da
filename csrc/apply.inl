// The one loop: load -> compute type -> rule -> store. Compiled once per instruction set, inside
// that instruction set's target region and an anonymous namespace: code of one set can then never
// be linked into another. All headers of the standard library are included before the region.
namespace fused_optim {
namespace {

#include "lanes.h"
#include "dtypes.h"
#include "formats.h"
#include "streams.h"
#include "arithmetic.h"
#include "rules.h"

// The roof: the same loop and traffic with next to no arithmetic.
struct Probe : Rule {
  static constexpr const char* state_names[MAX_STATES] = {};
  static constexpr unsigned OPTIONAL = all_states<Probe>();
  template <class T>
  struct Hypers {
    T factor;
  };
  template <unsigned THERE, class T>
  static inline void update(T& param, T grad, T& state0, T& state1, T& state2, const Hypers<T>& h) {
    param = param + h.factor * grad;
    state0 = state0 + grad;
    state1 = state1 + grad;
    state2 = state2 + grad;
  }
};

// Elements between what is prefetched and what is updated. On 2 threads of an AMD EPYC, AdamW of
// GPT-2 small, 192 and 256 were 2 to 5% faster than 384 and 512 in some runs, and none made a
// difference in others.
constexpr int64_t AHEAD = 256;

// A NaN without its payload: Pairs::store relies on that.
template <class T>
inline T to_compute(double value) {
  return value == value ? static_cast<T>(value) : std::numeric_limits<T>::quiet_NaN();
}

template <class H, class T>
inline H convert_hypers(const double* hypers) {
  T values[sizeof(H) / sizeof(T)];
  for (unsigned i = 0; i < sizeof(H) / sizeof(T); i++) values[i] = to_compute<T>(hypers[i]);
  H converted;
  std::memcpy(&converted, values, sizeof(H));
  return converted;
}

// Loops of their own over a tile. GCC 12 unrolls them before it can vectorise them, unless told not
// to.
template <int N, class T>
inline void multiply(const T* tile, T factor, T* product) {
#pragma GCC unroll 4
  for (int k = 0; k < N; k++) product[k] = factor * tile[k];
}

template <int N, class T>
inline void divide(T* tile, T divisor) {
#pragma GCC unroll 4
  for (int k = 0; k < N; k++) tile[k] = tile[k] / divisor;
}

template <int N, class T>
inline void lerp_tile(T* start, const T* end, T weight) {
#pragma GCC unroll 4
  for (int k = 0; k < N; k++) start[k] = lerp(start[k], end[k], weight);
}

template <class T>
inline void add_squares(const T* tile, double* sums) {
  double wide[TILE];
#pragma GCC unroll 4
  for (int k = 0; k < TILE; k++) wide[k] = tile[k];
#pragma GCC unroll 4
  for (int k = 0; k < TILE; k++) sums[k] += wide[k] * wide[k];
}

// ROOTS: leaves the square root of each state like a second moment, because root8 stores roots.
// Most rules have computed that root already, and the compiler reuses it.
template <class Rule, unsigned THERE, bool ROOTS, int N, class T, class H>
inline void update_tile(T* __restrict param, const T* __restrict grad, T factor,
                        T* __restrict state0, T* __restrict state1, T* __restrict state2,
                        const H& h) {
#pragma GCC unroll 4
  for (int k = 0; k < N; k++) {
    // In variables: GCC would store the param twice, as if a state could lie in the same place.
    T p = param[k], s0 = 0, s1 = 0, s2 = 0;
    if constexpr (THERE & 0b001) s0 = state0[k];
    if constexpr (THERE & 0b010) s1 = state1[k];
    if constexpr (THERE & 0b100) s2 = state2[k];
    Rule::template update<THERE, T>(p, factor * grad[k], s0, s1, s2, h);
    if constexpr (ROOTS) {
      if constexpr (Rule::state_kinds[0] == SQUARE) s0 = std::sqrt(s0);
      if constexpr (Rule::state_kinds[1] == SQUARE) s1 = std::sqrt(s1);
      if constexpr (Rule::state_kinds[2] == SQUARE) s2 = std::sqrt(s2);
    }
    param[k] = p;
    if constexpr (THERE & 0b001) state0[k] = s0;
    if constexpr (THERE & 0b010) state1[k] = s1;
    if constexpr (THERE & 0b100) state2[k] = s2;
  }
}

#include "interleaved.h"

template <class Rule, unsigned THERE, class Form>
void apply_rest(const Slice& slice, int64_t full);

template <class Rule, unsigned THERE, class Form>
[[gnu::noinline]] void apply(const Slice& slice) {
  using T = typename Form::compute;
  const auto h = convert_hypers<typename Rule::template Hypers<T>, T>(slice.hypers);
  // One factor unscales, clips and negates, unless the grad is to be left unscaled.
  const bool divides = slice.grad_scale != 0 && slice.grad_write == UNSCALED;
  const double unscaling = slice.grad_scale != 0 && !divides ? 1 / slice.grad_scale : 1;
  const T clip = to_compute<T>(slice.clip * unscaling);
  const T factor = static_cast<T>(slice.grad_sign) * clip;
  const T grad_scale = to_compute<T>(slice.grad_scale);
  const T ema_weight = to_compute<T>(slice.ema_weight);
  if constexpr (Form::roots && Rule::INTERLEAVES && LANES > 4) {
    const auto run = [&](auto interleaved) {
      if (!interleaved.serves(slice)) return false;
      const int64_t full = slice.numel / SCALE_BLOCK * SCALE_BLOCK;
      interleaved.run(slice, full, factor, h);
      if (full < slice.numel) apply_rest<Rule, THERE, Form>(slice, full);
      return true;
    };
    if (run(Interleaved<Rule, THERE, Float32Param, EightBits>()) ||
        run(Interleaved<Rule, THERE, Split8Param, EightBits>()) ||
        run(Interleaved<Rule, THERE, Float32Param, SixteenBits>()))
      return;
  }
  void* const* streams = slice.streams;
  const Form form(slice);
  // If one state like a second moment is stored as a root, all are.
  bool takes_roots = false;
  if constexpr (Form::roots)
    for (int s = STATES; s < EMA; s++)
      takes_roots = takes_roots || slice.packing->storage[s] == ROOT8;

  // The CPU's own prefetchers stop at every page (measured: 5 to 10% on float32, 20 to 30% on 16
  // bits). It may ask for addresses behind the last element, which is harmless; a short slice has
  // nothing ahead. Always inline, see prefetch.
  const int64_t ahead = slice.numel >= 4 * AHEAD ? AHEAD : 0;
  const auto fetch = [&](int stream, int64_t i) __attribute__((always_inline)) {
    const int itemsize = form.fetched(stream);
    for (int k = 0; k < Form::tile * itemsize; k += 64)
      prefetch(streams[stream], (i + ahead) * itemsize + k);
  };

  const int remainder_size = slice.remainder_itemsize();
  constexpr int N = Form::tile;
  const int64_t full = slice.numel / N * N;
  for (int64_t i = 0; i < full; i += N) {
    alignas(64) T param[N], grad[N], state[MAX_STATES][N];
    fetch(PARAM, i);
    for (int k = 0; k < N * remainder_size; k += 64)
      prefetch(slice.remainder, (i + ahead) * remainder_size + k);
    fetch(GRAD, i);
    if constexpr (THERE & 0b001) fetch(STATES, i);
    if constexpr (THERE & 0b010) fetch(STATES + 1, i);
    if constexpr (THERE & 0b100) fetch(STATES + 2, i);
    T* const p = Form::place(slice, PARAM, i, param);
    T* const g = Form::place(slice, GRAD, i, grad);
    if (p == param) form.load(slice, PARAM, i, param);
    if (g == grad) form.load(slice, GRAD, i, grad);
    if constexpr (THERE & 0b001) form.load(slice, STATES, i, state[0]);
    if constexpr (THERE & 0b010) form.load(slice, STATES + 1, i, state[1]);
    if constexpr (THERE & 0b100) form.load(slice, STATES + 2, i, state[2]);
    if (slice.grad_write == UNSCALED) {
      if (divides) divide<N>(grad, grad_scale);
      form.store(slice, GRAD, i, grad);
    }
    if (slice.grad_write == CLIPPED) {
      T clipped[N];
      multiply<N>(grad, clip, clipped);
      form.store(slice, GRAD, i, clipped);
    }
    if (slice.grad_write == ZEROED) {
      const T zeros[N] = {};
      form.store(slice, GRAD, i, zeros);
    }
    if constexpr (Form::roots) {
      if (takes_roots)
        update_tile<Rule, THERE, true, N>(p, g, factor, state[0], state[1], state[2], h);
      else
        update_tile<Rule, THERE, false, N>(p, g, factor, state[0], state[1], state[2], h);
    } else {
      update_tile<Rule, THERE, false, N>(p, g, factor, state[0], state[1], state[2], h);
    }
    if (p == param) form.store(slice, PARAM, i, param);
    if constexpr (THERE & 0b001) form.store(slice, STATES, i, state[0]);
    if constexpr (THERE & 0b010) form.store(slice, STATES + 1, i, state[1]);
    if constexpr (THERE & 0b100) form.store(slice, STATES + 2, i, state[2]);
    if (streams[EMA] != nullptr) {
      if (!form.past_caches) fetch(EMA, i);
      if constexpr (Form::rounds) form.load_stored(slice, PARAM, i, param);
      if (ema_weight == T(1)) {
        form.store(slice, EMA, i, param);
      } else {
        alignas(64) T ema[N];
        form.load(slice, EMA, i, ema);
        lerp_tile<N>(ema, param, ema_weight);
        form.store(slice, EMA, i, ema);
      }
    }
  }

  if (full < slice.numel) apply_rest<Rule, THERE, Form>(slice, full);
}

// The elements from `full` on, too few for a tile, are one more full tile on the stack: the same
// instructions, hence the same bits.
template <class Rule, unsigned THERE, class Form>
void apply_rest(const Slice& slice, int64_t full) {
  constexpr int N = Form::tile;
  const int64_t rest = slice.numel - full;
  void* const* streams = slice.streams;
  const Dtype* dtypes = slice.dtypes;
  const int remainder_size = slice.remainder_itemsize();
  alignas(64) unsigned char tiles[MAX_STREAMS][N * sizeof(double)] = {};
  Slice padded = slice;
  padded.numel = N;
  padded.first = slice.first + full;
  alignas(64) unsigned char remainder[N * 2] = {};
  if (remainder_size != 0) {
    std::memcpy(remainder, static_cast<char*>(slice.remainder) + full * remainder_size,
                rest * remainder_size);
    padded.remainder = remainder;
  }
  const auto there = [&](int s) {
    return s < STATES || (s == EMA ? streams[EMA] != nullptr : THERE >> (s - STATES) & 1);
  };
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!there(s)) continue;
    const int itemsize = Form::itemsize(dtypes[s]);
    std::memcpy(tiles[s], static_cast<char*>(streams[s]) + full * itemsize, rest * itemsize);
    padded.streams[s] = tiles[s];
  }
  apply<Rule, THERE, Form>(padded);
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!there(s) || (s == GRAD && slice.grad_write == KEPT)) continue;
    const int itemsize = Form::itemsize(dtypes[s]);
    std::memcpy(static_cast<char*>(streams[s]) + full * itemsize, tiles[s], rest * itemsize);
  }
  if (remainder_size != 0)
    std::memcpy(static_cast<char*>(slice.remainder) + full * remainder_size, remainder,
                rest * remainder_size);
}

// See kernel.h for the order of the additions. The four parts are read side by side: one run of
// memory alone does not keep enough of it on its way (measured on 2 cores of an AMD EPYC: 13 GB/s
// instead of 20).
template <class Form>
Sum sum_of_squares(const void* grad, Dtype dtype, int64_t numel) {
  using T = typename Form::compute;
  alignas(64) double lanes[NORM_PARTS * NORM_LANES];
  // Lanes that see no element would stay 0 and add nothing: a short run has fewer of them.
  int width = NORM_PARTS * NORM_LANES;
  while (width > TILE && width / 2 >= numel) width /= 2;
  for (int i = 0; i < width; i++) lanes[i] = 0;
  const auto add = [&](int part, const void* from, int64_t index, int64_t i) {
    alignas(64) T tile[TILE];
    Form::load_tile(from, index, dtype, tile);
    add_squares(tile, lanes + part * NORM_LANES + i % NORM_LANES);
  };
  const int itemsize = Form::itemsize(dtype);
  const int64_t joint = std::max<int64_t>(numel - (NORM_PARTS - 1) * NORM_PART, 0) / TILE * TILE;
  for (int64_t i = 0; i < joint; i += TILE)
    for (int part = 0; part < NORM_PARTS; part++) add(part, grad, part * NORM_PART + i, i);
  for (int part = 0; part * NORM_PART < numel; part++) {
    const int64_t begin = part * NORM_PART, size = std::min(NORM_PART, numel - begin);
    const int64_t full = size / TILE * TILE;
    for (int64_t i = joint; i < full; i += TILE) add(part, grad, begin + i, i);
    if (full == size) continue;
    alignas(64) unsigned char rest[TILE * sizeof(double)] = {};
    std::memcpy(rest, static_cast<const char*>(grad) + (begin + full) * itemsize,
                (size - full) * itemsize);
    add(part, rest, 0, full);
  }
  for (int half = width / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  Sum sum = {lanes[0], false};
  if (!(sum.squares <= std::numeric_limits<double>::max())) {
    // The squares of large float64 numbers overflow without an infinite one among them.
    sum.nonfinite = sizeof(T) < sizeof(double);
    for (int64_t i = 0; i < numel && !sum.nonfinite; i++) {
      T value;
      std::memcpy(&value, static_cast<const char*>(grad) + i * itemsize, sizeof(T));
      sum.nonfinite = !(std::fabs(value) <= std::numeric_limits<T>::max());
    }
  }
  return sum;
}

template <class Rule, class Form, unsigned THERE>
constexpr Kernel kernel_of() {
  if constexpr ((THERE | Rule::OPTIONAL) == all_states<Rule>()) return &apply<Rule, THERE, Form>;
  return nullptr;
}

#define STATE_SETS_OF(RULE, FORM)                                                      \
  {kernel_of<RULE, FORM, 0>(), kernel_of<RULE, FORM, 1>(), kernel_of<RULE, FORM, 2>(), \
   kernel_of<RULE, FORM, 3>(), kernel_of<RULE, FORM, 4>(), kernel_of<RULE, FORM, 5>(), \
   kernel_of<RULE, FORM, 6>(), kernel_of<RULE, FORM, 7>()},
#define FORMS_OF(RULE)                                                                             \
  {STATE_SETS_OF(RULE, Uniform<Direct<float>>) STATE_SETS_OF(RULE, Uniform<Direct<double>>)        \
       STATE_SETS_OF(RULE, Pairs) STATE_SETS_OF(RULE, Uniform<Float16>) STATE_SETS_OF(RULE, Mixed) \
           STATE_SETS_OF(RULE, Masters) STATE_SETS_OF(RULE, Packed)                                \
               STATE_SETS_OF(RULE, PackedPairs)},

// By rule, in the order of the registry, and KernelForm.
constexpr Kernel kernels[][N_FORMS][STATE_SETS] = {FUSED_OPTIM_RULES(FORMS_OF)};

}  // namespace

#define FUSED_OPTIM_ISA_TABLE(NAME, SUPPORTED)                                            \
  extern const Isa NAME;                                                                  \
  const Isa NAME = {                                                                      \
      #NAME,                                                                              \
      SUPPORTED,                                                                          \
      kernels,                                                                            \
      {&sum_of_squares<Uniform<Direct<float>>>, &sum_of_squares<Uniform<Direct<double>>>, \
       &sum_of_squares<Uniform<BFloat16>>, &sum_of_squares<Uniform<Float16>>},            \
      &load_stream,                                                                       \
      &store_stream,                                                                      \
      {kernel_of<Probe, Uniform<Direct<float>>, 0>(),                                     \
       kernel_of<Probe, Uniform<Direct<float>>, 1>(),                                     \
       kernel_of<Probe, Uniform<Direct<float>>, 3>(),                                     \
       kernel_of<Probe, Uniform<Direct<float>>, 7>()}};

}  // namespace fused_optim
