#include "materialize.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "thread_pool.h"

namespace n2n {
namespace {

constexpr int64_t kChunkBytes = 128 * 1024;     // what a thread claims at once
constexpr int64_t kParallelBytes = 256 * 1024;  // below this, waking a thread costs more than it saves
constexpr int64_t kRunBytes = 256;              // mean length from which channels are copied as runs

const int64_t* indices(int64_t address) { return reinterpret_cast<const int64_t*>(address); }

struct Plan;
using CopyRow = void (*)(const Plan&, const char* source, char* destination);

struct Run {
  int64_t first, length;  // channels
};

// How the rows of one result are made. A row is an output channel; its units are the kernels of its input channels.
struct Plan {
  const char* source;
  char* destination;
  const int64_t* rows;  // nullptr: all
  int64_t row_count, source_row, destination_row;
  const int64_t* units;  // nullptr: all
  int64_t unit_count, source_unit;
  int64_t lines, line_bytes, source_line;  // of a cropped unit; line_bytes is a whole unit where nothing is cropped
  std::vector<Run> runs;                   // the units, for copy_runs
  CopyRow copy_row;
};

void copy_whole(const Plan& plan, const char* source, char* destination) {
  std::memcpy(destination, source, plan.destination_row);
}

void copy_runs(const Plan& plan, const char* source, char* destination) {
  for (const Run& run : plan.runs) {
    const int64_t bytes = run.length * plan.line_bytes;
    std::memcpy(destination, source + run.first * plan.line_bytes, bytes);
    destination += bytes;
  }
}

// kBytes of a line, 0 where it is only known at run time. A constant lets memcpy become a few moves.
template <int64_t kBytes, bool kOneLine = false>
void copy_units(const Plan& plan, const char* source, char* destination) {
  const int64_t bytes = kBytes != 0 ? kBytes : plan.line_bytes, lines = kOneLine ? 1 : plan.lines;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const char* line = source + (plan.units != nullptr ? plan.units[u] : u) * plan.source_unit;
    for (int64_t l = 0; l < lines; ++l, line += plan.source_line, destination += bytes)
      std::memcpy(destination, line, bytes);
  }
}

struct UnitCopier {
  int64_t bytes;
  CopyRow one_line, lines;
};
template <int64_t kBytes>
constexpr UnitCopier kCopier{kBytes, copy_units<kBytes, true>, copy_units<kBytes>};
// Single elements, lines of three, and whole 3x3 kernels, of 2, 4 and 8 bytes an element.
constexpr UnitCopier kCopiers[] = {kCopier<2>,  kCopier<4>,  kCopier<6>,  kCopier<8>, kCopier<12>,
                                   kCopier<18>, kCopier<24>, kCopier<36>, kCopier<72>};

CopyRow unit_copier(const Plan& plan) {
  for (const UnitCopier& copier : kCopiers)
    if (copier.bytes == plan.line_bytes) return plan.lines == 1 ? copier.one_line : copier.lines;
  return copy_units<0>;
}

// Switches to copying runs where the kept channels are mostly neighbours.
void use_runs(Plan& plan) {
  std::vector<Run> runs;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    if (!runs.empty() && runs.back().first + runs.back().length == plan.units[u]) {
      ++runs.back().length;
    } else {
      runs.push_back({plan.units[u], 1});
    }
  }
  if (runs.empty() || plan.destination_row / static_cast<int64_t>(runs.size()) < kRunBytes) return;
  plan.runs = std::move(runs);
  plan.copy_row = copy_runs;
}

Plan plan_of(const Piece& piece, int64_t element_bytes, char* flat) {
  const bool cropped = piece.crop_h != piece.kernel_h || piece.crop_w != piece.kernel_w;
  Plan plan{};
  plan.source = reinterpret_cast<const char*>(piece.source) + piece.corner() * element_bytes;
  plan.destination = flat + piece.offset * element_bytes;
  plan.source_unit = piece.kernel_h * piece.kernel_w * element_bytes;
  plan.lines = cropped ? piece.crop_h : 1;
  plan.line_bytes = cropped ? piece.crop_w * element_bytes : plan.source_unit;
  plan.source_line = piece.kernel_w * element_bytes;
  plan.rows = indices(piece.keep_out);
  plan.row_count = piece.kept_out;
  plan.units = indices(piece.keep_in);
  plan.unit_count = piece.kept_in;
  if (piece.in_channels == 1 && piece.keep_in == 0) {
    // Vectors and depthwise kernels: one row whose units are the output channels, or rows would be too short.
    std::swap(plan.rows, plan.units);
    std::swap(plan.row_count, plan.unit_count);
  }
  plan.source_row = piece.in_channels * plan.source_unit;
  plan.destination_row = plan.unit_count * plan.lines * plan.line_bytes;
  plan.copy_row = plan.units == nullptr && !cropped ? copy_whole : unit_copier(plan);
  if (plan.units != nullptr && !cropped) use_runs(plan);
  return plan;
}

