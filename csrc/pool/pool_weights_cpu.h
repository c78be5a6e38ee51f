// Weights of the masked part pooling on the CPU: activations, sums and visibility, their gradients.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/tensor.h"
#include "pool_shape.h"

namespace gsalign::pool {

template <typename S>
GSALIGN_CLONES static void row_sigmoid(
    S* __restrict weights, const S* __restrict logits, std::int64_t count) {
#pragma omp simd
  for (std::int64_t n = 0; n < count; ++n) {
    weights[n] = sigmoid(logits[n]);
  }
}

// Softmax over the parts, position by position; `largest` and `sum` are N long.
template <typename S>
GSALIGN_CLONES static void part_softmax(
    S* __restrict weights, const S* __restrict logits, S* __restrict largest, S* __restrict sum,
    std::int64_t parts, std::int64_t positions) {
#pragma omp simd
  for (std::int64_t n = 0; n < positions; ++n) {
    largest[n] = -std::numeric_limits<S>::infinity();
    sum[n] = 0;
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    const S* logit = logits + p * positions;
#pragma omp simd
    for (std::int64_t n = 0; n < positions; ++n) {
      largest[n] = logit[n] > largest[n] ? logit[n] : largest[n];
    }
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    const S* logit = logits + p * positions;
    S* weight = weights + p * positions;
#pragma omp simd
    for (std::int64_t n = 0; n < positions; ++n) {
      const S value = exponential(logit[n] - largest[n]);
      weight[n] = value;
      sum[n] += value;
    }
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    S* weight = weights + p * positions;
#pragma omp simd
    for (std::int64_t n = 0; n < positions; ++n) {
      weight[n] /= sum[n];
    }
  }
}

// Gradient by the logits from the gradient by the weights, in place.
template <typename S>
GSALIGN_CLONES static void sigmoid_backward(
    S* __restrict grad, const S* __restrict weights, std::int64_t count) {
#pragma omp simd
  for (std::int64_t n = 0; n < count; ++n) {
    grad[n] *= weights[n] * (S(1) - weights[n]);
  }
}

template <typename S>
GSALIGN_CLONES static void softmax_backward(
    S* __restrict grad, const S* __restrict weights, S* __restrict mean, std::int64_t parts,
    std::int64_t positions) {
#pragma omp simd
  for (std::int64_t n = 0; n < positions; ++n) {
    mean[n] = 0;
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    const S* g = grad + p * positions;
    const S* w = weights + p * positions;
#pragma omp simd
    for (std::int64_t n = 0; n < positions; ++n) {
      mean[n] += w[n] * g[n];
    }
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    S* g = grad + p * positions;
    const S* w = weights + p * positions;
#pragma omp simd
    for (std::int64_t n = 0; n < positions; ++n) {
      g[n] = w[n] * (g[n] - mean[n]);
    }
  }
}

template <typename S>
void activation_backward(const Shape& shape, S* grad, const S* weights) {
  if (shape.activation == Activation::kSigmoid) {
    sigmoid_backward(grad, weights, shape.set_size());
  } else if (shape.activation == Activation::kSoftmax) {
    const Scratch<S> mean(shape.positions);
    softmax_backward(grad, weights, mean.data(), shape.mask_channels(), shape.positions);
  }
}

// The weights of every mask set: the masks themselves, or what the activation makes of them.
template <typename S>
class Weights {
 public:
  Weights(const Shape& shape, const S* masks)
      : made_(shape.activation == Activation::kNone ? 0 : shape.mask_sets() * shape.set_size()),
        data_(shape.activation == Activation::kNone ? masks : made_.data()) {
    if (shape.activation == Activation::kNone) {
      return;
    }
    parallel_for(shape.mask_sets(), [&](std::int64_t set) {
      S* weights = made_.data() + set * shape.set_size();
      const S* logits = masks + set * shape.set_size();
      if (shape.activation == Activation::kSigmoid) {
        row_sigmoid(weights, logits, shape.set_size());
      } else {
        const Scratch<S> rows(2 * shape.positions);
        part_softmax(
            weights, logits, rows.data(), rows.data() + shape.positions, shape.mask_channels(),
            shape.positions);
      }
    });
  }

  const S* data() const { return data_; }

 private:
  Scratch<S> made_;
  const S* data_;
};

// Sum, largest weight and its position for every part of a mask set.
template <typename S>
void summarize(
    const Shape& shape, const S* weights, S* totals, S* visibility, std::int32_t* peaks) {
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    const S* row = weights + p * shape.positions;
    S total = 0;
    S largest = shape.positions > 0 ? row[0] : S(0);
    std::int64_t peak = 0;
    for (std::int64_t n = 0; n < shape.positions; ++n) {
      total += row[n];
      if (takes_over(row[n], largest)) {
        largest = row[n];
        peak = n;
      }
    }
    totals[p] = total;
    visibility[p] = largest;
    peaks[p] = static_cast<std::int32_t>(peak);
  }
}

// For every part of a mask set whether it leads somewhere: 1 where its weight is the largest of all
// channels, the first of equal ones, and positive; else 0.
template <typename S>
void leading_parts(const Shape& shape, const S* set, S* visibility) {
  std::fill_n(visibility, shape.parts, S(0));
  const std::int64_t channels = shape.mask_channels();
  for (std::int64_t n = 0; n < shape.positions && channels > 0; ++n) {
    S largest = set[n];
    std::int64_t leader = 0;
    for (std::int64_t channel = 1; channel < channels; ++channel) {
      const S weight = set[channel * shape.positions + n];
      if (takes_over(weight, largest)) {
        largest = weight;
        leader = channel;
      }
    }
    const std::int64_t part = leader - (channels - shape.parts);
    if (part >= 0 && largest > S(0)) {
      visibility[part] = S(1);
    }
  }
}

// A sample's gradient by the weights, from the shares of its units.
template <typename S>
void weights_backward(
    const Shape& shape, const S* shares, const S* weights, const S* totals,
    const S* grad_visibility, const std::int32_t* peaks, S* set) {
  std::fill_n(set, shape.set_size(), S(0));
  S* grad = set + shape.set_size() - shape.part_size();
  for (std::int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
    row_add(grad, S(1), shares + chunk * shape.part_size(), shape.part_size());
  }
  const S eps = static_cast<S>(shape.eps);
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    S* row = grad + p * shape.positions;
    if (total_is_free(shape.mode, totals[p], eps)) {
      // d pooled / d total: pooled is itself a sum over the positions, so no stored, rounded copy
      // of it is needed.
      const S slope = row_dot(row, weights + p * shape.positions, shape.positions) /
                      divisor(shape.mode, totals[p], shape.positions, eps);
      for (std::int64_t n = 0; n < shape.positions; ++n) {
        row[n] -= slope;
      }
    }
    if (peaks[p] >= 0 && peaks[p] < shape.positions) {
      row[peaks[p]] += grad_visibility[p];
    }
  }
}

}  // namespace gsalign::pool
