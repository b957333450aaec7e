// One launch makes a whole student: a block copies one tile of one result.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_check.h"
#include "materialize.h"

namespace n2n {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTile = 4096;  // elements of a result that one block writes
constexpr int64_t kAll = -1;     // in place of the position of indices

// A piece as the device sees it; sizes and strides in elements, positions in int64 words of the packed buffer.
struct Job {
  int64_t source;                 // address of the first kernel's first kept element
  int64_t offset, elements, end;  // of the result in the flat buffer; `end` includes the gap behind it
  int64_t first_block;
  int64_t rows, units;  // positions of the indices, or kAll
  int64_t row_elements, source_row;
  int64_t unit_elements, source_unit;
  int64_t line_elements, source_line;
};
constexpr int64_t kJobWords = sizeof(Job) / sizeof(int64_t);

int64_t blocks_of(const Piece& piece) {
  const int64_t tiles = (piece.elements() + kTile - 1) / kTile;
  return tiles > 0 ? tiles : 1;  // an empty result still has a gap behind it
}

Job job_of(const Piece& piece, int64_t element_bytes, int64_t end, int64_t first_block) {
  Job job{};
  job.source = piece.source + piece.corner() * element_bytes;
  job.offset = piece.offset;
  job.elements = piece.elements();
  job.end = end;
  job.first_block = first_block;
  job.unit_elements = piece.crop_h * piece.crop_w;
  job.row_elements = piece.kept_in * job.unit_elements;
  job.source_unit = piece.kernel_h * piece.kernel_w;
  job.source_row = piece.in_channels * job.source_unit;
  job.line_elements = piece.crop_w;
  job.source_line = piece.kernel_w;
  if (job.row_elements > (int64_t{1} << 30))
    throw std::invalid_argument("materialize: more than 2^30 elements in one output channel");
  return job;
}

// Copies the indices to `packed` at `position`, which moves on.
int64_t pack_indices(int64_t address, int64_t kept, int64_t* packed, int64_t& position) {
  if (address == 0) return kAll;
  std::copy_n(reinterpret_cast<const int64_t*>(address), kept, packed + position);
  return std::exchange(position, position + kept);
}

template <class T>
__device__ bool all_aligned(const T* a, const T* b, int64_t row_elements, int64_t source_row) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | (row_elements * sizeof(T)) |
                    (source_row * sizeof(T));
  return bits % sizeof(uint4) == 0;
}

// Elements [begin, end) of whole rows, 16 bytes at once.
template <class T>
__device__ void copy_rows(const Job& job, const int64_t* packed, T* result, int64_t begin, int64_t end) {
  constexpr int64_t kWide = sizeof(uint4) / sizeof(T);
  const T* source = reinterpret_cast<const T*>(job.source);
  for (int64_t e = begin + threadIdx.x * kWide; e < end; e += kThreads * kWide) {
    const int64_t row = e / job.row_elements, column = e - row * job.row_elements;
    const int64_t from = job.rows == kAll ? row : packed[job.rows + row];
    *reinterpret_cast<uint4*>(result + e) = *reinterpret_cast<const uint4*>(source + from * job.source_row + column);
  }
}

// Elements [begin, end), one by one. Within a tile 32 bits are enough to divide with.
template <class T>
__device__ void copy_elements(const Job& job, const int64_t* packed, T* result, int64_t begin, int64_t end) {
  const T* source = reinterpret_cast<const T*>(job.source);
  const unsigned row_elements = static_cast<unsigned>(job.row_elements);
  const unsigned unit_elements = static_cast<unsigned>(job.unit_elements);
  const unsigned line_elements = static_cast<unsigned>(job.line_elements);
  const int64_t first_row = begin / job.row_elements;
  const unsigned before = static_cast<unsigned>(begin - first_row * job.row_elements);
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
    const unsigned place = before + static_cast<unsigned>(e - begin);
    const unsigned row = place / row_elements, in_row = place % row_elements;
    const unsigned unit = in_row / unit_elements, in_unit = in_row % unit_elements;
    const unsigned line = in_unit / line_elements, column = in_unit % line_elements;
    const int64_t from_row = job.rows == kAll ? first_row + row : packed[job.rows + first_row + row];
    const int64_t from_unit = job.units == kAll ? unit : packed[job.units + unit];
    result[e] = source[from_row * job.source_row + from_unit * job.source_unit + line * job.source_line + column];
  }
}

