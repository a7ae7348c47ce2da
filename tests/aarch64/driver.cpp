// Steps the same numbers with every instruction set of the machine, in each rule, format and way to
// treat the grads, and prints a hash of all bits that each case leaves, one NaN for all. Two
// machines agree if they print the same. Inputs come from an integer hash: no library makes them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/dispatch.h"
#include "../../csrc/norm.h"
#include "../../csrc/parallel.h"

using namespace fused_optim;

namespace {

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A dtype's exponent and mantissa bits.
struct Bits {
  int exponent, mantissa;
};
Bits bits_of(Dtype dtype) {
  return dtype == F32    ? Bits{8, 23}
         : dtype == F64  ? Bits{11, 52}
         : dtype == BF16 ? Bits{8, 7}
                         : Bits{5, 10};
}

// The memory of one stream, with a margin that no kernel may write.
struct Memory {
  static constexpr size_t MARGIN = 64;
  std::vector<unsigned char> bytes;
  Memory() = default;
  explicit Memory(size_t size) : bytes(size + MARGIN, 0xa5) {}
  void* data() { return bytes.data(); }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
};

// Numbers of all sizes; every 13th a subnormal, and, if `special`, now and then 0, -0, an infinity,
// NaN and the largest one. Not negative if `square`.
void fill(void* to, Dtype dtype, int64_t numel, uint64_t seed, bool special, bool square = false) {
  const Bits b = bits_of(dtype);
  const uint64_t bias = (uint64_t{1} << (b.exponent - 1)) - 1, all = 2 * bias + 1;
  for (int64_t i = 0; i < numel; i++) {
    const uint64_t x = mix(mix(seed) ^ static_cast<uint64_t>(i));
    uint64_t exponent = bias - 10 + (x >> 53) % 12,
             mantissa = x & ((uint64_t{1} << b.mantissa) - 1);
    uint64_t sign = square ? 0 : x >> 52 & 1;
    if (i % 13 == 0) exponent = 0;
    if (special) switch ((i + static_cast<int64_t>(seed % 7)) % 211) {
        case 5:
          exponent = mantissa = 0;
          break;
        case 6:
          exponent = mantissa = 0, sign = square ? 0 : 1;
          break;
        case 7:
          exponent = all, mantissa = 0;
          break;
        case 8:
          exponent = all, mantissa = uint64_t{1} << (b.mantissa - 1);
          break;
        case 9:
          exponent = all - 1, mantissa = (uint64_t{1} << b.mantissa) - 1;
          break;
      }
    const uint64_t bits = (sign << b.exponent | exponent) << b.mantissa | mantissa;
    std::memcpy(static_cast<char*>(to) + i * ITEMSIZE[dtype], &bits, ITEMSIZE[dtype]);
  }
}

struct Hash {
  uint64_t value = 0;
  void add(uint64_t word) { value = mix(value ^ word); }
  void add(const void* from, size_t size) {
    for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
      uint64_t word = 0;
      std::memcpy(&word, static_cast<const char*>(from) + i, std::min(size - i, sizeof(word)));
      add(word);
    }
  }
  // Numbers of a floating-point dtype, with one NaN for all.
  void add_numbers(const void* from, Dtype dtype, int64_t numel) {
    const Bits b = bits_of(dtype);
    const uint64_t infinity = ((uint64_t{1} << b.exponent) - 1) << b.mantissa;
    const uint64_t magnitude = infinity | ((uint64_t{1} << b.mantissa) - 1);
    for (int64_t i = 0; i < numel; i++) {
      uint64_t bits = 0;
      std::memcpy(&bits, static_cast<const char*>(from) + i * ITEMSIZE[dtype], ITEMSIZE[dtype]);
      add((bits & magnitude) > infinity ? magnitude : bits);
    }
  }
};

