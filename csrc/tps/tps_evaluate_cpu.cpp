// Thin-plate splines on the CPU: evaluation at points and on the pixels of a map.
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "tps.h"
#include "tps_block.h"

namespace gsalign::tps {
namespace {

// Points of evaluation per unit of backward work; each unit leaves its own partial sums.
constexpr std::int64_t kPointChunk = 16 * kPointBlock;

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
  m.impl("tps_evaluate", TORCH_BOX(&tps_evaluate));
  m.impl("tps_evaluate_backward", TORCH_BOX(&tps_evaluate_backward));
  m.impl("tps_grid", TORCH_BOX(&tps_grid));
  m.impl("tps_grid_backward", TORCH_BOX(&tps_grid_backward));
}

}  // namespace gsalign::tps
