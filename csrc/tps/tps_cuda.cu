// Thin-plate splines on CUDA: argument checks, memory, launches.
//
// Nothing here waits for the device, so calls can be captured into a CUDA graph; only tps_solve
// with check_errors reads what the device found.
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/cuda.h"
#include "tps_kernels.cuh"

namespace gsalign::tps {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A length that kernels count in 32 bits.
int checked_length(const char* name, std::int64_t length) {
  STD_TORCH_CHECK(length <= kMaxInt, name, ": at most 2^31 - 1, got ", length);
  return static_cast<int>(length);
}

// Blocks are counted in 32 bits.
void check_blocks(const char* name, std::int64_t blocks) {
  STD_TORCH_CHECK(
      blocks <= kMaxInt, name, ": too many blocks for one launch (", blocks, "); split the batch");
}

// Control points [B, K, 2], contiguous, and what both directions of the solve ask of them.
struct System {
  explicit System(const Tensor& control_points_)
      : control_points(torch::stable::contiguous(control_points_)) {
    check_shape("control_points", control_points, {-1, -1, 2});
    check_device("control_points", control_points, control_points);
    const std::int64_t count = control_points.size(1);
    STD_TORCH_CHECK(
        count >= 3 && count <= kMaxSolvePoints, "control_points: wanted 3 to ", kMaxSolvePoints,
        " points, got ", count);
    batch = checked_length("control_points: samples", control_points.size(0));
    points = static_cast<int>(count);
    device = control_points.get_device_index();
  }

  // Of a tensor [B, rows, V] that the solve starts from.
  int columns_of(const char* name, const Tensor& tensor, std::int64_t rows) const {
    check_shape(name, tensor, {batch, rows, -1});
    check_type(name, tensor, control_points.scalar_type());
    check_device(name, tensor, control_points);
    STD_TORCH_CHECK(
        tensor.size(2) <= (1 << 24), name, ": at most 2^24 columns, got ", tensor.size(2));
    return static_cast<int>(tensor.size(2));
  }

  SolvePlan plan(int columns, bool backward) const {
    const SolvePlan plan = plan_solve(
        points, columns, backward, batch, device_limit(DeviceLimit::multiprocessors, device),
        device_limit(DeviceLimit::shared_per_block, device));
    check_blocks("tps_solve", static_cast<std::int64_t>(batch) * plan.splits);
    return plan;
  }

  Tensor control_points;
  int batch, points, device;
};

// Waits for the device and raises for the first sample that was not solved.
void raise_unless_solved(const Tensor& info, cudaStream_t stream) {
  std::vector<std::int32_t> outcomes(info.size(0));
  STD_CUDA_CHECK(cudaMemcpyAsync(
      outcomes.data(), data<std::int32_t>(info), outcomes.size() * sizeof(std::int32_t),
      cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  for (std::size_t b = 0; b < outcomes.size(); ++b) {
    STD_TORCH_CHECK(
        outcomes[b] != 1, "control_points: those of sample ", b,
        " give a singular system; some are equal, or all lie on one line");
    STD_TORCH_CHECK(outcomes[b] != 2, "control_points: those of sample ", b, " are not finite");
  }
}

std::tuple<Tensor, Tensor, Tensor> tps_solve(
    const Tensor& control_points, const Tensor& values, double regularization, bool check_errors) {
  const System system(control_points);
  const int columns = system.columns_of("values", values, system.points);
  const DeviceGuard guard(system.device);
  const cudaStream_t stream = stream_of(system.device);
  const Tensor wanted = torch::stable::contiguous(values);
  const Tensor coefficients =
      empty(wanted, {system.batch, system.points + 3, columns}, wanted.scalar_type());
  const Tensor factors =
      empty(wanted, {system.batch, factor_doubles(system.points)}, ScalarType::Double);
  const Tensor info = empty(wanted, {system.batch}, ScalarType::Int);
  dispatch_coordinates("control_points", wanted.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    if (system.batch > 0) {
      STD_CUDA_CHECK(launch_solve(
          data<R>(system.control_points), data<R>(wanted), regularization, system.batch,
          system.points, columns, system.plan(columns, false), mutable_data<R>(coefficients),
          mutable_data<double>(factors), mutable_data<std::int32_t>(info), system.device, stream));
    }
  });
  if (check_errors && system.batch > 0) {
    raise_unless_solved(info, stream);
  }
  return {coefficients, factors, info};
}

std::tuple<Tensor, Tensor> tps_solve_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    const Tensor& factors) {
  const System system(control_points);
  const int columns = system.columns_of("grad", grad, system.points + 3);
  check_shape("coefficients", coefficients, {system.batch, system.points + 3, columns});
  check_type("coefficients", coefficients, control_points.scalar_type());
  check_device("coefficients", coefficients, control_points);
  check_shape("factors", factors, {system.batch, factor_doubles(system.points)});
  check_type("factors", factors, ScalarType::Double);
  check_device("factors", factors, control_points);
  const DeviceGuard guard(system.device);
  const Tensor gradient = torch::stable::contiguous(grad);
  const Tensor solution = torch::stable::contiguous(coefficients);
  const Tensor factored = torch::stable::contiguous(factors);
  const Tensor& like = system.control_points;
  const Tensor grad_points = empty(like, {system.batch, system.points, 2}, like.scalar_type());
  const Tensor grad_values =
      empty(like, {system.batch, system.points, columns}, like.scalar_type());
  dispatch_coordinates("control_points", like.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    if (system.batch > 0) {
      const SolvePlan plan = system.plan(columns, true);
      const std::int64_t sums = plan.splits > 1 ? 2 * system.points : 0;
      const Tensor partials = empty(like, {system.batch, plan.splits, sums}, ScalarType::Double);
      check_blocks(
          "tps_solve",
          static_cast<std::int64_t>(system.batch) * sum_blocks_per_sample(system.points, 0));
      STD_CUDA_CHECK(launch_solve_backward(
          data<R>(gradient), data<R>(solution), data<R>(like), data<double>(factored), system.batch,
          system.points, columns, plan, mutable_data<R>(grad_points), mutable_data<R>(grad_values),
          mutable_data<double>(partials), system.device, stream_of(system.device)));
    }
  });
  return {grad_points, grad_values};
}

