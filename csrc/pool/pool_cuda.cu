// CUDA entry points of masked part pooling: checks, memory, and the launches of pool_kernels.cuh.
//
// Nothing here waits for the device or reads its memory, so calls can be captured into a CUDA
// graph.
#include <cstdint>
#include <tuple>

#include "../common/cuda.h"
#include "pool_arguments.h"
#include "pool_kernels.cuh"

namespace gsalign::pool {
namespace {

Arguments check(
    const Tensor& tokens, const Tensor& masks, std::int64_t prefix, std::int64_t mode,
    std::int64_t activation, bool background, double eps) {
  STD_TORCH_CHECK(tokens.is_cuda(), "tokens: must be a CUDA tensor");
  const Arguments given = checked_arguments(
      tokens, masks, ScalarType::Float, prefix, mode, activation, background, eps);
  check_device("masks", masks, tokens);
  STD_TORCH_CHECK(
      given.batch <= kMaxInt && given.tokens() <= kMaxLength && given.channels <= kMaxLength,
      "tokens: at most 2^31 - 1 samples, 2^24 tokens and 2^24 channels, got ", shape_text(tokens));
  STD_TORCH_CHECK(
      given.parts <= kMaxParts && given.set_size() <= kMaxInt,
      "masks: the CUDA implementation takes at most ", kMaxParts,
      " parts and 2^31 - 1 weights a set, got ", shape_text(masks),
      "; implementation='reference' takes any");
  return given;
}

// Rows need only be contiguous in themselves: tokens behind a prefix stay where they are.
Tensor with_contiguous_rows(const Tensor& tokens) {
  const bool fine =
      (tokens.size(2) <= 1 || tokens.stride(2) == 1) && tokens.stride(1) <= kMaxInt / 4;
  return fine ? tokens : torch::stable::contiguous(tokens);
}

// The tensors of both passes as the kernels want them.
struct Call {
  Call(const Tensor& tokens_, const Tensor& masks_, const Arguments& given_)
      : tokens(with_contiguous_rows(tokens_)),
        masks(torch::stable::contiguous(masks_)),
        given(given_),
        device(tokens.get_device_index()),
        stream(stream_of(device)) {}

  bool maxima() const { return given.mode == Mode::kMax; }

  MaskSets mask_sets() const {
    MaskSets sets{};
    sets.start = masks.const_data_ptr<float>();
    sets.set_stride = given.shared ? 0 : given.set_size();
    sets.background = given.background;
    sets.parts = static_cast<int>(given.parts);
    sets.positions = static_cast<int>(given.positions);
    sets.mode = given.mode;
    sets.activation = given.activation;
    sets.eps = static_cast<float>(given.eps);
    return sets;
  }

  template <typename T>
  Problem<T> problem() const {
    Problem<T> result{};
    result.masks = mask_sets();
    result.tokens =
        static_cast<const T*>(tokens.const_data_ptr()) + given.prefix * tokens.stride(1);
    result.sample_stride = tokens.stride(0);
    result.row_bytes = static_cast<int>(tokens.stride(1) * sizeof(T));
    result.batch = static_cast<int>(given.batch);
    result.channels = static_cast<int>(given.channels);
    result.prefix = static_cast<int>(given.prefix);
    return result;
  }

