// The matrix product inside: a few rows times a panel of lanes, its sums in registers.
#pragma once

#include <cstdint>

#include "../common/lanes.h"

namespace gsalign::conv {

// A panel is kVectors vectors wide, 8 numbers at least; its sums fill half to three quarters of the
// registers, and leave room for one row's number and the panel's vectors.
template <int kBytes>
struct Panel {
  static constexpr int kVectors = kBytes == 16 ? 4 : 2;
  static constexpr int kRows = kBytes == 64 ? 8 : kBytes == 32 ? 4 : 2;
};
// Rows come in multiples of this, whatever the processor.
constexpr std::int64_t kRowsTogether = 8;

template <typename S, int kBytes>
constexpr std::int64_t kLanes = Panel<kBytes>::kVectors * kVectorLength<S, kBytes>;

// The same at run time, for this processor.
template <typename S>
std::int64_t panel_lanes() {
  const int bytes = vector_bytes();
  return bytes == 64 ? kLanes<S, 64> : bytes == 32 ? kLanes<S, 32> : kLanes<S, 16>;
}

// A matrix whose rows or columns are next to each other in memory.
template <typename S>
struct Factor {
  const S* data;
  std::int64_t row_stride, column_stride;
};

// sums [rows][lanes] = rows of `a` times `b`, or += where `accumulate`. `b` has `depth` rows,
// b_stride apart; so has `a` columns. `rows` is a multiple of kRowsTogether.
template <typename S, int kBytes>
GSALIGN_INLINE void multiply(
    const Factor<S>& a, std::int64_t rows, const S* b, std::int64_t b_stride, std::int64_t depth,
    bool accumulate, S* sums) {
  using V = Vector<S, kBytes>;
  constexpr int kRows = Panel<kBytes>::kRows, kVectors = Panel<kBytes>::kVectors;
  constexpr std::int64_t kLength = kVectorLength<S, kBytes>;
  for (std::int64_t first = 0; first < rows; first += kRows) {
    V sum[kRows][kVectors] = {};
    S* target = sums + first * kLanes<S, kBytes>;
    if (accumulate) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = load_vector<S, kBytes>(target + (r * kVectors + v) * kLength);
        }
      }
    }
    const S* from = a.data + first * a.row_stride;
    for (std::int64_t k = 0; k < depth; ++k) {
      V lanes[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        lanes[v] = load_vector<S, kBytes>(b + k * b_stride + v * kLength);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V number = from[r * a.row_stride + k * a.column_stride] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] += number * lanes[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store_vector(target + (r * kVectors + v) * kLength, sum[r][v]);
      }
    }
  }
}

}  // namespace gsalign::conv
