// Runs the CUDA kernels of the masked prototype loss on the host, on cases read from a file.
//
//   prototype_driver CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]
//
// CASES is a sequence of records: 7 int32 (batch, channels, threads of a block at most, 16-byte
// vectors allowed, multiprocessors, which passes: 1 forward, 3 both; repeats), the gradients of
// alignment and entropy, features and masks, all float32, then int64 labels. RESULTS gets per
// record the plan as 6 int32, then float32: alignment, entropy, means, norms, and the gradients of
// features and masks if asked for. Every pass runs `repeats` times into poisoned memory; a run that
// differs from the first by one bit ends the program with 3.
#define GSALIGN_HOST_LAUNCH "host_launch.h"
#include "../../csrc/prototype/prototype_kernels.cuh"
#include "driver.h"

namespace {

using namespace gsalign;
using namespace gsalign::prototype;
using host::keep_first;
using host::poisoned;
using host::read_values;

struct Header {
  std::int32_t batch, channels, threads, vectors, multiprocessors, passes, repeats;
};

void run_case(std::FILE* cases, std::FILE* results, const Header& h) {
  const std::size_t values = static_cast<std::size_t>(h.batch) * h.channels;
  const std::vector<float> slopes = read_values<float>(cases, 2);
  const std::vector<float> features = read_values<float>(cases, values);
  const std::vector<float> masks = read_values<float>(cases, values);
  const std::vector<std::int64_t> labels = read_values<std::int64_t>(cases, h.batch);
  const Problem problem{features.data(), masks.data(), labels.data(), h.batch, h.channels, 0, 0, 0};
  const bool vectors = h.vectors != 0 && h.channels % 4 == 0;
  const Plan plan = make_plan(h.batch, h.channels, vectors, h.threads, h.multiprocessors);
  const std::int32_t told[6] = {plan.vectors, plan.tiles,         plan.groups,
                                plan.window,  plan.class_threads, plan.row_threads};
  host::write(results, told, 6);

  const void* stream = nullptr;
  std::vector<float> losses, means, norms, grad_features, grad_masks;
  for (int repeat = 0; repeat < h.repeats; ++repeat) {
    std::vector<float> losses_now = poisoned<float>(2), means_now = poisoned<float>(values);
    std::vector<float> norms_now = poisoned<float>(static_cast<std::size_t>(h.batch) * kKept);
    std::vector<float> workspace = poisoned<float>(workspace_floats(h.batch));
    launch_forward(
        problem, plan, means_now.data(), norms_now.data(), workspace.data(), losses_now.data(),
        losses_now.data() + 1, stream);
    keep_first(losses, std::move(losses_now), repeat == 0);
    keep_first(means, std::move(means_now), repeat == 0);
    keep_first(norms, std::move(norms_now), repeat == 0);
    if ((h.passes & 2) != 0) {
      std::vector<float> features_now = poisoned<float>(values);
      std::vector<float> masks_now = poisoned<float>(values);
      launch_backward(
          problem, plan, means.data(), norms.data(), slopes.data(), slopes.data() + 1,
          features_now.data(), masks_now.data(), stream);
      keep_first(grad_features, std::move(features_now), repeat == 0);
      keep_first(grad_masks, std::move(masks_now), repeat == 0);
    }
  }
  for (const std::vector<float>* result : {&losses, &means, &norms, &grad_features, &grad_masks}) {
    host::write(results, result->data(), result->size());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return host::run_cases<Header>(argc, argv, run_case);
}
