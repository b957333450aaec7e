// The module n2n_fast.native._C: integers, floats and tables of int64 come in; addresses are trusted, having been
// checked by n2n_fast/native. The only file that knows pybind11.
#include <pybind11/pybind11.h>

#include <string>

#include "kd_loss.h"
#include "materialize.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// A table of pieces: an object with a contiguous buffer of int64, such as array.array("q").
struct Table {
  explicit Table(const py::buffer& buffer) : info(buffer.request()) {
    const auto bytes = static_cast<int64_t>(info.size * info.itemsize);
    if (info.itemsize != sizeof(int64_t) || bytes % sizeof(n2n::Piece) != 0)
      throw std::invalid_argument("table: expected twelve int64 for each piece, got " + std::to_string(info.size) +
                                  " items of " + std::to_string(info.itemsize) + " bytes");
    pieces = static_cast<const n2n::Piece*>(info.ptr);
    count = bytes / static_cast<int64_t>(sizeof(n2n::Piece));
  }
  py::buffer_info info;
  const n2n::Piece* pieces;
  int64_t count;
};

void materialize_cpu(const py::buffer& buffer, int64_t element_bytes, int64_t flat, int64_t flat_elements,
                     int threads) {
  const Table table(buffer);
  const py::gil_scoped_release release;
  n2n::materialize_cpu(table.pieces, table.count, element_bytes, at<void>(flat), flat_elements, threads);
}

n2n::KdLoss kd_loss_args(int dtype, int64_t rows, int64_t classes, int64_t student, int64_t teacher, int64_t labels,
                         double kd_weight, int64_t grad, int64_t loss, int64_t correct) {
  return {static_cast<n2n::DType>(dtype),
          rows,
          classes,
          at<void>(student),
          at<void>(teacher),
          at<int64_t>(labels),
          kd_weight,
          at<void>(grad),
          at<void>(loss),
          at<int64_t>(correct)};
}

void kd_loss_cpu(int dtype, int64_t rows, int64_t classes, int64_t student, int64_t teacher, int64_t labels,
                 double kd_weight, int64_t grad, int64_t loss, int64_t correct, int threads, int simd) {
  const py::gil_scoped_release release;
  n2n::kd_loss_cpu(kd_loss_args(dtype, rows, classes, student, teacher, labels, kd_weight, grad, loss, correct),
                   threads, static_cast<n2n::Simd>(simd));
}

#ifdef N2N_FAST_CUDA
int64_t materialize_pack_words(const py::buffer& buffer) {
  const Table table(buffer);
  return n2n::materialize_pack_words(table.pieces, table.count);
}

int64_t materialize_pack(const py::buffer& buffer, int64_t element_bytes, int64_t flat_elements, int64_t packed) {
  const Table table(buffer);
  const py::gil_scoped_release release;
  return n2n::materialize_pack(table.pieces, table.count, element_bytes, flat_elements, at<int64_t>(packed));
}

void materialize_cuda(int64_t packed, int64_t count, int64_t blocks, int64_t element_bytes, int64_t flat,
                      int64_t stream) {
  const py::gil_scoped_release release;
  n2n::materialize_cuda(at<int64_t>(packed), count, blocks, element_bytes, at<void>(flat), stream);
}

void kd_loss_cuda(int dtype, int64_t rows, int64_t classes, int64_t student, int64_t teacher, int64_t labels,
                  double kd_weight, int64_t grad, int64_t loss, int64_t correct, int64_t workspace, int64_t stream) {
  const py::gil_scoped_release release;
  n2n::kd_loss_cuda(kd_loss_args(dtype, rows, classes, student, teacher, labels, kd_weight, grad, loss, correct),
                    at<int64_t>(workspace), stream);
}
#endif

py::dict build_info() {
  using namespace py::literals;
  py::list levels;
  levels.append("baseline");
#ifdef N2N_FAST_X86
  levels.append("avx2");
  levels.append("avx512");
#endif
  const std::string cuda_version = N2N_FAST_CUDA_VERSION;
  return py::dict("compiler"_a = __VERSION__, "cuda"_a = !cuda_version.empty(), "cuda_version"_a = cuda_version,
                  "cuda_archs"_a = N2N_FAST_CUDA_ARCHS, "simd"_a = levels,
                  "simd_used"_a = levels[static_cast<size_t>(n2n::best_simd())]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of n2n_fast. Addresses are trusted: call them through n2n_fast.native.";
  m.attr("BEST_SIMD") = static_cast<int>(n2n::best_simd());
  m.attr("KD_LOSS_WORKSPACE_WORDS") = n2n::kd_loss_workspace_words;
  m.def("build_info", &build_info);
  m.def("materialize_cpu", &materialize_cpu);
  m.def("kd_loss_cpu", &kd_loss_cpu);
#ifdef N2N_FAST_CUDA
  m.def("materialize_pack_words", &materialize_pack_words);
  m.def("materialize_pack", &materialize_pack);
  m.def("materialize_cuda", &materialize_cuda);
  m.def("kd_loss_cuda", &kd_loss_cuda);
#endif
}
