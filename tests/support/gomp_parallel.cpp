// The one function of libgomp that csrc/parallel.cpp needs, on std::thread: ThreadSanitizer does
// not see how libgomp's own threads wait for one another. For `make sanitize-threads`.
#include <atomic>
#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*region)(void*), void* data, unsigned num_threads, unsigned) {
  // All begin together: a thread that comes late, to nothing, shows no race.
  std::atomic<unsigned> waiting{num_threads};
  const auto run = [&] {
    waiting--;
    while (waiting != 0) std::this_thread::yield();
    region(data);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < num_threads; i++) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
}
