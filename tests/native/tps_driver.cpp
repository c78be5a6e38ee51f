// Runs the CUDA kernels of thin-plate splines on the host, on cases read from a file.
//
//   tps_driver CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]
//
// CASES is a sequence of records: a Header, the regularisation as float64, then float64 control
// points, values, gradient by the coefficients, coefficients to evaluate, points, gradient by the
// values there, gradient by the map. RESULTS gets per record the plans of both solves and the tile
// as 11 int32 and, as float64: coefficients, info, gradients of control points and values;
// values at the points and gradients of coefficients, control points and points; the map and its
// two gradients. What was not asked for stays NaN. Every pass runs `repeats` times into poisoned
// memory; a run that differs from the first by one bit ends the program with 3.
#define GSALIGN_HOST_LAUNCH "host_launch.h"
#include "../../csrc/tps/tps_kernels.cuh"
#include "driver.h"

namespace {

using namespace gsalign;
using namespace gsalign::tps;
using host::poisoned;

enum Pass { kSolve = 1, kSolveBackward = 2, kForward = 4, kGradient = 8, kPointsBackward = 16 };

struct Header {
  std::int32_t type;  // 0 float32, 1 float64
  std::int32_t batch, points, columns, count, height, width, align_corners;
  std::int32_t passes;         // of Pass, together
  std::int32_t solve_threads;  // 0: as planned
  std::int32_t threads;        // of the kernels over points
  std::int32_t tile;           // 0: as planned
  std::int32_t multiprocessors, shared_per_block, repeats;
};

template <typename R>
std::vector<R> read_as(std::FILE* file, std::size_t count) {
  const std::vector<double> values = host::read_values<double>(file, count);
  return std::vector<R>(values.begin(), values.end());
}

template <typename T>
void write_widened(std::FILE* file, const std::vector<T>& values) {
  const std::vector<double> wide(values.begin(), values.end());
  host::write(file, wide.data(), wide.size());
}

// A result that every repeat writes anew into poisoned memory.
template <typename T>
class Result {
 public:
  explicit Result(std::size_t count) : kept_(poisoned<T>(count)) {}
  T* fresh() {
    now_ = poisoned<T>(kept_.size());
    return now_.data();
  }
  void keep(bool first) { host::keep_first(kept_, std::move(now_), first); }
  const std::vector<T>& values() const { return kept_; }