enum States { AS_PARAM, AS_F32, AS_BF16, AS_INT8 };
struct Format {
  const char* name;
  Dtype param, grad;
  States states;
  Storage master;
  Dtype ema;
};
const Format FORMATS[] = {
    {"float32", F32, F32, AS_PARAM, PLAIN, F32},
    {"float64", F64, F64, AS_PARAM, PLAIN, F64},
    {"bfloat16", BF16, BF16, AS_PARAM, PLAIN, BF16},
    {"float16", F16, F16, AS_PARAM, PLAIN, F16},
    {"mixed", BF16, F16, AS_F32, PLAIN, F32},
    {"masters-bfloat16", F32, BF16, AS_PARAM, PLAIN, BF16},
    {"masters-float16", F32, F16, AS_PARAM, PLAIN, F16},
    {"float32-bfloat16", F32, F32, AS_BF16, PLAIN, F32},
    {"float32-int8", F32, F32, AS_INT8, PLAIN, BF16},
    {"bfloat16-int8", BF16, BF16, AS_INT8, PLAIN, F32},
    {"float16-int8", F16, F16, AS_INT8, PLAIN, F16},
    {"bfloat16-stochastic", BF16, BF16, AS_BF16, STOCHASTIC, BF16},
    {"bfloat16-split8", BF16, BF16, AS_BF16, SPLIT8, BF16},
    {"bfloat16-split16", BF16, BF16, AS_BF16, SPLIT16, BF16},
    {"bfloat16-split8-int8", BF16, BF16, AS_INT8, SPLIT8, F32},
    {"bfloat16-split16-int8", BF16, F32, AS_INT8, SPLIT16, BF16},
    {"float16-stochastic", F16, F16, AS_F32, STOCHASTIC, F16},
    {"float16-split8-int8", F16, F16, AS_INT8, SPLIT8, F32},
    {"float16-split16", F16, F32, AS_BF16, SPLIT16, F16},
};

// What happens around the rule: an average and how grads are left; `offset`: a shard's first
// element.
struct Mode {
  const char* name;
  double ema_weight;  // 0: none
  double grad_scale, max_norm;
  GradWrite grad_write;
  double grad_sign;
  int64_t offset;
  bool special;
};
const Mode MODES[] = {
    {"plain", 0, 0, 0, KEPT, 1, 0, true},
    {"clipped", 0.01, 3, 0.5, CLIPPED, 1, 0, false},
    {"unscaled-maximized", 1, 3, 0, UNSCALED, -1, 17, true},
    {"zeroed", 0.7, 1024, 2, ZEROED, 1, 128, false},
};
constexpr int64_t SIZES[] = {1, 1055};  // the second is prefetched, and leaves a rest in each form
constexpr int64_t LARGE = 70001;        // spread over threads, in chunks
constexpr int STEPS = 6;                // RAdam's rectification begins with the sixth

// By the name of an option: the default, and another one.
const std::map<std::string, std::pair<double, double>> OPTIONS = {
    {"lr", {1e-3, 0.01}},
    {"betas.0", {0.9, 0.3}},
    {"betas.1", {0.999, 0.9}},
    {"betas.2", {0.9999, 0.99}},
    {"eps", {1e-8, 1e-3}},
    {"weight_decay", {0, 0.1}},
    {"momentum", {0, 0.9}},
    {"dampening", {0, 0.1}},
    {"nesterov", {0, 0}},
    {"lambd", {1e-4, 0.01}},
    {"alpha", {0.75, 0.5}},
    {"t0", {1e6, 1}},
    {"lr_decay", {0, 0.1}},
    {"rho", {0.9, 0.5}},
    {"centered", {0, 1}},
    {"etas.0", {0.5, 0.3}},
    {"etas.1", {1.2, 1.5}},
    {"step_sizes.0", {1e-6, 0.004}},
    {"step_sizes.1", {50, 12}},
    {"amsgrad", {0, 1}},
    {"decoupled_weight_decay", {0, 1}},
    {"momentum_decay", {4e-3, 0.3}},
    {"alpha_warmup", {0, 3}},
    {"beta3_warmup", {0, 4}},
    {"warmup_steps", {0, 2}},
    {"r", {0, 0.5}},
    {"weight_lr_power", {2, 1}},
};

