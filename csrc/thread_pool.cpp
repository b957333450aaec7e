#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace n2n {
namespace {

struct Job {
  const std::function<void(int64_t)>& body;
  int64_t chunks;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(chunk);
  }
};

class Pool {
 public:
  // False when another thread is using the pool; nothing has been done then.
  bool try_run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers(helpers);
      job_ = &job;
      seats_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // whoever has not come by now is no longer needed
    idle_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are, the caller at least, do all the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && seats_ > 0; });
      Job& job = *job_;
      --seats_;
      ++active_;
      lock.unlock();
      job.work();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_;  // of the one caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int workers_ = 0, seats_ = 0, active_ = 0;
};

// Never freed: its threads outlive every static object, and a forked child leaves its parent's pool behind.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  Pool* existing = current_pool.load();
  if (existing != nullptr) return *existing;
  Pool* created = new Pool;
  if (current_pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void parallel_for(int64_t chunks, int threads, const std::function<void(int64_t)>& body) {
  Job job{body, chunks};
  const int helpers = static_cast<int>(std::min<int64_t>(threads, chunks)) - 1;
  if (helpers <= 0 || !pool().try_run(job, helpers)) job.work();
}

}  // namespace n2n
