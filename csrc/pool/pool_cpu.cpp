// Masked part pooling on the CPU: one pass over the tokens forward, one backward.
//
// Work is cut into units of one sample and kPoolChunk channels. Tokens are read in groups of rows,
// and every part uses a group while it lies in a near cache; the [B, P, N, C] product never
// exists. Sums over positions run in order within a unit, sums over units in order of their index,
// so every bit is the same for any number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../common/cpu.h"
#include "../common/memory.h"
#include "../common/tensor.h"
#include "pool.h"

#define GSALIGN_TILE_SET baseline
#define GSALIGN_TILE_TARGET
#define GSALIGN_TILE_BYTES 16
#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GSALIGN_NO_CLONES)
#define GSALIGN_TILE_SETS
#define GSALIGN_TILE_SET avx2
#define GSALIGN_TILE_TARGET __attribute__((target("arch=x86-64-v3")))
#define GSALIGN_TILE_BYTES 32
#include "tile.h"

#define GSALIGN_TILE_SET avx512
#define GSALIGN_TILE_TARGET __attribute__((target("arch=x86-64-v4")))
#define GSALIGN_TILE_BYTES 64
#include "tile.h"
#endif

namespace gsalign::pool {
namespace {

// Channels of a unit. Wider than kChannelChunk: whole rows of the usual networks, so that a unit
// reads one run of memory. With a quarter of it the forward pass took half as long again.
constexpr std::int64_t kPoolChunk = 1024;
constexpr int kGroup = 16;  // rows of tokens that are read together
constexpr int kTile = 8;    // sums that are kept in registers together

struct Shape {
  std::int64_t batch, parts, positions, channels, prefix;
  bool shared;      // masks [P, N] instead of [B, P, N]
  bool background;  // channel 0 of the masks comes before the parts and is none
  Mode mode;
  Activation activation;
  double eps;

  std::int64_t tokens() const { return prefix + positions; }
  std::int64_t chunks() const { return ceil_div(channels, kPoolChunk); }
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

Shape checked_shape(
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
struct Rows {
  Rows(const Tensor& tokens, std::int64_t prefix)
      : start(data<T>(tokens) + prefix * tokens.stride(1)),
        sample_stride(tokens.stride(0)),
        stride(tokens.stride(1)) {}
  const T* start;
  std::int64_t sample_stride, stride;
};

Tensor with_contiguous_rows(const Tensor& tokens) {
  return tokens.size(2) <= 1 || tokens.stride(2) == 1 ? tokens : contiguous(tokens);
}

// Where outputs y_i = sum_j w_ij x_j, i in [0, Count), of rows find their operands.
template <typename S>
struct Product {
  S* y;
  std::int64_t y_stride;
  const S* w;
  std::int64_t w_stride, w_step;  // from one output to the next, from one input to the next
  const S* x;
  std::int64_t x_stride, inputs;
};

// tile() of the best instruction set of this processor.
template <int Count, bool Start, typename S>
void best_tile(const Product<S>& product, std::int64_t count) {
  const auto run = [&](auto tile) {
    tile(
        product.y, product.y_stride, product.w, product.w_stride, product.w_step, product.x,
        product.x_stride, product.inputs, count);
  };
#if defined(GSALIGN_TILE_SETS)
  static const bool has_avx512 = __builtin_cpu_supports("x86-64-v4");
  static const bool has_avx2 = __builtin_cpu_supports("x86-64-v3");
  if (has_avx512) {
    return run(avx512::tile<Count, Start, S>);
  }
  if (has_avx2) {
    return run(avx2::tile<Count, Start, S>);
  }
#endif
  run(baseline::tile<Count, Start, S>);
}

// largest[c] and its position, over what was seen and weights[i] rows[i stride + c]. The position
// is an integer of S's size, so that both fill the same number of vector lanes.
template <typename S>
using Position = std::conditional_t<std::is_same_v<S, double>, std::int64_t, std::int32_t>;

template <int Count, typename S>
GSALIGN_CLONES static void maximum(
    S* __restrict largest, Position<S>* __restrict position, Position<S> first,
    const S* __restrict weights, const S* __restrict rows, std::int64_t stride,
    std::int64_t count) {
  S w[Count];
  for (int i = 0; i < Count; ++i) {
    w[i] = weights[i];
  }
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    S best = largest[c];
    Position<S> where = position[c];
    for (int i = 0; i < Count; ++i) {
      const S value = w[i] * rows[i * stride + c];
      const bool taken = takes_over(value, best);
      best = taken ? value : best;
      where = taken ? first + i : where;
    }
    largest[c] = best;
    position[c] = where;
  }
}

// dots[i] = sum_c g[c] rows[i stride + c] for i in [0, 8)
template <typename S>
GSALIGN_CLONES static void eight_dots(
    S* __restrict dots, const S* __restrict g, const S* __restrict rows, std::int64_t stride,
    std::int64_t count) {
  S s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7)
  for (std::int64_t c = 0; c < count; ++c) {
    s0 += g[c] * rows[c];
    s1 += g[c] * rows[stride + c];
    s2 += g[c] * rows[2 * stride + c];
    s3 += g[c] * rows[3 * stride + c];
    s4 += g[c] * rows[4 * stride + c];
    s5 += g[c] * rows[5 * stride + c];
    s6 += g[c] * rows[6 * stride + c];
    s7 += g[c] * rows[7 * stride + c];
  }
  dots[0] = s0, dots[1] = s1, dots[2] = s2, dots[3] = s3;
  dots[4] = s4, dots[5] = s5, dots[6] = s6, dots[7] = s7;
}

// y[c] = load(x[c]) / divisor
template <typename T>
GSALIGN_CLONES static void row_load_divided(
    Compute<T>* __restrict y, const T* __restrict x, Compute<T> divisor, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] = load(x[c]) / divisor;
  }
}

