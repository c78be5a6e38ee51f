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
  D series = z * 0.073082248425217029 + 0.076658608002780206;
  series = series * z + 0.090914445626308610;
  series = series * z + 0.11111105567397540;
  series = series * z + 0.14285714312987742;
  series = series * z + 0.19999999999949752;
  series = series * z + 0.33333333333333348;
  const D fraction = 2.0 * s + 2.0 * s * (z * series);
  // log 2 in two parts: the product with the first is exact.
  return fraction + exponent * 1.90821492927058770002e-10 + exponent * 6.93147180369123816490e-01;
}

// The same in float, or in a vector of floats with `I` the vector of 32-bit integers.
template <typename F, typename I, typename ToFloat>
GSALIGN_HOST_DEVICE F float_log_of(const F& x, ToFloat&& to_float) {
  constexpr std::int32_t kRootHalf = 0x3f3504f3;
  const I bits = bits_of<I>(x);
  const I exponent = (bits - kRootHalf) >> 23;
  const F f = bits_of<F>(bits - exponent * (1 << 23)) - 1.0f;
  const F z = f * f;
  F series = f * 0.0697161147f - 0.114797338f;
  series = series * f + 0.116854199f;
  series = series * f - 0.124256873f;
  series = series * f + 0.142490576f;
  series = series * f - 0.166678023f;
  series = series * f + 0.200007157f;
  series = series * f - 0.249999970f;
  series = series * f + 0.333333312f;
  const F fraction = (z * f) * series - 0.5f * z + f;
  return fraction + to_float(exponent) * 0.693147180559945309f;
}

}  // namespace detail

// log(x) for normal positive x, without branches or tables so that loops over it vectorise:
// x = 2^e m with m in [sqrt(1/2), sqrt(2)). The polynomials interpolate at Chebyshev's nodes; what
// they leave is below the type's rounding.
//
// float: log(1 + f) = f - f^2 / 2 + f^3 P(f), which needs no division.
GSALIGN_HOST_DEVICE float natural_log(float x) {
  return detail::float_log_of<float, std::int32_t>(
      x, [](std::int32_t value) { return static_cast<float>(value); });
}

// double: 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, an odd function of s.
GSALIGN_HOST_DEVICE double natural_log(double x) {
  return detail::log_of<double, std::uint64_t>(x);
}

}  // namespace gsalign
