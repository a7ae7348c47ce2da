// Tensors whose streams do not share one contiguous order (a transposed grad, a sliced param).
//
// A layout visits them in 2-D blocks: `rows` of the dimension in which the odd stream runs fastest
// by `cols` of the innermost dimension of the param. Streams that are not contiguous over a block
// pass through a buffer. Many rows: with fewer than 16, every cache line of the odd stream would
// be fetched again for each row.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernel.h"

namespace fused_optim {

class Layout {
 public:
  // strides[s]: those of stream s, ndim each, in elements; null where bit s of `streams` is 0.
  // Returns whether all streams are contiguous in one common order (then no layout is needed).
  bool build(int ndim, const int64_t* shape, const int64_t* const* strides, unsigned streams);

  // Elements from the first to behind the last one of a stream.
  int64_t reach(int stream) const;
  int64_t n_blocks() const { return n_outer_ * row_blocks_ * col_blocks_; }
  // How many blocks make about `numel` elements.
  int64_t blocks_per(int64_t numel) const;
  // Calls `kernel` for runs that are contiguous in every stream, always cut in the same way.
  void run_blocks(const std::function<void(const Slice&)>& kernel, const Slice& slice,
                  unsigned streams, unsigned written, int64_t begin, int64_t end) const;

 private:
  // Elements. A block has about BLOCK of them, at most 16 * MAX_COLS, and rows are padded from 64
  // columns on.
  static constexpr int64_t BLOCK = 32768, MAX_COLS = 4096, PADDING = 16;
  static constexpr int64_t BUFFER = 16 * MAX_COLS + BLOCK / 64 * PADDING;

  struct Dim {
    int64_t size;
    int64_t strides[MAX_STREAMS];
  };
  void choose_blocks(unsigned streams);

  std::vector<Dim> outer_;
  Dim row_, col_;
  int64_t n_outer_, row_blocks_, col_blocks_, block_rows_, block_cols_;
  unsigned buffered_;  // bit s: stream s passes through a buffer
  bool whole_blocks_;  // the other streams are contiguous over a block, not only over its rows
};

// True if two elements of the tensor may share memory (exact for what strided views produce).
bool may_overlap_itself(int ndim, const int64_t* shape, const int64_t* strides);

}  // namespace fused_optim
