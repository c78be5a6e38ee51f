// Thin-plate splines on the CPU: batched solve with factors kept for its adjoint, evaluation at
// points and on the pixels of a map.
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "tps.h"
#include "tps_block.h"

namespace gsalign::tps {
namespace {

// Points of evaluation per unit of backward work; each unit leaves its own partial sums.
constexpr std::int64_t kPointChunk = 16 * kPointBlock;

// y[c] -= factor * x[c]
GSALIGN_CLONES static void row_subtract(
    double* __restrict y, double factor, const double* __restrict x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] -= factor * x[c];
  }
}

// The symmetric matrix [[Phi + reg I, P], [P^T, 0]] of order K + 3, in double for every type: the
// systems are small and their condition grows to thousands.
template <typename R>
void assemble(const R* points, std::int64_t count, double regularization, double* matrix) {
  const std::int64_t order = count + 3;
  for (std::int64_t i = 0; i < count; ++i) {
    double* row = matrix + i * order;
    const double x = points[2 * i], y = points[2 * i + 1];
    for (std::int64_t j = 0; j < count; ++j) {
      const double dx = x - points[2 * j], dy = y - points[2 * j + 1];
      row[j] = radial_basis(dx * dx + dy * dy).value;
    }
    row[i] += regularization;
    const double affine[3] = {1.0, x, y};
    for (std::int64_t a = 0; a < 3; ++a) {
      row[count + a] = affine[a];
      matrix[(count + a) * order + i] = affine[a];
    }
  }
  for (std::int64_t a = 0; a < 3; ++a) {
    for (std::int64_t b = 0; b < 3; ++b) {
      matrix[(count + a) * order + count + b] = 0.0;
    }
  }
}

// LU with partial pivoting, in place. Returns false when a pivot vanishes beside the matrix.
bool factorize(double* matrix, std::int64_t order, std::int32_t* pivots) {
  double largest = 0.0;
  for (std::int64_t i = 0; i < order * order; ++i) {
    largest = std::max(largest, std::fabs(matrix[i]));
  }
  const double vanishing =
      static_cast<double>(order) * std::numeric_limits<double>::epsilon() * largest;
  bool regular = true;
  for (std::int64_t step = 0; step < order; ++step) {
    std::int64_t best = step;
    for (std::int64_t i = step + 1; i < order; ++i) {
      if (std::fabs(matrix[i * order + step]) > std::fabs(matrix[best * order + step])) {
        best = i;
      }
    }
    pivots[step] = static_cast<std::int32_t>(best);
    if (best != step) {
      std::swap_ranges(matrix + step * order, matrix + (step + 1) * order, matrix + best * order);
    }
    const double pivot = matrix[step * order + step];
    if (std::fabs(pivot) <= vanishing) {
      regular = false;  // a NaN is no vanishing pivot: it goes on into the result
    }
    for (std::int64_t i = step + 1; i < order; ++i) {
      double* row = matrix + i * order;
      const double factor = row[step] / pivot;
      row[step] = factor;
      row_subtract(row + step + 1, factor, matrix + step * order + step + 1, order - step - 1);
    }
  }
  return regular;
}

