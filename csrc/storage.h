// How the states and the param of one tensor are stored, and where their scales and remainders lie.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "shard.h"

namespace fused_optim {

struct Group;
struct Schema;

// In the order of Storage.
constexpr const char* STORAGE_NAMES[] = {"plain", "stochastic", "signed8",
                                         "root8", "split8",     "split16"};

// The format that a group asks for; STATE_AS_STOCK: the param's dtype.
enum StateFormat { STATE_AS_STOCK, STATE_F32, STATE_BF16, STATE_INT8 };

constexpr const char* STATE_FORMAT_NAMES[] = {"", "float32", "bfloat16", "int8"};

struct Stored {
  Storage storage;
  Dtype dtype;
};

constexpr const char* STATE_KIND_NAMES[] = {"signed", "square", "exact"};

// Chooses the storage of a state. numel: elements of the whole param.
Stored storage_of(StateFormat format, StateKind kind, Dtype param, int64_t numel);

inline bool needs_random_bits(Storage master, Dtype param) {
  return (master == STOCHASTIC || master == SPLIT8) && (param == BF16 || param == F16);
}

// Mixes the seed of one stream of one param (its number among all), and from it the key of one
// step's random bits.
uint64_t random_seed(uint64_t seed, uint64_t param, int stream);
void random_key(uint64_t random_seed, uint64_t step, uint32_t* key);

struct Packed {
  Packed() { std::fill(std::begin(packing.storage), std::end(packing.storage), PLAIN); }

  Packing packing;  // the rest of it is only there if something is packed
  void* remainder = nullptr;
  std::vector<Ref> held;  // scales and remainder

  // Finds scales and remainder. Returns false if `states` are not in the formats that the group
  // asks for.
  bool read(const Group& group, PyObject* param, const View& p, const Place& place, unsigned used,
            PyObject* states);
  void draw(uint64_t seed, uint64_t ordinal, double step);  // the keys of a step's random bits

 private:
  bool read_remainder(const Group& group, PyObject* param, const View& p, PyObject* states);
  bool read_state(const Group& group, size_t s, PyObject* param, const View& p, const Place& place,
                  PyObject* states);
};

// Decode a stored stream of a contiguous tensor to float32, or encode float32 into it (with its
// scales or remainder). For checkpoints, not for a step.
void unpack(const Slice& slice, int stream, float* values, int num_threads);
void pack(const Slice& slice, int stream, const float* values, int num_threads);

}  // namespace fused_optim
