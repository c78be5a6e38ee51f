// Vectors as a type, as wide as the processor's: arithmetic on one is arithmetic on all its
// numbers.
//
// For code whose speed must not hang on what a compiler makes of a loop. Such code is templated on
// the width, and with_vectors() runs it for the width of this processor, compiled for it. Wider
// ones would be taken apart, comparisons number by number.
//
// `Vector<R, kBytes>` holds neighbouring points of a spline. As lanes, vectors of doubles hold the
// same element of several small systems, which would leave vectors along their rows half empty:
// code templated on the element runs with a vector for full groups of samples and with double for
// those left over.
#pragma once

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

// Bytes of this processor's vectors.
inline int vector_bytes() {
#if defined(GSALIGN_X86_LEVELS)
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