// Solves with the factors, in place, for `columns` right-hand sides [order, columns].
void substitute(
    const double* factors, const std::int32_t* pivots, std::int64_t order, std::int64_t columns,
    double* rhs) {
  for (std::int64_t step = 0; step < order; ++step) {
    if (pivots[step] != step) {
      std::swap_ranges(
          rhs + step * columns, rhs + (step + 1) * columns, rhs + pivots[step] * columns);
    }
  }
  for (std::int64_t i = 0; i < order; ++i) {
    for (std::int64_t j = 0; j < i; ++j) {
      row_subtract(rhs + i * columns, factors[i * order + j], rhs + j * columns, columns);
    }
  }
  for (std::int64_t i = order; i-- > 0;) {
    for (std::int64_t j = i + 1; j < order; ++j) {
      row_subtract(rhs + i * columns, factors[i * order + j], rhs + j * columns, columns);
    }
    const double inverse = 1.0 / factors[i * order + i];
    for (std::int64_t c = 0; c < columns; ++c) {
      rhs[i * columns + c] *= inverse;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> tps_solve(
    const Tensor& control_points, const Tensor& values, double regularization) {
  check_shape("control_points", control_points, {-1, -1, 2});
  const std::int64_t batch = control_points.size(0), count = control_points.size(1);
  STD_TORCH_CHECK(count >= 3, "control_points: wanted at least 3 points, got ", count);
  check_shape("values", values, {batch, count, -1});
  check_type("values", values, control_points.scalar_type());
  const std::int64_t columns = values.size(2), order = count + 3;
  const Tensor points = as_contiguous(control_points), wanted = as_contiguous(values);
  const Tensor coefficients = empty(wanted, {batch, order, columns}, wanted.scalar_type());
  const Tensor factors = empty(wanted, {batch, order, order}, ScalarType::Double);
  const Tensor pivots = empty(wanted, {batch, order}, ScalarType::Int);
  std::vector<char> regular(batch, 1);
  dispatch_coordinates("control_points", points.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    parallel_for(batch, [&](std::int64_t b) {
      double* matrix = mutable_data<double>(factors) + b * order * order;
      std::int32_t* order_of_rows = mutable_data<std::int32_t>(pivots) + b * order;
      assemble(data<R>(points) + b * count * 2, count, regularization, matrix);
      regular[b] = factorize(matrix, order, order_of_rows);
      std::vector<double> rhs(order * columns, 0.0);
      std::copy_n(data<R>(wanted) + b * count * columns, count * columns, rhs.begin());
      substitute(matrix, order_of_rows, order, columns, rhs.data());
      std::copy(rhs.begin(), rhs.end(), mutable_data<R>(coefficients) + b * order * columns);
    });
  });
  for (std::int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(
        regular[b], "control_points: those of sample ", b,
        " give a singular system; some are equal, or all lie on one line");
  }
  return {coefficients, factors, pivots};
}

std::tuple<Tensor, Tensor> tps_solve_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    const Tensor& factors, const Tensor& pivots) {
  check_shape("control_points", control_points, {-1, -1, 2});
  const std::int64_t batch = control_points.size(0), count = control_points.size(1);
  const std::int64_t order = count + 3;
  check_shape("grad", grad, {batch, order, -1});
  const std::int64_t columns = grad.size(2);
  check_shape("coefficients", coefficients, {batch, order, columns});
  check_shape("factors", factors, {batch, order, order});
  check_shape("pivots", pivots, {batch, order});
  check_type("grad", grad, control_points.scalar_type());
  check_type("coefficients", coefficients, control_points.scalar_type());
  check_type("factors", factors, ScalarType::Double);
  check_type("pivots", pivots, ScalarType::Int);
  const Tensor gradient = as_contiguous(grad), solution = as_contiguous(coefficients),
               points = as_contiguous(control_points), lu = as_contiguous(factors),
               rows = as_contiguous(pivots);
  for (std::int64_t i = 0; i < batch * order; ++i) {
    const std::int32_t pivot = data<std::int32_t>(rows)[i];
    STD_TORCH_CHECK(pivot >= 0 && pivot < order, "pivots: are not those of tps_solve");
  }
  const Tensor grad_points = empty(points, {batch, count, 2}, points.scalar_type());
  const Tensor grad_values = empty(points, {batch, count, columns}, points.scalar_type());
  dispatch_coordinates("control_points", points.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    parallel_for(batch, [&](std::int64_t b) {
      // L is symmetric, so its adjoint is the same solve: L z = g, dL = -z w^T, dv = z[:K].
      std::vector<double> z(
          data<R>(gradient) + b * order * columns, data<R>(gradient) + (b + 1) * order * columns);
      substitute(
          data<double>(lu) + b * order * order, data<std::int32_t>(rows) + b * order, order,
          columns, z.data());
      std::copy_n(z.begin(), count * columns, mutable_data<R>(grad_values) + b * count * columns);
      const R* w = data<R>(solution) + b * order * columns;
      const auto grad_matrix = [&](std::int64_t i, std::int64_t j) {
        double sum = 0.0;
        for (std::int64_t v = 0; v < columns; ++v) {
          sum -= z[i * columns + v] * static_cast<double>(w[j * columns + v]);
        }
        return sum;
      };
      const R* c = data<R>(points) + b * count * 2;
      R* out = mutable_data<R>(grad_points) + b * count * 2;
      for (std::int64_t i = 0; i < count; ++i) {
        double gx = grad_matrix(i, count + 1) + grad_matrix(count + 1, i);
        double gy = grad_matrix(i, count + 2) + grad_matrix(count + 2, i);
        for (std::int64_t j = 0; j < count; ++j) {
          const double dx = static_cast<double>(c[2 * i]) - c[2 * j];
          const double dy = static_cast<double>(c[2 * i + 1]) - c[2 * j + 1];
          const double slope = radial_basis(dx * dx + dy * dy).slope;
          const double pull = 2.0 * slope * (grad_matrix(i, j) + grad_matrix(j, i));
          gx += pull * dx;
          gy += pull * dy;
        }
        out[2 * i] = static_cast<R>(gx);
        out[2 * i + 1] = static_cast<R>(gy);
      }
    });
  });
  return {grad_points, grad_values};
}

