// The arguments of the masked part pooling as plain numbers, and what every device asks of them.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/checks.h"
#include "pool.h"

namespace gsalign::pool {

struct Arguments {
  std::int64_t batch, parts, positions, channels, prefix;
  bool shared;      // masks [P, N] instead of [B, P, N]
  bool background;  // channel 0 of the masks comes before the parts and is none
  Mode mode;
  Activation activation;
  double eps;

  std::int64_t tokens() const { return prefix + positions; }
  std::int64_t mask_channels() const { return parts + (background ? 1 : 0); }
  std::int64_t set_size() const { return mask_channels() * positions; }
};

// `type` is that of the masks, in which weights are made and sums.
inline Arguments checked_arguments(
    const Tensor& tokens, const Tensor& masks, ScalarType type, std::int64_t prefix,
    std::int64_t mode, std::int64_t activation, bool background, double eps) {
  check_shape("tokens", tokens, {-1, -1, -1});
  STD_TORCH_CHECK(
      0 <= prefix && prefix <= tokens.size(1), "prefix: wanted 0 to ", tokens.size(1), ", got ",
      prefix);
  STD_TORCH_CHECK(0 <= mode && mode <= 2, "mode: wanted 0, 1 or 2, got ", mode);
  STD_TORCH_CHECK(
      0 <= activation && activation <= 2, "activation: wanted 0, 1 or 2, got ", activation);
  STD_TORCH_CHECK(eps > 0.0, "eps: wanted a positive number, got ", eps);
  Arguments given{};
  given.batch = tokens.size(0);
  given.positions = tokens.size(1) - prefix;
  given.channels = tokens.size(2);
  given.prefix = prefix;
  given.shared = masks.dim() == 2;
  given.background = background;
  given.mode = static_cast<Mode>(mode);
  given.activation = static_cast<Activation>(activation);
  given.eps = eps;
  STD_TORCH_CHECK(
      given.positions <= std::numeric_limits<std::int32_t>::max(), "tokens: ", given.positions,
      " positions; 2^31 - 1 are served");
  if (given.shared) {
    check_shape("masks", masks, {-1, given.positions});
  } else {
    check_shape("masks", masks, {given.batch, -1, given.positions});
  }
  check_type("masks", masks, type);
  given.parts = masks.size(masks.dim() - 2) - (background ? 1 : 0);
  STD_TORCH_CHECK(
      given.parts >= 0, "masks: wanted a channel of background before the parts, got none");
  return given;
}

inline Visibility checked_visibility(std::int64_t kind) {
  STD_TORCH_CHECK(0 <= kind && kind <= 1, "visibility: wanted 0 or 1, got ", kind);
  return static_cast<Visibility>(kind);
}

// What the backward pass gets beside the arguments: gradients, and what the forward pass kept.
inline void check_kept(
    const Arguments& given, const Tensor& tokens, ScalarType type, const Tensor& grad_pooled,
    const Tensor& grad_visibility, const Tensor& totals, const Tensor& peaks,
    const Tensor& winners) {
  check_shape("grad_pooled", grad_pooled, {given.batch, given.parts, given.channels});
  check_type("grad_pooled", grad_pooled, tokens.scalar_type());
  check_shape("grad_visibility", grad_visibility, {given.batch, given.parts});
  check_type("grad_visibility", grad_visibility, type);
  check_shape("totals", totals, {given.batch, given.parts});
  check_type("totals", totals, type);
  check_shape("peaks", peaks, {given.batch, given.parts});
  check_type("peaks", peaks, ScalarType::Int);
  if (given.mode == Mode::kMax) {
    check_shape("winners", winners, {given.batch, given.parts, given.channels});
  } else {
    check_shape("winners", winners, {0});
  }
  check_type("winners", winners, ScalarType::Int);
}

}  // namespace gsalign::pool
