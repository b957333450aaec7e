#include "kd_loss.h"

#ifdef N2N_FAST_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kd_loss_rows.h"
#include "thread_pool.h"

namespace n2n {
namespace {

constexpr int64_t kChunkElements = 8192;        // what a thread claims at once; also fixes the order of the sum
constexpr int64_t kParallelElements = 1 << 18;  // below this, waking a thread costs more than it saves

#ifdef N2N_FAST_X86
// Not by __builtin_cpu_supports, to which clang before 15 does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
constexpr RowsFunction* kBySimd[] = {baseline::kd_loss_rows, avx2::kd_loss_rows, avx512::kd_loss_rows};
#else
constexpr RowsFunction* kBySimd[] = {baseline::kd_loss_rows};
#endif

void check_labels(const KdLoss& args) {
  for (int64_t n = 0; n < args.rows; ++n)
    if (args.labels[n] < 0 || args.labels[n] >= args.classes)
      throw std::invalid_argument("labels[" + std::to_string(n) + "]: " + std::to_string(args.labels[n]) +
                                  " out of range for " + std::to_string(args.classes) + " classes");
}

void write_results(const KdLoss& args, const RowTotals& total) {
  const auto rows = static_cast<double>(std::max<int64_t>(1, args.rows));
  const double loss = (total.cross_entropy + args.kd_weight * total.squared_distance) / rows;
  if (args.dtype == DType::kFloat64) {
    *static_cast<double*>(args.loss) = loss;
  } else {
    *static_cast<float*>(args.loss) = static_cast<float>(loss);
  }
  *args.correct = total.correct;
}

}  // namespace

Simd best_simd() {
#ifdef N2N_FAST_X86
  static const Simd best = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? Simd::kAvx512 : Simd::kAvx2) : Simd::kBaseline;
  }();
  return best;
#else
  return Simd::kBaseline;
#endif
}

void kd_loss_cpu(const KdLoss& args, int threads, Simd simd) {
  check_labels(args);
  RowsFunction* const rows = kBySimd[static_cast<int>(std::min(simd, best_simd()))];
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkElements / args.classes);
  const int64_t chunks = (args.rows + chunk_rows - 1) / chunk_rows;
  const bool small = args.rows * args.classes < kParallelElements;
  std::vector<RowTotals> partial(chunks);
  parallel_for(chunks, small ? 1 : threads, [&](int64_t c) {
    const std::unique_ptr<Scratch[]> scratch(new Scratch[scratch_size(args.classes)]);  // not set to zero
    partial[c] = rows(args, c * chunk_rows, std::min((c + 1) * chunk_rows, args.rows), scratch.get());
  });
  RowTotals total{};
  for (const RowTotals& part : partial) {
    total.cross_entropy += part.cross_entropy;
    total.squared_distance += part.squared_distance;
    total.correct += part.correct;
  }
  write_results(args, total);
}

}  // namespace n2n
