// Distances of a few gallery images to a few queries: the inner kernel and the layout it reads.
//
// A tile is kRows gallery images times two vectors of queries, a query to a lane. Its sums stay in
// registers while one part of the embeddings goes by; then the part is weighed and forgotten, so
// that nothing of the size parts x queries x gallery ever exists. Queries are laid out lane by lane
// once. Gallery images are read as rows, number by number, so that the side that is streamed is
// never turned.
//
// Every distance is the same sequence of operations wherever its tile begins: its bits do not
// depend on how the work is cut, and equal images of a gallery have equal distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../common/cpu.h"
#include "../common/lanes.h"

namespace gsalign::distance {

enum Metric : std::int64_t { kCosine = 0, kEuclidean = 1 };

// Gallery rows of a tile: with 32 registers 12 x 2 sums, two vectors of queries and room to work.
template <int kBytes>
constexpr std::int64_t kRowsFor = kBytes == 64 ? 12 : 6;

// The same at run time, for this processor.
inline std::int64_t tile_rows() {
  return vector_bytes() == 64 ? kRowsFor<64> : kRowsFor<32>;
}
constexpr std::int64_t kMostTileRows = 12;

// Queries of a vector, on this processor.
template <typename S>
std::int64_t vector_length() {
  return vector_bytes() / static_cast<std::int64_t>(sizeof(S));
}
constexpr std::int64_t kVectorsOfPanel = 2;
template <typename S>
constexpr std::int64_t kMostLanes = kVectorsOfPanel * 64 / static_cast<std::int64_t>(sizeof(S));

// What a tile is made from. Weights are square roots of visibilities.
template <typename S>
struct Tile {
  const S* rows;  // [kRows][row_stride], parts one behind the other
  std::int64_t row_stride;
  const S* row_weights;   // [kRows][parts]
  const S* lanes;         // [parts][channels][lanes]
  const S* lane_weights;  // [parts][lanes]
  std::int64_t parts, channels;
  S unmatched;  // where the weights' products are all 0
  S* result;    // [kRows][lanes]
};

// What one channel adds to a part's sum: a product, or the square of a difference. The difference
// costs an instruction more and never cancels, however near or far from 0 the two vectors are.
template <Metric kMetric, typename V>
GSALIGN_INLINE V accumulated(const V& sum, const V& query, const V& gallery) {
  if constexpr (kMetric == kCosine) {
    return sum + query * gallery;
  } else {
    const V difference = query - gallery;
    return sum + difference * difference;
  }
}

// The sum to a part's distance. Rounding may leave a cosine a little above 1.
template <Metric kMetric, typename S>
GSALIGN_INLINE S distance_from(S sum) {
  if constexpr (kMetric == kCosine) {
    const S distance = S(1) - sum;
    return distance < S(0) ? S(0) : distance;  // a NaN stays
  } else if constexpr (std::is_same_v<S, float>) {
    return __builtin_sqrtf(sum);
  } else {
    return __builtin_sqrt(sum);
  }
}

// One part: sums over its channels, kRows x kVectors vectors of them.
template <Metric kMetric, typename S, int kBytes, int kRows, int kVectors>
GSALIGN_INLINE void part_sums(
    const S* __restrict rows, std::int64_t row_stride, const S* __restrict lanes,
    std::int64_t channels, S* __restrict sums) {
  using V = Vector<S, kBytes>;
  constexpr std::int64_t kLength = kVectorLength<S, kBytes>;
  V sum[kRows][kVectors] = {};
  for (std::int64_t c = 0; c < channels; ++c) {
    V query[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      query[v] = load_vector<S, kBytes>(lanes + (c * kVectors + v) * kLength);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V gallery = rows[r * row_stride + c] - V{};
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = accumulated<kMetric>(sum[r][v], query[v], gallery);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store_vector(sums + (r * kVectors + v) * kLength, sum[r][v]);
    }
  }
}

template <Metric kMetric, typename S, int kBytes, int kVectors>
GSALIGN_INLINE void tile_body(const Tile<S>& tile) {
  constexpr int kRows = kRowsFor<kBytes>;
  constexpr int kLanes = kVectors * kVectorLength<S, kBytes>;
  alignas(64) S sums[kRows * kLanes];
  alignas(64) S total[kRows * kLanes] = {};
  alignas(64) S weight[kRows * kLanes] = {};
  for (std::int64_t p = 0; p < tile.parts; ++p) {
    part_sums<kMetric, S, kBytes, kRows, kVectors>(
        tile.rows + p * tile.channels, tile.row_stride, tile.lanes + p * tile.channels * kLanes,
        tile.channels, sums);
    const S* lane_weights = tile.lane_weights + p * kLanes;
    for (int r = 0; r < kRows; ++r) {
      const S row_weight = tile.row_weights[r * tile.parts + p];
      for (int l = 0; l < kLanes; ++l) {
        const S w = lane_weights[l] * row_weight;
        const S d = distance_from<kMetric>(sums[r * kLanes + l]);
        // Not 0 * d: a part that is not seen may hold anything, NaN too.
        total[r * kLanes + l] += w == S(0) ? S(0) : w * d;
        weight[r * kLanes + l] += w;
      }
    }
  }
  for (int i = 0; i < kRows * kLanes; ++i) {
    const S mean = total[i] / weight[i];  // outside the choice, where it can be done by vectors
    tile.result[i] = weight[i] == S(0) ? tile.unmatched : mean;
  }
}

// Makes a tile; `vectors` of queries, 1 or 2.
template <typename S>
void make_tile(Metric metric, std::int64_t vectors, const Tile<S>& tile) {
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    if (metric == kCosine) {
      vectors == 1 ? tile_body<kCosine, S, kBytes, 1>(tile)
                   : tile_body<kCosine, S, kBytes, 2>(tile);
    } else {
      vectors == 1 ? tile_body<kEuclidean, S, kBytes, 1>(tile)
                   : tile_body<kEuclidean, S, kBytes, 2>(tile);
    }
  });
}

}  // namespace gsalign::distance
