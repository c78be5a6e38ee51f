// What operators ask of their arguments, whatever the device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

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

}  // namespace gsalign