// The given points, `[B, N, 2]`, or the pixels of a map, the same for every sample.
template <typename R>
struct Points {
  const R* given;  // nullptr for a map
  std::int64_t count, height, width;
  bool align_corners;

  void block(std::int64_t sample, std::int64_t begin, std::int64_t length, R* x, R* y) const {
    for (std::int64_t n = 0; n < length; ++n) {
      if (given != nullptr) {
        const R* point = given + (sample * count + begin + n) * 2;
        x[n] = point[0];
        y[n] = point[1];
      } else {
        x[n] = pixel_position<R>((begin + n) % width, width, align_corners);
        y[n] = pixel_position<R>((begin + n) / width, height, align_corners);
      }
    }
  }
};

struct Splines {
  Tensor coefficients, control_points;
  std::int64_t batch, points, columns;

  Splines(const Tensor& coefficients_, const Tensor& control_points_)
      : coefficients(as_contiguous(coefficients_)), control_points(as_contiguous(control_points_)) {
    check_shape("control_points", control_points, {-1, -1, 2});
    batch = control_points.size(0);
    points = control_points.size(1);
    check_shape("coefficients", coefficients, {batch, points + 3, -1});
    check_type("coefficients", coefficients, control_points.scalar_type());
    columns = coefficients.size(2);
  }

  template <typename R>
  Spline<R> sample(std::int64_t b) const {
    return {
        data<R>(coefficients) + b * (points + 3) * columns,
        data<R>(control_points) + b * points * 2, points, columns};
  }
};

template <typename R>
void evaluate(const Splines& splines, const Points<R>& points, R* out) {
  const std::int64_t blocks = ceil_div(points.count, kPointBlock);
  parallel_for(splines.batch * blocks, [&](std::int64_t unit) {
    const std::int64_t b = unit / blocks, begin = unit % blocks * kPointBlock;
    const std::int64_t length = std::min(kPointBlock, points.count - begin);
    R x[kPointBlock], y[kPointBlock];
    std::vector<R> values(splines.columns * kPointBlock);
    points.block(b, begin, length, x, y);
    evaluate_block(splines.sample<R>(b), x, y, length, values.data());
    R* to = out + (b * points.count + begin) * splines.columns;
    for (std::int64_t n = 0; n < length; ++n) {
      for (std::int64_t v = 0; v < splines.columns; ++v) {
        to[n * splines.columns + v] = values[v * kPointBlock + n];
      }
    }
  });
}

template <typename R>
void evaluate_backward(
    const Splines& splines, const Points<R>& points, const R* gradient, R* grad_coefficients,
    R* grad_control_points, R* grad_points) {
  const std::int64_t of_coefficients = (splines.points + 3) * splines.columns;
  const std::int64_t numbers = of_coefficients + 2 * splines.points;
  const std::int64_t chunks = std::max<std::int64_t>(ceil_div(points.count, kPointChunk), 1);
  std::vector<double> partials(splines.batch * chunks * numbers, 0.0);
  parallel_for(splines.batch * chunks, [&](std::int64_t unit) {
    const std::int64_t b = unit / chunks;
    const std::int64_t end = std::min((unit % chunks + 1) * kPointChunk, points.count);
    double* partial = partials.data() + unit * numbers;
    std::vector<R> columns(splines.columns * kPointBlock);
    R x[kPointBlock], y[kPointBlock], gx[kPointBlock], gy[kPointBlock];
    for (std::int64_t begin = unit % chunks * kPointChunk; begin < end; begin += kPointBlock) {
      const std::int64_t length = std::min(kPointBlock, end - begin);
      points.block(b, begin, length, x, y);
      const R* from = gradient + (b * points.count + begin) * splines.columns;
      for (std::int64_t n = 0; n < length; ++n) {
        for (std::int64_t v = 0; v < splines.columns; ++v) {
          columns[v * kPointBlock + n] = from[n * splines.columns + v];
        }
      }
      evaluate_block_backward(
          splines.sample<R>(b), x, y, length, columns.data(), partial, partial + of_coefficients,
          grad_points == nullptr ? nullptr : gx, grad_points == nullptr ? nullptr : gy);
      if (grad_points != nullptr) {
        R* to = grad_points + (b * points.count + begin) * 2;
        for (std::int64_t n = 0; n < length; ++n) {
          to[2 * n] = gx[n];
          to[2 * n + 1] = gy[n];
        }
      }
    }
  });
  sum_partials(
      partials, splines.batch, chunks, of_coefficients, 2 * splines.points, grad_coefficients,
      grad_control_points);
}

