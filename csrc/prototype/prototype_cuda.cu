// CUDA entry points of the masked prototype loss: checks, memory, and the launches of
// prototype_kernels.cuh.
//
// Nothing here waits for the device or reads its memory, so calls can be captured into a CUDA
// graph. Float32 only: gsalign_kernels converts half types, and leaves float64 to the reference.
#include <cstdint>
#include <tuple>

#include "../common/cuda.h"
#include "prototype_kernels.cuh"

namespace gsalign::prototype {
namespace {

// A tensor of this shape and type on the device of `like`, contiguous.
Tensor checked(
    const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape,
    ScalarType type, const Tensor& like) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, type);
  check_device(name, tensor, like);
  // Asks first: a call through the dispatcher costs more than the kernels.
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The inputs of both passes, contiguous and on a stream.
struct Call {
  Call(const Tensor& features_, const Tensor& masks_, const Tensor& labels_)
      : features(checked("features", features_, {-1, -1}, ScalarType::Float, features_)),
        masks(checked(
            "masks", masks_, {features.size(0), features.size(1)}, ScalarType::Float, features)),
        labels(checked("labels", labels_, {features.size(0)}, ScalarType::Long, features)),
        batch(features.size(0)),
        channels(features.size(1)),
        device(features.get_device_index()),
        stream(stream_of(device)) {
    STD_TORCH_CHECK(
        batch <= kMaxSamples && channels <= (1 << 24),
        "features: at most 2^30 samples and 2^24 channels, got ", shape_text(features));
  }

  bool empty() const { return batch == 0 || channels == 0; }

  Problem problem() const {
    return {
        features.const_data_ptr<float>(),
        masks.const_data_ptr<float>(),
        labels.const_data_ptr<std::int64_t>(),
        static_cast<int>(batch),
        static_cast<int>(channels),
        0,
        0,
        0};
  }

  // `vectors`: whether whatever else is read and written in vectors is aligned.
  Plan plan(bool vectors) const {
    vectors = vectors && channels % 4 == 0 && aligned(features.const_data_ptr()) &&
              aligned(masks.const_data_ptr());
    const Plan plan = make_plan(
        batch, channels, vectors, kThreads, device_limit(DeviceLimit::multiprocessors, device));
    STD_TORCH_CHECK(
        batch * plan.groups <= kMaxInt, "features: too many samples for one launch, ", batch);
    return plan;
  }

  Tensor features, masks, labels;
  std::int64_t batch, channels;
  int device;
  cudaStream_t stream;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_prototype_loss_cuda(
    const Tensor& features, const Tensor& masks, const Tensor& labels) {
  const Call call(features, masks, labels);
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  const Tensor alignment = empty_floats(call.features, {});
  const Tensor entropy = empty_floats(call.features, {});
  const Tensor means = empty_floats(call.features, {call.batch, call.channels});
  const Tensor norms = empty_floats(call.features, {call.batch, kKept});
  if (call.empty()) {
    for (const Tensor* tensor : {&alignment, &entropy, &norms}) {
      if (tensor->numel() > 0) {
        STD_CUDA_CHECK(cudaMemsetAsync(
            tensor->mutable_data_ptr(), 0, tensor->numel() * sizeof(float), call.stream));
      }
    }
    return {alignment, entropy, means, norms};
  }
  const Tensor workspace = empty_floats(call.features, {workspace_floats(call.batch)});
  STD_CUDA_CHECK(launch_forward(
      call.problem(), call.plan(aligned(means.const_data_ptr())), means.mutable_data_ptr<float>(),
      norms.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
      alignment.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(), call.stream));
  return {alignment, entropy, means, norms};
}

std::tuple<Tensor, Tensor> masked_prototype_loss_backward_cuda(
    const Tensor& grad_alignment, const Tensor& grad_entropy, const Tensor& features,
    const Tensor& masks, const Tensor& labels, const Tensor& means, const Tensor& norms) {
  const Call call(features, masks, labels);
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  const auto given = [&](const char* name, const Tensor& tensor,
                         std::initializer_list<std::int64_t> shape) {
    return checked(name, tensor, shape, ScalarType::Float, call.features);
  };
  const Tensor by_alignment = given("grad_alignment", grad_alignment, {});
  const Tensor by_entropy = given("grad_entropy", grad_entropy, {});
  const Tensor kept_means = given("means", means, {call.batch, call.channels});
  const Tensor kept_norms = given("norms", norms, {call.batch, kKept});
  const Tensor grad_features = empty_as(call.features);
  const Tensor grad_masks = empty_as(call.masks);
  if (!call.empty()) {
    const bool vectors = aligned(kept_means.const_data_ptr()) &&
                         aligned(grad_features.const_data_ptr()) &&
                         aligned(grad_masks.const_data_ptr());
    STD_CUDA_CHECK(launch_backward(
        call.problem(), call.plan(vectors), kept_means.const_data_ptr<float>(),
        kept_norms.const_data_ptr<float>(), by_alignment.const_data_ptr<float>(),
        by_entropy.const_data_ptr<float>(), grad_features.mutable_data_ptr<float>(),
        grad_masks.mutable_data_ptr<float>(), call.stream));
  }
  return {grad_features, grad_masks};
}

}  // namespace
}  // namespace gsalign::prototype

STABLE_TORCH_LIBRARY_IMPL(gsalign, CUDA, m) {
  m.impl("masked_prototype_loss", TORCH_BOX(&gsalign::prototype::masked_prototype_loss_cuda));
  m.impl(
      "masked_prototype_loss_backward",
      TORCH_BOX(&gsalign::prototype::masked_prototype_loss_backward_cuda));
}