 private:
  std::vector<T> kept_, now_;
};

template <typename R>
struct Evaluated {
  Evaluated(const Splines<R>& splines, int count)
      : output(static_cast<std::size_t>(splines.batch) * count * splines.columns),
        coefficients(
            static_cast<std::size_t>(splines.batch) * (splines.points + 3) * splines.columns),
        control_points(static_cast<std::size_t>(splines.batch) * splines.points * 2),
        points(static_cast<std::size_t>(splines.batch) * count * 2) {}
  Result<R> output, coefficients, control_points, points;
};

template <typename R>
void evaluate(
    const Header& h, const Splines<R>& splines, const Points<R>& points,
    const std::vector<R>& gradient, int tile, Evaluated<R>& result) {
  const void* stream = nullptr;
  if (splines.batch == 0) {
    return;
  }
  for (int repeat = 0; repeat < h.repeats; ++repeat) {
    if ((h.passes & kForward) != 0 && points.count > 0 && splines.columns > 0) {
      launch_evaluate(splines, points, h.threads, result.output.fresh(), stream);
      result.output.keep(repeat == 0);
    }
    if ((h.passes & kGradient) != 0) {
      const std::size_t tiles = (points.count + tile - 1) / tile;
      std::vector<R> partials =
          poisoned<R>(splines.batch * tiles * partial_numbers(splines.points, splines.columns));
      launch_gradient(
          splines, points, gradient.data(), tile, h.threads, partials.data(),
          result.coefficients.fresh(), result.control_points.fresh(), stream);
      result.coefficients.keep(repeat == 0);
      result.control_points.keep(repeat == 0);
    }
    if ((h.passes & kPointsBackward) != 0 && points.given != nullptr && points.count > 0) {
      launch_points_backward(
          splines, points, gradient.data(), h.threads, result.points.fresh(), stream);
      result.points.keep(repeat == 0);
    }
  }
}

template <typename R>
void run_case(std::FILE* cases, std::FILE* results, const Header& h) {
  const std::size_t batch = h.batch, points = h.points, columns = h.columns, count = h.count;
  const std::size_t pixels = static_cast<std::size_t>(h.height) * h.width;
  const std::size_t of_coefficients = batch * (points + 3) * columns;
  const void* stream = nullptr;
  double regularization = 0.0;
  host::read(cases, &regularization, 1);
  const auto control_points = read_as<R>(cases, batch * points * 2);
  const auto values = read_as<R>(cases, batch * points * columns);
  const auto by_coefficients = read_as<R>(cases, of_coefficients);
  const auto coefficients = read_as<R>(cases, of_coefficients);
  const auto at = read_as<R>(cases, batch * count * 2);
  const auto by_values = read_as<R>(cases, batch * count * columns);
  const auto by_map = read_as<R>(cases, batch * pixels * columns);

  const auto plan_of = [&](bool backward) {
    SolvePlan plan =
        plan_solve(h.points, h.columns, backward, h.batch, h.multiprocessors, h.shared_per_block);
    plan.threads = h.solve_threads > 0 ? h.solve_threads : plan.threads;
    return plan;
  };
  const SolvePlan solve = plan_of(false), adjoint = plan_of(true);
  const int tile =
      h.tile > 0 ? h.tile
                 : plan_tile(h.count, most_tile_points<R>(h.columns), h.batch, h.multiprocessors);
  for (const SolvePlan& plan : {solve, adjoint}) {
    const std::int32_t told[5] = {
        plan.staged, plan.threads, plan.columns, plan.splits, plan.shared_bytes};
    host::write(results, told, 5);
  }
  const std::int32_t told_tile = tile;
  host::write(results, &told_tile, 1);

  Result<R> solved(of_coefficients), grad_control(batch * points * 2),
      grad_values(batch * points * columns);
  Result<double> factors(batch * factor_doubles(h.points));
  Result<int> info(batch);
  for (int repeat = 0; repeat < h.repeats && batch > 0; ++repeat) {
    if ((h.passes & kSolve) != 0) {
      launch_solve(
          control_points.data(), values.data(), regularization, h.batch, h.points, h.columns, solve,
          solved.fresh(), factors.fresh(), info.fresh(), 0, stream);
      solved.keep(repeat == 0);
      factors.keep(repeat == 0);
      info.keep(repeat == 0);
    }
    if ((h.passes & kSolveBackward) != 0) {
      std::vector<double> partials = poisoned<double>(batch * adjoint.splits * points * 2);
      launch_solve_backward(
          by_coefficients.data(), solved.values().data(), control_points.data(),
          factors.values().data(), h.batch, h.points, h.columns, adjoint, grad_control.fresh(),
          grad_values.fresh(), partials.data(), 0, stream);
      grad_control.keep(repeat == 0);
      grad_values.keep(repeat == 0);
    }
  }
  write_widened(results, solved.values());
  write_widened(results, info.values());
  write_widened(results, grad_control.values());
  write_widened(results, grad_values.values());

  const Splines<R> splines{
      coefficients.data(), control_points.data(), h.batch, h.points, h.columns};
  Evaluated<R> there(splines, h.count), map(splines, static_cast<int>(pixels));
  evaluate(h, splines, {at.data(), h.count, 0, 0, true}, by_values, tile, there);
  evaluate(
      h, splines, {nullptr, static_cast<int>(pixels), h.height, h.width, h.align_corners != 0},
      by_map, tile, map);
  write_widened(results, there.output.values());
  write_widened(results, there.coefficients.values());
  write_widened(results, there.control_points.values());
  write_widened(results, there.points.values());
  write_widened(results, map.output.values());
  write_widened(results, map.coefficients.values());
  write_widened(results, map.control_points.values());
}

}  // namespace

int main(int argc, char** argv) {
  return host::run_cases<Header>(
      argc, argv, [](std::FILE* cases, std::FILE* results, const Header& header) {
        return header.type == 0 ? run_case<float>(cases, results, header)
                                : run_case<double>(cases, results, header);
      });
}