KernelForm form_of(const Slice& slice, unsigned streams, bool packs, const Packing& packing) {
  bool all_same = true, masters = true;
  const Dtype dtype = slice.dtypes[PARAM];
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (!(streams >> s & 1)) continue;
    all_same &= slice.dtypes[s] == dtype;
    masters &= slice.dtypes[s] == F32 || s == GRAD || s == EMA;
  }
  if (packs) return all_same && dtype == BF16 && packing.in_pairs() ? PACKED_BF16 : PACKED;
  if (!all_same) return masters ? MASTERS : MIXED;
  return dtype == F32 ? ALL_F32 : dtype == F64 ? ALL_F64 : dtype == BF16 ? ALL_BF16 : ALL_F16;
}

// Of all that the steps of one tensor leave, and of the margins.
uint64_t hash_of(size_t rule_index, const std::vector<double>& options, const Format& format,
                 const Mode& mode, int64_t numel, int n_steps, int num_threads) {
  const RuleInfo& rule = rules()[rule_index];
  const unsigned used = rule.states(options.data());
  Packing packing = {};
  packing.offset = mode.offset;
  Slice slice = {};
  Memory streams[MAX_STREAMS], scales[MAX_STREAMS], remainder;
  unsigned there = 1u << PARAM | 1u << GRAD;
  const auto put = [&](int s, Dtype dtype, Storage storage) {
    there |= 1u << s;
    slice.dtypes[s] = dtype;
    packing.storage[s] = storage;
    streams[s] = Memory(numel * ITEMSIZE[dtype]);
    slice.streams[s] = streams[s].data();
    if (!has_scales(storage)) return;
    scales[s] = Memory(extra_nbytes(storage, numel));
    packing.scales[s] = scales[s].as<uint16_t>();
  };
  put(PARAM, format.param, format.master);
  put(GRAD, format.grad, PLAIN);
  if (mode.ema_weight != 0) put(EMA, format.ema, PLAIN);
  fill(slice.streams[PARAM], format.param, numel, 1, mode.special);
  if (mode.ema_weight != 0) fill(slice.streams[EMA], format.ema, numel, 2, mode.special);
  const int rest_size = remainder_itemsize(format.master);
  if (rest_size != 0) {
    remainder = Memory(numel * rest_size);
    std::memset(remainder.data(), 0, numel * rest_size);
    slice.remainder = remainder.data();
  }
  for (size_t i = 0; i < rule.state_names.size(); i++) {
    if (!(used >> i & 1)) continue;
    const int s = STATES + static_cast<int>(i);
    const StateKind kind = rule.state_kinds[i];
    const bool exact = kind == EXACT && format.states != AS_PARAM;
    if (format.states == AS_INT8 && !exact)
      put(s, kind == SQUARE ? U8 : I8, kind == SQUARE ? ROOT8 : SIGNED8);
    else if (format.states == AS_BF16 && !exact)
      put(s, BF16, kind == SQUARE ? STOCHASTIC : PLAIN);
    else
      put(s, format.states == AS_PARAM ? format.param : F32, PLAIN);
    if (has_scales(packing.storage[s])) {  // zeros: a first step's
      std::memset(slice.streams[s], 0, numel);
      std::memset(packing.scales[s], 0, extra_nbytes(packing.storage[s], numel));
    } else {
      fill(slice.streams[s], slice.dtypes[s], numel, 3 + i, false, kind != SIGNED);
    }
  }
  const bool packs = packing.packs();
  if (packs) slice.packing = &packing;

  Hash hash;
  double scalars[MAX_RULE_SCALARS] = {};
  if (std::string(rule.name) == "nadam") scalars[1] = 1;
  if (std::string(rule.name) == "asgd") scalars[1] = options[0], scalars[2] = 1;
  slice.numel = numel;
  slice.grad_sign = mode.grad_sign;
  slice.grad_scale = mode.grad_scale;
  slice.grad_write = mode.grad_write;
  for (int step = 1; step <= n_steps; step++) {
    fill(slice.streams[GRAD], format.grad, numel, 100 + step, mode.special && step < n_steps);
    const Sum sum =
        sum_of_squares({{slice.streams[GRAD], format.grad, numel, -1}}, {}, num_threads);
    hash.add_numbers(&sum.squares, F64, 1);
    hash.add(&sum.nonfinite, 1);
    slice.clip = 1;
    if (mode.max_norm != 0) {
      const double norm = std::sqrt(sum.squares) / mode.grad_scale;
      const double coefficient = mode.max_norm / (norm + 1e-6);
      if (!(coefficient > 1)) slice.clip = coefficient;
    }
    double hypers[MAX_HYPERS] = {};
    if (rule.prepares_before) rule.prepare(options.data(), scalars, hypers);
    rule.advance(options.data(), scalars, true, true);
    if (!rule.prepares_before) rule.prepare(options.data(), scalars, hypers);
    hash.add_numbers(hypers, F64, MAX_HYPERS);
    hash.add_numbers(scalars, F64, MAX_RULE_SCALARS);
    slice.hypers = hypers;
    slice.ema_weight = mode.ema_weight;
    for (int s = 0; s < MAX_STREAMS; s++) {
      const uint64_t key = mix(static_cast<uint64_t>(step * MAX_STREAMS + s));
      packing.keys[s][0] = static_cast<uint32_t>(key);
      packing.keys[s][1] = static_cast<uint32_t>(key >> 32);
    }
    Task task = {};
    task.slice = slice;
    task.kernel = current_isa().kernels[rule_index][form_of(slice, there, packs, packing)][used];
    if (task.kernel == nullptr) throw std::logic_error("no kernel for these states");
    task.layout = task.packing = task.device = -1;
    task.streams = there;
    run({task}, {}, num_threads);
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(there >> s & 1)) continue;
      const Dtype dtype = slice.dtypes[s];
      if (has_scales(packing.storage[s])) {
        hash.add(streams[s].data(), numel);
        hash.add(scales[s].data(), extra_nbytes(packing.storage[s], numel));
      } else {
        hash.add_numbers(streams[s].data(), dtype, numel);
      }
    }
    if (rest_size != 0) hash.add(remainder.data(), numel * rest_size);
  }
  const auto add_margin = [&](Memory& memory) {
    if (!memory.bytes.empty())
      hash.add(memory.bytes.data() + memory.bytes.size() - Memory::MARGIN, Memory::MARGIN);
  };
  for (int s = 0; s < MAX_STREAMS; s++) add_margin(streams[s]), add_margin(scales[s]);
  add_margin(remainder);
  // As checkpoints read and write them: decoded, encoded again, and decoded.
  if (!packs || numel < SCALE_BLOCK) return hash.value;
  slice.numel = numel / SCALE_BLOCK * SCALE_BLOCK;
  std::vector<float> values(slice.numel);
  for (int s = 0; s < MAX_STREAMS; s++) {
    if (packing.storage[s] == PLAIN) continue;
    for (int times = 0; times < 2; times++) {
      current_isa().load_stream(slice, s, values.data());
      hash.add_numbers(values.data(), F32, slice.numel);
      current_isa().store_stream(slice, s, values.data());
    }
  }
  return hash.value;
}

