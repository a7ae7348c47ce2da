// The work of one step, cut into units and spread over OpenMP threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernel.h"
#include "layout.h"

namespace fused_optim {

// One tensor of one step. `slice` spans all of it; with a layout, in the layout's order.
struct Task {
  Kernel kernel;
  Slice slice;       // its hypers are set when the step's table of them is complete
  int64_t hypers;    // index of the first of them in that table
  int packing;       // index of the step's packings; -1: all streams are PLAIN
  int layout;        // index into the step's layouts; -1: contiguous in every stream
  unsigned streams;  // bit s: stream s is read
  unsigned written;  // bit s: stream s is written
  bool is_sharded;   // the grad is a part of a DTensor
  bool known_grad;   // the grad lies where it lay in the last step
  int device;        // index of the step's device tasks; -1: for the CPU
};

// Calls work(0) to work(n - 1), in any order, with at most `num_threads` threads; with one if
// `numel` elements in all are not worth waking another.
void spread(size_t n, int64_t numel, int num_threads, const std::function<void(size_t)>& work);

// Runs all tasks, none of them for a device, with at most `num_threads` threads; a tensor's bits
// depend on nothing but its own values. Never throws.
void run(const std::vector<Task>& tasks, const std::vector<Layout>& layouts, int num_threads);

// The number of elements of the [begin, end) runs that `numel` elements are cut into. For tests.
std::vector<std::pair<int64_t, int64_t>> chunks(int64_t numel);

// "libgomp.so.1", say: the OpenMP runtime in use, as a path; empty without OpenMP.
const char* openmp_library();

}  // namespace fused_optim
