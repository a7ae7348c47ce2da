#include "dispatch.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <sstream>
#include <stdexcept>

namespace fused_optim {

#include "arithmetic.h"
#include "rules.h"

namespace {

// The names in "lr, beta1", kept for good; as keys of a param group they are "lr" and "betas.0".
std::vector<const char*> names_in(const char* list, bool as_keys) {
  static std::deque<std::string> kept;
  std::vector<const char*> names;
  std::istringstream words(list);
  for (std::string name; words >> name;) {
    if (name.back() == ',') name.pop_back();
    if (as_keys && name.back() >= '1' && name.back() <= '9') {
      name.back()--;
      name.insert(name.size() - 1, "s.");
    }
    names.push_back(kept.emplace_back(name).c_str());
  }
  return names;
}

// A struct of doubles.
template <class T>
T as(const double* values) {
  T whole;
  std::memcpy(&whole, values, sizeof(whole));
  return whole;
}

template <class Rule>
RuleInfo describe() {
  static_assert(all_states<Rule>() < STATE_SETS, "raise MAX_STATES");
  static_assert(sizeof(typename Rule::Options) <= MAX_OPTIONS * sizeof(double),
                "raise MAX_OPTIONS");
  static_assert(sizeof(typename Rule::template Hypers<double>) <= MAX_HYPERS * sizeof(double),
                "raise MAX_HYPERS");
  static_assert(sizeof(typename Rule::Scalars) <= MAX_RULE_SCALARS * sizeof(double),
                "raise MAX_RULE_SCALARS");
  using Options = typename Rule::Options;
  using Scalars = typename Rule::Scalars;
  return {Rule::name,
          names_in(Rule::option_names, true),
          {std::begin(Rule::state_names), std::end(Rule::state_names)},
          names_in(Rule::scalar_names, false),
          names_in(Rule::hyper_names, false),
          Rule::state_kinds,
          Rule::FLAGS,
          Rule::has_step,
          Rule::TAKES_TENSORS,
          Rule::HIDDEN,
          Rule::OPTIONAL,
          [](const double* options) {
            return (all_states<Rule>() & ~Rule::OPTIONAL) |
                   Rule::optional_states(as<Options>(options));
          },
          Rule::LERPED,
          [](const double* options) { return Rule::decays_grad(as<Options>(options)); },
          [](const double* options, double* scalars, bool step_is_float32, bool last_is_float32) {
            auto advanced = as<Scalars>(scalars);
            Rule::advance(as<Options>(options), advanced, {step_is_float32, last_is_float32});
            std::memcpy(scalars, &advanced, sizeof(advanced));
          },
          Rule::PREPARES_BEFORE,
          [](const double* options, const double* scalars, double* hypers) {
            const auto prepared = Rule::prepare(as<Options>(options), as<Scalars>(scalars));
            std::memcpy(hypers, &prepared, sizeof(prepared));
          }};
}

}  // namespace

const std::vector<RuleInfo>& rules() {
#define DESCRIBE(RULE) describe<RULE>(),
  static const std::vector<RuleInfo> all = {FUSED_OPTIM_RULES(DESCRIBE)};
#undef DESCRIBE
  return all;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FUSED_OPTIM_BASELINE_ONLY)
extern const Isa avx512, avx2, baseline;
static const Isa* const ISAS[] = {&avx512, &avx2, &baseline};  // best first
#elif defined(__aarch64__)
extern const Isa neon;
static const Isa* const ISAS[] = {&neon};
#else
extern const Isa baseline;
static const Isa* const ISAS[] = {&baseline};
#endif

static std::atomic<const Isa*> current{nullptr};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : ISAS)
    if (isa->supported()) names.emplace_back(isa->name);
  return names;
}

const Isa& current_isa() {
  if (!current)
    for (const Isa* isa : ISAS)
      if (isa->supported()) {
        current = isa;
        break;
      }
  return *current;
}

void set_isa(const std::string& name) {
  for (const Isa* isa : ISAS)
    if (name == isa->name && isa->supported()) {
      current = isa;
      return;
    }
  std::string message = "FUSED_OPTIM_ISA=" + name + " is not available here; accepted:";
  for (const auto& available : available_isas()) message += " " + available;
  throw std::invalid_argument(message);
}

}  // namespace fused_optim