// Coefficients [B, K + 3, V] and control points [B, K, 2], contiguous and on one device.
struct Spline {
  Spline(const Tensor& coefficients_, const Tensor& control_points_)
      : coefficients(torch::stable::contiguous(coefficients_)),
        control_points(torch::stable::contiguous(control_points_)) {
    check_shape("control_points", control_points, {-1, -1, 2});
    check_device("control_points", control_points, control_points);
    check_shape(
        "coefficients", coefficients, {control_points.size(0), control_points.size(1) + 3, -1});
    check_type("coefficients", coefficients, control_points.scalar_type());
    check_device("coefficients", coefficients, control_points);
    STD_TORCH_CHECK(
        control_points.size(1) <= (1 << 24) && coefficients.size(2) <= (1 << 24),
        "coefficients: at most 2^24 control points and columns");
    batch = checked_length("control_points: samples", control_points.size(0));
    points = static_cast<int>(control_points.size(1));
    columns = static_cast<int>(coefficients.size(2));
    device = control_points.get_device_index();
  }

  template <typename R>
  Splines<R> splines() const {
    return {data<R>(coefficients), data<R>(control_points), batch, points, columns};
  }
  ScalarType type() const { return coefficients.scalar_type(); }

  // Of one launch with so many blocks per sample.
  void check_launch(const char* name, std::int64_t blocks) const {
    check_blocks(name, blocks * batch);
  }

  Tensor coefficients, control_points;
  int batch, points, columns, device;
};

template <typename R>
void evaluate(const char* name, const Spline& spline, const Points<R>& points, const Tensor& out) {
  if (spline.batch == 0 || points.count == 0 || spline.columns == 0) {
    return;
  }
  const int threads = evaluation_threads(points.count, kSplineThreads);
  const std::int64_t groups =
      (spline.columns - 1) / columns_per_thread(spline.columns) + std::int64_t(1);
  spline.check_launch(name, groups * ((points.count - 1) / threads + 1));
  STD_CUDA_CHECK(launch_evaluate(
      spline.splines<R>(), points, threads, mutable_data<R>(out), stream_of(spline.device)));
}

// Gradients of coefficients and control points.
template <typename R>
void evaluate_backward(
    const char* name, const Spline& spline, const Points<R>& points, const Tensor& grad,
    const Tensor& grad_coefficients, const Tensor& grad_control_points) {
  if (spline.batch == 0) {
    return;
  }
  const int tile = plan_tile(
      points.count, most_tile_points<R>(spline.columns), spline.batch,
      device_limit(DeviceLimit::multiprocessors, spline.device));
  const std::int64_t tiles = (static_cast<std::int64_t>(points.count) + tile - 1) / tile;
  spline.check_launch(name, tiles);
  spline.check_launch(name, sum_blocks_per_sample(spline.points, spline.columns));
  const Tensor partials = empty(
      spline.coefficients, {spline.batch, tiles, partial_numbers(spline.points, spline.columns)},
      spline.type());
  STD_CUDA_CHECK(launch_gradient(
      spline.splines<R>(), points, data<R>(grad), tile, kSplineThreads, mutable_data<R>(partials),
      mutable_data<R>(grad_coefficients), mutable_data<R>(grad_control_points),
      stream_of(spline.device)));
}

