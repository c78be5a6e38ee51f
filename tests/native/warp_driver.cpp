// Runs the CUDA kernels of the token warp on the host, on cases read from a file.
//
//   warp_driver CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]
//
// CASES is a sequence of records: 14 int32 (type 0 float32, 1 float16, 2 bfloat16; batch, height,
// width, prefix, channels, points, threads, 16-byte vectors allowed, shared memory per block, per
// multiprocessor, multiprocessors, which passes: 1 forward, 2 backward, 3 both; repeats), eta as
// float32, then float32 tokens, gradient, source points, angles, basis. RESULTS gets per record the
// plans of both passes as 12 int32 and the float32 outputs: tokens, and the three gradients. Every
// pass runs `repeats` times into poisoned memory; a run that differs from the first by one bit ends
// the program with 3.
#define GSALIGN_HOST_LAUNCH "host_launch.h"
#include "../../csrc/warp/warp_kernels.cuh"
#include "driver.h"

namespace {

using namespace gsalign;
using namespace gsalign::warp;
using host::keep_first;
using host::narrow;
using host::poisoned;
using host::read;
using host::write;
using host::write_widened;

struct Header {
  std::int32_t type, batch, height, width, prefix, channels, points, threads, vectors;
  std::int32_t shared_per_block, shared_per_multiprocessor, multiprocessors, passes, repeats;
};

template <typename T>
void run_case(std::FILE* cases, std::FILE* results, const Header& h) {
  const std::size_t map = static_cast<std::size_t>(h.height) * h.width;
  const std::size_t values = h.batch * (h.prefix + map) * h.channels;
  float eta = 0.0f;
  read(cases, &eta, 1);
  const std::vector<T> tokens = narrow<T>(host::read_values<float>(cases, values));
  const std::vector<T> gradient = narrow<T>(host::read_values<float>(cases, values));
  const std::vector<float> points = host::read_values<float>(cases, 2 * h.points);
  const std::vector<float> angle = host::read_values<float>(cases, h.batch);
  const std::vector<float> basis = host::read_values<float>(cases, map * h.points);
  const Chip chip{h.multiprocessors, h.shared_per_block, h.shared_per_multiprocessor};
  const int queries = static_cast<int>(map);
  const void* stream = nullptr;

  Problem<T> problem{};
  problem.tokens = tokens.data();
  problem.source_points = points.data();
  problem.angle = angle.data();
  problem.basis = basis.data();
  problem.eta = eta;
  problem.height = h.height;
  problem.width = h.width;
  problem.prefix = h.prefix;
  problem.channels = h.channels;
  problem.points = h.points;
  std::vector<float> base;
  if (h.points > kInlinePoints) {
    base = poisoned<float>(2 * map);
    launch_base(basis.data(), points.data(), base.data(), queries, h.points, h.threads, stream);
    problem.base = base.data();
  }
  const bool vectors = h.vectors != 0 && h.channels * sizeof(T) % 16 == 0;
  const Plan forward = plan_forward(queries, h.channels, sizeof(T), vectors, h.batch, chip);
  const Plan backward = plan_backward(queries, h.channels, sizeof(T), vectors, h.batch, chip);
  for (const Plan& plan : {forward, backward}) {
    const std::int32_t told[6] = {plan.vectors, plan.buffers,      plan.lane_bits,
                                  plan.groups,  plan.shared_bytes, plan.table_bytes};
    write(results, told, 6);
  }

  const bool empty = h.batch == 0 || h.channels == 0;
  std::vector<T> output, grad_tokens;
  std::vector<float> grad_points, grad_angle;
  for (int repeat = 0; repeat < h.repeats; ++repeat) {
    if ((h.passes & 1) != 0) {
      std::vector<T> now = poisoned<T>(values);
      if (!empty) {
        launch_forward<T>(problem, forward, now.data(), h.batch, h.threads, 0, stream);
      }
      keep_first(output, std::move(now), repeat == 0);
    }
    if ((h.passes & 2) != 0) {
      std::vector<T> tokens_now = poisoned<T>(values);
      std::vector<float> points_now = poisoned<float>(2 * h.points);
      std::vector<float> angle_now = poisoned<float>(h.batch);
      std::vector<float> workspace = poisoned<float>(workspace_floats(backward, h.batch, h.points));
      launch_backward<T>(
          problem, backward, gradient.data(), tokens_now.data(), points_now.data(),
          angle_now.data(), workspace.data(), h.batch, h.threads, 0, stream);
      keep_first(grad_tokens, std::move(tokens_now), repeat == 0);
      keep_first(grad_points, std::move(points_now), repeat == 0);
      keep_first(grad_angle, std::move(angle_now), repeat == 0);
    }
  }
  write_widened(results, output);
  write_widened(results, grad_tokens);
  write(results, grad_points.data(), grad_points.size());
  write(results, grad_angle.data(), grad_angle.size());
}

}  // namespace

int main(int argc, char** argv) {
  return host::run_cases<Header>(
      argc, argv, [](std::FILE* cases, std::FILE* results, const Header& header) {
        switch (header.type) {
          case 0:
            return run_case<float>(cases, results, header);
          case 1:
            return run_case<Half>(cases, results, header);
          default:
            return run_case<BFloat16>(cases, results, header);
        }
      });
}
