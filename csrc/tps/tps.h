// Scalar arithmetic of thin-plate splines, shared by every implementation.
//
// U(r2) = r2/2 log(max(r2, 1e-8)): the squared distance comes from differences, never from an
// expanded square, and is clamped, so U(0) = 0 and the slope stays finite.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/natural_log.h"

namespace gsalign::tps {

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
    return rounded_product(static_cast<R>(index), step) - R(1);
  }
  return static_cast<R>(2 * index + 1) / static_cast<R>(length) - R(1);
}

}  // namespace gsalign::tps
