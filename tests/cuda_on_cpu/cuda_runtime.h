// The CUDA execution model on one CPU thread, enough to run kernels that were written for a GPU, as plain C++.
//
// A launch runs its blocks one after another; the threads of a block are fibers, each with a stack of its own, that run
// until they wait for others (a barrier or a shuffle) or end. Between waits the order of fibers is chosen by a
// schedule, so that code which forgets a barrier meets orders in which that shows. Knows nothing of the kernels it
// runs.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so a static variable is what its threads share; it outlives the block, as stale as on a
// GPU.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "threads wait for others that never come";
  }
  return "unknown error";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr unsigned kStackBytes = 128 * 1024;

// Who runs next. 0: each thread in turn. 1: the same, last thread first. Any other number seeds a schedule in which a
// warp picked by chance runs as far ahead of the rest of its block as the barriers let it.
inline unsigned schedule = 0;

// Where the lanes of a warp, or the threads of a block, wait for one another. Odd and even meetings use different
// slots, so that a fast thread can write for the next meeting while a slow one still reads.
struct Meeting {
  unsigned members = 0;  // that have not ended
  unsigned arrived = 0;
  uint64_t round = 0;
  uint64_t slots[2][warpSize];

  void close_if_complete() {
    if (arrived == 0 || arrived < members) return;
    arrived = 0;
    ++round;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // of the address sanitizer
  unsigned thread = 0;
  bool ended = false;
  Meeting* waiting = nullptr;
  uint64_t round = 0;  // of `waiting`, when it began to wait
};

class Block {
 public:
  Block(unsigned threads, std::function<void()> body)
      : body_(std::move(body)), fibers_(threads), warps_((threads + warpSize - 1) / warpSize) {
    for (Fiber& fiber : fibers_) {
      fiber.thread = static_cast<unsigned>(&fiber - fibers_.data());
      fiber.stack.reset(new char[kStackBytes]);
    }
  }

  // Runs the threads of one block to their end; false where some wait for ever.
  bool run() {
    current = this;
    random_ = schedule * 2654435761u + blockIdx.x + 1;
    everyone_.members = 0;
    for (Meeting& warp : warps_) warp.members = 0;
    for (Fiber& fiber : fibers_) prepare(fiber);
    bool moved = true;
    while (everyone_.members > 0 && moved) moved = schedule > 1 ? run_ahead() : run_in_turn();
    return everyone_.members == 0;
  }

  // Called by the running thread: waits until every member of the meeting has come. Returns the slots to read.
  uint64_t* meet(Meeting& meeting, uint64_t value, bool has_value) {
    Fiber& fiber = *running_;
    uint64_t* slots = meeting.slots[meeting.round % 2];
    if (has_value) slots[fiber.thread % warpSize] = value;
    fiber.waiting = &meeting;
    fiber.round = meeting.round;
    ++meeting.arrived;
    meeting.close_if_complete();
    if (meeting.round == fiber.round) leave(fiber);
    fiber.waiting = nullptr;
    return slots;
  }

  void barrier() { meet(everyone_, 0, false); }
  uint64_t* exchange(uint64_t value) { return meet(warps_[running_->thread / warpSize], value, true); }
  unsigned lane() const { return running_->thread % warpSize; }

  static inline Block* current = nullptr;

 private:
  static void entry() { current->run_thread(); }

  void run_thread() {
    entered(nullptr);
    Fiber& fiber = *running_;
    body_();
    fiber.ended = true;
    Meeting& warp = warps_[fiber.thread / warpSize];
    --warp.members;
    --everyone_.members;
    warp.close_if_complete();  // those who wait need not wait for a thread that has ended
    everyone_.close_if_complete();
    leave(fiber);
  }

  bool run_in_turn() {
    bool moved = false;
    const size_t count = fibers_.size();
    for (size_t t = 0; t < count; ++t) moved |= advance(fibers_[schedule == 1 ? count - 1 - t : t]);
    return moved;
  }

  bool run_ahead() {
    const size_t first = next_random() % warps_.size();
    bool moved = false;
    for (size_t w = 0; w < warps_.size() && !moved; ++w)
      while (advance_warp((first + w) % warps_.size())) moved = true;
    return moved;
  }

  bool advance_warp(size_t warp) {
    const size_t begin = warp * warpSize, lanes = std::min<size_t>(warpSize, fibers_.size() - begin);
    const size_t first = next_random() % lanes;
    bool moved = false;
    for (size_t l = 0; l < lanes; ++l) moved |= advance(fibers_[begin + (first + l) % lanes]);
    return moved;
  }

  // Runs a thread to where it next waits; false where it still waits, or has ended.
  bool advance(Fiber& fiber) {
    if (fiber.ended || (fiber.waiting != nullptr && fiber.waiting->round == fiber.round)) return false;
    resume(fiber);
    return true;
  }

  void prepare(Fiber& fiber) {
    ++everyone_.members;
    ++warps_[fiber.thread / warpSize].members;
    fiber.ended = false;
    fiber.waiting = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::entry, 0);
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    ::threadIdx = dim3(fiber.thread, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.ended ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
    entered(fiber.fake_stack);
  }

  void entered(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_bytes_);
#else
    (void)fake_stack;
#endif
  }

  unsigned next_random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    return random_ ^= random_ << 5;
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting everyone_;
  Fiber* running_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  unsigned random_ = 1;
};

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "a shuffle moves 8 bytes");
  if (mask != 0xffffffffu) throw std::logic_error("cuda_on_cpu: only shuffles of whole warps are known");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* slots = Block::current->exchange(bits);
  T result;
  std::memcpy(&result, &slots[from % warpSize], sizeof(T));
  return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  cuda_on_cpu::Block::current->barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::shuffle(mask, 0, 0);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::Block::current->lane() ^ static_cast<unsigned>(distance));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = cuda_on_cpu::Block::current->lane();
  const T other = cuda_on_cpu::shuffle(mask, value, lane + distance);
  return lane + distance < warpSize ? other : value;
}

// Fibers change only where they wait, so nothing comes between reading and writing.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
inline void __threadfence() {}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned threads = blockDim.x;
  const bool one_dimension = gridDim.y * gridDim.z * blockDim.y * blockDim.z == 1;
  if (gridDim.x == 0 || gridDim.x > 0x7fffffffu || threads == 0 || threads > 1024 || !one_dimension)
    return cudaErrorInvalidConfiguration;
  cuda_on_cpu::Block block(threads, [&] { kernel(arguments...); });
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    if (!block.run()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// The device's memory is the host's.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  *address = static_cast<T*>(std::malloc(bytes));
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
