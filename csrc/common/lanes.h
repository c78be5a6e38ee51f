// Vectors of 64 bytes as a type: arithmetic on one of them is arithmetic on all its numbers.
//
// For code whose speed must not hang on what a compiler makes of a loop. `Vector<R>` holds
// neighbouring points of a spline; Lanes hold the same element of several small systems, which
// would leave vectors along their rows half empty: code templated on the element runs with Lanes
// for full groups of samples and with double for those left over.
#pragma once

#include <cstdint>
#include <cstring>

#include "natural_log.h"
#include "numbers.h"

namespace gsalign {

constexpr std::int64_t kLanes = 8;

// GCC and Clang split the vector where the processor's are narrower. An array of Lanes may be read
// and written as one of doubles, [kLanes] to an element.
using Lanes = double __attribute__((vector_size(kLanes * sizeof(double)), may_alias));
using LaneMask = std::int64_t __attribute__((vector_size(kLanes * sizeof(std::int64_t))));
using LaneBits = std::uint64_t __attribute__((vector_size(kLanes * sizeof(std::uint64_t))));

template <typename E>
constexpr std::int64_t kLanesOf = sizeof(E) / sizeof(double);

using FloatLanes = float __attribute__((vector_size(kLanes * sizeof(double)), may_alias));
using FloatMask = std::int32_t __attribute__((vector_size(kLanes * sizeof(double))));

namespace detail {
template <typename R>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatLanes;
};
template <>
struct VectorOf<double> {
  using Type = Lanes;
};
}  // namespace detail

template <typename R>
using Vector = typename detail::VectorOf<R>::Type;
template <typename R>
constexpr std::int64_t kVectorLength = sizeof(Vector<R>) / sizeof(R);

template <typename R>
GSALIGN_INLINE Vector<R> load_vector(const R* from) {
  Vector<R> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
template <typename R>
GSALIGN_INLINE void store_vector(R* to, const Vector<R>& value) {
  std::memcpy(to, &value, sizeof value);
}

// The sum of the numbers of a vector, always in the same order.
template <typename R>
GSALIGN_INLINE double sum_of(const Vector<R>& value) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < kVectorLength<R>; ++i) {
    sum += static_cast<double>(value[i]);
  }
  return sum;
}

GSALIGN_INLINE double lane(const double& value, std::int64_t) {
  return value;
}
GSALIGN_INLINE double lane(const Lanes& value, std::int64_t index) {
  return value[index];
}
GSALIGN_INLINE void set_lane(double& value, std::int64_t, double to) {
  value = to;
}
GSALIGN_INLINE void set_lane(Lanes& value, std::int64_t index, double to) {
  value[index] = to;
}

// Where a comparison holds, `yes`, else `no`; the comparison is a mask of all or no bits.
GSALIGN_INLINE double choose(bool mask, double yes, double no) {
  return mask ? yes : no;
}
GSALIGN_INLINE Lanes choose(const LaneMask& mask, const Lanes& yes, const Lanes& no) {
  return mask ? yes : no;
}

GSALIGN_INLINE FloatLanes
choose(const FloatMask& mask, const FloatLanes& yes, const FloatLanes& no) {
  return mask ? yes : no;
}

GSALIGN_INLINE double square_root(double value) {
  return __builtin_sqrt(value);
}
GSALIGN_INLINE Lanes square_root(const Lanes& value) {
  Lanes result;
  for (std::int64_t l = 0; l < kLanes; ++l) {
    result[l] = __builtin_sqrt(value[l]);
  }
  return result;
}

// Rows of an 8 x 8 matrix to its columns.
GSALIGN_INLINE void transpose(Lanes (&rows)[kLanes]) {
  static_assert(kLanes == 8);
  Lanes pairs[8], fours[8];
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

GSALIGN_INLINE Lanes natural_log(const Lanes& x) {
  return detail::log_of<Lanes, LaneBits>(x);
}
GSALIGN_INLINE FloatLanes natural_log(const FloatLanes& x) {
  return detail::float_log_of<FloatLanes, FloatMask>(
      x, [](const FloatMask& value) { return __builtin_convertvector(value, FloatLanes); });
}

}  // namespace gsalign
