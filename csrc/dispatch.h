// Chooses the kernels of the best instruction set, and describes the rules to everything that is
// not a kernel.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace fused_optim {

// A rule without its types. Options, hypers and states are in the order that rules.h gives.
struct RuleInfo {
  const char* name;
  std::vector<const char*> option_names;
  std::vector<const char*> state_names;
  std::vector<const char*> scalar_names;
  std::vector<const char*> hyper_names;
  const StateKind* state_kinds;
  unsigned flags;  // bit i: option i is true or false, not a number
  bool has_step;
  bool takes_tensors;                          // betas of any shape
  unsigned hidden_scalars;                     // bit i: scalar i is not among the states
  unsigned optional;                           // bit i: options decide whether there is state i
  unsigned (*states)(const double* options);   // bit i: there is state i
  unsigned lerped;                             // torch.lerp_ wants these in the grad's dtype
  bool (*decays_grad)(const double* options);  // grad + weight_decay * param comes first
  // Whether `step` is a float32, and the last scalar.
  void (*advance)(const double* options, double* scalars, bool step_is_float32,
                  bool last_is_float32);
  bool prepares_before;  // prepare takes the scalars before the step, otherwise those after it
  void (*prepare)(const double* options, const double* scalars, double* hypers);
};

const std::vector<RuleInfo>& rules();

// Names, best first, of the instruction sets this machine has.
std::vector<std::string> available_isas();
const Isa& current_isa();
// Raises std::invalid_argument, naming the accepted values, if `name` is unknown or not available.
void set_isa(const std::string& name);

}  // namespace fused_optim
