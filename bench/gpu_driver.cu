// Every path of both kernels on small inputs, compared with the host's own arithmetic; needs neither torch nor Python.
// bench/gpu.py runs it under compute-sanitizer, and on a CPU, against tests/cuda_on_cpu/, under the address sanitizer.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_check.h"
#include "kd_loss.h"
#include "materialize.h"

namespace {

using n2n::check_cuda;

// An array in the device's memory of just its bytes, so that an access beyond them is seen; it begins as NaN.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) {
    T* raw = nullptr;
    check_cuda(cudaMalloc(&raw, bytes()), "malloc");
    data_ = std::shared_ptr<T>(raw, [](T* held) { cudaFree(held); });
    check_cuda(cudaMemset(raw, 0xff, bytes()), "memset");
  }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    check_cuda(cudaMemcpy(get(), values.data(), bytes(), cudaMemcpyHostToDevice), "copy to the device");
  }
  T* get() const { return data_.get(); }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    check_cuda(cudaMemcpy(values.data(), get(), bytes(), cudaMemcpyDeviceToHost), "copy from the device");
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_;
  std::shared_ptr<T> data_;
};

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

double widen(float x) { return x; }
double widen(double x) { return x; }
double widen(__half x) { return __half2float(x); }
double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
void narrow(double x, float& to) { to = static_cast<float>(x); }
void narrow(double x, double& to) { to = x; }
void narrow(double x, __half& to) { to = __float2half_rn(static_cast<float>(x)); }
void narrow(double x, __nv_bfloat16& to) { to = __float2bfloat16_rn(static_cast<float>(x)); }

// Numbers between -4 and 4 that look random and are the same everywhere.
template <class T>
std::vector<T> numbers(size_t count, uint64_t state) {
  std::vector<T> values(count);
  for (T& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    narrow(static_cast<double>(state >> 40) / (1 << 21) - 4.0, value);
  }
  return values;
}

// Loss and gradient of one row of logits, added to `loss` and written to `grad`.
template <class T>
void row_on_host(const T* student, const T* teacher, int64_t classes, int64_t label, double kd_weight, double rows,
                 double& loss, double* grad) {
  double total = 0, squares = 0;
  for (int64_t c = 0; c < classes; ++c) total += std::exp(widen(student[c]));
  for (int64_t c = 0; c < classes; ++c) {
    const double distance = widen(student[c]) - widen(teacher[c]);
    const double probability = std::exp(widen(student[c])) / total;
    squares += distance * distance;
    grad[c] = (probability - (c == label) + 2 * kd_weight * distance) / rows;
  }
  loss += (std::log(total) - widen(student[label]) + kd_weight * squares) / rows;
}

template <class T, class Loss>
void try_kd_loss(n2n::DType dtype, int64_t rows, int64_t classes, double tolerance) {
  const double kd_weight = 0.3;
  const auto student = numbers<T>(rows * classes, 1), teacher = numbers<T>(rows * classes, 2);
  std::vector<int64_t> labels(rows);
  for (int64_t n = 0; n < rows; ++n) labels[n] = (7 * n + 3) % classes;
  const OnDevice<T> students(student), teachers(teacher), grad(student.size());
  const OnDevice<int64_t> on_device(labels), correct(1), workspace(n2n::kd_loss_workspace_words);
  const OnDevice<Loss> loss(1);
  n2n::kd_loss_cuda({dtype, rows, classes, students.get(), teachers.get(), on_device.get(), kd_weight, grad.get(),
                     loss.get(), correct.get()},
                    workspace.get(), 0);
  check_cuda(cudaDeviceSynchronize(), "kd_loss");

  double wanted = 0, error = 0, size = 0;
  std::vector<double> slope(classes);
  const auto got = grad.read();
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t start = n * classes;
    row_on_host(&student[start], &teacher[start], classes, labels[n], kd_weight, static_cast<double>(rows), wanted,
                slope.data());
    for (int64_t c = 0; c < classes; ++c) {
      error += std::pow(widen(got[start + c]) - slope[c], 2);
      size += slope[c] * slope[c];
    }
  }
  const std::string what = "kd_loss (" + std::to_string(rows) + ", " + std::to_string(classes) + "), " +
                           std::to_string(sizeof(T)) + " bytes: ";
  expect(std::abs(loss.read()[0] - wanted) <= 1e-5 * std::abs(wanted), what + "the loss");
  expect(std::sqrt(error) <= tolerance * std::sqrt(size), what + "the gradient");
}

void try_kd_loss_in_every_type(int64_t rows, int64_t classes) {
  try_kd_loss<float, float>(n2n::DType::kFloat32, rows, classes, 1e-5);
  try_kd_loss<double, double>(n2n::DType::kFloat64, rows, classes, 1e-12);
  try_kd_loss<__half, float>(n2n::DType::kFloat16, rows, classes, 2e-2);
  try_kd_loss<__nv_bfloat16, float>(n2n::DType::kBFloat16, rows, classes, 2e-2);
}

