// The means of the masked part pooling on the CPU, unit by unit.
//
// Forward, a group of rows is read once for a tile of parts, whose sums wait in a near cache, while
// the next group is asked for. Backward takes two tokens at a time, for which a part's row of
// gradients is read once and used four times, for the tokens' gradients and the weights'. Both make
// two products per value and part: with P parts of float32 that is P multiply-adds forward and 2 P
// backward for 4 (8) bytes of memory, and memory bounds them up to 8 parts or so.
#pragma once

#include <algorithm>

#include "../common/tensor.h"
#include "pool_shape.h"
#include "pool_writer.h"

namespace gsalign::pool {

template <typename T>
void pool_sums(
    const Shape& shape, const TokenRows<const T>& rows, const Compute<T>* weights,
    const Compute<T>* totals, std::int64_t sample, std::int64_t channel, T* pooled) {
  using S = Compute<T>;
  const Rows<T>& functions = rows_for<T>();
  const std::int64_t count = std::min(shape.chunk(), shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const Scratch<S> sums(shape.parts * kKeptStride<S>);
  if (shape.positions == 0) {
    std::fill_n(sums.data(), shape.parts * kKeptStride<S>, S(0));
  }
  for (std::int64_t n = 0; n < shape.positions; n += kRowGroup) {
    const std::int64_t size = std::min<std::int64_t>(kRowGroup, shape.positions - n);
    for (std::int64_t p = 0; p < shape.parts; p += kPartTile) {
      const std::int64_t parts = std::min<std::int64_t>(kPartTile, shape.parts - p);
      S tile[kRowGroup * kPartTile];  // the weights in the order in which they are used
      for (std::int64_t i = 0; i < size; ++i) {
        for (std::int64_t j = 0; j < parts; ++j) {
          tile[i * parts + j] = weights[(p + j) * shape.positions + n + i];
        }
      }
      functions.add_rows[parts - 1](RowSums<T>{
          sums.data() + p * kKeptStride<S>, tile, tokens + n * rows.stride, rows.stride, size,
          count, n == 0});
    }
  }
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    functions.release(
        pooled + p * shape.channels + channel, sums.data() + p * kKeptStride<S>,
        divisor(shape.mode, totals[p], shape.positions, static_cast<S>(shape.eps)), count);
  }
}

// Gradient of the tokens, and this unit's share of
// d[p, n] = sum_c grad_pooled[p, c] x[n, c] / divisor[p].
template <typename T>
void sums_backward(
    const Shape& shape, const TokenRows<const T>& rows, const Compute<T>* weights,
    const Compute<T>* totals, const T* grad_pooled, std::int64_t sample, std::int64_t channel,
    T* grad_tokens, Compute<T>* share) {
  using S = Compute<T>;
  const Rows<T>& functions = rows_for<T>();
  const std::int64_t count = std::min(shape.chunk(), shape.channels - channel);
  const T* tokens = rows.start + sample * rows.sample_stride + channel;
  const RowWriter<T> writer(shape);
  const Scratch<S> gradient(shape.parts * kKeptStride<S>);
  const Scratch<S> carry(shape.parts > kPartTile ? 2 * kPoolChunk : 0);
  for (std::int64_t p = 0; p < shape.parts; ++p) {
    functions.keep(
        gradient.data() + p * kKeptStride<S>, grad_pooled + p * shape.channels + channel,
        divisor(shape.mode, totals[p], shape.positions, static_cast<S>(shape.eps)), count);
  }
  for (std::int64_t n = 0; n < shape.positions; n += 2) {
    // An odd last token is done twice, the second time into a spare row.
    const bool both = n + 1 < shape.positions;
    const std::int64_t next = both ? n + 1 : n;
    T* const targets[2] = {
        grad_tokens + n * shape.channels + channel, grad_tokens + next * shape.channels + channel};
    const auto first = writer.place(targets[0], 0), second = writer.place(targets[1], 1);
    T* const last = both ? second.row : writer.spare(1);
    for (std::int64_t p = 0; p < shape.parts; p += kPartTile) {
      const std::int64_t parts = std::min<std::int64_t>(kPartTile, shape.parts - p);
      const bool begins = p == 0, ends = p + parts == shape.parts;
      S tile[2][kPartTile], dots[2][kPartTile];
      for (std::int64_t j = 0; j < parts; ++j) {
        tile[0][j] = weights[(p + j) * shape.positions + n];
        tile[1][j] = weights[(p + j) * shape.positions + next];
      }
      functions.token_gradients[parts - 1](TokenGradients<T>{
          .kept = gradient.data() + p * kKeptStride<S>,
          .weights = {tile[0], tile[1]},
          .rows = {tokens + n * rows.stride, tokens + next * rows.stride},
          .dots = {dots[0], dots[1]},
          .carried =
              {begins ? nullptr : carry.data(), begins ? nullptr : carry.data() + kPoolChunk},
          .carry = {ends ? nullptr : carry.data(), ends ? nullptr : carry.data() + kPoolChunk},
          .gradients = {first.row, last},
          .channels = count,
          .ahead = 2 * rows.stride,
          .streamed = first.streamed && second.streamed && both});
      for (std::int64_t j = 0; j < parts; ++j) {
        share[(p + j) * shape.positions + n] = dots[0][j];
        share[(p + j) * shape.positions + next] = dots[1][j];
      }
    }
    if (shape.parts == 0) {
      std::fill_n(first.row, count, T{});
      std::fill_n(last, count, T{});
    }
    writer.put(targets[0], first, count);
    if (both) {
      writer.put(targets[1], second, count);
    }
  }
}

}  // namespace gsalign::pool
