// The few things the operators ask of a tensor, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "numbers.h"

namespace gsalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

// Requires a shape; -1 accepts any length along that axis.
inline void check_shape(
    const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape) {
  bool same = tensor.dim() == static_cast<std::int64_t>(shape.size());
  std::string wanted = "[";
  std::int64_t axis = 0;
  for (const std::int64_t length : shape) {
    same = same && (length < 0 || tensor.size(axis) == length);
    wanted += (axis ? ", " : "") + (length < 0 ? std::string("*") : std::to_string(length));
    ++axis;
  }
  STD_TORCH_CHECK(same, name, ": wanted shape ", wanted, "], got ", shape_text(tensor));
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type, name, ": has another type than the operator works in; ",
      "call it through gsalign_kernels, which converts");
}

// The type coordinates and sums have beside features of a type.
inline ScalarType compute_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Asks before it calls: a call through the dispatcher costs more than a small operator's work.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty(
    const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
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

// Calls `function` with a float or a double.
template <typename Function>
void dispatch_coordinates(const char* name, ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, name, ": wanted float32 or float64");
  }
}

// Runs `function(state, index)` for index in [0, count) on PyTorch's threads; `make_state()` makes
// what a thread keeps from one index to the next, such as working memory.
template <typename MakeState, typename Function>
void parallel_for(std::int64_t count, MakeState&& make_state, Function&& function) {
  if (count <= 0) {
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    auto state = make_state();
    for (std::int64_t index = begin; index < end; ++index) {
      function(state, index);
    }
  });
}

// Runs `function(index)` for index in [0, count) on PyTorch's threads.
template <typename Function>
void parallel_for(std::int64_t count, Function&& function) {
  parallel_for(count, [] { return 0; }, [&](int, std::int64_t index) { function(index); });
}

}  // namespace gsalign
