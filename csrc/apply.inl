// The one loop: load -> compute type -> rule -> store. Compiled once per instruction set, inside that
// instruction set's target region and an anonymous namespace: code of one set can then never be
// linked into another. All headers of the standard library are included before the region.
namespace fused_optim {
namespace {

#include "formats.h"
#include "rules.h"

// The roof: the same loop and traffic with next to no arithmetic.
struct Probe {
  enum : unsigned { VARIANTS = MAX_STATES + 1 };
  static constexpr bool valid(unsigned) { return true; }
  static constexpr unsigned states(unsigned variant) { return (1u << variant) - 1; }
  template <class T>
  struct Hypers {
    T factor;
  };
  template <unsigned VARIANT, class T>
  static inline void update(T& param, T grad, T& state0, T& state1, T& state2,
                            const Hypers<T>& h) {
    param = param + h.factor * grad;
    state0 = state0 + grad;
    state1 = state1 + grad;
    state2 = state2 + grad;
  }
};

constexpr int64_t AHEAD = 512;  // elements between what is prefetched and what is updated

template <class H, class T>
inline H convert_hypers(const double* hypers) {
  T values[sizeof(H) / sizeof(T)];
  for (unsigned i = 0; i < sizeof(H) / sizeof(T); i++) values[i] = static_cast<T>(hypers[i]);
  H converted;
  std::memcpy(&converted, values, sizeof(H));
  return converted;
}

template <class Rule, unsigned VARIANT, class Form>
void apply(const Slice& slice) {
  using T = typename Form::compute;
  constexpr unsigned states = Rule::states(VARIANT);
  const auto h = convert_hypers<typename Rule::template Hypers<T>, T>(slice.hypers);
  const T grad_sign = static_cast<T>(slice.grad_sign);
  const T grad_scale = static_cast<T>(slice.grad_scale);
  void* const* streams = slice.streams;
  const Dtype* dtypes = slice.dtypes;

  // The CPU's own prefetchers stop at every page (measured: 5 to 10% on float32, 20 to 30% on 16 bits).
  // It may ask for addresses behind the last element, which is harmless; a short slice has nothing ahead.
  const int64_t ahead = slice.numel >= 4 * AHEAD ? AHEAD : 0;
  const auto fetch = [&](int stream, int64_t i) {
    prefetch(streams[stream], (i + ahead) * Form::itemsize(dtypes[stream]));
  };

  const int64_t full = slice.numel / TILE * TILE;
  for (int64_t i = 0; i < full; i += TILE) {
    alignas(64) T param[TILE], grad[TILE], state[MAX_STATES][TILE];
    fetch(PARAM, i);
    fetch(GRAD, i);
    if constexpr (states & 0b001) fetch(STATES, i);
    if constexpr (states & 0b010) fetch(STATES + 1, i);
    if constexpr (states & 0b100) fetch(STATES + 2, i);
    Form::load(streams[PARAM], i, dtypes[PARAM], param);
    Form::load(streams[GRAD], i, dtypes[GRAD], grad);
    if constexpr (states & 0b001) Form::load(streams[STATES], i, dtypes[STATES], state[0]);
    if constexpr (states & 0b010) Form::load(streams[STATES + 1], i, dtypes[STATES + 1], state[1]);
    if constexpr (states & 0b100) Form::load(streams[STATES + 2], i, dtypes[STATES + 2], state[2]);
    if (grad_scale != T(0)) {
      for (int k = 0; k < TILE; k++) grad[k] = grad[k] / grad_scale;
      Form::store(grad, streams[GRAD], i, dtypes[GRAD]);
    }
    for (int k = 0; k < TILE; k++)
      Rule::template update<VARIANT, T>(param[k], grad_sign * grad[k], state[0][k], state[1][k],
                                        state[2][k], h);
    Form::store(param, streams[PARAM], i, dtypes[PARAM]);
    if constexpr (states & 0b001) Form::store(state[0], streams[STATES], i, dtypes[STATES]);
    if constexpr (states & 0b010) Form::store(state[1], streams[STATES + 1], i, dtypes[STATES + 1]);
    if constexpr (states & 0b100) Form::store(state[2], streams[STATES + 2], i, dtypes[STATES + 2]);
  }

  const int64_t rest = slice.numel - full;
  if (rest == 0) return;
  // The rest is one more full tile on the stack: the same instructions, hence the same bits.
  alignas(64) unsigned char tiles[MAX_STREAMS][TILE * sizeof(double)] = {};
  Slice padded = slice;
  padded.numel = TILE;
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (s >= STATES && !(states >> (s - STATES) & 1)) continue;
    const int itemsize = Form::itemsize(dtypes[s]);
    std::memcpy(tiles[s], static_cast<char*>(streams[s]) + full * itemsize, rest * itemsize);
    padded.streams[s] = tiles[s];
  }
  apply<Rule, VARIANT, Form>(padded);
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (s >= STATES && !(states >> (s - STATES) & 1)) continue;
    if (s == GRAD && slice.grad_scale == 0) continue;  // a grad is never written on the plain path
    const int itemsize = Form::itemsize(dtypes[s]);
    std::memcpy(static_cast<char*>(streams[s]) + full * itemsize, tiles[s], rest * itemsize);
  }
}

template <class Rule, class Form, unsigned VARIANT>
constexpr Kernel kernel_of() {
  if constexpr (VARIANT < unsigned(Rule::VARIANTS)) {
    if constexpr (Rule::valid(VARIANT)) return &apply<Rule, VARIANT, Form>;
  }
  return nullptr;
}

#define VARIANTS_OF(RULE, FORM)                                                            \
  {kernel_of<RULE, FORM, 0>(),  kernel_of<RULE, FORM, 1>(),  kernel_of<RULE, FORM, 2>(),   \
   kernel_of<RULE, FORM, 3>(),  kernel_of<RULE, FORM, 4>(),  kernel_of<RULE, FORM, 5>(),   \
   kernel_of<RULE, FORM, 6>(),  kernel_of<RULE, FORM, 7>(),  kernel_of<RULE, FORM, 8>(),   \
   kernel_of<RULE, FORM, 9>(),  kernel_of<RULE, FORM, 10>(), kernel_of<RULE, FORM, 11>(),  \
   kernel_of<RULE, FORM, 12>(), kernel_of<RULE, FORM, 13>(), kernel_of<RULE, FORM, 14>(),  \
   kernel_of<RULE, FORM, 15>()},
#define FORMATS_OF(RULE)                                                                   \
  {VARIANTS_OF(RULE, Uniform<Direct<float>>) VARIANTS_OF(RULE, Uniform<Direct<double>>)    \
   VARIANTS_OF(RULE, Uniform<BFloat16>) VARIANTS_OF(RULE, Uniform<Float16>)                \
   VARIANTS_OF(RULE, Mixed)},

}  // namespace

// In the order of RuleId and Format.
#define FUSED_OPTIM_ISA_TABLE(NAME, SUPPORTED)                                             \
  extern const Isa NAME;                                                                   \
  const Isa NAME = {#NAME,                                                                 \
                    SUPPORTED,                                                             \
                    {FUSED_OPTIM_RULES(FORMATS_OF)},                                       \
                    {kernel_of<Probe, Uniform<Direct<float>>, 0>(),                        \
                     kernel_of<Probe, Uniform<Direct<float>>, 1>(),                        \
                     kernel_of<Probe, Uniform<Direct<float>>, 2>(),                        \
                     kernel_of<Probe, Uniform<Direct<float>>, 3>()}};

}  // namespace fused_optim
