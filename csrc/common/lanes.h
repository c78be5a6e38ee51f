// Vectors as a type, as wide as the processor's: arithmetic on one is arithmetic on all its
// numbers.
//
// For code whose speed must not hang on what a compiler makes of a loop. Such code is templated on
// the width, and with_vectors() runs it for the width of this processor, compiled for it. Wider
// ones would be taken apart, comparisons number by number. Where the compiler's loop is good
// enough, GSALIGN_CLONES (cpu.h) is less to write; where half types are read and written next to
// the arithmetic, row_sets.h has the instructions for them.
//
// `Vector<R, kBytes>` holds neighbouring numbers: points of a spline, channels of a row. As lanes,
// vectors of doubles hold the same element of several small systems, which would leave vectors
// along their rows half empty: code templated on the element runs with a vector for full groups of
// samples and with double for those left over.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "natural_log.h"
#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSALIGN_X86_LEVELS 1
#endif

namespace gsalign {

// Bytes of a vector, as a type.
template <int kBytesOf>
struct Width {
  static constexpr int kBytes = kBytesOf;
};

// Bytes of this processor's vectors; tests set a macro to run as one with narrower ones would.
inline int vector_bytes() {
#if defined(GSALIGN_FORCED_VECTOR_BYTES)
  return GSALIGN_FORCED_VECTOR_BYTES;
#elif defined(GSALIGN_X86_LEVELS)
  static const int bytes = __builtin_cpu_supports("x86-64-v4")   ? 64
                           : __builtin_cpu_supports("x86-64-v3") ? 32
                                                                 : 16;
  return bytes;
#else
  return 16;
#endif
}

namespace detail {
#if defined(GSALIGN_X86_LEVELS)
template <typename Body>
__attribute__((target("arch=x86-64-v4"), noinline)) static void run_64(const Body& body) {
  body(Width<64>{});
}
template <typename Body>
__attribute__((target("arch=x86-64-v3"), noinline)) static void run_32(const Body& body) {
  body(Width<32>{});
}
#endif
}  // namespace detail

// Calls `body` with a Width, in a function compiled for processors of that width. The body and all
// it calls must be always inlined (GSALIGN_VECTOR_BODY, GSALIGN_INLINE): what is not is compiled
// for any processor.
#define GSALIGN_VECTOR_BODY __attribute__((always_inline))
template <typename Body>
void with_vectors(const Body& body) {
#if defined(GSALIGN_X86_LEVELS)
  switch (vector_bytes()) {
    case 64:
      return detail::run_64(body);
    case 32:
      return detail::run_32(body);
    default:
      return body(Width<16>{});
  }
#else
  body(Width<16>{});
#endif
}

// Vectors of numbers, of integers of their size, and of comparisons. Compilers let a vector alias
// its numbers: an array of vectors may be read and written as one of numbers.
namespace detail {
template <typename R, int kBytes>
struct VectorOf {
  using Signed = std::conditional_t<sizeof(R) == 8, std::int64_t, std::int32_t>;
  using Unsigned = std::conditional_t<sizeof(R) == 8, std::uint64_t, std::uint32_t>;
  typedef R Numbers __attribute__((vector_size(kBytes)));
  typedef Signed Mask __attribute__((vector_size(kBytes)));
  typedef Unsigned Bits __attribute__((vector_size(kBytes)));
};
}  // namespace detail

template <typename R, int kBytes>
using Vector = typename detail::VectorOf<R, kBytes>::Numbers;
template <typename R, int kBytes>
constexpr std::int64_t kVectorLength = kBytes / std::int64_t(sizeof(R));

// Vectors of doubles: the lanes of several systems.
template <int kBytes>
using Lanes = Vector<double, kBytes>;
template <typename E>
constexpr std::int64_t kLanesOf = sizeof(E) / sizeof(double);

template <typename R, int kBytes>
GSALIGN_INLINE Vector<R, kBytes> load_vector(const R* from) {
  Vector<R, kBytes> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
template <typename R, typename V>
GSALIGN_INLINE void store_vector(R* to, const V& value) {
  std::memcpy(to, &value, sizeof value);
}

// The vector of make(0), make(1), ..., put together by halves: GCC makes a wide one through memory,
// or by one masked instruction per number.
template <typename R, int kBytes, typename Make>
GSALIGN_INLINE Vector<R, kBytes> vector_of(const Make& make, int from = 0) {
  if constexpr (kBytes == 16 && sizeof(R) == 8) {
    return Vector<R, 16>{make(from), make(from + 1)};
  } else if constexpr (kBytes == 16) {
    return Vector<R, 16>{make(from), make(from + 1), make(from + 2), make(from + 3)};
  } else {
    constexpr int kHalf = kBytes / 2;
    const auto low = (Vector<double, kHalf>)vector_of<R, kHalf>(make, from);
    const auto high = (Vector<double, kHalf>)vector_of<R, kHalf>(make, from + kHalf / sizeof(R));
    if constexpr (kBytes == 32) {
      return (Vector<R, kBytes>)__builtin_shufflevector(low, high, 0, 1, 2, 3);
    } else {
      return (Vector<R, kBytes>)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    }
  }
}

// The order of the numbers of two vectors in a third one, as a constant in memory: one made number
// by number would be made anew at every use.
namespace detail {
template <int kLength, typename Place>
constexpr std::array<Place, kLength> places(int step, int start, int apart) {
  std::array<Place, kLength> result{};
  for (int i = 0; i < kLength; ++i) {
    // `apart` 1: step through both vectors. Else: from each in turn.
    result[i] =
        static_cast<Place>(apart == 1 ? start + i * step : start + i / 2 + (i % 2) * kLength);
  }
  return result;
}
template <int kLength, typename Place, int kStep, int kStart, int kApart>
alignas(64) inline constexpr std::array<Place, kLength> kPlaces =
    places<kLength, Place>(kStep, kStart, kApart);

template <int kStep, int kStart, int kApart, typename R, typename V>
GSALIGN_INLINE V merged(const V& a, const V& b) {
  using Types = VectorOf<R, sizeof(V)>;
  constexpr int kLength = sizeof(V) / sizeof(R);
  typename Types::Mask order;
  std::memcpy(
      &order, kPlaces<kLength, typename Types::Signed, kStep, kStart, kApart>.data(), sizeof order);
  return __builtin_shuffle(a, b, order);
}
}  // namespace detail

// a[0], b[0], a[1], b[1], ...: the first half, and the second one.
template <int kHalf, typename R, typename V>
GSALIGN_INLINE V interleaved(const V& a, const V& b) {
  return detail::merged<0, kHalf* int(sizeof(V) / sizeof(R)) / 2, 2, R>(a, b);
}

// Every other number of a, then of b: those at even places, and at odd ones.
template <int kOdd, typename R, typename V>
GSALIGN_INLINE V every_other(const V& a, const V& b) {
  return detail::merged<2, kOdd, 1, R>(a, b);
}

// The sum of the numbers of a vector, always in the same order.
template <typename R, typename V>
GSALIGN_INLINE double sum_of(const V& value) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < std::int64_t(sizeof(V) / sizeof(R)); ++i) {
    sum += static_cast<double>(value[i]);
  }
  return sum;
}