// What is kept of a weight (O, I, kh, kw): channels, all where there are none, and the centre of the kernels.
struct Cut {
  int64_t sizes[4];
  std::vector<int64_t> rows, columns;
  int64_t crop[2];

  int64_t kept_out() const { return rows.empty() ? sizes[0] : static_cast<int64_t>(rows.size()); }
  int64_t kept_in() const { return columns.empty() ? sizes[1] : static_cast<int64_t>(columns.size()); }
};

std::vector<int64_t> every_second(int64_t channels) {
  std::vector<int64_t> kept;
  for (int64_t k = channels - 1; k >= 0; k -= 2) kept.push_back(k);
  return kept;
}

template <class T>
void append_on_host(const Cut& cut, const std::vector<T>& source, std::vector<T>& wanted) {
  const auto [height, width] = std::pair(cut.sizes[2], cut.sizes[3]);
  const int64_t top = (height - cut.crop[0]) / 2, left = (width - cut.crop[1]) / 2;
  for (int64_t o = 0; o < cut.kept_out(); ++o)
    for (int64_t i = 0; i < cut.kept_in(); ++i)
      for (int64_t y = 0; y < cut.crop[0]; ++y)
        for (int64_t x = 0; x < cut.crop[1]; ++x) {
          const int64_t row = cut.rows.empty() ? o : cut.rows[o], column = cut.columns.empty() ? i : cut.columns[i];
          wanted.push_back(source[((row * cut.sizes[1] + column) * height + top + y) * width + left + x]);
        }
}

template <class T>
void try_materialize(const std::vector<Cut>& cuts) {
  const size_t step = 64 / sizeof(T);
  std::vector<OnDevice<T>> sources;
  std::vector<n2n::Piece> pieces;
  std::vector<T> wanted;
  for (const Cut& cut : cuts) {
    std::vector<T> source(cut.sizes[0] * cut.sizes[1] * cut.sizes[2] * cut.sizes[3]);
    for (size_t e = 0; e < source.size(); ++e) source[e] = static_cast<T>(7 * e + pieces.size() + 1);
    sources.emplace_back(source);
    pieces.push_back({reinterpret_cast<int64_t>(sources.back().get()), cut.sizes[0], cut.sizes[1], cut.sizes[2],
                      cut.sizes[3], cut.kept_out(), cut.kept_in(), cut.crop[0], cut.crop[1],
                      cut.rows.empty() ? 0 : reinterpret_cast<int64_t>(cut.rows.data()),
                      cut.columns.empty() ? 0 : reinterpret_cast<int64_t>(cut.columns.data()),
                      static_cast<int64_t>(wanted.size())});
    append_on_host(cut, source, wanted);
    wanted.resize((wanted.size() + step - 1) / step * step);
  }
  const int64_t count = static_cast<int64_t>(pieces.size()), elements = static_cast<int64_t>(wanted.size());
  std::vector<int64_t> packed(n2n::materialize_pack_words(pieces.data(), count));
  const int64_t blocks = n2n::materialize_pack(pieces.data(), count, sizeof(T), elements, packed.data());
  const OnDevice<int64_t> table(packed);
  const OnDevice<T> flat(wanted.size());
  n2n::materialize_cuda(table.get(), count, blocks, sizeof(T), flat.get(), 0);
  check_cuda(cudaDeviceSynchronize(), "materialize");
  expect(flat.read() == wanted, "materialize of " + std::to_string(sizeof(T)) + " bytes");
}

}  // namespace

int main() {
  try {
    // Both ends of each path of kd_loss.cu, and more rows than blocks.
    const int64_t shapes[][2] = {{1, 1},    {9, 10},   {6, 33},   {5, 129}, {3, 1024},
                                 {2, 1025}, {1, 4096}, {2, 4097}, {1, 9001}};
    for (const auto& [rows, classes] : shapes) try_kd_loss_in_every_type(rows, classes);
    try_kd_loss<float, float>(n2n::DType::kFloat32, 4 * 1024 + 7, 3, 1e-5);

    const std::vector<Cut> cuts = {
        {{40, 48, 3, 3}, every_second(40), every_second(48), {3, 3}},  // several tiles, element by element
        {{40, 48, 3, 3}, every_second(40), {}, {3, 3}},                // whole rows, 16 bytes at once
        {{7, 5, 5, 5}, {}, every_second(5), {3, 1}},                   // a crop
        {{5, 3, 1, 1}, every_second(5), {}, {1, 1}},                   // rows that are not aligned
        {{5000, 1, 1, 1}, every_second(5000), {}, {1, 1}},
        {{3, 1, 1, 1}, {}, {}, {1, 1}},
    };
    try_materialize<uint16_t>(cuts);
    try_materialize<uint32_t>(cuts);
    try_materialize<uint64_t>(cuts);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::puts("both kernels are right");
}
