// The natural logarithm as arithmetic that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace gsalign {

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
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int64_t exponent = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
  bits -= exponent * (std::int64_t(1) << 52);
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double series = 1.0 / 23.0;
  series = series * z + 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  const double fraction = 2.0 * s + 2.0 * s * (z * series);
  // log 2 in two parts: the product with the first is exact.
  return fraction + static_cast<double>(exponent) * 1.90821492927058770002e-10 +
         static_cast<double>(exponent) * 6.93147180369123816490e-01;
}

}  // namespace gsalign
