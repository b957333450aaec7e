// The rows of the loss, compiled once for each SIMD level. Includes nothing that a linker could share between levels.
#pragma once

#include <cstdint>

#include "kd_loss.h"

namespace n2n {

struct RowTotals {
  double cross_entropy;
  double squared_distance;
  int64_t correct;
};

constexpr int64_t kMaxVectorBytes = 64;

// A row of doubles and one vector more, so that the last store may be a whole vector.
constexpr int64_t scratch_bytes(int64_t classes) { return classes * 8 + kMaxVectorBytes; }

// Rows [begin, end) of the loss. `scratch`: scratch_bytes(classes), aligned to kMaxVectorBytes.
using RowsFunction = RowTotals (*)(const KdLoss& args, int64_t begin, int64_t end, void* scratch);

namespace baseline {
RowTotals kd_loss_rows(const KdLoss& args, int64_t begin, int64_t end, void* scratch);
}
namespace avx2 {
RowTotals kd_loss_rows(const KdLoss& args, int64_t begin, int64_t end, void* scratch);
}
namespace avx512 {
RowTotals kd_loss_rows(const KdLoss& args, int64_t begin, int64_t end, void* scratch);
}

}  // namespace n2n
