// Streams of whole tensors outside of a step: decoded to float32, or encoded from it.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "storage.h"

namespace fused_optim {

namespace {

// Calls work(part, values) for parts of the stream that are whole blocks, the last one in buffers.
template <class Work>
void for_parts(const Slice& slice, int stream, float* values, bool stores, int num_threads,
               Work work) {
  constexpr int64_t PART = 256 * SCALE_BLOCK;
  const int itemsize = ITEMSIZE[slice.dtypes[stream]];
  const int rest_size = slice.remainder_itemsize();
  const int64_t whole = slice.numel / SCALE_BLOCK * SCALE_BLOCK;
  const auto at = [](void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; };
  const size_t n_parts = static_cast<size_t>((whole + PART - 1) / PART);
  spread(n_parts, whole, num_threads, [&](size_t p) {
    Slice part = slice;
    part.first = static_cast<int64_t>(p) * PART;
    part.numel = std::min(PART, whole - part.first);
    part.streams[stream] = at(slice.streams[stream], part.first * itemsize);
    if (rest_size != 0) part.remainder = at(slice.remainder, part.first * rest_size);
    work(part, values + part.first);
  });
  const int64_t rest = slice.numel - whole;
  if (rest == 0) return;
  unsigned char codes[SCALE_BLOCK * 4] = {}, remainders[SCALE_BLOCK * 2] = {};
  float tile[SCALE_BLOCK] = {};
  Slice part = slice;
  part.first = whole;
  part.numel = SCALE_BLOCK;
  part.streams[stream] = codes;
  if (rest_size != 0) part.remainder = remainders;
  char* const stream_end = at(slice.streams[stream], whole * itemsize);
  if (stores) {
    std::memcpy(tile, values + whole, rest * sizeof(float));
    work(part, tile);
    std::memcpy(stream_end, codes, rest * itemsize);
    if (rest_size != 0)
      std::memcpy(at(slice.remainder, whole * rest_size), remainders, rest * rest_size);
  } else {
    std::memcpy(codes, stream_end, rest * itemsize);
    if (rest_size != 0)
      std::memcpy(remainders, at(slice.remainder, whole * rest_size), rest * rest_size);
    work(part, tile);
    std::memcpy(values + whole, tile, rest * sizeof(float));
  }
}

}  // namespace

void unpack(const Slice& slice, int stream, float* values, int num_threads) {
  for_parts(slice, stream, values, false, num_threads,
            [&](const Slice& part, float* to) { current_isa().load_stream(part, stream, to); });
}

void pack(const Slice& slice, int stream, const float* values, int num_threads) {
  for_parts(
      slice, stream, const_cast<float*>(values), true, num_threads,
      [&](const Slice& part, float* from) { current_isa().store_stream(part, stream, from); });
}

}  // namespace fused_optim
