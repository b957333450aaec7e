// The launchers of csrc/*.h as C functions, for ctypes. A function returns null, or the text of what was thrown.
#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <string>

#include "kd_loss.h"
#include "materialize.h"

namespace {

template <class Body>
const char* guarded(const Body& body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

void set_schedule(unsigned schedule) {
  cuda_on_cpu::schedule = schedule;
}

int64_t kd_loss_workspace_words() {
  return n2n::kd_loss_workspace_words;
}

const char* kd_loss(int dtype, int64_t rows, int64_t classes, const void* student, const void* teacher,
                    const int64_t* labels, double kd_weight, void* grad, void* loss, int64_t* correct,
                    int64_t* workspace) {
  return guarded([&] {
    n2n::kd_loss_cuda(
        {static_cast<n2n::DType>(dtype), rows, classes, student, teacher, labels, kd_weight, grad, loss, correct},
        workspace, 0);
  });
}

int64_t materialize_pack_words(const n2n::Piece* pieces, int64_t count) {
  return n2n::materialize_pack_words(pieces, count);
}

const char* materialize_pack(const n2n::Piece* pieces, int64_t count, int64_t element_bytes, int64_t flat_elements,
                             int64_t* packed, int64_t* blocks) {
  return guarded([&] { *blocks = n2n::materialize_pack(pieces, count, element_bytes, flat_elements, packed); });
}

const char* materialize(const int64_t* packed, int64_t count, int64_t blocks, int64_t element_bytes, void* flat) {
  return guarded([&] { n2n::materialize_cuda(packed, count, blocks, element_bytes, flat, 0); });
}
}
