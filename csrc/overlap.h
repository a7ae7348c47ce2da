// Finds the tensors of a step that share memory which one of them writes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace fused_optim {

struct Range {  // memory of one tensor of a task
  const char *begin, *end;
  size_t task;
};

// The memory that a step writes. Compared are ranges from first to last element, so interleaved
// views of one buffer count as sharing.
class Written {
 public:
  void clear() { ranges_.clear(); }
  void add(const Range& range) { ranges_.push_back(range); }

  // Call it once after the last add(). mark(task): of each task that shares with another one.
  template <class Mark>
  void sort(Mark mark) {
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (size_t r = 1, widest = 0; r < ranges_.size(); r++) {
      if (ranges_[r].begin < ranges_[widest].end) {
        mark(ranges_[r].task);
        mark(ranges_[widest].task);
      }
      if (ranges_[r].end > ranges_[widest].end) widest = r;
    }
    reach_.clear();
    for (const Range& range : ranges_)
      reach_.push_back(reach_.empty() ? range.end : std::max(reach_.back(), range.end));
  }

  // mark(task): of the reader, and of each task that writes what it reads.
  template <class Mark>
  void find(const Range& read, Mark mark) const {
    const auto first = std::upper_bound(reach_.begin(), reach_.end(), read.begin);
    for (size_t r = first - reach_.begin(); r < ranges_.size() && ranges_[r].begin < read.end; r++)
      if (ranges_[r].end > read.begin) {
        mark(read.task);
        mark(ranges_[r].task);
      }
  }

 private:
  std::vector<Range> ranges_;
  std::vector<const char*> reach_;  // the largest end so far
};

}  // namespace fused_optim
