// A libFuzzer target of the native entry points: bytes become a plan of materialize or a batch of the loss, right ones
// and wrong ones. What n2n_fast/native validates (addresses, sizes that agree with their tensors) is kept true here;
// what the native side promises to check itself (indices, labels, order and room of the results) is left to the bytes.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kd_loss.h"
#include "materialize.h"

namespace {

// Takes bytes off the input; zeros when there are none left.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const size_t n = std::min(sizeof(T), size_);
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }
  int64_t below(int64_t limit) { return take<uint16_t>() % limit; }
  bool rarely() { return take<uint8_t>() < 6; }

  // Mostly a position in [0, limit), now and then one that is not.
  int64_t index(int64_t limit) {
    if (!rarely()) return below(std::max<int64_t>(1, limit));
    const int64_t wrong[] = {-1, limit, limit + 1, INT64_MIN, INT64_MAX, take<int64_t>()};
    return wrong[below(6)];
  }
  void fill(void* to, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(to)[i] = take<uint8_t>();
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Memory of exactly so many bytes, on the heap, where the sanitizer sees the first byte beyond.
using Memory = std::unique_ptr<uint8_t[]>;
Memory memory(int64_t bytes) { return Memory(new uint8_t[bytes]()); }

struct Tensors {
  std::vector<Memory> sources;
  std::vector<std::unique_ptr<int64_t[]>> indices;
};

int64_t keep(Bytes& bytes, Tensors& tensors, int64_t channels, int64_t& kept) {
  kept = channels;
  if (bytes.below(3) == 0) return 0;
  kept = bytes.below(channels + 3);
  tensors.indices.emplace_back(new int64_t[kept]);
  int64_t* index = tensors.indices.back().get();
  const bool runs = bytes.below(2) == 0;  // neighbours are copied another way
  for (int64_t k = 0; k < kept; ++k) {
    const bool follows = runs && k > 0 && index[k - 1] >= 0 && index[k - 1] < channels;
    index[k] = follows ? (index[k - 1] + 1) % channels : bytes.index(channels);
  }
  return reinterpret_cast<int64_t>(index);
}

n2n::Piece piece(Bytes& bytes, Tensors& tensors, int64_t element_bytes, int64_t& end) {
  n2n::Piece p{};
  const bool wide = bytes.below(4) == 0;
  p.out_channels = 1 + bytes.below(wide ? 96 : 7);
  p.in_channels = bytes.below(4) == 0 ? 1 : 1 + bytes.below(wide ? 96 : 7);
  p.kernel_h = 1 + bytes.below(bytes.below(2) == 0 ? 1 : 7);
  p.kernel_w = 1 + bytes.below(bytes.below(2) == 0 ? 1 : 7);
  const bool crops = bytes.below(3) == 0;
  p.crop_h = p.kernel_h - (crops ? 2 * bytes.below((p.kernel_h + 1) / 2) : 0);
  p.crop_w = p.kernel_w - (crops ? 2 * bytes.below((p.kernel_w + 1) / 2) : 0);
  p.keep_out = keep(bytes, tensors, p.out_channels, p.kept_out);
  p.keep_in = keep(bytes, tensors, p.in_channels, p.kept_in);
  tensors.sources.push_back(memory(p.out_channels * p.in_channels * p.kernel_h * p.kernel_w * element_bytes));
  p.source = reinterpret_cast<int64_t>(tensors.sources.back().get());
  p.offset = bytes.rarely() ? bytes.index(end) : end + bytes.below(3) * bytes.below(20);
  end = bytes.rarely() ? end : std::max(end, p.offset < (1 << 24) ? p.offset + p.elements() : end);
  return p;
}

void materialize(Bytes& bytes) {
  Tensors tensors;
  std::vector<n2n::Piece> pieces;
  const int64_t sizes[] = {2, 4, 8};
  const int64_t element_bytes = sizes[bytes.below(3)];
  const int64_t count = bytes.below(6);
  int64_t end = 0;
  for (int64_t p = 0; p < count; ++p) pieces.push_back(piece(bytes, tensors, element_bytes, end));
  const int64_t elements = bytes.rarely() ? bytes.below(1 + end) : end + bytes.below(9);
  const Memory flat = memory(elements * element_bytes);
  n2n::materialize_cpu(pieces.data(), count, element_bytes, flat.get(), elements, 1 + static_cast<int>(bytes.below(3)));
}

void kd_loss(Bytes& bytes) {
  const auto dtype = static_cast<n2n::DType>(bytes.below(4));
  const int64_t element_bytes = dtype == n2n::DType::kFloat64 ? 8 : dtype == n2n::DType::kFloat32 ? 4 : 2;
  const int64_t rows = bytes.below(bytes.below(8) == 0 ? 70 : 6);
  const int64_t classes = 1 + bytes.below(bytes.below(16) == 0 ? 9000 : 70);
  const int64_t size = rows * classes * element_bytes;
  const Memory student = memory(size), teacher = memory(size), grad = memory(size);
  bytes.fill(student.get(), std::min<int64_t>(size, 512));
  bytes.fill(teacher.get(), std::min<int64_t>(size, 512));
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  for (int64_t n = 0; n < rows; ++n) labels[n] = bytes.index(classes);
  const Memory loss = memory(dtype == n2n::DType::kFloat64 ? 8 : 4);
  const std::unique_ptr<int64_t> correct(new int64_t);
  const n2n::KdLoss args{dtype,
                         rows,
                         classes,
                         student.get(),
                         teacher.get(),
                         labels.get(),
                         bytes.take<float>(),
                         bytes.below(3) == 0 ? nullptr : grad.get(),
                         loss.get(),
                         correct.get()};
  n2n::kd_loss_cpu(args, 1 + static_cast<int>(bytes.below(3)), static_cast<n2n::Simd>(bytes.below(3)));
  if (*correct < 0 || *correct > rows) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  try {
    if (bytes.below(2) == 0)
      materialize(bytes);
    else
      kd_loss(bytes);
  } catch (const std::invalid_argument&) {  // refused, which is right
  }
  return 0;
}