template <typename E>
GSALIGN_INLINE double lane(const E& value, std::int64_t index) {
  if constexpr (kLanesOf<E> == 1) {
    return value;
  } else {
    return value[index];
  }
}
template <typename E>
GSALIGN_INLINE void set_lane(E& value, std::int64_t index, double to) {
  if constexpr (kLanesOf<E> == 1) {
    value = to;
  } else {
    value[index] = to;
  }
}

template <typename E>
GSALIGN_INLINE E square_root(const E& value) {
  if constexpr (kLanesOf<E> == 1) {
    return __builtin_sqrt(value);
  } else {
    E result;
    for (std::int64_t l = 0; l < kLanesOf<E>; ++l) {
      result[l] = __builtin_sqrt(value[l]);
    }
    return result;
  }
}

// Logarithms of a number or of a vector.
template <typename R, typename V>
GSALIGN_INLINE V logarithm(const V& x) {
  if constexpr (sizeof(V) == sizeof(R)) {
    return natural_log(x);
  } else {
    using Types = detail::VectorOf<R, sizeof(V)>;
    if constexpr (std::is_same_v<R, double>) {
      return detail::log_of<V, typename Types::Bits>(x);
    } else {
      return detail::float_log_of<V, typename Types::Mask>(
          x, [](const typename Types::Mask& value)
                 GSALIGN_VECTOR_BODY { return __builtin_convertvector(value, V); });
    }
  }
}

