#include "layout.h"

#include <algorithm>
#include <cstring>

namespace fused_optim {

bool may_overlap_itself(int ndim, const int64_t* shape, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int d = 0; d < ndim; d++) {
    if (shape[d] == 0) return false;
    if (shape[d] > 1) dims.emplace_back(strides[d], shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the largest offset the dimensions so far can make
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

bool Layout::build(int ndim, const int64_t* shape, const int64_t* const* strides,
                   unsigned streams) {
  std::vector<Dim> dims;
  for (int d = 0; d < ndim; d++) {
    if (shape[d] == 1) continue;
    Dim dim = {shape[d], {}};
    for (int s = 0; s < MAX_STREAMS; s++)
      if (streams >> s & 1) dim.strides[s] = strides[s][d];
    dims.push_back(dim);
  }
  int leading = 0;  // the param, if it is among the streams
  while (!(streams >> leading & 1)) leading++;
  std::stable_sort(dims.begin(), dims.end(), [&](const Dim& a, const Dim& b) {
    return a.strides[leading] > b.strides[leading];
  });
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    bool joins = !merged.empty();
    for (int s = 0; joins && s < MAX_STREAMS; s++)
      if (streams >> s & 1) joins = merged.back().strides[s] == dim.strides[s] * dim.size;
    if (joins) {
      const int64_t size = merged.back().size * dim.size;
      merged.back() = dim;
      merged.back().size = size;
    } else {
      merged.push_back(dim);
    }
  }

  const auto contiguous = [&](const Dim& dim) {
    for (int s = 0; s < MAX_STREAMS; s++)
      if ((streams >> s & 1) && dim.strides[s] != 1) return false;
    return true;
  };
  if (merged.empty() || (merged.size() == 1 && contiguous(merged[0]))) return true;

  col_ = merged.back();
  merged.pop_back();
  row_ = {1, {}};
  if (!merged.empty()) {
    // The first stream that does not run along the columns says which dimension makes the rows.
    size_t rows = merged.size() - 1;
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(streams >> s & 1) || col_.strides[s] == 1) continue;
      for (size_t d = 0; d < merged.size(); d++)
        if (merged[d].strides[s] < merged[rows].strides[s]) rows = d;
      break;
    }
    row_ = merged[rows];
    merged.erase(merged.begin() + rows);
  }
  outer_ = std::move(merged);
  choose_blocks(streams);
  return false;
}

void Layout::choose_blocks(unsigned streams) {
  // Whole rows of the param wherever they fit: cut rows, not the odd stream's short runs, are what
  // costs (GPT-2 with transposed grads: 2.1 times the time of matching ones with rows of 1 KiB, 1.4
  // with whole ones). Multiples of 16 rows are whole cache lines of the odd stream.
  const int64_t cuts = (col_.size + MAX_COLS - 1) / MAX_COLS;
  block_cols_ = cuts > 1 ? ((col_.size + cuts - 1) / cuts + 15) / 16 * 16 : col_.size;
  block_rows_ = std::max<int64_t>(BLOCK / block_cols_ / 16 * 16, 16);
  if (row_.size < block_rows_) {
    block_rows_ = row_.size;
    block_cols_ = std::min(col_.size, BLOCK / block_rows_);
  }
  row_blocks_ = (row_.size + block_rows_ - 1) / block_rows_;
  col_blocks_ = (col_.size + block_cols_ - 1) / block_cols_;
  n_outer_ = 1;
  for (const Dim& dim : outer_) n_outer_ *= dim.size;

  const auto whole = [&](int s) {
    return col_.strides[s] == 1 &&
           (block_rows_ == 1 || (block_cols_ == col_.size && row_.strides[s] == col_.size));
  };
  // A kernel call per row pays from 64 elements on; narrower rows are collected in a buffer.
  whole_blocks_ = block_cols_ < 64;
  if (!whole_blocks_) {
    whole_blocks_ = true;
    for (int s = 0; s < MAX_STREAMS; s++)
      if ((streams >> s & 1) && col_.strides[s] == 1 && !whole(s)) whole_blocks_ = false;
  }
  buffered_ = 0;
  for (int s = 0; s < MAX_STREAMS; s++)
    if ((streams >> s & 1) && !(whole_blocks_ ? whole(s) : col_.strides[s] == 1))
      buffered_ |= 1u << s;
}