// y[c] = store(x[c] / divisor)
template <typename T>
GSALIGN_CLONES static void row_store_divided(
    T* __restrict y, const Compute<T>* __restrict x, Compute<T> divisor, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] = store<T>(x[c] / divisor);
  }
}

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

// Calls `function` with `count`, from 1 to kTile, as a compile-time constant.
template <int Count = kTile, typename Function>
void with_constant(std::int64_t count, Function&& function) {
  if constexpr (Count > 1) {
    if (count != Count) {
      return with_constant<Count - 1>(count, function);
    }
  }
  function(std::integral_constant<int, Count>{});
}

// The product for any number of outputs.
template <bool Start, typename S>
void combine(Product<S> product, std::int64_t outputs, std::int64_t count) {
  for (std::int64_t i = 0; i < outputs; i += kTile) {
    with_constant(std::min<std::int64_t>(kTile, outputs - i), [&](auto constant) {
      best_tile<decltype(constant)::value, Start>(product, count);
    });
    product.y += kTile * product.y_stride;
    product.w += kTile * product.w_stride;
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

// Rows as S: where they lie when they are stored so, else a converted copy of a group.
template <typename T>
class Group {
 public:
  using S = Compute<T>;

  explicit Group(const Rows<T>& rows)
      : stride_(kInPlace ? rows.stride : kPoolChunk),
        converted_(kInPlace ? 0 : kGroup * kPoolChunk) {}

  const S* read(
      const T* first, std::int64_t row_stride, std::int64_t rows, std::int64_t count) const {
    if constexpr (kInPlace) {
      return first;
    } else {
      for (std::int64_t i = 0; i < rows; ++i) {
        row_load(converted_.data() + i * kPoolChunk, first + i * row_stride, count);
      }
      return converted_.data();
    }
  }
  std::int64_t stride() const { return stride_; }

 private:
  static constexpr bool kInPlace = std::is_same_v<T, S>;
  std::int64_t stride_;
  Scratch<S> converted_;
};

// Stores rows of the tokens' gradient, past the caches when it is large.
template <typename T>
class RowWriter {
 public:
  explicit RowWriter(const Shape& shape)
      : streamed_(
            shape.batch * shape.tokens() * shape.channels * static_cast<std::int64_t>(sizeof(T)) >
            kStreamedBytes),
        stored_(streamed_ ? kPoolChunk : 0) {}
  ~RowWriter() {
    if (streamed_) {
      stream_fence();
    }
  }

  void write(T* target, const Compute<T>* row, std::int64_t count) const {
    if (!streamed_) {
      row_store(target, Compute<T>(1), row, count);
    } else if constexpr (std::is_same_v<T, Compute<T>>) {
      stream_row(target, row, count * sizeof(T));
    } else {
      row_store(stored_.data(), Compute<T>(1), row, count);
      stream_row(target, stored_.data(), count * sizeof(T));
    }
  }

 private:
  bool streamed_;
  Scratch<T> stored_;
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

template <typename T>
void pool_sums(
    const Shape& shape, const Rows<T>& rows, const Compute<T>* weights, const Compute<T>* totals,
    std::int64_t sample, std::int64_t channel, T* pooled) {
  using S = Compute<T>;
  const std::int64_t count = std::min(kPoolChunk, shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const Group<T> group(rows);
  const Scratch<S> sums(shape.parts * kPoolChunk);
  if (shape.positions == 0) {
    std::fill_n(sums.data(), shape.parts * kPoolChunk, S(0));
  }
  for (std::int64_t n = 0; n < shape.positions; n += kGroup) {
    const std::int64_t size = std::min<std::int64_t>(kGroup, shape.positions - n);
    const S* x = group.read(tokens + n * rows.stride, rows.stride, size, count);
    const Product<S> product = {sums.data(), kPoolChunk, weights + n,    shape.positions,
                                1,           x,          group.stride(), size};
    if (n == 0) {
      combine<true>(product, shape.parts, count);
    } else {
      combine<false>(product, shape.parts, count);
    }
  }
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    row_store_divided(
        pooled + p * shape.channels + channel, sums.data() + p * kPoolChunk,
        divisor(shape.mode, totals[p], shape.positions, static_cast<S>(shape.eps)), count);
  }
}

template <typename T>
void pool_maxima(
    const Shape& shape, const Rows<T>& rows, const Compute<T>* weights, std::int64_t sample,
    std::int64_t channel, T* pooled, std::int32_t* winners) {
  using S = Compute<T>;
  const std::int64_t count = std::min(kPoolChunk, shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const Group<T> group(rows);
  const Scratch<S> largest(shape.parts * kPoolChunk);
  const Scratch<Position<S>> position(shape.parts * kPoolChunk);
  std::fill_n(
      largest.data(), shape.parts * kPoolChunk,
      shape.positions > 0 ? -std::numeric_limits<S>::infinity() : S(0));
  std::fill_n(position.data(), shape.parts * kPoolChunk, Position<S>(0));
  for (std::int64_t n = 0; n < shape.positions; n += kGroup) {
    const std::int64_t size = std::min<std::int64_t>(kGroup, shape.positions - n);
    const S* x = group.read(tokens + n * rows.stride, rows.stride, size, count);
    for (std::int64_t i = 0; i < size; i += kTile) {
      with_constant(std::min<std::int64_t>(kTile, size - i), [&](auto constant) {
        for (std::int64_t p = 0; p < shape.parts; ++p) {
          maximum<decltype(constant)::value>(
              largest.data() + p * kPoolChunk, position.data() + p * kPoolChunk,
              static_cast<Position<S>>(n + i), weights + p * shape.positions + n + i,
              x + i * group.stride(), group.stride(), count);
        }
      });
    }
  }
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    row_store(pooled + p * shape.channels + channel, S(1), largest.data() + p * kPoolChunk, count);
    std::copy_n(position.data() + p * kPoolChunk, count, winners + p * shape.channels + channel);
  }
}

// The pass over the tokens of the two means: gradient of the tokens, and this unit's share of
// d[p, n] = sum_c grad_pooled[p, c] x[n, c] / divisor[p].
template <typename T>
void sums_backward(
    const Shape& shape, const Rows<T>& rows, const Compute<T>* weights, const Compute<T>* totals,
    const T* grad_pooled, std::int64_t sample, std::int64_t channel, T* grad_tokens,
    Compute<T>* share) {
  using S = Compute<T>;
  const std::int64_t count = std::min(kPoolChunk, shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const Group<T> group(rows);
  const RowWriter<T> writer(shape);
  const Scratch<S> gradient(shape.parts * kPoolChunk);
  const Scratch<S> sums(kGroup * kPoolChunk);
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    row_load_divided(
        gradient.data() + p * kPoolChunk, grad_pooled + p * shape.channels + channel,
        divisor(shape.mode, totals[p], shape.positions, static_cast<S>(shape.eps)), count);
  }
  for (std::int64_t n = 0; n < shape.positions; n += kGroup) {
    const std::int64_t size = std::min<std::int64_t>(kGroup, shape.positions - n);
    const S* x = group.read(tokens + n * rows.stride, rows.stride, size, count);
    for (std::int64_t p = 0; p < shape.parts; ++p) {
      const S* g = gradient.data() + p * kPoolChunk;
      S* dots = share + p * shape.positions + n;
      std::int64_t i = 0;
      for (; i + 8 <= size; i += 8) {
        eight_dots(dots + i, g, x + i * group.stride(), group.stride(), count);
      }
      for (; i < size; ++i) {
        dots[i] = row_dot(g, x + i * group.stride(), count);
      }
    }
    combine<true>(
        Product<S>{
            sums.data(), kPoolChunk, weights + n, 1, shape.positions, gradient.data(), kPoolChunk,
            shape.parts},
        size, count);
    for (std::int64_t i = 0; i < size; ++i) {
      writer.write(
          grad_tokens + (n + i) * shape.channels + channel, sums.data() + i * kPoolChunk, count);
    }
  }
}

// The same for the maxima: only winners get and give gradients.
template <typename T>
void maxima_backward(
    const Shape& shape, const Rows<T>& rows, const Compute<T>* weights, const T* grad_pooled,
    const std::int32_t* winners, std::int64_t sample, std::int64_t channel, T* grad_tokens,
    Compute<T>* share) {
  using S = Compute<T>;
  const std::int64_t count = std::min(kPoolChunk, shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const RowWriter<T> writer(shape);
  const Scratch<S> field(shape.positions * kPoolChunk);
  std::fill_n(field.data(), shape.positions * kPoolChunk, S(0));
  std::fill_n(share, shape.part_size(), S(0));
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    const std::int64_t row = p * shape.channels + channel;
    for (std::int64_t c = 0; c < count; ++c) {
      const std::int64_t n = winners[row + c];
      // The forward pass gives no other; a caller of the bare operator might.
      if (n < 0 || n >= shape.positions) {
        continue;
      }
      const S g = load(grad_pooled[row + c]);
      field[n * kPoolChunk + c] += weights[p * shape.positions + n] * g;
      share[p * shape.positions + n] += g * load(tokens[n * rows.stride + c]);
    }
  }
  for (std::int64_t n = 0; n < shape.positions; ++n) {
    writer.write(grad_tokens + n * shape.channels + channel, field.data() + n * kPoolChunk, count);
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

template <typename T>
void forward(
    const Shape& shape, Visibility kind, const Rows<T>& rows, const Compute<T>* masks, T* pooled,
    Compute<T>* visibility, Compute<T>* totals, std::int32_t* peaks, std::int32_t* winners) {
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
    const std::int64_t channel = unit % shape.chunks() * kPoolChunk;
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
    const Shape& shape, const Rows<T>& rows, const Compute<T>* masks, const T* grad_pooled,
    const Compute<T>* grad_visibility, const Compute<T>* totals, const std::int32_t* peaks,
    const std::int32_t* winners, T* grad_tokens, Compute<T>* grad_masks) {
  using S = Compute<T>;
  const Weights<S> weights(shape, masks);
  const std::int64_t parts = shape.parts, size = shape.part_size(), chunks = shape.chunks();
  const Scratch<S> shares(shape.batch * chunks * size);
  parallel_for(shape.batch * chunks, [&](std::int64_t unit) {
    const std::int64_t sample = unit / chunks;
    const std::int64_t channel = unit % chunks * kPoolChunk;
    const std::int64_t count = std::min(kPoolChunk, shape.channels - channel);
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
  const Shape shape = checked_shape(tokens, masks, prefix, mode, activation, background, eps);
  STD_TORCH_CHECK(
      0 <= visibility_kind && visibility_kind <= 1, "visibility: wanted 0 or 1, got ",
      visibility_kind);
  const Tensor in = with_contiguous_rows(tokens), masks_in = contiguous(masks);
  const ScalarType type = compute_type(in.scalar_type());
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
        shape, static_cast<Visibility>(visibility_kind), Rows<T>(in, prefix), data<S>(masks_in),
        mutable_data<T>(pooled), mutable_data<S>(visibility), mutable_data<S>(totals),
        mutable_data<std::int32_t>(peaks), mutable_data<std::int32_t>(winners));
  });
  return {pooled, visibility, totals, peaks, winners};
}

std::tuple<Tensor, Tensor> masked_part_pool_backward(
    const Tensor& grad_pooled, const Tensor& grad_visibility, const Tensor& tokens,
    const Tensor& masks, const Tensor& totals, const Tensor& peaks, const Tensor& winners,
    std::int64_t prefix, std::int64_t mode, std::int64_t activation, bool background, double eps) {
  const Shape shape = checked_shape(tokens, masks, prefix, mode, activation, background, eps);
  const ScalarType type = compute_type(tokens.scalar_type());
  check_shape("grad_pooled", grad_pooled, {shape.batch, shape.parts, shape.channels});
  check_type("grad_pooled", grad_pooled, tokens.scalar_type());
  check_shape("grad_visibility", grad_visibility, {shape.batch, shape.parts});
  check_type("grad_visibility", grad_visibility, type);
  check_shape("totals", totals, {shape.batch, shape.parts});
  check_type("totals", totals, type);
  check_shape("peaks", peaks, {shape.batch, shape.parts});
  check_type("peaks", peaks, ScalarType::Int);
  check_type("winners", winners, ScalarType::Int);
  if (shape.mode == Mode::kMax) {
    check_shape("winners", winners, {shape.batch, shape.parts, shape.channels});
  }
  const Tensor in = with_contiguous_rows(tokens), masks_in = contiguous(masks),
               gradient = contiguous(grad_pooled), visibility = contiguous(grad_visibility),
               sums = contiguous(totals), peaks_in = contiguous(peaks),
               winners_in = contiguous(winners);
  const Tensor grad_tokens = empty({shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
  const std::int64_t mask_channels = shape.mask_channels();
  const Tensor grad_masks = shape.shared
                                ? empty({mask_channels, shape.positions}, type)
                                : empty({shape.batch, mask_channels, shape.positions}, type);
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    backward<T>(
        shape, Rows<T>(in, prefix), data<S>(masks_in), data<T>(gradient), data<S>(visibility),
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
