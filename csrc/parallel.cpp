#include "parallel.h"

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_optim {

namespace {

// Multiples of SCALE_BLOCK, the widest granularity of a storage format. 16 K elements of AdamW in
// float32 are 448 KiB, about 20 us: short enough to balance, long enough to hide the scheduling. A
// chunk begins with memory that nothing has prefetched. So large steps have larger ones: 256 K
// instead of 16 K takes 3% off AdamW in float32, 10% off AdamW and 12% off SGD in bfloat16 (GPT-2
// small, 2 threads of an AMD EPYC); 4 M no more.
constexpr int64_t CHUNK = 16384, LARGE_CHUNK = 262144;
// A chunk is at most such a part of each thread's share of what is left: the last ones to end are
// small, and keep no other thread waiting. (2 to 4% off AdamW, GPT-2 small, 2 threads of an Intel
// Xeon, where all chunks had been a 64th of the share.)
constexpr int64_t CHUNKS_PER_THREAD = 8;
// Below this many elements in the whole step, waking a second thread costs more than it saves.
constexpr int64_t SERIAL = 65536;

// Either whole tasks [task, task_end), or the part [begin, end) of one: elements, or blocks of its
// layout.
struct Unit {
  uint32_t task, task_end;
  int64_t begin, end;
};

// The caller's torch.set_flush_denormal, for all threads, so that bits do not depend on the thread.
#if defined(__x86_64__)
using FloatMode = unsigned;
FloatMode float_mode() { return _mm_getcsr(); }
void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__) && defined(__GNUC__)
using FloatMode = uint64_t;
FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
FloatMode float_mode() { return 0; }
void set_float_mode(FloatMode) {}
#endif

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
// An OpenMP region hangs in a forked child of a process that has had one (measured, libgomp).
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

void run_part(const Task& task, const std::vector<Layout>& layouts, int64_t begin, int64_t end) {
  if (task.layout >= 0) {
    layouts[task.layout].run_blocks(task.kernel, task.slice, task.streams, task.written, begin,
                                    end);
    return;
  }
  Slice part = task.slice;
  part.numel = end - begin;
  part.first = begin;
  if (part.remainder != nullptr)
    part.remainder = static_cast<char*>(part.remainder) + begin * part.remainder_itemsize();
  for (int s = 0; s < MAX_STREAMS; s++)
    if (task.streams >> s & 1)
      part.streams[s] = static_cast<char*>(part.streams[s]) + begin * ITEMSIZE[part.dtypes[s]];
  task.kernel(part);
}

int64_t n_parts(const Task& task, const std::vector<Layout>& layouts) {
  return task.layout >= 0 ? layouts[task.layout].n_blocks() : task.slice.numel;
}

void run_unit(const Unit& unit, const std::vector<Task>& tasks,
              const std::vector<Layout>& layouts) {
  if (unit.task_end == unit.task + 1)
    return run_part(tasks[unit.task], layouts, unit.begin, unit.end);
  for (uint32_t t = unit.task; t < unit.task_end; t++)
    run_part(tasks[t], layouts, 0, n_parts(tasks[t], layouts));
}

bool is_serial(int64_t numel, int num_threads) {
  return num_threads <= 1 || numel < SERIAL || forked;
}

}  // namespace

void spread(size_t n, int64_t numel, int num_threads, const std::function<void(size_t)>& work) {
#if defined(_OPENMP)
  if (!is_serial(numel, num_threads)) {
    const FloatMode mode = float_mode();
    std::atomic<size_t> next{0};
#pragma omp parallel num_threads(num_threads)
    {
      const FloatMode own = float_mode();
      set_float_mode(mode);
      for (size_t i = next++; i < n; i = next++) work(i);
      set_float_mode(own);
    }
    return;
  }
#endif
  for (size_t i = 0; i < n; i++) work(i);
}

std::vector<std::pair<int64_t, int64_t>> chunks(int64_t numel) {
  std::vector<std::pair<int64_t, int64_t>> cut;
  for (int64_t begin = 0; begin < numel; begin += CHUNK)
    cut.emplace_back(begin, std::min(begin + CHUNK, numel));
  return cut;
}

void run(const std::vector<Task>& tasks, const std::vector<Layout>& layouts, int num_threads) {
  int64_t total = 0;
  for (const Task& task : tasks) total += task.slice.numel;
  if (is_serial(total, num_threads)) {
    for (const Task& task : tasks) run_part(task, layouts, 0, n_parts(task, layouts));
    return;
  }

  int64_t left = total;
  const auto next_chunk = [&] {
    const int64_t share = left / (CHUNKS_PER_THREAD * num_threads) / SCALE_BLOCK * SCALE_BLOCK;
    return std::clamp(share, CHUNK, LARGE_CHUNK);
  };
  static thread_local std::vector<Unit> units;  // kept: a step allocates nothing that grows
  units.clear();
  int64_t gathered = 0;  // elements of the small tasks that the last unit is made of
  for (uint32_t t = 0; t < tasks.size(); t++) {
    const Task& task = tasks[t];
    int64_t chunk = next_chunk();
    if (task.slice.numel >= chunk) {
      const int64_t parts = n_parts(task, layouts), behind = left - task.slice.numel;
      for (int64_t begin = 0, end; begin < parts; begin = end) {
        left = behind + (parts - begin) * (task.slice.numel / parts);
        chunk = next_chunk();
        end = begin + (task.layout >= 0 ? layouts[task.layout].blocks_per(chunk) : chunk);
        end = std::min(end, parts);
        units.push_back({t, t + 1, begin, end});
      }
      left = behind;
      gathered = 0;
      continue;
    } else if (gathered > 0 && gathered + task.slice.numel <= chunk) {
      units.back().task_end = t + 1;
      gathered += task.slice.numel;
    } else {
      units.push_back({t, t + 1, 0, n_parts(task, layouts)});
      gathered = std::max<int64_t>(task.slice.numel, 1);
    }
    left -= task.slice.numel;
  }

  const std::vector<Unit>& work = units;  // the workers' own thread_local units are empty
  spread(work.size(), total, num_threads, [&](size_t u) { run_unit(work[u], tasks, layouts); });
}

const char* openmp_library() {
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) && info.dli_fname)
    return info.dli_fname;
#endif
  return "";
}

}  // namespace fused_optim
