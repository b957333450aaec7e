// Compiled once for each SIMD level, N2N_FAST_LEVEL naming the namespace. The arithmetic is written in the compiler's
// vector types; only what they cannot say (partial loads, float16) uses intrinsics. Everything but the one entry is
// local to this file, so that no function of a wider level can be linked into a narrower one.
#include "kd_loss_rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define N2N_INLINE inline __attribute__((always_inline))

namespace n2n {
namespace N2N_FAST_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
static_assert(kBytes <= sizeof(Scratch), "scratch rows have room for one vector more");

constexpr int kDoubles = kBytes / 8;
typedef float Float __attribute__((vector_size(kBytes)));
typedef double Double __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t Unsigned __attribute__((vector_size(kBytes)));
typedef uint16_t Short __attribute__((vector_size(kBytes / 2)));
typedef double Wide __attribute__((vector_size(kBytes * 2)));  // as many doubles as a Float has lanes

enum Half : uint16_t {};
enum BFloat : uint16_t {};

template <class To, class From>
N2N_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

N2N_INLINE Float broadcast(float x) { return x - Float{}; }
N2N_INLINE Double broadcast(double x) { return x - Double{}; }

// float16 and bfloat16, all lanes at once.

#if defined(__AVX512F__)
N2N_INLINE Float widen_half(Short h) { return (Float)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
N2N_INLINE Short narrow_half(Float x) {
  return (Short)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
N2N_INLINE Float widen_half(Short h) { return (Float)_mm256_cvtph_ps((__m128i)h); }
N2N_INLINE Short narrow_half(Float x) { return (Short)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
N2N_INLINE Float widen_half(Short h) {
  const Unsigned wide = __builtin_convertvector(h, Unsigned);
  const Unsigned magnitude = wide & 0x7fffu;
  // Shifted into place, the exponent is short of float's bias by 112; multiplying mends subnormals as well.
  const Unsigned finite = bits_as<Unsigned>(bits_as<Float>(magnitude << 13) * broadcast(0x1p112f));
  const Unsigned special = (magnitude << 13) | 0x7f800000u;
  return bits_as<Float>((magnitude >= 0x7c00u ? special : finite) | ((wide & 0x8000u) << 16));
}
N2N_INLINE Short narrow_half(Float x) {
  const Unsigned bits = bits_as<Unsigned>(x), magnitude = bits & 0x7fffffffu;
  const Unsigned normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding one half leaves a subnormal's bits, rounded, in the lowest places.
  const Unsigned tiny = bits_as<Unsigned>(bits_as<Float>(magnitude) + broadcast(0.5f)) - 0x3f000000u;
  const Unsigned infinite = Unsigned{} + 0x7c00u, nan = Unsigned{} + 0x7e00u;
  Unsigned half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x47800000u ? infinite : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Short);
}
#endif

N2N_INLINE Float widen_bfloat(Short b) { return bits_as<Float>(__builtin_convertvector(b, Unsigned) << 16); }
N2N_INLINE Short narrow_bfloat(Float x) {
  const Unsigned bits = bits_as<Unsigned>(x);
  const Unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Unsigned nan = Unsigned{} + 0x7fc0u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Short);
}

struct All {};  // in place of a number of lanes

template <class V, class T>
N2N_INLINE V load_all(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class T, class V>
N2N_INLINE void store_all(T* to, const V& v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// The first `count` lanes; the rest are `fill`.
template <class V, class T>
N2N_INLINE V load_first(const T* from, int64_t count, T fill) {
  T lanes[sizeof(V) / sizeof(T)];
  for (auto& lane : lanes) lane = fill;
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load_all<V>(lanes);
}

template <class T, class V>
N2N_INLINE void store_first(T* to, const V& v, int64_t count) {
  T lanes[sizeof(V) / sizeof(T)];
  store_all(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Loads and stores of an element type T. Vector is what a load gives, and arithmetic is done in; Scalar is its lane.
template <class T, class V>
struct Plain {
  using Vector = V;
  using Scalar = T;
  static N2N_INLINE V load(const T* p, All = {}, T = 0) { return load_all<V>(p); }
  static N2N_INLINE V load(const T* p, int64_t n, T fill) { return load_first<V>(p, n, fill); }
  static N2N_INLINE void store(T* p, V v, All = {}) { store_all(p, v); }
  static N2N_INLINE void store(T* p, V v, int64_t n) { store_first(p, v, n); }
};

template <class T, Float (*kWiden)(Short), Short (*kNarrow)(Float), uint16_t kMinusInfinity>
struct Narrow {
  using Vector = Float;
  using Scalar = float;
  static N2N_INLINE Float load(const T* p, All = {}, float = 0) { return kWiden(load_all<Short>(p)); }
  static N2N_INLINE Float load(const T* p, int64_t n, float fill) {
    return kWiden(load_first<Short>(p, n, T{fill < 0 ? kMinusInfinity : uint16_t{0}}));
  }
  static N2N_INLINE void store(T* p, Float v, All = {}) { store_all(p, kNarrow(v)); }
  static N2N_INLINE void store(T* p, Float v, int64_t n) { store_first(p, kNarrow(v), n); }
};

template <class T>
struct Of;
template <>
struct Of<double> : Plain<double, Double> {};
template <>
struct Of<Half> : Narrow<Half, widen_half, narrow_half, 0xfc00> {};
template <>
struct Of<BFloat> : Narrow<BFloat, widen_bfloat, narrow_bfloat, 0xff80> {};
template <>
struct Of<float> : Plain<float, Float> {
  using Plain::load, Plain::store;
#if defined(__AVX512F__)
  static N2N_INLINE Float load(const float* p, int64_t n, float fill) {
    return (Float)_mm512_mask_loadu_ps((__m512)broadcast(fill), (__mmask16)((1u << n) - 1), p);
  }
  static N2N_INLINE void store(float* p, Float v, int64_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  }
#elif defined(__AVX2__)
  static N2N_INLINE Float load(const float* p, int64_t n, float fill) {
    const Int wanted = Int{0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n;
    return wanted ? (Float)_mm256_maskload_ps(p, (__m256i)wanted) : broadcast(fill);
  }
#endif
};

template <class T>
N2N_INLINE float load_one(const T* p) {
  return Of<T>::load(p, 1, 0)[0];
}
N2N_INLINE float load_one(const float* p) { return *p; }
N2N_INLINE double load_one(const double* p) { return *p; }

// e^x for x <= 0, to about one unit in the last place; 0 below -87, NaN for NaN.
N2N_INLINE Float exp_negative(Float x) {
  const Float lowest = broadcast(-87.0f);
  const Float clamped = x < lowest ? lowest : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is left in the low bits.
  const Float shifter = broadcast(0x1.8p23f);
  const Float shifted = clamped * 1.44269504f + shifter;
  const Float n = shifted - shifter;
  const Float r = (clamped - n * 0.693145752f) - n * 1.42860677e-06f;  // ln 2, in two parts
  // Minimax of (e^r - 1 - r) / r^2 on |r| <= ln(2)/2.
  Float p = r * 0.00138145429f + 0.00836878084f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = (p * r) * r + r + 1.0f;
  const Unsigned exponent = bits_as<Unsigned>(shifted) << 23;
  const Float result = bits_as<Float>(bits_as<Unsigned>(p) + exponent);
  return x < lowest ? Float{} : result;
}

N2N_INLINE Double exp_negative(Double x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };  // b where a is NaN

// Halving, lane i with lane i + half: the same order at every call.
template <class V, class Op>
N2N_INLINE auto reduce(V v, Op op) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  auto lanes = v;
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = op(lanes[i], lanes[i + half]);
  return lanes[0];
}

N2N_INLINE double widened_sum(Float v) { return reduce(__builtin_convertvector(v, Wide), plus); }
N2N_INLINE double widened_sum(Double v) { return reduce(v, plus); }

N2N_INLINE float log_of(float x) { return __builtin_logf(x); }
N2N_INLINE double log_of(double x) { return __builtin_log(x); }

constexpr int kUnroll = 4;  // vectors in flight at once

// Calls body(i, u, lanes) for each vector of a row, from element i on: `lanes` is All, or the number of those left at
// the end; u < kUnroll tells apart what is in flight at once.
template <int kLanes, class Body>
N2N_INLINE void each_vector(int64_t classes, const Body& body) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= classes; i += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) body(i + u * kLanes, u, All{});
  for (; i + kLanes <= classes; i += kLanes) body(i, 0, All{});
  if (i < classes) body(i, 1, classes - i);
}

template <class T>
struct Row {
  using V = typename Of<T>::Vector;
  using S = typename Of<T>::Scalar;
  static constexpr int kLanes = sizeof(V) / sizeof(S);
  static constexpr S kNone = -static_cast<S>(__builtin_inff());

  const T* student;
  const T* teacher;
  int64_t classes;

  struct Extent {
    S largest;
    double squared_distance;
  };

  template <class Lanes>
  N2N_INLINE V distance(int64_t i, Lanes lanes) const {
    return Of<T>::load(student + i, lanes, 0) - Of<T>::load(teacher + i, lanes, 0);
  }

  N2N_INLINE Extent extent() const {
    V most[kUnroll], squares[kUnroll];
    for (int u = 0; u < kUnroll; ++u) most[u] = broadcast(kNone), squares[u] = V{};
    each_vector<kLanes>(classes, [&](int64_t i, int u, auto lanes) {
      const V d = distance(i, lanes);
      most[u] = larger(Of<T>::load(student + i, lanes, kNone), most[u]);
      squares[u] += d * d;
    });
    return {reduce(larger(larger(most[0], most[1]), larger(most[2], most[3])), larger),
            widened_sum((squares[0] + squares[1]) + (squares[2] + squares[3]))};
  }

  // Leaves e^(s - largest) in `exponentials` and returns their sum.
  N2N_INLINE S exponentiate(S largest, S* exponentials) const {
    V total[kUnroll] = {};
    each_vector<kLanes>(classes, [&](int64_t i, int u, auto lanes) {
      const V e = exp_negative(Of<T>::load(student + i, lanes, kNone) - broadcast(largest));
      Of<S>::store(exponentials + i, e);
      total[u] += e;
    });
    return reduce((total[0] + total[1]) + (total[2] + total[3]), plus);
  }

  N2N_INLINE void gradient(const S* exponentials, S scale, S pull, S hit, int64_t label, T* grad) const {
    each_vector<kLanes>(classes, [&](int64_t i, int, auto lanes) {
      Of<T>::store(grad + i, Of<S>::load(exponentials + i) * scale + distance(i, lanes) * pull, lanes);
    });
    // Anew rather than corrected: what was stored may have been rounded. A sure row's first two terms cancel exactly.
    const S hard = exponentials[label] * scale - hit;
    const S at_label = hard + (load_one(student + label) - load_one(teacher + label)) * pull;
    Of<T>::store(grad + label, broadcast(at_label), 1);
  }

  N2N_INLINE bool reaches_before(S value, int64_t end) const {
    auto equal = V{} != V{};
    each_vector<kLanes>(
        end, [&](int64_t i, int, auto lanes) { equal |= Of<T>::load(student + i, lanes, kNone) == broadcast(value); });
    return reduce(equal, [](auto a, auto b) { return a | b; }) != 0;
  }
};

template <class T>
RowTotals rows_of(const KdLoss& args, int64_t begin, int64_t end, Scratch* scratch) {
  using S = typename Of<T>::Scalar;
  S* exponentials = reinterpret_cast<S*>(scratch);
  const S hit = static_cast<S>(1.0 / static_cast<double>(args.rows));
  const S pull = static_cast<S>(2.0 * args.kd_weight / static_cast<double>(args.rows));
  RowTotals totals{0.0, 0.0, 0};
  for (int64_t n = begin; n < end; ++n) {
    const int64_t start = n * args.classes, label = args.labels[n];
    const Row<T> row{static_cast<const T*>(args.student) + start, static_cast<const T*>(args.teacher) + start,
                     args.classes};
    const auto extent = row.extent();
    const S total = row.exponentiate(extent.largest, exponentials);
    const S at_label = load_one(row.student + label);
    const S cross_entropy = log_of(total) + extent.largest - at_label;
    totals.cross_entropy += cross_entropy;
    totals.squared_distance += extent.squared_distance;
    if (at_label == extent.largest && cross_entropy == cross_entropy)
      totals.correct += !row.reaches_before(at_label, label);
    if (args.grad != nullptr)
      row.gradient(exponentials, hit / total, pull, hit, label, static_cast<T*>(args.grad) + start);
  }
  return totals;
}

}  // namespace

RowTotals kd_loss_rows(const KdLoss& args, int64_t begin, int64_t end, Scratch* scratch) {
  constexpr RowsFunction* kByDType[] = {rows_of<float>, rows_of<double>, rows_of<Half>, rows_of<BFloat>};
  return kByDType[static_cast<int>(args.dtype)](args, begin, end, scratch);
}

}  // namespace N2N_FAST_LEVEL
}  // namespace n2n
