// Splines at a block of points on the CPU, forward and backward: the inner loops of tps and warp.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/cpu.h"
#include "tps.h"

namespace gsalign::tps {

// Points are worked on in blocks of this many, which stay in the first-level cache.
constexpr std::int64_t kPointBlock = 64;

// One sample's spline: coefficients [K + 3, V], control points [K, 2].
template <typename R>
struct Spline {
  const R* coefficients;
  const R* control_points;
  std::int64_t points, columns;

  const R* weights(std::int64_t k) const { return coefficients + k * columns; }
  const R* affine() const { return coefficients + points * columns; }
};

// U and its slope from one control point to `count` points.
template <typename R>
GSALIGN_CLONES static void basis_row(
    const R* x, const R* y, std::int64_t count, R cx, R cy, R* __restrict value,
    R* __restrict slope) {
#pragma omp simd
  for (std::int64_t n = 0; n < count; ++n) {
    const R dx = x[n] - cx, dy = y[n] - cy;
    const Basis<R> basis = radial_basis(dx * dx + dy * dy);
    value[n] = basis.value;
    slope[n] = basis.slope;
  }
}

// out[v * kPointBlock + n] = f_v(x[n], y[n]), column by column so that points fill the vectors.
template <typename R>
GSALIGN_CLONES static void evaluate_block(
    const Spline<R>& spline, const R* x, const R* y, std::int64_t count, R* __restrict out) {
  const R* affine = spline.affine();
  for (std::int64_t v = 0; v < spline.columns; ++v) {
    const R a0 = affine[v], ax = affine[spline.columns + v], ay = affine[2 * spline.columns + v];
    R* column = out + v * kPointBlock;
#pragma omp simd
    for (std::int64_t n = 0; n < count; ++n) {
      column[n] = a0 + ax * x[n] + ay * y[n];
    }
  }
  for (std::int64_t k = 0; k < spline.points; ++k) {
    const R cx = spline.control_points[2 * k], cy = spline.control_points[2 * k + 1];
    R value[kPointBlock];
#pragma omp simd
    for (std::int64_t n = 0; n < count; ++n) {
      const R dx = x[n] - cx, dy = y[n] - cy;
      value[n] = radial_basis(dx * dx + dy * dy).value;
    }
    const R* weights = spline.weights(k);
    for (std::int64_t v = 0; v < spline.columns; ++v) {
      const R weight = weights[v];
      R* column = out + v * kPointBlock;
#pragma omp simd
      for (std::int64_t n = 0; n < count; ++n) {
        column[n] += weight * value[n];
      }
    }
  }
}

// sum_n a[n] b[n] over a block
template <typename R>
GSALIGN_CLONES static R block_dot(const R* a, const R* b, std::int64_t count) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t n = 0; n < count; ++n) {
    sum += a[n] * b[n];
  }
  return sum;
}

// One block's share of the gradients, for `gradient` [V][kPointBlock]: added to `coefficients`
// [(K + 3) V] and `control_points` [2K]; the points' own gradient is written to gx, gy when given.
template <typename R>
void evaluate_block_backward(
    const Spline<R>& spline, const R* x, const R* y, std::int64_t count, const R* gradient,
    double* coefficients, double* control_points, R* gx, R* gy) {
  const std::int64_t columns = spline.columns;
  R ones[kPointBlock];
  std::fill_n(ones, count, R(1));
  double* affine = coefficients + spline.points * columns;
  if (gx != nullptr) {
    std::fill_n(gx, count, R(0));
    std::fill_n(gy, count, R(0));
  }
  for (std::int64_t v = 0; v < columns; ++v) {
    const R* column = gradient + v * kPointBlock;
    affine[v] += block_dot(column, ones, count);
    affine[columns + v] += block_dot(column, x, count);
    affine[2 * columns + v] += block_dot(column, y, count);
    if (gx != nullptr) {
      row_add(gx, spline.affine()[columns + v], column, count);
      row_add(gy, spline.affine()[2 * columns + v], column, count);
    }
  }
  for (std::int64_t k = 0; k < spline.points; ++k) {
    const R cx = spline.control_points[2 * k], cy = spline.control_points[2 * k + 1];
    R value[kPointBlock], slope[kPointBlock], pull[kPointBlock];
    basis_row(x, y, count, cx, cy, value, slope);
    std::fill_n(pull, count, R(0));
    for (std::int64_t v = 0; v < columns; ++v) {
      const R* column = gradient + v * kPointBlock;
      coefficients[k * columns + v] += block_dot(column, value, count);
      row_add(pull, spline.weights(k)[v], column, count);
    }
    // d U / d point = 2 slope (point - centre), and the opposite for the centre.
    double sum_x = 0.0, sum_y = 0.0;
    for (std::int64_t n = 0; n < count; ++n) {
      const R factor = R(2) * slope[n] * pull[n];
      const R tx = factor * (x[n] - cx), ty = factor * (y[n] - cy);
      sum_x -= tx;
      sum_y -= ty;
      if (gx != nullptr) {
        gx[n] += tx;
        gy[n] += ty;
      }
    }
    control_points[2 * k] += sum_x;
    control_points[2 * k + 1] += sum_y;
  }
}

// Adds up what the units of work left, [batch, chunks, (K + 3) V + 2K], in one fixed order, into
// the gradients of the coefficients [batch, (K + 3) V] and of the control points [batch, 2K].
template <typename R>
void sum_partials(
    const std::vector<double>& partials, std::int64_t batch, std::int64_t chunks,
    std::int64_t of_coefficients, std::int64_t of_points, R* grad_coefficients,
    R* grad_control_points) {
  const std::int64_t numbers = of_coefficients + of_points;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < numbers; ++i) {
      double sum = 0.0;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[(b * chunks + chunk) * numbers + i];
      }
      if (i < of_coefficients) {
        grad_coefficients[b * of_coefficients + i] = static_cast<R>(sum);
      } else {
        grad_control_points[b * of_points + i - of_coefficients] = static_cast<R>(sum);
      }
    }
  }
}

}  // namespace gsalign::tps
