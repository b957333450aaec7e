// A warp for a row of few classes, a block for a row of many. Each block leaves one partial sum; a second launch adds
// these in a fixed order. Where a row fits a thread group's registers, its logits are read once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda_check.h"
#include "kd_loss.h"

namespace n2n {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;
constexpr int kRowThreads = 128;    // of a block whose warps take a row each
constexpr int kBlockThreads = 512;  // of a block that takes a row
constexpr int kTotalThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

// What a block leaves for the second launch.
struct Partial {
  double cross_entropy, squared_distance;
  int64_t correct;

  __device__ void operator+=(const Partial& other) {
    cross_entropy += other.cross_entropy;
    squared_distance += other.squared_distance;
    correct += other.correct;
  }
};
static_assert(kMaxBlocks * sizeof(Partial) <= kd_loss_workspace_words * sizeof(int64_t), "the workspace holds it");

// The type that rows of T are computed in.
template <class T>
using Precise = std::conditional_t<std::is_same<T, double>::value, double, float>;

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(double x, double& to) { to = x; }
__device__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Larger {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a > b ? a : b;  // b where a is NaN: the sum of exponentials carries a NaN into the loss
  }
};

template <class A, class Op>
__device__ A warp_reduce(A value, Op op) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = op(value, __shfl_xor_sync(kEveryLane, value, distance));
  return value;
}

// How the threads that share a row work together: a warp,
struct WarpGroup {
  static constexpr int kThreads = kWarp;

  __device__ int rank() const { return threadIdx.x % kWarp; }

  template <class A, class Op>
  __device__ A reduce(A value, Op op) const {
    return warp_reduce(value, op);
  }
};

// or a block, through shared memory.
struct BlockGroup {
  static constexpr int kThreads = kBlockThreads;

  __device__ int rank() const { return threadIdx.x; }

  template <class A, class Op>
  __device__ A reduce(A value, Op op) const {
    __shared__ A of_warp[kBlockThreads / kWarp];
    value = warp_reduce(value, op);
    __syncthreads();  // whoever still reads the previous reduction
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < kBlockThreads / kWarp; ++w) value = op(value, of_warp[w]);
    return value;
  }
};

// A row's figures, the same in all of its threads.
template <class A>
struct RowResult {
  A largest, total;  // of exponentials, relative to the largest
  A squared_distance;
};

template <class T, class A = Precise<T>>
struct Row {
  const T* student;
  const T* teacher;
  int64_t classes, label;

  __device__ bool has_label() const { return label >= 0 && label < classes; }
  __device__ A at_label() const { return has_label() ? widen(student[label]) : static_cast<A>(NAN); }
};

template <class T, class A>
__device__ A gradient(const Row<T>& row, const RowResult<A>& result, A student, A distance, int64_t c, A hit, A pull) {
  const A probability = exponential(student - result.largest) / result.total;
  const A wanted = c == row.label ? static_cast<A>(1) : static_cast<A>(0);
  const A slope = (probability - wanted) * hit + pull * distance;
  return row.has_label() ? slope : static_cast<A>(NAN);
}

// A row in registers: `kEach` logits a thread, classes <= kEach * Group::kThreads.
template <class T, class Group, int kEach>
struct Resident {
  using A = Precise<T>;
  A student[kEach], distance[kEach];

  __device__ RowResult<A> read(const Group& group, const Row<T>& row) {
    A most = -static_cast<A>(INFINITY), squares = 0, total = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t c = group.rank() + k * Group::kThreads;
      const bool inside = c < row.classes;
      student[k] = inside ? widen(row.student[c]) : -static_cast<A>(INFINITY);
      distance[k] = inside ? student[k] - widen(row.teacher[c]) : static_cast<A>(0);
      most = Larger()(student[k], most);
      squares += distance[k] * distance[k];
    }
    most = group.reduce(most, Larger());
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (group.rank() + k * Group::kThreads < row.classes) total += exponential(student[k] - most);
    return {most, group.reduce(total, Sum()), group.reduce(squares, Sum())};
  }

  __device__ int reaches_before(const Group& group, const Row<T>& row, A value) const {
    int reached = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) reached |= group.rank() + k * Group::kThreads < row.label && student[k] == value;
    return reached;
  }

  __device__ void write(const Group& group, const Row<T>& row, const RowResult<A>& result, A hit, A pull,
                        T* grad) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t c = group.rank() + k * Group::kThreads;
      if (c < row.classes) narrow(gradient(row, result, student[k], distance[k], c, hit, pull), grad[c]);
    }
  }
};

// A row too long for registers: read twice, the second time from the cache.
template <class T, class Group>
struct Streamed {
  using A = Precise<T>;

  __device__ RowResult<A> read(const Group& group, const Row<T>& row) {
    A most = -static_cast<A>(INFINITY), squares = 0, total = 0;
    for (int64_t c = group.rank(); c < row.classes; c += Group::kThreads) {
      const A student = widen(row.student[c]), distance = student - widen(row.teacher[c]);
      squares += distance * distance;
      if (student == -static_cast<A>(INFINITY)) continue;  // adds nothing, and has no distance to itself
      const A larger = Larger()(student, most);
      total = total * exponential(most - larger) + exponential(student - larger);
      most = larger;
    }
    const A largest = group.reduce(most, Larger());
    total *= exponential(most - largest);
    return {largest, group.reduce(total, Sum()), group.reduce(squares, Sum())};
  }

