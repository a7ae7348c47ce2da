// Reads a param group: its numbers, or where on a device they lie; EMA; formats.
#pragma once

#include <cfloat>
#include <cmath>

#include "averages.h"
#include "scalars.h"
#include "schema.h"
#include "storage.h"
#include "view.h"

namespace fused_optim {

inline bool fits_float(double value) { return std::abs(value) <= FLT_MAX; }

// The reason for a group with options that no kernel takes as torch.optim's code does.
constexpr const char* ODD_OPTIONS = "an option that is no number in float32's range";

// A param's place: optimizer.param_groups[group]["params"][index].
struct Origin {
  int64_t group, index;
  bool operator==(const Origin& other) const {
    return group == other.group && index == other.index;
  }
};

struct Group {
  // Raises PythonError for options outside their range, in the words of optimizer._check_options.
  Group(PyObject* dict, int64_t position, uint64_t first_ordinal, const Schema& schema,
        PyObject* optimizer, unsigned device_types);

  Origin origin(int64_t param) const;
  // The param's number among all of the optimizer's.
  uint64_t ordinal(const Origin& origin) const {
    return first_ordinal + static_cast<uint64_t>(origin.index);
  }
  // Reads options from a device that the kernels of another one need: the host waits.
  void know_options();
  bool knows_lr() const { return numbers_known || option_addresses[schema.lr] == 0; }

  const Schema& schema;
  Ref dict;
  const int64_t position;  // in the list of groups that are stepped
  // The optimizer's group whose params these are: all of them, or those that `indices` name.
  int64_t index;
  uint64_t first_ordinal;  // the number of that group's first param among all of the optimizer's
  Ref indices;
  const char* stock_reason = nullptr;  // the whole group goes to stock; null: no
  bool capturable = false, fused = false;
  double options[MAX_OPTIONS] = {};
  // Options that are tensors on `option_device`: 0 where the number is known.
  int64_t option_addresses[MAX_OPTIONS] = {};
  Ref option_values[MAX_OPTIONS];
  Device option_device = {};
  bool has_addresses = false, numbers_known = true;
  double grad_sign = 1;
  bool has_formats = false;  // the user has given an option of formats
  StateFormat state_format = STATE_AS_STOCK;
  Storage master = PLAIN;
  uint64_t seed = 0;
  Averaging averaging;
  unsigned states = 0;  // bit s: the options ask for state s
  struct Prepared {
    double scalars[MAX_RULE_SCALARS] = {-1};  // for which it was; -1: none yet
    int64_t hypers = 0;                       // index in the step's table
    bool fits = true;                         // float32 holds all of them
  } prepared;                                 // latest

 private:
  void read_origin();
  bool read_formats();
  bool read_options(unsigned device_types);
  bool read_option(size_t option, PyObject* value, unsigned device_types);
  bool read_number(size_t option, PyObject* value, double& result) const;
};

}  // namespace fused_optim
