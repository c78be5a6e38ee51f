// CUDA entry points of the token warp: checks, memory, and the launches of warp_kernels.cuh.
//
// Nothing here waits for the device or reads its memory, so calls can be captured into a CUDA
// graph.
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/cuda.h"
#include "warp_kernels.cuh"

namespace gsalign::warp {
namespace {

// What the plan asks of a device.
Chip chip_of(int device) {
  return {
      device_limit(DeviceLimit::multiprocessors, device),
      device_limit(DeviceLimit::shared_per_block, device),
      device_limit(DeviceLimit::shared_per_multiprocessor, device)};
}

struct Sizes {
  int batch, channels, points, height, width, prefix;
};

void check_coordinates(const Tensor& tensor, const char* name, const Tensor& tokens) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float, "warp_tokens: ", name, " must be float32");
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == tokens.get_device_index(),
      "warp_tokens: ", name, " must be on the device of tokens");
}

Sizes check(
    const Tensor& tokens, const Tensor& source_points, const Tensor& angle, const Tensor& basis,
    std::int64_t height, std::int64_t width, std::int64_t prefix) {
  STD_TORCH_CHECK(tokens.is_cuda(), "warp_tokens: tokens must be a CUDA tensor");
  STD_TORCH_CHECK(
      tokens.dim() == 3, "warp_tokens: tokens must be [B, prefix + H*W, C], got ", tokens.dim(),
      " dimensions");
  STD_TORCH_CHECK(
      height > 0 && width > 0 && height <= kMaxQueries && width <= kMaxQueries &&
          height * width <= kMaxQueries,
      "warp_tokens: the map must have 1 to ", kMaxQueries, " tokens, got ", height, " x ", width);
  STD_TORCH_CHECK(
      prefix >= 0 && prefix <= kMaxQueries, "warp_tokens: prefix must be 0 to ", kMaxQueries,
      ", got ", prefix);
  STD_TORCH_CHECK(
      tokens.size(1) == prefix + height * width, "warp_tokens: tokens must have ",
      prefix + height * width, " rows (prefix ", prefix, " + ", height, " x ", width, "), got ",
      tokens.size(1));
  STD_TORCH_CHECK(
      tokens.size(0) <= kMaxInt && tokens.size(2) <= (1 << 24),
      "warp_tokens: at most 2^31 - 1 samples and 2^24 channels");
  check_coordinates(source_points, "source_points", tokens);
  check_coordinates(angle, "angle", tokens);
  check_coordinates(basis, "basis", tokens);
  STD_TORCH_CHECK(
      source_points.dim() == 2 && source_points.size(1) == 2 && source_points.size(0) >= 1 &&
          source_points.size(0) <= (1 << 20),
      "warp_tokens: source_points must be [K, 2] with K from 1 to 2^20");
  STD_TORCH_CHECK(
      angle.dim() == 1 && angle.size(0) == tokens.size(0),
      "warp_tokens: angle must be [B] with B = ", tokens.size(0));
  STD_TORCH_CHECK(
      basis.dim() == 2 && basis.size(0) == height * width && basis.size(1) == source_points.size(0),
      "warp_tokens: basis must be [H*W, K] = [", height * width, ", ", source_points.size(0), "]");
  return {
      static_cast<int>(tokens.size(0)),
      static_cast<int>(tokens.size(2)),
      static_cast<int>(source_points.size(0)),
      static_cast<int>(height),
      static_cast<int>(width),
      static_cast<int>(prefix)};
}

// The inputs of both passes, contiguous and on a stream, and what must outlive the launches.
struct Call {
  Call(
      const Tensor& tokens_, const Tensor& source_points_, const Tensor& angle_,
      const Tensor& basis_, const Sizes& sizes_, double eta_)
      : sizes(sizes_),
        eta(static_cast<float>(eta_)),
        tokens(torch::stable::contiguous(tokens_)),
        source_points(torch::stable::contiguous(source_points_)),
        angle(torch::stable::contiguous(angle_)),
        basis(torch::stable::contiguous(basis_)),
        device(tokens.get_device_index()),
        chip(chip_of(device)),
        stream(stream_of(device)) {
    if (sizes.points > kInlinePoints && sizes.batch > 0) {
      base = empty_floats(source_points, {queries(), 2});
      STD_CUDA_CHECK(launch_base(
          basis.const_data_ptr<float>(), source_points.const_data_ptr<float>(),
          base->mutable_data_ptr<float>(), queries(), sizes.points, kThreads, stream));
    }
  }

  int queries() const { return sizes.height * sizes.width; }

  template <typename T>
  Problem<T> problem() const {
    Problem<T> result{};
    result.tokens = static_cast<const T*>(tokens.const_data_ptr());
    result.source_points = source_points.const_data_ptr<float>();
    result.angle = angle.const_data_ptr<float>();
    result.basis = basis.const_data_ptr<float>();
    result.base = base ? base->const_data_ptr<float>() : nullptr;
    result.eta = eta;
    result.height = sizes.height;
    result.width = sizes.width;
    result.prefix = sizes.prefix;
    result.channels = sizes.channels;
    result.points = sizes.points;
    return result;
  }

