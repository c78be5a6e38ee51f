// The maxima of the masked part pooling on the CPU, unit by unit.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../common/tensor.h"
#include "pool_shape.h"
#include "pool_writer.h"

namespace gsalign::pool {

// The position of a maximum: an integer of S's size, so that both fill the same number of vector
// lanes.
template <typename S>
using Position = std::conditional_t<std::is_same_v<S, double>, std::int64_t, std::int32_t>;

// largest[c] and its position, over what was seen and weights[i] rows[i stride + c]. From the last
// row to the first, so that the first of equal values stays, and the first NaN: seen from the other
// end, that takes a comparison more, and costs GCC the vectorisation.
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
    for (int i = Count - 1; i >= 0; --i) {
      const S value = w[i] * rows[i * stride + c];
      const bool taken = (value >= best) | (value != value);
      best = taken ? value : best;
      where = taken ? first + i : where;
    }
    largest[c] = best;
    position[c] = where;
  }
}

// Calls `function` with `count`, from 1 to kPartTile, as a compile-time constant.
template <int Count = kPartTile, typename Function>
void with_constant(std::int64_t count, Function&& function) {
  if constexpr (Count > 1) {
    if (count != Count) {
      return with_constant<Count - 1>(count, function);
    }
  }
  function(std::integral_constant<int, Count>{});
}

// Rows as S: where they lie when they are stored so, else a converted copy of a group.
template <typename T>
class Group {
 public:
  using S = Compute<T>;

  explicit Group(const TokenRows<const T>& rows)
      : stride_(kInPlace ? rows.stride : kPoolChunk),
        converted_(kInPlace ? 0 : kRowGroup * kPoolChunk) {}

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

template <typename T>
void pool_maxima(
    const Shape& shape, const TokenRows<const T>& rows, const Compute<T>* weights,
    std::int64_t sample, std::int64_t channel, T* pooled, std::int32_t* winners) {
  using S = Compute<T>;
  const std::int64_t count = std::min(shape.chunk(), shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const Group<T> group(rows);
  const Scratch<S> largest(shape.parts * kPoolChunk);
  const Scratch<Position<S>> position(shape.parts * kPoolChunk);
  std::fill_n(
      largest.data(), shape.parts * kPoolChunk,
      shape.positions > 0 ? -std::numeric_limits<S>::infinity() : S(0));
  std::fill_n(position.data(), shape.parts * kPoolChunk, Position<S>(0));
  const std::int64_t last = (shape.positions - 1) / kRowGroup * kRowGroup;
  for (std::int64_t n = shape.positions > 0 ? last : -1; n >= 0; n -= kRowGroup) {
    const std::int64_t size = std::min<std::int64_t>(kRowGroup, shape.positions - n);
    const S* x = group.read(tokens + n * rows.stride, rows.stride, size, count);
    for (std::int64_t i = (size - 1) / kPartTile * kPartTile; i >= 0; i -= kPartTile) {
      with_constant(std::min<std::int64_t>(kPartTile, size - i), [&](auto constant) {
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

// Gradient of the tokens, and this unit's share of that of the weights: only winners get and give.
template <typename T>
void maxima_backward(
    const Shape& shape, const TokenRows<const T>& rows, const Compute<T>* weights,
    const T* grad_pooled, const std::int32_t* winners, std::int64_t sample, std::int64_t channel,
    T* grad_tokens, Compute<T>* share) {
  using S = Compute<T>;
  const std::int64_t count = std::min(shape.chunk(), shape.channels - channel);
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
    T* const target = grad_tokens + n * shape.channels + channel;
    const auto place = writer.place(target, 0);
    row_store(place.row, S(1), field.data() + n * kPoolChunk, count);
    writer.put(target, place, count);
  }
}

}  // namespace gsalign::pool
