// Cross entropy plus distillation: loss, gradient and correct count in one pass over the logits.
//
//   loss = 1/N sum_n [ logsumexp(s_n) - s_n[y_n]  +  kd_weight * |s_n - t_n|^2 ]
//   grad[n, c] = 1/N ( softmax(s_n)[c] - [c = y_n]  +  2 kd_weight (s_n[c] - t_n[c]) )
#pragma once

#include <cstdint>

namespace n2n {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Student s, teacher t and grad: (rows, classes), contiguous, of `dtype`. The loss is a double for kFloat64, else a
// float. A row is correct when its label's logit is the first of its largest and its cross entropy is not NaN.
// No rows: loss 0.
struct KdLoss {
  DType dtype;
  int64_t rows, classes;
  const void* student;
  const void* teacher;
  const int64_t* labels;
  double kd_weight;
  void* grad;  // nullptr: not wanted
  void* loss;
  int64_t* correct;
};

// The widest instructions a call may use; the best that the machine has is 2, 1 or 0.
enum class Simd : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
Simd best_simd();

// Throws std::invalid_argument, before anything is written, where a label is not in [0, classes). The same to the last
// bit for any number of threads.
void kd_loss_cpu(const KdLoss& args, int threads, Simd simd);

// Two launches on `stream` of the current device; nothing waits for them. `workspace`: kd_loss_workspace_words int64 of
// device memory. A label out of range, which cannot be refused without waiting, makes the loss and its row's gradient
// NaN.
constexpr int64_t kd_loss_workspace_words = 4096;
void kd_loss_cuda(const KdLoss& args, int64_t* workspace, int64_t stream);

}  // namespace n2n
