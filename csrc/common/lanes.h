// Samples side by side: one number of each of several small problems in one vector.
//
// Small systems leave vectors along a row half empty. Here every vector holds the same element of
// kLanes samples, so that all arithmetic fills it, whatever the size of the systems. Code templated
// on the element runs with Lanes for full groups of samples and with double for those left over.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// Functions that take such vectors are always inlined, so how one would be passed is no matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <cstdint>

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

}  // namespace gsalign
