// Row arithmetic of the masked part pooling for the processor it runs on.
#pragma once

#include "../common/row_sets.h"

namespace gsalign::pool {

// Channels of a unit of work at most: whole rows of the usual networks, so that a unit reads one
// run of memory.
constexpr std::int64_t kPoolChunk = 1024;

// Numbers between the rows of sums and gradients that a unit keeps. A line more than a chunk: rows
// 4096 bytes apart would all want the same few lines of a near cache.
template <typename S>
constexpr std::int64_t kKeptStride = kPoolChunk + 64 / std::int64_t(sizeof(S));

constexpr int kPartTile = 8;  // parts whose sums are kept in registers together
constexpr int kRowGroup = 8;  // rows of tokens that are read together

// "Kept" rows hold numbers in an order of their own (that of load_pair()), which makes conversions
// cheap; only functions of this table read and write them.

// kept[p][c] = (start ? 0 : kept[p][c]) + sum_i weights[i parts + p] rows[i][c] over `count` rows
// `stride` apart, for `parts` parts.
template <typename T>
struct RowSums {
  Compute<T>* kept;
  const Compute<T>* weights;
  const T* rows;
  std::int64_t stride, count, channels;
  bool start;
};

// Two tokens of the backward pass, which share what they read of `kept`:
// dots[i][p] = sum_c kept[p][c] rows[i][c], and
//   gradients[i][c] = carried[i][c] + sum_p weights[i][p] kept[p][c],
// where `carried`, from the parts before these, may be null. It is written to `gradients`, past the
// caches where `streamed`, or to `carry` (which may be `carried`) when more parts follow. Values
// `ahead` behind the rows are asked for.
template <typename T>
struct TokenGradients {
  const Compute<T>* kept;
  const Compute<T>* weights[2];
  const T* rows[2];
  Compute<T>* dots[2];
  const Compute<T>* carried[2];
  Compute<T>* carry[2];
  T* gradients[2];
  std::int64_t channels, ahead;
  bool streamed;
};

template <typename T>
struct Rows {
  // By the number of parts less one.
  void (*add_rows[kPartTile])(const RowSums<T>&);
  void (*token_gradients[kPartTile])(const TokenGradients<T>&);
  // A kept row from y[c] = x[c] / divisor, and back.
  void (*keep)(Compute<T>*, const T*, Compute<T> divisor, std::int64_t channels);
  void (*release)(T*, const Compute<T>*, Compute<T> divisor, std::int64_t channels);
  std::int64_t alignment;  // of rows that are written past the caches
};

#define GSALIGN_ROWS "../pool/pool_rows.inl"
#include "../common/row_sets.inl"
#undef GSALIGN_ROWS

}  // namespace gsalign::pool
