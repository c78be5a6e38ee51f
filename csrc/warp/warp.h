// Scalar arithmetic of the token warp, shared by the CPU code, the CUDA kernels and their host
// tests.
//
// Coordinates are (x, y) in [-1, 1] with align_corners = true: -1 and 1 are the centres of the
// first and the last column (row). The map goes from output to input: the grid says where an output
// token reads. R is float, or double where the CPU serves float64.
//
// Non-finite coordinates. torch's grid_sample with border padding clips to [0, size - 1] so that a
// NaN reads the first column (row); on an axis of size 1 an infinite coordinate becomes inf * 0 =
// NaN and reads the only one. The same is done here. The backward pass of torch's CPU grid_sample
// reads out of bounds for a NaN (seen in 2.11 and 2.15); here a NaN is treated as clamped: its
// whole weight goes to the first column (row) and its gradient is zero. Compile this file without
// -ffast-math, which would let the compiler drop the NaN case.
#pragma once

#include "../common/host_device.h"

namespace gsalign::warp {

template <typename R>
struct Point {
  R x, y;
};

// One axis of a bilinear tap: cells `cell` and `cell + 1` with weights 1 - fraction and fraction.
template <typename R>
struct Axis {
  int cell;       // in [0, size - 1] whatever the coordinate
  R fraction;     // in [0, 1); 0 where clamped
  bool has_next;  // cell + 1 is inside; where not, fraction is 0 and that cell must not be read
  bool free;      // not clamped: the coordinate receives a gradient
};

// Row q of A = M S: the point where query q reads before rotation.
template <typename R>
GSALIGN_HOST_DEVICE Point<R> base_point(const R* basis_row, const R* source_points, int points) {
  Point<R> sum{R(0), R(0)};
  for (int k = 0; k < points; ++k) {
    sum.x += basis_row[k] * source_points[2 * k];
    sum.y += basis_row[k] * source_points[2 * k + 1];
  }
  return sum;
}

// R(theta) p, counter-clockwise with y pointing down the map: (x cos - y sin, x sin + y cos).
template <typename R>
GSALIGN_HOST_DEVICE Point<R> rotate(Point<R> p, R cosine, R sine) {
  return {p.x * cosine - p.y * sine, p.x * sine + p.y * cosine};
}

// R(theta)^T g: carries a gradient at rotated points back to the points before rotation.
template <typename R>
GSALIGN_HOST_DEVICE Point<R> rotate_back(Point<R> g, R cosine, R sine) {
  return {g.x * cosine + g.y * sine, g.y * cosine - g.x * sine};
}

// d theta for a gradient g at the rotated point p' = R(theta) p: dR/dtheta p = (-p'_y, p'_x).
template <typename R>
GSALIGN_HOST_DEVICE R angle_gradient(Point<R> g, Point<R> rotated) {
  return g.y * rotated.x - g.x * rotated.y;
}

// Normalised coordinate to cell and fraction with border padding. A coordinate at or beyond the
// border is clamped and has no gradient, as in grid_sample.
template <typename R>
GSALIGN_HOST_DEVICE Axis<R> clamp_axis(R coordinate, int size) {
  const R last = static_cast<R>(size - 1);
  const R position = ((coordinate + R(1)) / R(2)) * last;
  if (!(position > R(0))) {  // also NaN
    return {0, R(0), size > 1, false};
  }
  if (position >= last) {
    return {size - 1, R(0), false, false};
  }
  const int cell = static_cast<int>(position);  // below last, so cell + 1 <= size - 1
  return {cell, position - static_cast<R>(cell), true, true};
}

// Factor from the derivative by pixel position to the derivative by normalised coordinate.
template <typename R>
GSALIGN_HOST_DEVICE R position_scale(int size) {
  return static_cast<R>(size - 1) / R(2);
}

// Derivatives of sum_i w_i d_i by pixel position, where d_00, d_01, d_10, d_11 are the dot products
// of the output gradient with the tokens at (cell, cell + 1) of each axis (first index y, second
// x).
template <typename R>
GSALIGN_HOST_DEVICE Point<R> position_gradient(R fx, R fy, R d00, R d01, R d10, R d11) {
  return {
      (R(1) - fy) * (d01 - d00) + fy * (d11 - d10), (R(1) - fx) * (d10 - d00) + fx * (d11 - d01)};
}

}  // namespace gsalign::warp
