// Masked part pooling on the CPU: one pass over the tokens forward, one backward.
//
// Work is cut into units of one sample and a chunk of its channels. The [B, P, N, C] product never
// exists. Sums over positions run in order within a unit, sums over units in order of their index,
// so every bit is the same for any number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "../common/tensor.h"
#include "pool_maxima_cpu.h"
#include "pool_sums_cpu.h"
#include "pool_weights_cpu.h"

namespace gsalign::pool {
namespace {

template <typename T>
void forward(
    const Shape& shape, Visibility kind, const TokenRows<const T>& rows, const Compute<T>* masks,
    T* pooled, Compute<T>* visibility, Compute<T>* totals, std::int32_t* peaks,
    std::int32_t* winners) {
  using S = Compute<T>;
  const Weights<S> weights(shape, masks);
  const std::int64_t parts = shape.parts;
  const bool once = shape.shared && shape.batch > 0;
  parallel_for(once ? 1 : shape.batch, [&](std::int64_t b) {
    const std::int64_t out = b * parts;
    summarize(
        shape, weights.data() + shape.part_offset(b), totals + out, visibility + out, peaks + out);
    if (kind == Visibility::kBinary) {
      leading_parts(shape, weights.data() + shape.set_offset(b), visibility + out);
      std::fill_n(peaks + out, parts, -1);
    }
  });
  for (std::int64_t b = 1; once && b < shape.batch; ++b) {
    std::copy_n(totals, parts, totals + b * parts);
    std::copy_n(visibility, parts, visibility + b * parts);
    std::copy_n(peaks, parts, peaks + b * parts);
  }
  parallel_for(shape.batch * shape.chunks(), [&](std::int64_t unit) {
    const std::int64_t sample = unit / shape.chunks();
    const std::int64_t channel = unit % shape.chunks() * shape.chunk();
    const std::int64_t out = sample * parts * shape.channels;
    const S* weight = weights.data() + shape.part_offset(sample);
    if (shape.mode == Mode::kMax) {
      pool_maxima(shape, rows, weight, sample, channel, pooled + out, winners + out);
    } else {
      pool_sums(shape, rows, weight, totals + sample * parts, sample, channel, pooled + out);
    }
  });
}

template <typename T>
void backward(
    const Shape& shape, const TokenRows<const T>& rows, const Compute<T>* masks,
    const T* grad_pooled, const Compute<T>* grad_visibility, const Compute<T>* totals,
    const std::int32_t* peaks, const std::int32_t* winners, T* grad_tokens,
    Compute<T>* grad_masks) {
  using S = Compute<T>;
  const Weights<S> weights(shape, masks);
  const std::int64_t parts = shape.parts, size = shape.part_size(), chunks = shape.chunks();
  const Scratch<S> shares(shape.batch * chunks * size);
  parallel_for(shape.batch * chunks, [&](std::int64_t unit) {
    const std::int64_t sample = unit / chunks;
    const std::int64_t channel = unit % chunks * shape.chunk();
    const std::int64_t count = std::min(shape.chunk(), shape.channels - channel);
    const std::int64_t out = sample * parts * shape.channels;
    T* head = grad_tokens + sample * shape.tokens() * shape.channels;
    T* map = head + shape.prefix * shape.channels;
    const S* weight = weights.data() + shape.part_offset(sample);
    S* share = shares.data() + unit * size;
    for (std::int64_t n = 0; n < shape.prefix; ++n) {
      std::memset(head + n * shape.channels + channel, 0, sizeof(T) * count);
    }
    if (shape.mode == Mode::kMax) {
      maxima_backward(
          shape, rows, weight, grad_pooled + out, winners + out, sample, channel, map, share);
    } else {
      sums_backward(
          shape, rows, weight, totals + sample * parts, grad_pooled + out, sample, channel, map,
          share);
    }
  });

  const std::int64_t set_size = shape.set_size();
  const Scratch<S> by_sample(shape.shared ? shape.batch * set_size : 0);
  S* grads = shape.shared ? by_sample.data() : grad_masks;
  parallel_for(shape.batch, [&](std::int64_t b) {
    S* grad = grads + b * set_size;
    weights_backward(
        shape, shares.data() + b * chunks * size, weights.data() + shape.part_offset(b),
        totals + b * parts, grad_visibility + b * parts, peaks + b * parts, grad);
    if (!shape.shared) {
      activation_backward(shape, grad, weights.data() + shape.set_offset(b));
    }
  });
  if (shape.shared) {
    // The activation's derivative is linear in the gradient: once for the whole batch is enough.
    parallel_for(shape.mask_channels(), [&](std::int64_t p) {
      S* sum = grad_masks + p * shape.positions;
      std::fill_n(sum, shape.positions, S(0));
      for (std::int64_t b = 0; b < shape.batch; ++b) {
        row_add(sum, S(1), grads + b * set_size + p * shape.positions, shape.positions);
      }
    });
    activation_backward(shape, grad_masks, weights.data());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_part_pool(
    const Tensor& tokens, const Tensor& masks, std::int64_t prefix, std::int64_t mode,
    std::int64_t activation, bool background, std::int64_t visibility_kind, double eps) {
  const ScalarType type = compute_type(tokens.scalar_type());
  const Shape shape{
      checked_arguments(tokens, masks, type, prefix, mode, activation, background, eps)};
  const Visibility visibility_wanted = checked_visibility(visibility_kind);
  const Tensor in = with_contiguous_rows(tokens), masks_in = as_contiguous(masks);
  const Tensor pooled = empty({shape.batch, shape.parts, shape.channels}, in.scalar_type());
  const Tensor visibility = empty({shape.batch, shape.parts}, type);
  const Tensor totals = empty({shape.batch, shape.parts}, type);
  const Tensor peaks = empty({shape.batch, shape.parts}, ScalarType::Int);
  const Tensor winners = shape.mode == Mode::kMax
                             ? empty({shape.batch, shape.parts, shape.channels}, ScalarType::Int)
                             : empty({0}, ScalarType::Int);
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    forward<T>(
        shape, visibility_wanted, token_rows<T>(in, prefix), data<S>(masks_in),
        mutable_data<T>(pooled), mutable_data<S>(visibility), mutable_data<S>(totals),
        mutable_data<std::int32_t>(peaks), mutable_data<std::int32_t>(winners));
  });
  return {pooled, visibility, totals, peaks, winners};
}

std::tuple<Tensor, Tensor> masked_part_pool_backward(
    const Tensor& grad_pooled, const Tensor& grad_visibility, const Tensor& tokens,
    const Tensor& masks, const Tensor& totals, const Tensor& peaks, const Tensor& winners,
    std::int64_t prefix, std::int64_t mode, std::int64_t activation, bool background, double eps) {
  const ScalarType type = compute_type(tokens.scalar_type());
  const Shape shape{
      checked_arguments(tokens, masks, type, prefix, mode, activation, background, eps)};
  check_kept(shape, tokens, type, grad_pooled, grad_visibility, totals, peaks, winners);
  const Tensor in = with_contiguous_rows(tokens), masks_in = as_contiguous(masks),
               gradient = as_contiguous(grad_pooled), visibility = as_contiguous(grad_visibility),
               sums = as_contiguous(totals), peaks_in = as_contiguous(peaks),
               winners_in = as_contiguous(winners);
  const Tensor grad_tokens = empty({shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
  const std::int64_t mask_channels = shape.mask_channels();
  const Tensor grad_masks = shape.shared
                                ? empty({mask_channels, shape.positions}, type)
                                : empty({shape.batch, mask_channels, shape.positions}, type);
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    backward<T>(
        shape, token_rows<T>(in, prefix), data<S>(masks_in), data<T>(gradient), data<S>(visibility),
        data<S>(sums), data<std::int32_t>(peaks_in), data<std::int32_t>(winners_in),
        mutable_data<T>(grad_tokens), mutable_data<S>(grad_masks));
  });
  return {grad_tokens, grad_masks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("masked_part_pool", TORCH_BOX(&masked_part_pool));
  m.impl("masked_part_pool_backward", TORCH_BOX(&masked_part_pool_backward));
}

}  // namespace gsalign::pool
