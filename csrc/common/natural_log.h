// The natural logarithm as arithmetic that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace gsalign {
namespace detail {

template <typename To, typename From>
GSALIGN_HOST_DEVICE To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// log(x) for normal positive x in double, or in a vector of doubles with `I` the vector of unsigned
// 64-bit integers. Only logical shifts and no conversion from integers: older vector units lack
// the others.
template <typename D, typename I>
GSALIGN_HOST_DEVICE D log_of(const D& x) {
  constexpr std::uint64_t kRootHalf = 0x3fe6a09e667f3bcdULL;  // sqrt(1/2)
  constexpr std::uint64_t kOne = 0x3ff0000000000000ULL;
  const I bits = bits_of<I>(x);
  // Exponent field of x / sqrt(1/2): that of x, rounded so that m lies in [sqrt(1/2), sqrt(2)).
  const I shifted = bits + (kOne - kRootHalf);
  const I exponent_bits = shifted & ~std::uint64_t(0xfffffffffffffULL);
  const D m = bits_of<D>(bits - exponent_bits + kOne);
  // The field as a number: the low bits of a double of 2^52.
  const D exponent = bits_of<D>((exponent_bits >> 52) | std::uint64_t(0x4330000000000000ULL)) -
                     (4503599627370496.0 + 1023.0);
  const D s = (m - 1.0) / (m + 1.0);
  const D z = s * s;
  D series = z * (1.0 / 23.0) + 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  const D fraction = 2.0 * s + 2.0 * s * (z * series);
  // log 2 in two parts: the product with the first is exact.
  return fraction + exponent * 1.90821492927058770002e-10 + exponent * 6.93147180369123816490e-01;
}

}  // namespace detail

// log(x) for normal positive x, without branches or tables so that loops over it vectorise.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172,
// by its odd series; the first term left out is below the type's rounding.
GSALIGN_HOST_DEVICE float natural_log(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent * (1 << 23);
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  float series = 1.0f / 9.0f;
  series = series * z + 1.0f / 7.0f;
  series = series * z + 1.0f / 5.0f;
  series = series * z + 1.0f / 3.0f;
  const float fraction = 2.0f * s + 2.0f * s * (z * series);
  return fraction + static_cast<float>(exponent) * 0.693147180559945309f;
}

GSALIGN_HOST_DEVICE double natural_log(double x) {
  return detail::log_of<double, std::uint64_t>(x);
}

}  // namespace gsalign
