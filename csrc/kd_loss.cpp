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
constexpr int64_t kStackBytes = 32768;

#ifdef N2N_FAST_X86
// Not by __builtin_cpu_supports, to which clang before 15 does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

RowsFunction rows_function(Simd simd) {
#ifdef N2N_FAST_X86
  switch (std::min(simd, best_simd())) {
    case Simd::kAvx512:
      return avx512::kd_loss_rows;
    case Simd::kAvx2:
      return avx2::kd_loss_rows;
    case Simd::kBaseline:
      break;
  }
#else
  (void)simd;
#endif
  return baseline::kd_loss_rows;
}

RowTotals rows_with_scratch(RowsFunction rows, const KdLoss& args, int64_t begin, int64_t end) {
  const int64_t bytes = scratch_bytes(args.classes);
  if (bytes <= kStackBytes) {
    alignas(kMaxVectorBytes) char scratch[kStackBytes];
    return rows(args, begin, end, scratch);
  }
  const std::unique_ptr<char[]> memory(new char[bytes + kMaxVectorBytes]);
  const uintptr_t mask = kMaxVectorBytes - 1;
  return rows(args, begin, end, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + mask) & ~mask));
}

void check_labels(const KdLoss& args) {
  const uint64_t limit = static_cast<uint64_t>(args.classes);
  bool all_good = true;
  for (int64_t n = 0; n < args.rows; ++n) all_good &= static_cast<uint64_t>(args.labels[n]) < limit;
  if (all_good) return;
  for (int64_t n = 0; n < args.rows; ++n) {
    if (static_cast<uint64_t>(args.labels[n]) < limit) continue;
    throw std::invalid_argument("labels[" + std::to_string(n) + "]: " + std::to_string(args.labels[n]) +
                                " out of range for " + std::to_string(args.classes) + " classes");
  }
}

void write_results(const KdLoss& args, const RowTotals& total) {
  const double rows = args.rows > 0 ? static_cast<double>(args.rows) : 1.0;
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
  const RowsFunction rows = rows_function(simd);
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkElements / args.classes);
  const int64_t chunks = (args.rows + chunk_rows - 1) / chunk_rows;
  const bool small = args.rows * args.classes < kParallelElements;
  std::vector<RowTotals> partial(chunks);
  parallel_for(chunks, small ? 1 : threads, [&](int64_t c) {
    partial[c] = rows_with_scratch(rows, args, c * chunk_rows, std::min((c + 1) * chunk_rows, args.rows));
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