Tensor tps_evaluate(
    const Tensor& coefficients, const Tensor& control_points, const Tensor& points) {
  const Splines splines(coefficients, control_points);
  check_shape("points", points, {splines.batch, -1, 2});
  check_type("points", points, splines.coefficients.scalar_type());
  const Tensor at = as_contiguous(points);
  const std::int64_t count = at.size(1);
  const Tensor out = empty(at, {splines.batch, count, splines.columns}, at.scalar_type());
  dispatch_coordinates("coefficients", at.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate<R>(splines, {data<R>(at), count, 0, 0, true}, mutable_data<R>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> tps_evaluate_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    const Tensor& points) {
  const Splines splines(coefficients, control_points);
  check_shape("points", points, {splines.batch, -1, 2});
  check_type("points", points, splines.coefficients.scalar_type());
  const Tensor at = as_contiguous(points), gradient = as_contiguous(grad);
  const std::int64_t count = at.size(1);
  check_shape("grad", gradient, {splines.batch, count, splines.columns});
  check_type("grad", gradient, at.scalar_type());
  const Tensor grad_coefficients =
      empty(at, {splines.batch, splines.points + 3, splines.columns}, at.scalar_type());
  const Tensor grad_control = empty(at, {splines.batch, splines.points, 2}, at.scalar_type());
  const Tensor grad_points = empty(at, {splines.batch, count, 2}, at.scalar_type());
  dispatch_coordinates("coefficients", at.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate_backward<R>(
        splines, {data<R>(at), count, 0, 0, true}, data<R>(gradient),
        mutable_data<R>(grad_coefficients), mutable_data<R>(grad_control),
        mutable_data<R>(grad_points));
  });
  return {grad_coefficients, grad_control, grad_points};
}

void check_map(std::int64_t height, std::int64_t width) {
  STD_TORCH_CHECK(
      height >= 1 && width >= 1, "size: wanted positive lengths, got ", height, " x ", width);
}

Tensor tps_grid(
    const Tensor& coefficients, const Tensor& control_points, std::int64_t height,
    std::int64_t width, bool align_corners) {
  const Splines splines(coefficients, control_points);
  check_map(height, width);
  const Tensor& like = splines.coefficients;
  const Tensor out =
      empty(like, {splines.batch, height, width, splines.columns}, like.scalar_type());
  dispatch_coordinates("coefficients", like.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate<R>(
        splines, {nullptr, height * width, height, width, align_corners}, mutable_data<R>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> tps_grid_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    bool align_corners) {
  const Splines splines(coefficients, control_points);
  const Tensor gradient = as_contiguous(grad);
  check_shape("grad", gradient, {splines.batch, -1, -1, splines.columns});
  check_type("grad", gradient, splines.coefficients.scalar_type());
  const std::int64_t height = gradient.size(1), width = gradient.size(2);
  check_map(height, width);
  const Tensor grad_coefficients =
      empty(gradient, {splines.batch, splines.points + 3, splines.columns}, gradient.scalar_type());
  const Tensor grad_control =
      empty(gradient, {splines.batch, splines.points, 2}, gradient.scalar_type());
  dispatch_coordinates("coefficients", gradient.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate_backward<R>(
        splines, {nullptr, height * width, height, width, align_corners}, data<R>(gradient),
        mutable_data<R>(grad_coefficients), mutable_data<R>(grad_control), nullptr);
  });
  return {grad_coefficients, grad_control};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("tps_solve", TORCH_BOX(&tps_solve));
  m.impl("tps_solve_backward", TORCH_BOX(&tps_solve_backward));
  m.impl("tps_evaluate", TORCH_BOX(&tps_evaluate));
  m.impl("tps_evaluate_backward", TORCH_BOX(&tps_evaluate_backward));
  m.impl("tps_grid", TORCH_BOX(&tps_grid));
  m.impl("tps_grid_backward", TORCH_BOX(&tps_grid_backward));
}

}  // namespace gsalign::tps
