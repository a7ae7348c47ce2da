// A rule with the keys that its options and states have in Python's dicts.
#pragma once

#include <vector>

#include "dispatch.h"
#include "py.h"

namespace fused_optim {

struct Schema {
  explicit Schema(const std::string& rule);  // std::invalid_argument if there is no such rule

  // Torch takes these out of tensors with one element of any shape, and a device's kernels read
  // them there; the other options decide on the states.
  bool may_be_any_tensor(size_t option) const {
    return option == lr || (option_items[option] >= 0 && rule.takes_tensors);
  }

  const RuleInfo& rule;
  int rule_index;
  // Interned: they stay.
  std::vector<PyObject*> option_keys, state_keys, scale_keys, scalar_keys;
  std::vector<int> option_lengths;  // of a tuple option
  std::vector<int> option_items;  // index into a tuple option (betas); -1: the option is the number
  size_t lr = 0;                  // index of that option
};

}  // namespace fused_optim
