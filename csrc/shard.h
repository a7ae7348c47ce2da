// DTensors: each process steps the plain tensor that it holds of them.
#pragma once

#include <vector>

#include "view.h"

namespace fused_optim {

bool is_dtensor(PyObject* tensor);

// Returns this process's part of a param, or of another tensor with its sharding: the tensor itself
// if both are plain; none if it is another kind of tensor, or sharded otherwise.
Ref part_of(PyObject* tensor, PyObject* param);
// Appends the tensor and, if it is a DTensor, the part that this process holds.
void append_with_part(PyObject* list, PyObject* tensor);

// A part's place in its whole.
struct Place {
  int64_t numel = 0;  // the whole's
  int64_t first = 0;  // random bits are drawn as for the elements of the whole from this one on
};

// Keeps the places of params that are DTensors, which fused_optim/sharding.py works out, as long as
// the param has the same spec and the part the same size and order.
class Places {
 public:
  Place find(PyObject* param, const View& part, size_t ordinal);

 private:
  struct Known {
    Ref spec;
    int64_t numel = 0;  // the part's
    bool contiguous = false;
    Place place;
  };
  std::vector<Known> known_;  // by ordinal
};

}  // namespace fused_optim