namespace detail {

// (1/2) log m = offset[i] + f (a + f (b + f (c + ...))) with f = m inverse[i] - 1 for m in the
// i-th stretch of [3/4, 3/2), which are equally many floats each. The tables fill a vector, where
// looking up takes one instruction; the polynomials are Chebyshev's interpolations, and leave 2e-8
// of 8 stretches and 1e-8 of 16: less than the rounding of most logarithms.
template <int kBytes>
struct LogarithmTable;
template <>
struct LogarithmTable<32> {
  static constexpr int kStretchBits = 20;  // of a float's bits, those that are not the stretch
  static constexpr float kInverse[8] = {1.27999997f,  1.18518519f,  1.10344827f,  1.03225803f,
                                        0.941176474f, 0.842105269f, 0.761904776f, 0.695652187f};
  static constexpr float kOffset[8] = {-0.123430028f,  -0.0849495221f, -0.0492200345f,
                                       -0.0158743343f, 0.030312309f,   0.0859251247f,
                                       0.135966848f,   0.181452738f};
  static constexpr float kSeries[4] = {0.499999625f, -0.249999687f, 0.167100264f, -0.125361376f};
};
template <>
struct LogarithmTable<64> {
  static constexpr int kStretchBits = 19;
  static constexpr float kInverse[16] = {1.30612242f,  1.25490201f,  1.20754719f,  1.16363633f,
                                         1.12280703f,  1.08474576f,  1.04918027f,  1.01587307f,
                                         0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f,
                                         0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f};
  static constexpr float kOffset[16] = {
      -0.133531369f,  -0.11352873f,   -0.0942955792f, -0.07577492f,
      -0.0579158983f, -0.0406728075f, -0.0240045685f, -0.00787419417f,
      0.0153858276f,  0.0448060897f,  0.072591006f,   0.0989128783f,
      0.123918114f,   0.147732121f,   0.170463295f,   0.192205878f};
  static constexpr float kSeries[3] = {0.499999989f, -0.250114846f, 0.166758547f};
};

}  // namespace detail

// x[j] = half the logarithm of x[j], a few vectors step by step side by side: one alone is a chain
// of twenty instructions, and processors look ahead at three such chains only.
template <typename R, typename V, int kCount>
GSALIGN_INLINE void half_logarithms(V (&x)[kCount]) {
  if constexpr (std::is_same_v<R, float> && sizeof(V) >= 32) {
    using Table = detail::LogarithmTable<sizeof(V)>;
    using I = typename detail::VectorOf<float, sizeof(V)>::Mask;
    const V inverse = load_vector<float, sizeof(V)>(Table::kInverse);
    const V offset = load_vector<float, sizeof(V)>(Table::kOffset);
    constexpr std::int32_t kThreeQuarters = 0x3f400000;
    constexpr int kDegree = sizeof(Table::kSeries) / sizeof(float);
    I above[kCount];
    V exponent[kCount], f[kCount], series[kCount];
    const auto each = [](const auto& step) GSALIGN_VECTOR_BODY {
      for (int j = 0; j < kCount; ++j) {
        step(j);
      }
    };
    each([&](int j) GSALIGN_VECTOR_BODY { above[j] = bit_cast<I>(x[j]) - kThreeQuarters; });
    each([&](int j) GSALIGN_VECTOR_BODY {
      const I field = above[j] & ~0x7fffff;  // 2^23 times the exponent
      f[j] = bit_cast<V>(bit_cast<I>(x[j]) - field);
      exponent[j] = __builtin_convertvector(field, V);
    });
    each([&](int j) GSALIGN_VECTOR_BODY { above[j] >>= Table::kStretchBits; });
    each([&](int j)
             GSALIGN_VECTOR_BODY { f[j] = f[j] * __builtin_shuffle(inverse, above[j]) - 1.0f; });
    each([&](int j) GSALIGN_VECTOR_BODY {
      exponent[j] =
          exponent[j] * (0x1p-23f * 0.346573590279972655f) + __builtin_shuffle(offset, above[j]);
    });
    each([&](int j) GSALIGN_VECTOR_BODY { series[j] = V{} + Table::kSeries[kDegree - 1]; });
    for (int i = kDegree - 2; i >= 0; --i) {
      each([&](int j) GSALIGN_VECTOR_BODY { series[j] = series[j] * f[j] + Table::kSeries[i]; });
    }
    each([&](int j) GSALIGN_VECTOR_BODY { x[j] = series[j] * f[j] + exponent[j]; });
  } else {
    for (V& value : x) {
      value = R(0.5) * logarithm<R, V>(value);
    }
  }
}

// As many rows as a vector of doubles has numbers, to columns.
template <typename V>
GSALIGN_INLINE void transpose(V (&rows)[sizeof(V) / sizeof(double)]) {
  constexpr int n = sizeof(V) / sizeof(double);
  if constexpr (n == 2) {
    const V first = rows[0];
    rows[0] = __builtin_shufflevector(first, rows[1], 0, 2);
    rows[1] = __builtin_shufflevector(first, rows[1], 1, 3);
  } else if constexpr (n == 4) {
    V pairs[4];
    for (int i = 0; i < 4; i += 2) {
      pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 4, 2, 6);
      pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 1, 5, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
      rows[i] = __builtin_shufflevector(pairs[i], pairs[i + 2], 0, 1, 4, 5);
      rows[i + 2] = __builtin_shufflevector(pairs[i], pairs[i + 2], 2, 3, 6, 7);
    }
  } else {
    static_assert(n == 8);
    V pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
      pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = i; j < i + 2; ++j) {
        fours[j] = __builtin_shufflevector(pairs[j], pairs[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        fours[j + 2] = __builtin_shufflevector(pairs[j], pairs[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
}

}  // namespace gsalign