void print_all(const std::string& isa) {
  for (size_t r = 0; r < rules().size(); r++) {
    const RuleInfo& rule = rules()[r];
    std::vector<double> last;
    for (int variant = 0; variant < 3; variant++) {
      std::vector<double> options(MAX_OPTIONS);
      for (size_t o = 0; o < rule.option_names.size(); o++) {
        const std::string name = rule.option_names[o];
        const auto& [first, other] = OPTIONS.at(name);
        options[o] = variant == 0 ? first : other;
        // The third has one of the optional states where the second has two.
        if (variant == 2 && name == "nesterov") options[o] = 1;
        if (variant == 2 && (name == "centered" || name == "amsgrad")) options[o] = 0;
      }
      if (options == last) continue;
      last = options;
      for (const Format& format : FORMATS)
        for (const Mode& mode : MODES) {
          const auto print = [&](int64_t numel, int n_steps, int num_threads) {
            const uint64_t hash = hash_of(r, options, format, mode, numel, n_steps, num_threads);
            std::printf("%s %s-%d %s %s %lld %016llx\n", isa.c_str(), rule.name, variant,
                        format.name, mode.name, static_cast<long long>(numel),
                        static_cast<unsigned long long>(hash));
          };
          for (int64_t numel : SIZES) print(numel, STEPS, 1);
          if (variant == 1 && &mode == &MODES[2]) print(LARGE, 1, 2);
        }
    }
  }
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    print_all(isa);
  }
}
