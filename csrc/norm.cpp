#include "norm.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "dispatch.h"
#include "parallel.h"

namespace fused_optim {

namespace {

int64_t n_chunks(const NormTask& task, const std::vector<Layout>& layouts) {
  if (task.layout >= 0) return layouts[task.layout].n_blocks();
  return (task.numel + NORM_CHUNK - 1) / NORM_CHUNK;
}

Sum sum_of_chunk(const NormTask& task, const std::vector<Layout>& layouts, int64_t chunk) {
  const NormKernel kernel = current_isa().norm[task.dtype];
  if (task.layout < 0) {
    const int64_t begin = chunk * NORM_CHUNK;
    return kernel(static_cast<const char*>(task.grad) + begin * ITEMSIZE[task.dtype], task.dtype,
                  std::min(NORM_CHUNK, task.numel - begin));
  }
  Sum sum = {0, false};
  Slice slice = {};
  slice.streams[GRAD] = const_cast<void*>(task.grad);
  slice.dtypes[GRAD] = task.dtype;
  const auto add = [&](const Slice& part) {
    for (int64_t begin = 0; begin < part.numel; begin += NORM_CHUNK) {
      const char* grad =
          static_cast<const char*>(part.streams[GRAD]) + begin * ITEMSIZE[task.dtype];
      const Sum more = kernel(grad, task.dtype, std::min(NORM_CHUNK, part.numel - begin));
      sum.squares += more.squares;
      sum.nonfinite |= more.nonfinite;
    }
  };
  layouts[task.layout].run_blocks(add, slice, 1u << GRAD, 0, chunk, chunk + 1);
  return sum;
}

}  // namespace

Sum sum_of_squares(const std::vector<NormTask>& tasks, const std::vector<Layout>& layouts,
                   int num_threads) {
  struct Chunk {
    uint32_t task;
    int64_t index;
  };
  static thread_local std::vector<Chunk> chunks;  // kept, as the partial sums are
  static thread_local std::vector<double> partials;
  chunks.clear();
  int64_t numel = 0;
  for (uint32_t t = 0; t < tasks.size(); t++) {
    numel += tasks[t].numel;
    if (tasks[t].numel == 0) continue;
    for (int64_t c = 0; c < n_chunks(tasks[t], layouts); c++) chunks.push_back({t, c});
  }
  partials.resize(chunks.size());
  std::atomic<bool> nonfinite{false};
  // Workers have thread_local vectors of their own, which are empty.
  const Chunk* const all = chunks.data();
  double* const sums = partials.data();
  spread(chunks.size(), numel, num_threads, [&](size_t c) {
    const Sum sum = sum_of_chunk(tasks[all[c].task], layouts, all[c].index);
    sums[c] = sum.squares;
    if (sum.nonfinite) nonfinite = true;
  });

  std::array<double, NORM_PARTS * NORM_LANES> lanes = {};
  for (size_t c = 0; c < partials.size(); c++) lanes[c % lanes.size()] += partials[c];
  for (size_t half = lanes.size() / 2; half >= 1; half /= 2)
    for (size_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return {lanes[0], nonfinite};
}

}  // namespace fused_optim