int64_t Layout::reach(int stream) const {
  int64_t last = (row_.size - 1) * row_.strides[stream] + (col_.size - 1) * col_.strides[stream];
  for (const Dim& dim : outer_) last += (dim.size - 1) * dim.strides[stream];
  return last + 1;
}

int64_t Layout::blocks_per(int64_t numel) const {
  return std::max<int64_t>(1, numel / (block_rows_ * block_cols_));
}

namespace {

// A square of elements of 4 bytes, line by line.
typedef uint32_t Line __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(A, B, I, J, K, L) __builtin_shufflevector(A, B, I, J, K, L)
#else
#define SHUFFLE(A, B, I, J, K, L) __builtin_shuffle(A, B, (Line{I, J, K, L}))
#endif
inline void transpose(Line (&lines)[4]) {
  const Line a = SHUFFLE(lines[0], lines[1], 0, 4, 1, 5),
             b = SHUFFLE(lines[2], lines[3], 0, 4, 1, 5);
  const Line c = SHUFFLE(lines[0], lines[1], 2, 6, 3, 7),
             d = SHUFFLE(lines[2], lines[3], 2, 6, 3, 7);
  lines[0] = SHUFFLE(a, b, 0, 1, 4, 5);
  lines[1] = SHUFFLE(a, b, 2, 3, 6, 7);
  lines[2] = SHUFFLE(c, d, 0, 1, 4, 5);
  lines[3] = SHUFFLE(c, d, 2, 3, 6, 7);
}
#undef SHUFFLE

// Copies a block between a strided tensor and a buffer with rows `row_length` apart. Lines of the
// tensor that run across the buffer's are taken four at a time, so that the buffer's are written in
// runs.
template <class Element, bool TO_BUFFER>
void copy_block(Element* tensor, int64_t row_stride, int64_t col_stride, Element* buffer,
                int64_t row_length, int64_t rows, int64_t cols) {
  const auto copy = [&](int64_t r, int64_t c) {
    Element& outside = tensor[r * row_stride + c * col_stride];
    Element& inside = buffer[r * row_length + c];
    if constexpr (TO_BUFFER)
      inside = outside;
    else
      outside = inside;
  };
  if (row_stride >= col_stride) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < cols; c++) copy(r, c);
    return;
  }
  constexpr int64_t LINE = 64 / sizeof(Element), AHEAD = 16;
  int64_t c = 0;
  for (; c + 4 <= cols; c += 4) {
    // No prefetcher follows runs this short; asked for here, the lines come side by side.
    if (row_stride == 1)
      for (int64_t ahead = c + AHEAD; ahead < std::min(c + AHEAD + 4, cols); ahead++)
        for (int64_t r = 0; r < rows + LINE - 1; r += LINE)
          prefetch(tensor + ahead * col_stride + std::min(r, rows - 1));
    int64_t r = 0;
    if constexpr (sizeof(Element) == 4)
      for (; row_stride == 1 && r + 4 <= rows; r += 4) {
        Element* outside = tensor + r + c * col_stride;
        Element* inside = buffer + r * row_length + c;
        Line lines[4];
        for (int k = 0; k < 4; k++)
          std::memcpy(&lines[k], TO_BUFFER ? outside + k * col_stride : inside + k * row_length,
                      sizeof(Line));
        transpose(lines);
        for (int k = 0; k < 4; k++)
          std::memcpy(TO_BUFFER ? inside + k * row_length : outside + k * col_stride, &lines[k],
                      sizeof(Line));
      }
    for (; r < rows; r++) {
      Element* outside = tensor + r * row_stride + c * col_stride;
      Element* inside = buffer + r * row_length + c;
      Element four[4];
      for (int k = 0; k < 4; k++) four[k] = TO_BUFFER ? outside[k * col_stride] : inside[k];
      for (int k = 0; k < 4; k++) (TO_BUFFER ? inside[k] : outside[k * col_stride]) = four[k];
    }
  }
  for (; c < cols; c++)
    for (int64_t r = 0; r < rows; r++) copy(r, c);
}