  __device__ int reaches_before(const Group& group, const Row<T>& row, A value) const {
    int reached = 0;
    for (int64_t c = group.rank(); c < row.label; c += Group::kThreads) reached |= widen(row.student[c]) == value;
    return reached;
  }

  __device__ void write(const Group& group, const Row<T>& row, const RowResult<A>& result, A hit, A pull,
                        T* grad) const {
    for (int64_t c = group.rank(); c < row.classes; c += Group::kThreads) {
      const A student = widen(row.student[c]), distance = student - widen(row.teacher[c]);
      narrow(gradient(row, result, student, distance, c, hit, pull), grad[c]);
    }
  }
};

template <class T, class Group, class Values>
__device__ void add_row(const KdLoss& args, const Group& group, int64_t n, Partial& partial) {
  using A = Precise<T>;
  const int64_t start = n * args.classes;
  const Row<T> row{static_cast<const T*>(args.student) + start, static_cast<const T*>(args.teacher) + start,
                   args.classes, args.labels[n]};
  const A hit = static_cast<A>(1.0 / static_cast<double>(args.rows));
  const A pull = static_cast<A>(2.0 * args.kd_weight / static_cast<double>(args.rows));
  Values values;
  const RowResult<A> result = values.read(group, row);
  const A at_label = row.at_label();
  const A cross_entropy = logarithm(result.total) + result.largest - at_label;
  const int earlier = group.reduce(values.reaches_before(group, row, at_label), Sum());
  partial.cross_entropy += cross_entropy;
  partial.squared_distance += result.squared_distance;
  partial.correct += at_label == result.largest && cross_entropy == cross_entropy && earlier == 0;
  if (args.grad != nullptr) values.write(group, row, result, hit, pull, static_cast<T*>(args.grad) + start);
}

template <class T, int kEach>
__global__ void __launch_bounds__(kRowThreads) warp_per_row(KdLoss args, Partial* partials) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ Partial of_warp[kWarps];
  const int warp = threadIdx.x / kWarp;
  Partial partial{};
  for (int64_t n = blockIdx.x * static_cast<int64_t>(kWarps) + warp; n < args.rows;
       n += gridDim.x * static_cast<int64_t>(kWarps))
    add_row<T, WarpGroup, Resident<T, WarpGroup, kEach>>(args, WarpGroup(), n, partial);
  if (threadIdx.x % kWarp == 0) of_warp[warp] = partial;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) partial += of_warp[w];
  partials[blockIdx.x] = partial;
}

// One block a processor is enough for the compiler to aim at: for two it spills.
template <class T, class Values>
__global__ void __launch_bounds__(kBlockThreads, 1) block_per_row(KdLoss args, Partial* partials) {
  Partial partial{};
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x)
    add_row<T, BlockGroup, Values>(args, BlockGroup(), n, partial);
  if (threadIdx.x == 0) partials[blockIdx.x] = partial;
}

template <class Loss>
__global__ void __launch_bounds__(kTotalThreads)
    add_partials(const Partial* partials, int64_t count, int64_t rows, double kd_weight, Loss* loss, int64_t* correct) {
  __shared__ Partial of_thread[kTotalThreads];
  Partial sum{};
  for (int64_t p = threadIdx.x; p < count; p += kTotalThreads) sum += partials[p];
  of_thread[threadIdx.x] = sum;
  for (unsigned half = kTotalThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  const double divisor = rows > 0 ? static_cast<double>(rows) : 1.0;
  *loss = static_cast<Loss>((of_thread[0].cross_entropy + kd_weight * of_thread[0].squared_distance) / divisor);
  *correct = of_thread[0].correct;
}

// Returns how many partials there will be.
template <class T>
int64_t launch_rows(const KdLoss& args, Partial* partials, int64_t stream) {
  const int64_t warps = kRowThreads / kWarp;
  const int64_t warp_blocks = (args.rows + warps - 1) / warps;
  const bool by_warp = args.classes <= kWarp * 32;
  const int64_t wanted = by_warp ? warp_blocks : args.rows, blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
  if (blocks == 0) return 0;
  auto* kernel = block_per_row<T, Streamed<T, BlockGroup>>;
  if (args.classes <= kWarp) {
    kernel = warp_per_row<T, 1>;
  } else if (args.classes <= kWarp * 4) {
    kernel = warp_per_row<T, 4>;
  } else if (by_warp) {
    kernel = warp_per_row<T, 32>;
  } else if (args.classes <= kBlockThreads * 8) {
    kernel = block_per_row<T, Resident<T, BlockGroup, 8>>;
  }
  launch("kd_loss", kernel, blocks, by_warp ? kRowThreads : kBlockThreads, stream, args, partials);
  return blocks;
}

template <class T>
void launch_all(const KdLoss& args, int64_t* workspace, int64_t stream) {
  using Loss = Precise<T>;
  auto* partials = reinterpret_cast<Partial*>(workspace);
  const int64_t blocks = launch_rows<T>(args, partials, stream);
  launch("kd_loss", add_partials<Loss>, 1, kTotalThreads, stream, partials, blocks, args.rows, args.kd_weight,
         static_cast<Loss*>(args.loss), args.correct);
}

}  // namespace

void kd_loss_cuda(const KdLoss& args, int64_t* workspace, int64_t stream) {
  constexpr void (*kByDType[])(const KdLoss&, int64_t*, int64_t) = {launch_all<float>, launch_all<double>,
                                                                    launch_all<__half>, launch_all<__nv_bfloat16>};
  kByDType[static_cast<int>(args.dtype)](args, workspace, stream);
}

}  // namespace n2n