// Points [B, N, 2] of a spline, contiguous.
Tensor checked_points(const Spline& spline, const Tensor& points) {
  check_shape("points", points, {spline.batch, -1, 2});
  check_type("points", points, spline.type());
  check_device("points", points, spline.coefficients);
  checked_length("points", points.size(1));
  return torch::stable::contiguous(points);
}

Tensor checked_gradient(const Spline& spline, const Tensor& grad) {
  check_type("grad", grad, spline.type());
  check_device("grad", grad, spline.coefficients);
  return torch::stable::contiguous(grad);
}

template <typename R>
Points<R> given_points(const Tensor& points) {
  return {data<R>(points), static_cast<int>(points.size(1)), 0, 0, true};
}

template <typename R>
Points<R> map_points(std::int64_t height, std::int64_t width, bool align_corners) {
  return {
      nullptr, static_cast<int>(height * width), static_cast<int>(height), static_cast<int>(width),
      align_corners};
}

void check_map(std::int64_t height, std::int64_t width) {
  STD_TORCH_CHECK(
      height >= 1 && width >= 1, "size: wanted positive lengths, got ", height, " x ", width);
  STD_TORCH_CHECK(
      height <= kMaxInt && width <= kMaxInt && height <= kMaxInt / width,
      "size: at most 2^31 - 1 pixels, got ", height, " x ", width);
}

Tensor tps_evaluate(
    const Tensor& coefficients, const Tensor& control_points, const Tensor& points) {
  const Spline spline(coefficients, control_points);
  const Tensor at = checked_points(spline, points);
  const DeviceGuard guard(spline.device);
  const Tensor out = empty(at, {spline.batch, at.size(1), spline.columns}, at.scalar_type());
  dispatch_coordinates("coefficients", at.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate<R>("tps_evaluate", spline, given_points<R>(at), out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> tps_evaluate_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    const Tensor& points) {
  const Spline spline(coefficients, control_points);
  const Tensor at = checked_points(spline, points);
  check_shape("grad", grad, {spline.batch, at.size(1), spline.columns});
  const Tensor gradient = checked_gradient(spline, grad);
  const DeviceGuard guard(spline.device);
  const Tensor grad_coefficients = empty_as(spline.coefficients);
  const Tensor grad_control = empty_as(spline.control_points);
  const Tensor grad_points = empty_as(at);
  dispatch_coordinates("coefficients", at.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    const Points<R> where = given_points<R>(at);
    evaluate_backward<R>("tps_evaluate", spline, where, gradient, grad_coefficients, grad_control);
    if (spline.batch > 0 && where.count > 0) {
      const int threads = evaluation_threads(where.count, kSplineThreads);
      spline.check_launch("tps_evaluate", (where.count - 1) / threads + std::int64_t(1));
      STD_CUDA_CHECK(launch_points_backward(
          spline.splines<R>(), where, data<R>(gradient), threads, mutable_data<R>(grad_points),
          stream_of(spline.device)));
    }
  });
  return {grad_coefficients, grad_control, grad_points};
}

Tensor tps_grid(
    const Tensor& coefficients, const Tensor& control_points, std::int64_t height,
    std::int64_t width, bool align_corners) {
  const Spline spline(coefficients, control_points);
  check_map(height, width);
  const DeviceGuard guard(spline.device);
  const Tensor out =
      empty(spline.coefficients, {spline.batch, height, width, spline.columns}, spline.type());
  dispatch_coordinates("coefficients", spline.type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate<R>("tps_grid", spline, map_points<R>(height, width, align_corners), out);
  });
  return out;
}

std::tuple<Tensor, Tensor> tps_grid_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    bool align_corners) {
  const Spline spline(coefficients, control_points);
  check_shape("grad", grad, {spline.batch, -1, -1, spline.columns});
  const std::int64_t height = grad.size(1), width = grad.size(2);
  check_map(height, width);
  const Tensor gradient = checked_gradient(spline, grad);
  const DeviceGuard guard(spline.device);
  const Tensor grad_coefficients = empty_as(spline.coefficients);
  const Tensor grad_control = empty_as(spline.control_points);
  dispatch_coordinates("coefficients", spline.type(), [&](auto kind) {
    using R = decltype(kind);
    evaluate_backward<R>(
        "tps_grid", spline, map_points<R>(height, width, align_corners), gradient,
        grad_coefficients, grad_control);
  });
  return {grad_coefficients, grad_control};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CUDA, m) {
  m.impl("tps_solve", TORCH_BOX(&tps_solve));
  m.impl("tps_solve_backward", TORCH_BOX(&tps_solve_backward));
  m.impl("tps_evaluate", TORCH_BOX(&tps_evaluate));
  m.impl("tps_evaluate_backward", TORCH_BOX(&tps_evaluate_backward));
  m.impl("tps_grid", TORCH_BOX(&tps_grid));
  m.impl("tps_grid_backward", TORCH_BOX(&tps_grid_backward));
}

}  // namespace gsalign::tps