  Tensor tokens, masks;
  Arguments given;
  int device;
  cudaStream_t stream;
};

// Whether 16-byte vectors of channels lie at multiples of 16 bytes in the tokens and in `other`,
// contiguous tensors of as many channels.
template <typename T>
bool in_vectors(const Problem<T>& problem, std::initializer_list<const void*> other) {
  constexpr std::int64_t kVector = 16 / sizeof(T);
  bool fine = problem.channels % kVector == 0 && problem.row_bytes % 16 == 0 &&
              problem.sample_stride % kVector == 0 && aligned(problem.tokens);
  for (const void* pointer : other) {
    fine = fine && aligned(pointer);
  }
  return fine;
}

void check_blocks(std::int64_t blocks) {
  STD_TORCH_CHECK(
      blocks <= kMaxInt, "masked_part_pool: too many blocks for one launch; split the batch");
}

template <typename T>
void forward(const Call& call, const Results<T>& results) {
  const Problem<T> problem = call.problem<T>();
  const MaskSets& masks = problem.masks;
  const bool vectors = in_vectors(problem, {results.pooled});
  const ForwardPlan plan = plan_forward(
      masks.parts, masks.positions, problem.channels, sizeof(T), vectors, call.maxima(),
      problem.batch, device_limit(DeviceLimit::multiprocessors, call.device));
  check_blocks(forward_blocks(plan, problem));
  STD_CUDA_CHECK(launch_forward<T>(problem, plan, results, call.device, call.stream));
}

template <typename T>
void backward(const Call& call, const Gradients<T>& gradients) {
  const Problem<T> problem = call.problem<T>();
  const MaskSets& masks = problem.masks;
  const bool vectors = in_vectors(problem, {gradients.pooled, gradients.tokens});
  const BackwardPlan plan = plan_backward(
      masks.parts, masks.positions, problem.channels, sizeof(T), vectors, call.maxima());
  check_blocks(backward_blocks(plan, problem));
  const Tensor workspace =
      empty_floats(call.masks, {workspace_floats(masks, call.given.shared, plan, problem.batch)});
  STD_CUDA_CHECK(launch_backward<T>(
      problem, call.given.shared, plan, gradients, workspace.mutable_data_ptr<float>(), call.device,
      call.stream));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_part_pool_cuda(
    const Tensor& tokens, const Tensor& masks, std::int64_t prefix, std::int64_t mode,
    std::int64_t activation, bool background, std::int64_t visibility_kind, double eps) {
  const Arguments given = check(tokens, masks, prefix, mode, activation, background, eps);
  const bool binary = checked_visibility(visibility_kind) == Visibility::kBinary;
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Call call(tokens, masks, given);
  const std::int64_t batch = given.batch, parts = given.parts, channels = given.channels;
  const Tensor pooled = empty(tokens, {batch, parts, channels}, tokens.scalar_type());
  const Tensor visibility = empty_floats(tokens, {batch, parts});
  const Tensor totals = empty_floats(tokens, {batch, parts});
  const Tensor peaks = empty(tokens, {batch, parts}, ScalarType::Int);
  const Tensor winners = call.maxima() ? empty(tokens, {batch, parts, channels}, ScalarType::Int)
                                       : empty(tokens, {0}, ScalarType::Int);
  by_storage_type("tokens:", tokens, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Results<T> results{};
    results.pooled = static_cast<T*>(pooled.mutable_data_ptr());
    results.visibility = visibility.mutable_data_ptr<float>();
    results.totals = totals.mutable_data_ptr<float>();
    results.peaks = peaks.mutable_data_ptr<std::int32_t>();
    results.winners = winners.mutable_data_ptr<std::int32_t>();
    results.binary = binary;
    forward<T>(call, results);
  });
  return {pooled, visibility, totals, peaks, winners};
}

std::tuple<Tensor, Tensor> masked_part_pool_backward_cuda(
    const Tensor& grad_pooled, const Tensor& grad_visibility, const Tensor& tokens,
    const Tensor& masks, const Tensor& totals, const Tensor& peaks, const Tensor& winners,
    std::int64_t prefix, std::int64_t mode, std::int64_t activation, bool background, double eps) {
  const Arguments given = check(tokens, masks, prefix, mode, activation, background, eps);
  check_kept(
      given, tokens, ScalarType::Float, grad_pooled, grad_visibility, totals, peaks, winners);
  check_device("grad_pooled", grad_pooled, tokens);
  check_device("grad_visibility", grad_visibility, tokens);
  check_device("totals", totals, tokens);
  check_device("peaks", peaks, tokens);
  check_device("winners", winners, tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Call call(tokens, masks, given);
  const Tensor gradient = torch::stable::contiguous(grad_pooled);
  const Tensor visibility = torch::stable::contiguous(grad_visibility);
  const Tensor sums = torch::stable::contiguous(totals);
  const Tensor peaks_in = torch::stable::contiguous(peaks);
  const Tensor winners_in = torch::stable::contiguous(winners);
  const Tensor grad_tokens =
      empty(tokens, {given.batch, given.tokens(), given.channels}, tokens.scalar_type());
  const Tensor grad_masks = empty_as(call.masks);
  by_storage_type("tokens:", tokens, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Gradients<T> gradients{};
    gradients.visibility = visibility.const_data_ptr<float>();
    gradients.totals = sums.const_data_ptr<float>();
    gradients.peaks = peaks_in.const_data_ptr<std::int32_t>();
    gradients.masks = grad_masks.mutable_data_ptr<float>();
    gradients.pooled = static_cast<const T*>(gradient.const_data_ptr());
    gradients.winners = winners_in.const_data_ptr<std::int32_t>();
    gradients.tokens = static_cast<T*>(grad_tokens.mutable_data_ptr());
    backward<T>(call, gradients);
  });
  return {grad_tokens, grad_masks};
}

}  // namespace gsalign::pool

STABLE_TORCH_LIBRARY_IMPL(gsalign, CUDA, m) {
  m.impl("masked_part_pool", TORCH_BOX(&gsalign::pool::masked_part_pool_cuda));
  m.impl("masked_part_pool_backward", TORCH_BOX(&gsalign::pool::masked_part_pool_backward_cuda));
}
