// Scalar arithmetic of image sampling: one axis of torch's grid_sample, and its derivative.
//
// On a GPU the cell of a coordinate is the same in every kernel: no product here may be fused with
// a sum.
//
// Non-finite coordinates read what grid_sample reads on the CPU: with border and reflection padding
// the first pixel (border takes an infinity to its side), with zeros NaN when bilinear and 0 when
// nearest. Nothing outside the image is ever read.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/host_device.h"

namespace gsalign::warp {

enum class Mode { bilinear = 0, nearest = 1 };
enum class Padding { zeros = 0, border = 1, reflection = 2 };

template <typename R>
constexpr R kNan = std::numeric_limits<R>::quiet_NaN();

// A pixel position and its derivative by the normalised coordinate.
template <typename R>
struct Position {
  R value, slope;
};

template <typename R, typename Index>
GSALIGN_HOST_DEVICE Position<R> pixel_position_of(R coordinate, Index size, bool align_corners) {
  if (align_corners) {
    const R half = static_cast<R>(size - 1) / R(2);
    return {rounded_product((coordinate + R(1)) / R(2), static_cast<R>(size - 1)), half};
  }
  return {
      (rounded_product(coordinate + R(1), static_cast<R>(size)) - R(1)) / R(2),
      static_cast<R>(size) / R(2)};
}

template <typename R, typename Index>
GSALIGN_HOST_DEVICE Position<R> clip(Position<R> p, Index size) {
  const R last = static_cast<R>(size - 1);
  if (!(p.value > R(0))) {  // also NaN
    return {R(0), R(0)};
  }
  if (p.value >= last) {
    return {last, R(0)};
  }
  return p;
}

// Reflects about the centres (align_corners) or the outer edges of the first and last pixel.
template <typename R, typename Index>
GSALIGN_HOST_DEVICE Position<R> reflect(Position<R> p, Index size, bool align_corners) {
  const R low = align_corners ? R(0) : R(-0.5);
  const R span = static_cast<R>(align_corners ? size - 1 : size);
  if (span <= R(0)) {
    return {R(0), R(0)};
  }
  const R offset = p.value - low;
  const R distance = std::fabs(offset);
  const R slope = offset < R(0) ? -p.slope : p.slope;
  const R extra = std::fmod(distance, span);
  const R flips = std::floor(distance / span);
  const bool even = flips - R(2) * std::floor(flips / R(2)) == R(0);
  return even ? Position<R>{extra + low, slope} : Position<R>{span - extra + low, -slope};
}

// One axis of a tap: pixels `cell` and `cell + 1` with weights 1 - fraction and fraction; only
// those said to be inside may be read.
template <typename R, typename Index = std::int64_t>
struct SampleAxis {
  Index cell;
  R fraction, slope;
  bool first_inside, next_inside;
  bool undefined;  // the sampled value is NaN
};

template <typename R, typename Index>
GSALIGN_HOST_DEVICE SampleAxis<R, Index> sample_axis(
    R coordinate, Index size, Mode mode, Padding padding, bool align_corners) {
  Position<R> p = pixel_position_of(coordinate, size, align_corners);
  if (padding == Padding::reflection) {
    p = reflect(p, size, align_corners);
  }
  if (padding != Padding::zeros) {
    p = clip(p, size);
  }
  const bool finite = p.value - p.value == R(0);
  // A pixel further out is outside for both taps; the bound also keeps the conversion defined.
  if (!finite || p.value < R(-2) || p.value > static_cast<R>(size) + R(1)) {
    const bool undefined = !finite && mode == Mode::bilinear;
    return {0, undefined ? kNan<R> : R(0), R(0), false, false, undefined};
  }
  if (mode == Mode::nearest) {
    const Index cell = static_cast<Index>(std::nearbyint(p.value));
    return {cell, R(0), R(0), cell >= 0 && cell < size, false, false};
  }
  const R floor = std::floor(p.value);
  const Index cell = static_cast<Index>(floor);
  return {
      cell, p.value - floor, p.slope, cell >= 0 && cell < size, cell + 1 >= 0 && cell + 1 < size,
      false};
}

}  // namespace gsalign::warp