  Sizes sizes;
  float eta;
  Tensor tokens, source_points, angle, basis;
  std::optional<Tensor> base;
  int device;
  Chip chip;
  cudaStream_t stream;
};

void check_blocks(const Plan& plan, int batch) {
  STD_TORCH_CHECK(
      static_cast<std::int64_t>(plan.groups) * batch <= kMaxInt,
      "warp_tokens: too many blocks for one launch; split the batch of ", batch);
}

template <typename T>
void forward(const Call& call, const Tensor& output) {
  const bool vectors = call.sizes.channels * sizeof(T) % 16 == 0 &&
                       aligned(call.tokens.const_data_ptr()) && aligned(output.const_data_ptr());
  const Plan plan = plan_forward(
      call.queries(), call.sizes.channels, sizeof(T), vectors, call.sizes.batch, call.chip);
  check_blocks(plan, call.sizes.batch);
  STD_CUDA_CHECK(launch_forward<T>(
      call.problem<T>(), plan, static_cast<T*>(output.mutable_data_ptr()), call.sizes.batch,
      kThreads, call.device, call.stream));
}

template <typename T>
void backward(
    const Call& call, const Tensor& grad, const Tensor& grad_tokens,
    const Tensor& grad_source_points, const Tensor& grad_angle) {
  const bool vectors = call.sizes.channels * sizeof(T) % 16 == 0 &&
                       aligned(call.tokens.const_data_ptr()) && aligned(grad.const_data_ptr()) &&
                       aligned(grad_tokens.const_data_ptr());
  const Plan plan = plan_backward(
      call.queries(), call.sizes.channels, sizeof(T), vectors, call.sizes.batch, call.chip);
  check_blocks(plan, call.sizes.batch);
  const Tensor workspace = empty_floats(
      call.source_points, {workspace_floats(plan, call.sizes.batch, call.sizes.points)});
  STD_CUDA_CHECK(launch_backward<T>(
      call.problem<T>(), plan, static_cast<const T*>(grad.const_data_ptr()),
      static_cast<T*>(grad_tokens.mutable_data_ptr()), grad_source_points.mutable_data_ptr<float>(),
      grad_angle.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), call.sizes.batch,
      kThreads, call.device, call.stream));
}

}  // namespace

Tensor warp_tokens_cuda(
    const Tensor& tokens, const Tensor& source_points, const Tensor& angle, const Tensor& basis,
    std::int64_t height, std::int64_t width, double eta, std::int64_t prefix) {
  const Sizes sizes = check(tokens, source_points, angle, basis, height, width, prefix);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Call call(tokens, source_points, angle, basis, sizes, eta);
  const Tensor output = empty_as(call.tokens);
  by_storage_type("warp_tokens: tokens", tokens, [&](auto* type) {
    if (sizes.batch > 0 && sizes.channels > 0) {
      forward<std::remove_pointer_t<decltype(type)>>(call, output);
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> warp_tokens_backward_cuda(
    const Tensor& grad, const Tensor& tokens, const Tensor& source_points, const Tensor& angle,
    const Tensor& basis, std::int64_t height, std::int64_t width, double eta, std::int64_t prefix) {
  const Sizes sizes = check(tokens, source_points, angle, basis, height, width, prefix);
  STD_TORCH_CHECK(
      grad.scalar_type() == tokens.scalar_type() && grad.dim() == 3 &&
          grad.size(0) == tokens.size(0) && grad.size(1) == tokens.size(1) &&
          grad.size(2) == tokens.size(2) && grad.is_cuda() &&
          grad.get_device_index() == tokens.get_device_index(),
      "warp_tokens: grad must have the type, size and device of tokens");
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Call call(tokens, source_points, angle, basis, sizes, eta);
  const Tensor grad_dense = torch::stable::contiguous(grad);
  const Tensor grad_tokens = empty_as(call.tokens);
  const Tensor grad_source_points = empty_floats(call.source_points, {sizes.points, 2});
  const Tensor grad_angle = empty_floats(call.source_points, {sizes.batch});
  by_storage_type("warp_tokens: tokens", tokens, [&](auto* type) {
    backward<std::remove_pointer_t<decltype(type)>>(
        call, grad_dense, grad_tokens, grad_source_points, grad_angle);
  });
  return {grad_tokens, grad_source_points, grad_angle};
}

}  // namespace gsalign::warp

STABLE_TORCH_LIBRARY_IMPL(gsalign, CUDA, m) {
  m.impl("warp_tokens", TORCH_BOX(&gsalign::warp::warp_tokens_cuda));
  m.impl("warp_tokens_backward", TORCH_BOX(&gsalign::warp::warp_tokens_backward_cuda));
}
