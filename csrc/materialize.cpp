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
  const Run* runs;
  int64_t run_count;
  void (*copy_row)(const Plan&, const char*, char*);
};

void copy_whole(const Plan& plan, const char* source, char* destination) {
  std::memcpy(destination, source, plan.destination_row);
}

void copy_runs(const Plan& plan, const char* source, char* destination) {
  for (int64_t r = 0; r < plan.run_count; ++r) {
    const int64_t bytes = plan.runs[r].length * plan.line_bytes;
    std::memcpy(destination, source + plan.runs[r].first * plan.line_bytes, bytes);
    destination += bytes;
  }
}

// kBytes of a line, 0 where it is only known at run time. A constant lets memcpy become a few moves.
template <int64_t kBytes>
void copy_units(const Plan& plan, const char* source, char* destination) {
  const int64_t bytes = kBytes != 0 ? kBytes : plan.line_bytes;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const char* line = source + (plan.units != nullptr ? plan.units[u] : u) * plan.source_unit;
    for (int64_t l = 0; l < plan.lines; ++l, line += plan.source_line, destination += bytes)
      std::memcpy(destination, line, bytes);
  }
}

template <int64_t kBytes>
void gather_units(const Plan& plan, const char* source, char* destination) {
  for (int64_t u = 0; u < plan.unit_count; ++u, destination += kBytes)
    std::memcpy(destination, source + plan.units[u] * plan.source_unit, kBytes);
}

using CopyRow = void (*)(const Plan&, const char*, char*);

// Single elements, lines of three, and whole 3x3 kernels, of 2, 4 and 8 bytes an element.
CopyRow unit_copier(const Plan& plan) {
  const bool gather = plan.units != nullptr && plan.lines == 1;
  switch (plan.line_bytes) {
    case 2:
      return gather ? gather_units<2> : copy_units<2>;
    case 4:
      return gather ? gather_units<4> : copy_units<4>;
    case 6:
      return gather ? gather_units<6> : copy_units<6>;
    case 8:
      return gather ? gather_units<8> : copy_units<8>;
    case 12:
      return gather ? gather_units<12> : copy_units<12>;
    case 18:
      return gather ? gather_units<18> : copy_units<18>;
    case 24:
      return gather ? gather_units<24> : copy_units<24>;
    case 36:
      return gather ? gather_units<36> : copy_units<36>;
    case 72:
      return gather ? gather_units<72> : copy_units<72>;
    default:
      return copy_units<0>;
  }
}

std::vector<Run> runs_of(const int64_t* units, int64_t count) {
  std::vector<Run> runs;
  for (int64_t u = 0; u < count; ++u) {
    if (!runs.empty() && runs.back().first + runs.back().length == units[u]) {
      ++runs.back().length;
    } else {
      runs.push_back({units[u], 1});
    }
  }
  return runs;
}

Plan plan_of(const Piece& piece, int64_t element_bytes, char* flat) {
  const bool cropped = piece.crop_h != piece.kernel_h || piece.crop_w != piece.kernel_w;
  const int64_t top = (piece.kernel_h - piece.crop_h) / 2, left = (piece.kernel_w - piece.crop_w) / 2;
  Plan plan{};
  plan.source = reinterpret_cast<const char*>(piece.source) + (top * piece.kernel_w + left) * element_bytes;
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
  return plan;
}

// Switches to copying runs where the kept channels are mostly neighbours.
void use_runs(Plan& plan, std::vector<std::vector<Run>>& storage) {
  if (plan.units == nullptr || plan.lines != 1 || plan.line_bytes != plan.source_unit || plan.unit_count == 0) return;
  std::vector<Run> runs = runs_of(plan.units, plan.unit_count);
  if (plan.destination_row / static_cast<int64_t>(runs.size()) < kRunBytes) return;
  plan.run_count = static_cast<int64_t>(runs.size());
  storage.push_back(std::move(runs));  // moving a vector keeps its elements where they are
  plan.runs = storage.back().data();
  plan.copy_row = copy_runs;
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
    std::memset(flat + end * element_bytes, 0, (next - end) * element_bytes);
  }
}

void check_indices(const char* name, int64_t piece, int64_t address, int64_t kept, int64_t channels, const char* side) {
  if (address == 0) return;
  const int64_t* index = indices(address);
  const uint64_t limit = static_cast<uint64_t>(channels);
  bool all_good = true;
  for (int64_t k = 0; k < kept; ++k) all_good &= static_cast<uint64_t>(index[k]) < limit;
  if (all_good) return;
  for (int64_t k = 0; k < kept; ++k) {
    if (static_cast<uint64_t>(index[k]) < limit) continue;
    const std::string number = std::to_string(piece);
    throw std::invalid_argument(std::string(name) + "[" + number + "]: index " + std::to_string(index[k]) +
                                " out of range for " + std::to_string(channels) + " " + side + " channels of weights[" +
                                number + "]");
  }
}

}  // namespace

void check_pieces(const Piece* pieces, int64_t count, int64_t flat_elements) {
  int64_t end = 0;
  for (int64_t p = 0; p < count; ++p) {
    check_indices("keep_out", p, pieces[p].keep_out, pieces[p].kept_out, pieces[p].out_channels, "output");
    check_indices("keep_in", p, pieces[p].keep_in, pieces[p].kept_in, pieces[p].in_channels, "input");
    if (pieces[p].offset < end)
      throw std::invalid_argument("materialize: result " + std::to_string(p) + " overlaps the one before it");
    // By subtraction: an offset near the largest number would make their sum a negative one.
    if (pieces[p].elements() > flat_elements - pieces[p].offset)
      throw std::invalid_argument("materialize: result " + std::to_string(p) + " takes " +
                                  std::to_string(pieces[p].elements()) + " elements from " +
                                  std::to_string(pieces[p].offset) + " on, the flat buffer has " +
                                  std::to_string(flat_elements));
    end = pieces[p].offset + pieces[p].elements();
  }
}

void materialize_cpu(const Piece* pieces, int64_t count, int64_t element_bytes, void* flat, int64_t flat_elements,
                     int threads) {
  check_pieces(pieces, count, flat_elements);
  char* bytes = static_cast<char*>(flat);
  std::vector<Plan> plans;
  std::vector<std::vector<Run>> runs;
  plans.reserve(count);
  for (int64_t p = 0; p < count; ++p) {
    plans.push_back(plan_of(pieces[p], element_bytes, bytes));
    use_runs(plans.back(), runs);
  }
  zero_gaps(pieces, count, element_bytes, bytes, flat_elements);
  const std::vector<Chunk> chunks = chunks_of(plans);
  const bool small = flat_elements * element_bytes < kParallelBytes;
  parallel_for(static_cast<int64_t>(chunks.size()), small ? 1 : threads,
               [&](int64_t c) { copy_rows(*chunks[c].plan, chunks[c].begin, chunks[c].end); });
}

}  // namespace n2n
