// Scalar arithmetic of thin-plate splines, shared by every implementation.
//
// U(r2) = r2/2 log(max(r2, 1e-8)): the squared distance comes from differences, never from an
// expanded square, and is clamped, so U(0) = 0 and the slope stays finite.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/host_device.h"

namespace gsalign::tps {

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

// A value and its derivative by r2.
template <typename R>
struct Basis {
  R value, slope;
};

template <typename R>
GSALIGN_HOST_DEVICE Basis<R> radial_basis(R squared_distance) {
  const R smallest = R(1e-8);
  // Written so that a NaN stays one: it must not look like a distance of zero.
  const bool below = squared_distance < smallest;
  const R logarithm = natural_log(below ? smallest : squared_distance);
  const R nan_keeper = squared_distance - squared_distance;  // 0, or NaN for infinity and NaN
  const R half_log = R(0.5) * logarithm + nan_keeper;
  return {squared_distance * half_log, half_log + (below ? R(0) : R(0.5))};
}

// Position of pixel `index` of `length` in [-1, 1].
template <typename R>
GSALIGN_HOST_DEVICE R pixel_position(std::int64_t index, std::int64_t length, bool align_corners) {
  if (align_corners) {
    const R step = R(2) / static_cast<R>(length > 1 ? length - 1 : 1);
    return static_cast<R>(index) * step - R(1);
  }
  return static_cast<R>(2 * index + 1) / static_cast<R>(length) - R(1);
}

}  // namespace gsalign::tps
