// What every CUDA entry point asks of LibTorch's stable ABI and of the device.
//
// Nothing here waits for the device, so calls can be captured into a CUDA graph.
#pragma once

#if !defined(USE_CUDA)
#define USE_CUDA  // the stream and error functions of the stable headers are declared under it
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "launch.h"

namespace gsalign {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();

enum class DeviceLimit { multiprocessors, shared_per_block, shared_per_multiprocessor };

// A limit of a device; the driver is asked once per device.
inline int device_limit(DeviceLimit limit, int device) {
  constexpr int kDevices = 64;
  constexpr cudaDeviceAttr attributes[3] = {
      cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
      cudaDevAttrMaxSharedMemoryPerMultiprocessor};
  static std::atomic<int> known[kDevices][3];
  const int which = static_cast<int>(limit);
  int value = device < kDevices ? known[device][which].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attributes[which], device));
    if (device < kDevices) {
      known[device][which].store(value, std::memory_order_relaxed);
    }
  }
  return value;
}

// Requires the device of a tensor that is known to be a CUDA tensor.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
      ": is not on the CUDA device of the other arguments");
}

inline cudaStream_t stream_of(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Uninitialised contiguous tensors on the device of `like`.
inline Tensor empty(
    const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType type) {
  const std::vector<std::int64_t> list(sizes);
  return torch::stable::new_empty(like, list, std::make_optional(type));
}
inline Tensor empty_floats(const Tensor& like, std::initializer_list<std::int64_t> sizes) {
  return empty(like, sizes, ScalarType::Float);
}
inline Tensor empty_as(const Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, sizes);
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// Calls `run` with a null pointer of the storage type of a tensor of features.
template <typename Run>
void by_storage_type(const char* name, const Tensor& tensor, Run&& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

}  // namespace gsalign
