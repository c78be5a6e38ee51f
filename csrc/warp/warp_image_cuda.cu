// CUDA entry points of the image warp: checks, memory, and the launches of warp_image_kernels.cuh.
//
// Nothing here waits for the device or reads its memory, so calls can be captured into a CUDA
// graph.
#include <cstdint>
#include <tuple>

#include "../common/cuda.h"
#include "warp_image_kernels.cuh"

namespace gsalign::warp {
namespace {

void check_pixels(const char* name, std::int64_t height, std::int64_t width) {
  STD_TORCH_CHECK(
      height >= 1 && width >= 1 && height <= kMaxSide && width <= kMaxSide &&
          height * width <= kMaxPixels,
      name, ": wanted 1 to ", kMaxPixels, " pixels, ", kMaxSide, " a side at most, got ", height,
      " x ", width);
}

// Blocks are counted in 32 bits.
void check_blocks(std::int64_t blocks, std::int64_t batch) {
  STD_TORCH_CHECK(
      blocks <= kMaxInt, "warp_image: too many blocks for one launch (", blocks,
      "); split the batch of ", batch);
}

// The inputs of both passes, checked, on a stream, and what must outlive the launches.
struct Call {
  Call(
      const Tensor& image_, const Tensor& coefficients_, const Tensor& control_points_,
      std::int64_t height, std::int64_t width, std::int64_t mode, std::int64_t padding_mode,
      bool align_corners)
      : image(image_) {
    check_shape("image", image, {-1, -1, -1, -1});
    by_storage_type("image", image, [](auto*) {});
    check_device("image", image, image);
    check_pixels("image", image.size(2), image.size(3));
    check_pixels("size", height, width);
    batch = image.size(0);
    STD_TORCH_CHECK(
        batch <= kMaxInt && image.size(1) <= (1 << 24),
        "image: wanted at most 2^31 - 1 samples and 2^24 channels, got ", batch, " and ",
        image.size(1));
    STD_TORCH_CHECK(mode == 0 || mode == 1, "mode: wanted 0 or 1, got ", mode);
    STD_TORCH_CHECK(
        padding_mode >= 0 && padding_mode <= 2, "padding_mode: wanted 0, 1 or 2, got ",
        padding_mode);
    check_shape("control_points", control_points_, {batch, -1, 2});
    const std::int64_t points = control_points_.size(1);
    STD_TORCH_CHECK(
        points <= (1 << 20), "control_points: wanted at most 2^20 points, got ", points);
    check_shape("coefficients", coefficients_, {batch, points + 3, 2});
    check_type("control_points", control_points_, ScalarType::Float);
    check_type("coefficients", coefficients_, ScalarType::Float);
    check_device("control_points", control_points_, image);
    check_device("coefficients", coefficients_, image);
    coefficients = torch::stable::contiguous(coefficients_);
    control_points = torch::stable::contiguous(control_points_);
    device = image.get_device_index();
    stream = stream_of(device);
    multiprocessors = device_limit(DeviceLimit::multiprocessors, device);
    sampling = {
        coefficients.const_data_ptr<float>(),
        control_points.const_data_ptr<float>(),
        static_cast<int>(image.size(1)),
        static_cast<int>(image.size(2)),
        static_cast<int>(image.size(3)),
        static_cast<int>(height),
        static_cast<int>(width),
        static_cast<int>(points),
        static_cast<Mode>(mode),
        static_cast<Padding>(padding_mode),
        align_corners};
  }

  template <typename T>
  Image<T> pixels() const {
    return {
        static_cast<const T*>(image.const_data_ptr()), image.stride(0), image.stride(1),
        image.stride(2), image.stride(3)};
  }