// T: any type of the elements' size.
template <class T>
__global__ void __launch_bounds__(kThreads) materialize_kernel(const int64_t* packed, int64_t count, T* flat) {
  const Job* jobs = reinterpret_cast<const Job*>(packed);
  const int64_t* job_of_block = packed + count * kJobWords;
  const Job job = jobs[job_of_block[blockIdx.x]];
  T* result = flat + job.offset;
  const int64_t begin = (blockIdx.x - job.first_block) * kTile;
  const int64_t end = begin + kTile < job.elements ? begin + kTile : job.elements;
  if (begin < end) {
    const bool whole_rows = job.units == kAll && job.row_elements == job.source_row;
    if (whole_rows && all_aligned(reinterpret_cast<const T*>(job.source), result, job.row_elements, job.source_row)) {
      copy_rows(job, packed, result, begin, end);
    } else {
      copy_elements(job, packed, result, begin, end);
    }
  }
  if (begin + kTile < job.elements) return;
  for (int64_t e = job.offset + job.elements + threadIdx.x; e < job.end; e += kThreads) flat[e] = T{};
}

}  // namespace

int64_t materialize_pack_words(const Piece* pieces, int64_t count) {
  int64_t words = count * kJobWords;
  for (int64_t p = 0; p < count; ++p) {
    words += blocks_of(pieces[p]);
    words += pieces[p].keep_out != 0 ? pieces[p].kept_out : 0;
    words += pieces[p].keep_in != 0 ? pieces[p].kept_in : 0;
  }
  return words;
}

int64_t materialize_pack(const Piece* pieces, int64_t count, int64_t element_bytes, int64_t flat_elements,
                         int64_t* packed) {
  check_pieces(pieces, count, flat_elements);
  int64_t blocks = 0;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t end = p + 1 < count ? pieces[p + 1].offset : flat_elements;
    reinterpret_cast<Job*>(packed)[p] = job_of(pieces[p], element_bytes, end, blocks);
    for (const int64_t last = blocks + blocks_of(pieces[p]); blocks < last; ++blocks)
      packed[count * kJobWords + blocks] = p;
  }
  int64_t position = count * kJobWords + blocks;
  for (int64_t p = 0; p < count; ++p) {
    Job& job = reinterpret_cast<Job*>(packed)[p];
    job.rows = pack_indices(pieces[p].keep_out, pieces[p].kept_out, packed, position);
    job.units = pack_indices(pieces[p].keep_in, pieces[p].kept_in, packed, position);
  }
  return blocks;
}

void materialize_cuda(const int64_t* packed, int64_t count, int64_t blocks, int64_t element_bytes, void* flat,
                      int64_t stream) {
  const auto launch_as = [&](auto* elements, auto* kernel) {
    launch("materialize", kernel, blocks, kThreads, stream, packed, count, elements);
  };
  switch (element_bytes) {
    case 2:
      return launch_as(static_cast<uint16_t*>(flat), materialize_kernel<uint16_t>);
    case 4:
      return launch_as(static_cast<uint32_t*>(flat), materialize_kernel<uint32_t>);
    case 8:
      return launch_as(static_cast<uint64_t*>(flat), materialize_kernel<uint64_t>);
  }
  throw std::invalid_argument("materialize: expected elements of 2, 4 or 8 bytes, got " +
                              std::to_string(element_bytes));
}

}  // namespace n2n
