// The few things the operators ask of a tensor, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "checks.h"
#include "numbers.h"

namespace gsalign {

// The type coordinates and sums have beside features of a type.
inline ScalarType compute_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Asks before it calls: a call through the dispatcher costs more than a small operator's work.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Tokens [B, N, C] whose rows are contiguous in themselves, wherever they lie.
inline Tensor with_contiguous_rows(const Tensor& tokens) {
  return tokens.size(2) <= 1 || tokens.stride(2) == 1 ? tokens : as_contiguous(tokens);
}

// An uninitialised contiguous CPU tensor, not through the dispatcher: see as_contiguous().
inline Tensor empty(std::initializer_list<std::int64_t> shape, ScalarType type) {
  constexpr std::size_t kMost = 8;
  STD_TORCH_CHECK(shape.size() <= kMost, "empty: too many dimensions");
  std::array<std::int64_t, kMost> strides;
  std::int64_t stride = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<std::int64_t>(shape.begin()[axis], 1);
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(shape.size()), shape.begin(), strides.data(),
      static_cast<std::int32_t>(type), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of tokens behind a prefix, where they lie.
template <typename T>
struct TokenRows {
  T* start;  // the first one of the first sample
  std::int64_t sample_stride, stride;
};

// Of tokens with contiguous rows.
template <typename T>
TokenRows<const T> token_rows(const Tensor& tokens, std::int64_t prefix) {
  return {data<T>(tokens) + prefix * tokens.stride(1), tokens.stride(0), tokens.stride(1)};
}

// Calls `function` with a value of the storage type of the features.
template <typename Function>
void dispatch_features(const char* name, ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, ": wanted float32, float16, bfloat16 or float64");
  }
}

// Runs `function(index)` for index in [0, count) on PyTorch's threads.
template <typename Function>
void parallel_for(std::int64_t count, Function&& function) {
  parallel_for(count, [] { return 0; }, [&](int, std::int64_t index) { function(index); });
}

}  // namespace gsalign
