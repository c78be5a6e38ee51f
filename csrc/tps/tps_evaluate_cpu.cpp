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

  GSALIGN_INLINE void block(std::int64_t sample, std::int64_t begin, PointBlock<R>* out) const {
    const std::int64_t length = std::min(kPointBlock, count - begin);
    if (given == nullptr) {
      out->set_pixels(begin, length, height, width, align_corners);
      return;
    }
    const R* point = given + (sample * count + begin) * 2;
    for (std::int64_t n = 0; n < length; ++n) {
      out->x[n] = point[2 * n];
      out->y[n] = point[2 * n + 1];
    }
    out->count = length;
    out->fill();
  }
};

struct Splines {
  Tensor coefficients, control_points;
  std::int64_t batch, points, columns;
  bool shared;  // one set of control points for every sample

  Splines(const Tensor& coefficients_, const Tensor& control_points_)
      : coefficients(as_contiguous(coefficients_)), control_points(as_contiguous(control_points_)) {
    check_shape("control_points", control_points, {-1, -1, 2});
    batch = control_points.size(0);
    points = control_points.size(1);
    check_shape("coefficients", coefficients, {batch, points + 3, -1});
    check_type("coefficients", coefficients, control_points.scalar_type());
    columns = coefficients.size(2);
    shared = batch > 1 && control_points_.stride(0) == 0;
  }

  template <typename R>
  Spline<R> sample(std::int64_t b) const {
    return {
        data<R>(coefficients) + b * (points + 3) * columns,
        data<R>(control_points) + b * points * 2, points, columns};
  }
};

// [V][kPointBlock] to `count` points of [V].
template <typename R>
GSALIGN_INLINE void write_points(
    R* __restrict to, const R* values, std::int64_t count, std::int64_t columns) {
  for (std::int64_t n = 0; n < count; ++n) {
    for (std::int64_t v = 0; v < columns; ++v) {
      to[n * columns + v] = values[v * kPointBlock + n];
    }
  }
}

// One block of one sample.
template <int kBytes, typename R>
GSALIGN_INLINE void evaluate_one(
    const Spline<R>& spline, const Points<R>& points, std::int64_t sample, std::int64_t begin,
    R* values, R* out) {
  PointBlock<R> at;
  points.block(sample, begin, &at);
  evaluate_block<kBytes, Rows::none, R>(spline, at, nullptr, values);
  write_points(
      out + (sample * points.count + begin) * spline.columns, values, at.count, spline.columns);
}

// One block of pixels of every sample, whose control points are the same.
template <int kBytes, typename R>
GSALIGN_INLINE void evaluate_all(
    Spline<R> spline, const Points<R>& points, std::int64_t batch, std::int64_t begin, R* rows,
    R* values, R* out) {
  PointBlock<R> at;
  points.block(0, begin, &at);
  logarithm_rows<kBytes>(spline.control_points, spline.points, at, rows);
  for (std::int64_t b = 0; b < batch; ++b) {
    evaluate_block<kBytes, Rows::read, R>(spline, at, rows, values);
    write_points(
        out + (b * points.count + begin) * spline.columns, values, at.count, spline.columns);
    spline.coefficients += (spline.points + 3) * spline.columns;
  }
}

template <typename R>
void evaluate(const Splines& splines, const Points<R>& points, R* out) {
  const std::int64_t blocks = ceil_div(points.count, kPointBlock);
  const std::int64_t columns = splines.columns * kPointBlock;
  if (splines.shared && points.given == nullptr) {
    const std::int64_t rows = splines.points * kPointBlock;
    parallel_for(
        blocks, [&] { return Scratch<R>(rows + columns); },
        [&](const Scratch<R>& memory, std::int64_t block) {
          with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
            evaluate_all<decltype(width)::kBytes>(
                splines.sample<R>(0), points, splines.batch, block * kPointBlock, memory.data(),
                memory.data() + rows, out);
          });
        });
    return;
  }
  parallel_for(
      splines.batch * blocks, [&] { return Scratch<R>(columns); },
      [&](const Scratch<R>& memory, std::int64_t unit) {
        const std::int64_t b = unit / blocks;
        with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
          evaluate_one<decltype(width)::kBytes>(
              splines.sample<R>(b), points, b, unit % blocks * kPointBlock, memory.data(), out);
        });
      });
}

// One chunk of the points of one sample.
template <int kBytes, bool kPoints, typename R>
GSALIGN_INLINE void backward_chunk(
    const Spline<R>& spline, const Points<R>& points, std::int64_t sample, std::int64_t chunk,
    const R* gradient, R* columns, double* totals, R* grad_points) {
  SplineGradient<R, kBytes> sums(spline.points, spline.columns, totals);
  const std::int64_t end = std::min((chunk + 1) * kPointChunk, points.count);
  for (std::int64_t begin = chunk * kPointChunk; begin < end; begin += kPointBlock) {
    PointBlock<R> at;
    points.block(sample, begin, &at);
    const R* from = gradient + (sample * points.count + begin) * spline.columns;
    for (std::int64_t v = 0; v < spline.columns; ++v) {
      for (std::int64_t n = 0; n < kPointBlock; ++n) {
        columns[v * kPointBlock + n] = n < at.count ? from[n * spline.columns + v] : R(0);
      }
    }
    R gx[kPointBlock], gy[kPointBlock];
    sums.template add<kPoints>(spline, at, columns, gx, gy);
    if constexpr (kPoints) {
      R* to = grad_points + (sample * points.count + begin) * 2;
      for (std::int64_t n = 0; n < at.count; ++n) {
        to[2 * n] = gx[n];
        to[2 * n + 1] = gy[n];
      }
    }
  }
  sums.flush();
}

template <typename R>
void evaluate_backward(
    const Splines& splines, const Points<R>& points, const R* gradient, R* grad_coefficients,
    R* grad_control_points, R* grad_points) {
  const std::int64_t of_coefficients = (splines.points + 3) * splines.columns;
  const std::int64_t numbers = of_coefficients + 2 * splines.points;
  const std::int64_t chunks = std::max<std::int64_t>(ceil_div(points.count, kPointChunk), 1);
  std::vector<double> partials(splines.batch * chunks * numbers, 0.0);
  parallel_for(
      splines.batch * chunks, [&] { return Scratch<R>(splines.columns * kPointBlock); },
      [&](const Scratch<R>& columns, std::int64_t unit) {
        const std::int64_t b = unit / chunks;
        with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
          constexpr int kBytes = decltype(width)::kBytes;
          double* totals = partials.data() + unit * numbers;
          if (grad_points == nullptr) {
            backward_chunk<kBytes, false>(
                splines.sample<R>(b), points, b, unit % chunks, gradient, columns.data(), totals,
                grad_points);
          } else {
            backward_chunk<kBytes, true>(
                splines.sample<R>(b), points, b, unit % chunks, gradient, columns.data(), totals,
                grad_points);
          }
        });
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
  const Tensor out = empty({splines.batch, count, splines.columns}, at.scalar_type());
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
      empty({splines.batch, splines.points + 3, splines.columns}, at.scalar_type());
  const Tensor grad_control = empty({splines.batch, splines.points, 2}, at.scalar_type());
  const Tensor grad_points = empty({splines.batch, count, 2}, at.scalar_type());
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
  const Tensor out = empty({splines.batch, height, width, splines.columns}, like.scalar_type());
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
      empty({splines.batch, splines.points + 3, splines.columns}, gradient.scalar_type());
  const Tensor grad_control = empty({splines.batch, splines.points, 2}, gradient.scalar_type());
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