template <bool TO_BUFFER>
void copy_block(int itemsize, void* tensor, int64_t row_stride, int64_t col_stride, void* buffer,
                int64_t row_length, int64_t rows, int64_t cols) {
  const auto copy = [&](auto element) {
    using E = decltype(element);
    copy_block<E, TO_BUFFER>(static_cast<E*>(tensor), row_stride, col_stride,
                             static_cast<E*>(buffer), row_length, rows, cols);
  };
  if (itemsize == 2)
    copy(uint16_t{});
  else if (itemsize == 4)
    copy(uint32_t{});
  else
    copy(uint64_t{});
}

}  // namespace

void Layout::run_blocks(const std::function<void(const Slice&)>& kernel, const Slice& slice,
                        unsigned streams, unsigned written, int64_t begin, int64_t end) const {
  // Kept by each thread; at most 576 KiB for each odd stream, 288 of float32.
  static thread_local std::vector<unsigned char> memory;
  unsigned char* buffers[MAX_STREAMS] = {};
  size_t n_buffered = 0;
  for (int s = 0; s < MAX_STREAMS; s++) n_buffered += buffered_ >> s & 1;
  if (memory.size() < n_buffered * BUFFER * sizeof(double) + 64)
    memory.resize(n_buffered * BUFFER * sizeof(double) + 64);
  unsigned char* next = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  for (int s = 0; s < MAX_STREAMS; s++)
    if (buffered_ >> s & 1) {
      buffers[s] = next;
      next += BUFFER * ITEMSIZE[slice.dtypes[s]];
    }
  for (int64_t block = begin; block < end; block++) {
    int64_t rest = block;
    const int64_t col = rest % col_blocks_ * block_cols_;
    rest /= col_blocks_;
    const int64_t row = rest % row_blocks_ * block_rows_;
    rest /= row_blocks_;
    int64_t offsets[MAX_STREAMS];
    for (int s = 0; s < MAX_STREAMS; s++)
      offsets[s] = row * row_.strides[s] + col * col_.strides[s];
    for (size_t d = outer_.size(); d-- > 0; rest /= outer_[d].size)
      for (int s = 0; s < MAX_STREAMS; s++)
        offsets[s] += rest % outer_[d].size * outer_[d].strides[s];

    const int64_t rows = std::min(block_rows_, row_.size - row);
    const int64_t cols = std::min(block_cols_, col_.size - col);
    // The padding keeps rows a power of two long from falling into the same few cache sets.
    const int64_t row_length = whole_blocks_ ? cols : cols + PADDING;
    Slice part = slice;
    for (int s = 0; s < MAX_STREAMS; s++) {
      if (!(streams >> s & 1)) continue;
      const int itemsize = ITEMSIZE[slice.dtypes[s]];
      part.streams[s] = static_cast<char*>(slice.streams[s]) + offsets[s] * itemsize;
      if (buffered_ >> s & 1) {
        copy_block<true>(itemsize, part.streams[s], row_.strides[s], col_.strides[s], buffers[s],
                         row_length, rows, cols);
        part.streams[s] = buffers[s];
      }
    }
    if (whole_blocks_) {
      part.numel = rows * cols;
      kernel(part);
    } else {
      part.numel = cols;
      for (int64_t r = 0; r < rows; r++) {
        kernel(part);
        for (int s = 0; s < MAX_STREAMS; s++)
          if (streams >> s & 1)
            part.streams[s] =
                static_cast<char*>(part.streams[s]) +
                (buffered_ >> s & 1 ? row_length : row_.strides[s]) * ITEMSIZE[slice.dtypes[s]];
      }
    }
    for (int s = 0; s < MAX_STREAMS; s++)
      if (buffered_ & written & 1u << s) {
        const int itemsize = ITEMSIZE[slice.dtypes[s]];
        copy_block<false>(itemsize, static_cast<char*>(slice.streams[s]) + offsets[s] * itemsize,
                          row_.strides[s], col_.strides[s], buffers[s], row_length, rows, cols);
      }
  }
}

}  // namespace fused_optim