  Tensor image, coefficients, control_points;
  std::int64_t batch;
  int device, multiprocessors;
  cudaStream_t stream;
  Sampling sampling;
};

template <typename T>
void forward(const Call& call, const Tensor& output) {
  const Image<T> image = call.pixels<T>();
  const bool vectors = has_vectors(image, call.sampling.channels);
  const ForwardPlan plan =
      plan_image_forward<T>(call.sampling, vectors, call.batch, kThreads, call.multiprocessors);
  check_blocks(plan.blocks, call.batch);
  STD_CUDA_CHECK(launch_image_forward<T>(
      call.sampling, image, plan, vectors, static_cast<T*>(output.mutable_data_ptr()), kThreads,
      call.stream));
}

template <typename T>
void backward(
    const Call& call, const Tensor& grad, const Tensor& grad_image, const Tensor& grad_coefficients,
    const Tensor& grad_control_points) {
  const Image<T> image = call.pixels<T>();
  const ImageBackwardPlan plan =
      plan_image_backward(call.sampling, call.batch, kThreads, call.multiprocessors);
  for (const std::int64_t blocks :
       {plan.box_blocks, plan.gradient_blocks, plan.spline_blocks, plan.sum_blocks}) {
    check_blocks(blocks, call.batch);
  }
  const Tensor workspace = empty_floats(call.coefficients, {plan.box_floats + plan.partial_floats});
  STD_CUDA_CHECK(launch_image_backward<T>(
      call.sampling, image, plan, has_vectors(image, call.sampling.channels),
      static_cast<const T*>(grad.const_data_ptr()), static_cast<T*>(grad_image.mutable_data_ptr()),
      grad_coefficients.mutable_data_ptr<float>(), grad_control_points.mutable_data_ptr<float>(),
      workspace.mutable_data_ptr<float>(), static_cast<int>(call.batch), kThreads, call.stream));
}

}  // namespace

Tensor warp_image_cuda(
    const Tensor& image, const Tensor& coefficients, const Tensor& control_points,
    std::int64_t height, std::int64_t width, std::int64_t mode, std::int64_t padding_mode,
    bool align_corners) {
  check_device("image", image, image);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const Call call(
      image, coefficients, control_points, height, width, mode, padding_mode, align_corners);
  const Tensor output =
      empty(image, {call.batch, image.size(1), height, width}, image.scalar_type());
  by_storage_type("image", image, [&](auto* type) {
    if (call.batch > 0 && call.sampling.channels > 0) {
      forward<std::remove_pointer_t<decltype(type)>>(call, output);
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> warp_image_backward_cuda(
    const Tensor& grad, const Tensor& image, const Tensor& coefficients,
    const Tensor& control_points, std::int64_t mode, std::int64_t padding_mode,
    bool align_corners) {
  check_device("image", image, image);
  check_shape("grad", grad, {-1, -1, -1, -1});
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const Call call(
      image, coefficients, control_points, grad.size(2), grad.size(3), mode, padding_mode,
      align_corners);
  check_shape("grad", grad, {call.batch, image.size(1), grad.size(2), grad.size(3)});
  check_type("grad", grad, image.scalar_type());
  check_device("grad", grad, image);
  const Tensor grad_dense = torch::stable::contiguous(grad);
  const Tensor grad_image =
      empty(image, {call.batch, image.size(1), image.size(2), image.size(3)}, image.scalar_type());
  const Tensor grad_coefficients = empty_as(call.coefficients);
  const Tensor grad_control_points = empty_as(call.control_points);
  by_storage_type("image", image, [&](auto* type) {
    if (call.batch > 0) {
      backward<std::remove_pointer_t<decltype(type)>>(
          call, grad_dense, grad_image, grad_coefficients, grad_control_points);
    }
  });
  return {grad_image, grad_coefficients, grad_control_points};
}

}  // namespace gsalign::warp

STABLE_TORCH_LIBRARY_IMPL(gsalign, CUDA, m) {
  m.impl("warp_image", TORCH_BOX(&gsalign::warp::warp_image_cuda));
  m.impl("warp_image_backward", TORCH_BOX(&gsalign::warp::warp_image_backward_cuda));
}
