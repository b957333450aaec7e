// Student weights from teacher tensors: kept output and input channels of each, kernels cropped at their centre.
#pragma once

#include <cstdint>

namespace n2n {

// One weight (O, I, kh, kw), contiguous; a vector is (O, 1, 1, 1), a matrix (O, I, 1, 1). Python passes a table of
// these as int64, field by field. Sizes are in elements.
struct Piece {
  int64_t source;  // address
  int64_t out_channels, in_channels, kernel_h, kernel_w;
  int64_t kept_out, kept_in, crop_h, crop_w;  // the result's sizes
  int64_t keep_out, keep_in;                  // addresses of the kept channels' int64 indices; 0: all
  int64_t offset;                             // of the result in the flat buffer

  int64_t elements() const { return kept_out * kept_in * crop_h * crop_w; }
  int64_t corner() const { return (kernel_h - crop_h) / 2 * kernel_w + (kernel_w - crop_w) / 2; }  // first element kept
};
static_assert(sizeof(Piece) == 12 * sizeof(int64_t), "a piece is twelve int64 in Python's table");

// Throws std::invalid_argument, naming the argument, where an index is out of range or a result leaves the flat buffer.
// Pieces must lie in the flat buffer in order. Indices must be readable by the host.
void check_pieces(const Piece* pieces, int64_t count, int64_t flat_elements);

// Fills `flat`; the elements between results are set to zero. Checks first: on a throw nothing has been written.
void materialize_cpu(const Piece* pieces, int64_t count, int64_t element_bytes, void* flat, int64_t flat_elements,
                     int threads);

// On a GPU the table and the indices travel in one copy. `pack_words` tells how many int64 that takes; `pack` checks,
// fills them (host memory) and returns the number of blocks to launch; `materialize_cuda` launches once, on `stream`,
// of the current device, with `packed` being the copy in the device's memory.
int64_t materialize_pack_words(const Piece* pieces, int64_t count);
int64_t materialize_pack(const Piece* pieces, int64_t count, int64_t element_bytes, int64_t flat_elements,
                         int64_t* packed);
void materialize_cuda(const int64_t* packed, int64_t count, int64_t blocks, int64_t element_bytes, void* flat,
                      int64_t stream);

}  // namespace n2n