void copy_rows(const Plan& plan, int64_t begin, int64_t end) {
  if (plan.rows == nullptr && plan.copy_row == copy_whole) {
    std::memcpy(plan.destination + begin * plan.destination_row, plan.source + begin * plan.source_row,
                (end - begin) * plan.destination_row);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = plan.rows != nullptr ? plan.rows[row] : row;
    plan.copy_row(plan, plan.source + from * plan.source_row, plan.destination + row * plan.destination_row);
  }
}

struct Chunk {
  const Plan* plan;
  int64_t begin, end;  // rows
};

std::vector<Chunk> chunks_of(const std::vector<Plan>& plans) {
  std::vector<Chunk> chunks;
  chunks.reserve(plans.size() * 2);
  for (const Plan& plan : plans) {
    if (plan.destination_row == 0) continue;
    const int64_t step = std::max<int64_t>(1, kChunkBytes / plan.destination_row);
    for (int64_t row = 0; row < plan.row_count; row += step)
      chunks.push_back({&plan, row, std::min(row + step, plan.row_count)});
  }
  return chunks;
}

void zero_gaps(const Piece* pieces, int64_t count, int64_t element_bytes, char* flat, int64_t flat_elements) {
  for (int64_t p = 0; p < count; ++p) {
    const int64_t end = pieces[p].offset + pieces[p].elements();
    const int64_t next = p + 1 < count ? pieces[p + 1].offset : flat_elements;
    if (next > end) std::memset(flat + end * element_bytes, 0, (next - end) * element_bytes);
  }
}

void check_indices(const char* name, int64_t piece, int64_t address, int64_t kept, int64_t channels, const char* side) {
  if (address == 0) return;
  const int64_t* end = indices(address) + kept;
  const int64_t* wrong = std::find_if(indices(address), end, [&](int64_t i) { return i < 0 || i >= channels; });
  if (wrong == end) return;
  const std::string number = "[" + std::to_string(piece) + "]";
  throw std::invalid_argument(name + number + ": index " + std::to_string(*wrong) + " out of range for " +
                              std::to_string(channels) + " " + side + " channels of weights" + number);
}

}  // namespace

void check_pieces(const Piece* pieces, int64_t count, int64_t flat_elements) {
  int64_t end = 0;
  for (int64_t p = 0; p < count; ++p) {
    const Piece& piece = pieces[p];
    check_indices("keep_out", p, piece.keep_out, piece.kept_out, piece.out_channels, "output");
    check_indices("keep_in", p, piece.keep_in, piece.kept_in, piece.in_channels, "input");
    if (piece.offset < end)
      throw std::invalid_argument("materialize: result " + std::to_string(p) + " overlaps the one before it");
    // By subtraction: an offset near the largest number would make their sum a negative one.
    if (piece.elements() > flat_elements - piece.offset)
      throw std::invalid_argument("materialize: result " + std::to_string(p) + " takes " +
                                  std::to_string(piece.elements()) + " elements from " + std::to_string(piece.offset) +
                                  " on, the flat buffer has " + std::to_string(flat_elements));
    end = piece.offset + piece.elements();
  }
}

void materialize_cpu(const Piece* pieces, int64_t count, int64_t element_bytes, void* flat, int64_t flat_elements,
                     int threads) {
  check_pieces(pieces, count, flat_elements);
  char* bytes = static_cast<char*>(flat);
  std::vector<Plan> plans;
  plans.reserve(count);
  for (int64_t p = 0; p < count; ++p) plans.push_back(plan_of(pieces[p], element_bytes, bytes));
  zero_gaps(pieces, count, element_bytes, bytes, flat_elements);
  const std::vector<Chunk> chunks = chunks_of(plans);
  const bool small = flat_elements * element_bytes < kParallelBytes;
  parallel_for(static_cast<int64_t>(chunks.size()), small ? 1 : threads,
               [&](int64_t c) { copy_rows(*chunks[c].plan, chunks[c].begin, chunks[c].end); });
}

}  // namespace n2n
