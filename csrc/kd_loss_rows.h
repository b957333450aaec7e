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

// Memory of the widest vector.
struct alignas(64) Scratch {
  char bytes[64];
};

// How many of these a call needs: a row of doubles and one vector more, so that the last store may be a whole vector.
constexpr int64_t scratch_size(int64_t classes) { return classes / 8 + 2; }

// Rows [begin, end) of the loss.
using RowsFunction = RowTotals(const KdLoss& args, int64_t begin, int64_t end, Scratch* scratch);

namespace baseline {
RowsFunction kd_loss_rows;
}
namespace avx2 {
RowsFunction kd_loss_rows;
}
namespace avx512 {
RowsFunction kd_loss_rows;
}

}  // namespace n2n
