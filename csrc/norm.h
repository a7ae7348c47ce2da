// The sum of the squares of all grads: the same bits for any number of threads and instruction set.
#pragma once

#include <vector>

#include "kernel.h"
#include "layout.h"

namespace fused_optim {

// One grad. Cut into chunks of NORM_CHUNK elements in the order of its memory, or into the blocks
// of its layout if it is dense in no order.
struct NormTask {
  const void* grad;
  Dtype dtype;
  int64_t numel;
  int layout;  // index into the layouts; -1: dense
};

// Sums each chunk as NormKernel does. Chunk c of all tasks goes to lane c % (NORM_PARTS *
// NORM_LANES); then the upper half of the lanes is added to the lower one, until one is left. The
// order is fixed, so threads do not change the bits. Never throws.
Sum sum_of_squares(const std::vector<NormTask>& tasks, const std::vector<Layout>& layouts,
                   int num_threads);

}  // namespace fused_optim
