// The arguments of the masked part pooling on the CPU as plain numbers, and its tokens where they
// lie.
#pragma once

#include <limits>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "pool.h"
#include "pool_rows.h"

namespace gsalign::pool {

constexpr std::int64_t kFewSamples = 8;

struct Shape {
  std::int64_t batch, parts, positions, channels, prefix;
  bool shared;      // masks [P, N] instead of [B, P, N]
  bool background;  // channel 0 of the masks comes before the parts and is none
  Mode mode;
  Activation activation;
  double eps;

  std::int64_t tokens() const { return prefix + positions; }
  // Channels of a unit of work: fewer where few samples would leave threads without any. It hangs
  // on the tensors' sizes alone, as do all bits of a result.
  std::int64_t chunk() const { return batch < kFewSamples ? kChannelChunk : kPoolChunk; }
  std::int64_t chunks() const { return ceil_div(channels, chunk()); }
  std::int64_t mask_sets() const { return shared ? 1 : batch; }
  std::int64_t mask_channels() const { return parts + (background ? 1 : 0); }
  std::int64_t set_size() const { return mask_channels() * positions; }
  std::int64_t part_size() const { return parts * positions; }
  // Where a sample's masks begin, and where those of its parts do.
  std::int64_t set_offset(std::int64_t sample) const { return shared ? 0 : sample * set_size(); }
  std::int64_t part_offset(std::int64_t sample) const {
    return set_offset(sample) + set_size() - part_size();
  }
};

inline Shape checked_shape(
    const Tensor& tokens, const Tensor& masks, std::int64_t prefix, std::int64_t mode,
    std::int64_t activation, bool background, double eps) {
  check_shape("tokens", tokens, {-1, -1, -1});
  STD_TORCH_CHECK(
      0 <= prefix && prefix <= tokens.size(1), "prefix: wanted 0 to ", tokens.size(1), ", got ",
      prefix);
  STD_TORCH_CHECK(0 <= mode && mode <= 2, "mode: wanted 0, 1 or 2, got ", mode);
  STD_TORCH_CHECK(
      0 <= activation && activation <= 2, "activation: wanted 0, 1 or 2, got ", activation);
  STD_TORCH_CHECK(eps > 0.0, "eps: wanted a positive number, got ", eps);
  Shape shape;
  shape.batch = tokens.size(0);
  shape.positions = tokens.size(1) - prefix;
  shape.channels = tokens.size(2);
  shape.prefix = prefix;
  shape.shared = masks.dim() == 2;
  shape.background = background;
  shape.mode = static_cast<Mode>(mode);
  shape.activation = static_cast<Activation>(activation);
  shape.eps = eps;
  STD_TORCH_CHECK(
      shape.positions <= std::numeric_limits<std::int32_t>::max(), "tokens: ", shape.positions,
      " positions; 2^31 - 1 are served");
  if (shape.shared) {
    check_shape("masks", masks, {-1, shape.positions});
  } else {
    check_shape("masks", masks, {shape.batch, -1, shape.positions});
  }
  shape.parts = masks.size(masks.dim() - 2) - (background ? 1 : 0);
  STD_TORCH_CHECK(shape.parts >= 0, "masks: wanted a channel of background, got none");
  check_type("masks", masks, compute_type(tokens.scalar_type()));
  return shape;
}

// Tokens behind the prefix where they lie: rows need only be contiguous in themselves.
template <typename T>
struct TokenRows {
  TokenRows(const Tensor& tokens, std::int64_t prefix)
      : start(data<T>(tokens) + prefix * tokens.stride(1)),
        sample_stride(tokens.stride(0)),
        stride(tokens.stride(1)) {}
  const T* start;
  std::int64_t sample_stride, stride;
};

Tensor with_contiguous_rows(const Tensor& tokens) {
  return tokens.size(2) <= 1 || tokens.stride(2) == 1 ? tokens : contiguous(tokens);
}

}  // namespace gsalign::pool
