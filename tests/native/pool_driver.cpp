// Runs the CUDA kernels of masked part pooling on the host, on cases read from a file.
//
//   pool_driver CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]
//
// CASES is a sequence of records: 16 int32 (type 0 float32, 1 float16, 2 bfloat16; batch, parts,
// background, positions, prefix, channels, values between two rows of tokens, masks shared, mode,
// activation, binary visibility, 16-byte vectors allowed, multiprocessors, repeats, 0), eps as
// float32, then float32 tokens, masks, and the gradients of pooled tokens and visibilities. RESULTS
// gets per record the plans of both passes as 14 int32, the float32 pooled tokens, visibilities and
// totals, the int32 peaks and (with maxima) winners, and the float32 gradients of tokens and masks.
// Both passes run `repeats` times into poisoned memory; a run that differs from the first by one
// bit ends the program with 3. Launches are counted in order: forward, backward, and where there is
// one the finishing kernel.
#define GSALIGN_HOST_LAUNCH "host_launch.h"
#include "../../csrc/pool/pool_kernels.cuh"
#include "driver.h"

namespace {

using namespace gsalign;
using namespace gsalign::pool;
using host::keep_first;
using host::narrow;
using host::poisoned;
using host::read;
using host::read_values;
using host::write;
using host::write_widened;

struct Header {
  std::int32_t type, batch, parts, background, positions, prefix, channels, gap, shared;
  std::int32_t mode, activation, binary, vectors, multiprocessors, repeats, unused;
};

// Tokens with `gap` poisoned values behind every row.
template <typename T>
std::vector<T> spread(const std::vector<T>& tokens, std::size_t channels, std::size_t gap) {
  const std::size_t rows = channels > 0 ? tokens.size() / channels : 0;
  std::vector<T> result = poisoned<T>(rows * (channels + gap));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    result[i / channels * (channels + gap) + i % channels] = tokens[i];
  }
  return result;
}

template <typename T>
void run_case(std::FILE* cases, std::FILE* results, const Header& h) {
  const std::size_t batch = h.batch, parts = h.parts, channels = h.channels;
  const std::size_t rows = static_cast<std::size_t>(h.prefix) + h.positions;
  const std::size_t set = static_cast<std::size_t>(h.parts + h.background) * h.positions;
  const std::size_t masks_size = (h.shared != 0 ? 1 : batch) * set;
  float eps = 0.0f;
  read(cases, &eps, 1);
  const std::vector<T> tokens = spread(
      narrow<T>(read_values<float>(cases, batch * rows * channels)), channels,
      static_cast<std::size_t>(h.gap));
  const std::vector<float> masks = read_values<float>(cases, masks_size);
  const std::vector<T> gradient = narrow<T>(read_values<float>(cases, batch * parts * channels));
  const std::vector<float> seen = read_values<float>(cases, batch * parts);

  Problem<T> problem{};
  problem.masks.start = masks.data();
  problem.masks.set_stride = h.shared != 0 ? 0 : static_cast<std::int64_t>(set);
  problem.masks.background = h.background;
  problem.masks.parts = h.parts;
  problem.masks.positions = h.positions;
  problem.masks.mode = static_cast<Mode>(h.mode);
  problem.masks.activation = static_cast<Activation>(h.activation);
  problem.masks.eps = eps;
  const std::int64_t row_stride = h.channels + h.gap;
  problem.row_bytes = static_cast<int>(row_stride * sizeof(T));
  problem.sample_stride = static_cast<std::int64_t>(rows) * row_stride;
  problem.tokens = tokens.data() + h.prefix * row_stride;
  problem.batch = h.batch;
  problem.channels = h.channels;
  problem.prefix = h.prefix;

  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const bool vectors = h.vectors != 0 && h.channels % kVector == 0 && h.gap % kVector == 0;
  const bool maxima = problem.masks.mode == Mode::kMax;
  const ForwardPlan forward = plan_forward(
      h.parts, h.positions, h.channels, sizeof(T), vectors, maxima, h.batch, h.multiprocessors);
  const BackwardPlan backward =
      plan_backward(h.parts, h.positions, h.channels, sizeof(T), vectors, maxima);
  const std::int32_t told[14] = {forward.vectors,   forward.whole,         forward.parts,
                                 forward.lane_bits, forward.group_bits,    forward.held_parts,
                                 forward.held_rows, forward.shared_bytes,  backward.vectors,
                                 backward.parts,    backward.padded_parts, backward.units,
                                 backward.columns,  backward.shared_bytes};
  write(results, told, 14);

  const void* stream = nullptr;
  std::vector<T> pooled, grad_tokens;
  std::vector<float> visibility, totals, grad_masks;
  std::vector<std::int32_t> peaks, winners;
  for (int repeat = 0; repeat < h.repeats; ++repeat) {
    const bool first = repeat == 0;
    std::vector<T> pooled_now = poisoned<T>(batch * parts * channels);
    std::vector<float> visibility_now = poisoned<float>(batch * parts);
    std::vector<float> totals_now = poisoned<float>(batch * parts);
    std::vector<std::int32_t> peaks_now = poisoned<std::int32_t>(batch * parts);
    std::vector<std::int32_t> winners_now =
        poisoned<std::int32_t>(maxima ? batch * parts * channels : 0);
    Results<T> out{};
    out.pooled = pooled_now.data();
    out.visibility = visibility_now.data();
    out.totals = totals_now.data();
    out.peaks = peaks_now.data();
    out.winners = winners_now.data();
    out.binary = h.binary != 0;
    launch_forward<T>(problem, forward, out, 0, stream);

    std::vector<T> tokens_now = poisoned<T>(batch * rows * channels);
    std::vector<float> masks_now = poisoned<float>(masks_size);
    std::vector<float> workspace =
        poisoned<float>(workspace_floats(problem.masks, h.shared != 0, backward, h.batch));
    Gradients<T> gradients{};
    gradients.visibility = seen.data();
    gradients.totals = totals_now.data();
    gradients.peaks = peaks_now.data();
    gradients.masks = masks_now.data();
    gradients.pooled = gradient.data();
    gradients.winners = winners_now.data();
    gradients.tokens = tokens_now.data();
    launch_backward<T>(problem, h.shared != 0, backward, gradients, workspace.data(), 0, stream);

    keep_first(pooled, std::move(pooled_now), first);
    keep_first(visibility, std::move(visibility_now), first);
    keep_first(totals, std::move(totals_now), first);
    keep_first(peaks, std::move(peaks_now), first);
    keep_first(winners, std::move(winners_now), first);
    keep_first(grad_tokens, std::move(tokens_now), first);
    keep_first(grad_masks, std::move(masks_now), first);
  }
  write_widened(results, pooled);
  write(results, visibility.data(), visibility.size());
  write(results, totals.data(), totals.size());
  write(results, peaks.data(), peaks.size());
  write(results, winners.data(), winners.size());
  write_widened(results, grad_tokens);
  write(results, grad_masks.data(), grad_masks.size());
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
