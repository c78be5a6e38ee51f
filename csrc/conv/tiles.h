// Maps cut into tiles, tiles and kernels as the products want them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cpu.h"
#include "../common/lanes.h"
#include "product.h"
#include "winograd.h"

namespace gsalign::conv {

// Channels of a block, the depth of a product: what a thread holds of the kernels at a time stays
// in the second-level cache.
constexpr std::int64_t kDepth = 64;

// One cache line: planes that lie a power of two apart would share few lines of the caches.
template <typename S>
constexpr std::int64_t kLine = 64 / std::int64_t(sizeof(S));

struct Map {
  std::int64_t height, width;

  std::int64_t positions() const { return height * width; }
  std::int64_t tiles_across() const { return ceil_div(width, kTile); }
  std::int64_t tiles() const { return ceil_div(height, kTile) * tiles_across(); }
  // The first output position of a tile.
  std::int64_t top(std::int64_t tile) const { return tile / tiles_across() * kTile; }
  std::int64_t left(std::int64_t tile) const { return tile % tiles_across() * kTile; }
  // The row of a position, -1 outside.
  std::int64_t position(std::int64_t y, std::int64_t x) const {
    return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : -1;
  }
};

// Planes of products: [kPlanes][rows][lanes].
template <typename S>
struct Planes {
  S* data;
  std::int64_t rows, lanes;

  static std::int64_t size(std::int64_t rows, std::int64_t lanes) {
    return kPlanes * (rows * lanes + kLine<S>);
  }
  std::int64_t stride() const { return rows * lanes + kLine<S>; }
  S* row(std::int64_t plane, std::int64_t row) const {
    return data + plane * stride() + row * lanes;
  }
};

// The tiles of some images, channels in blocks of kDepth, each block's planes together.
template <typename S>
class TileBlocks {
 public:
  TileBlocks(std::int64_t channels, std::int64_t tiles)
      : rows_(ceil_div(tiles, kRowsTogether) * kRowsTogether),
        blocks_(ceil_div(channels, kDepth)),
        data_(blocks_ * Planes<S>::size(rows_, kDepth)) {}

  std::int64_t blocks() const { return blocks_; }
  std::int64_t rows() const { return rows_; }
  Planes<S> block(std::int64_t index) const {
    return {data_.data() + index * Planes<S>::size(rows_, kDepth), rows_, kDepth};
  }

 private:
  std::int64_t rows_, blocks_;
  Scratch<S> data_;
};

// Where a tile's corner lies from its first output: inputs reach one beyond it on every side.
template <const auto& kM>
constexpr int kReach = (std::remove_cvref_t<decltype(kM)>::kColumns - kTile) / 2;

// One block of one image to tiles: `from` has a row of kDepth numbers per position; the tiles go to
// rows [first, first + tiles) of the planes. kM is kInput for inputs, kOutputBack for gradients of
// outputs. What lies outside the map is 0.
template <const auto& kM, typename S>
void make_tiles(
    const Map& map, const S* from, std::int64_t stride, const Planes<S>& planes,
    std::int64_t first) {
  constexpr int kFrom = std::remove_cvref_t<decltype(kM)>::kColumns;
  alignas(64) static constexpr S kZeros[kDepth] = {};
  for (std::int64_t tile = 0; tile < map.tiles(); ++tile) {
    const S* rows[kFrom * kFrom];
    for (int y = 0; y < kFrom; ++y) {
      for (int x = 0; x < kFrom; ++x) {
        const std::int64_t position =
            map.position(map.top(tile) + y - kReach<kM>, map.left(tile) + x - kReach<kM>);
        rows[y * kFrom + x] = position < 0 ? kZeros : from + position * stride;
      }
    }
    with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
      constexpr int kBytes = decltype(width)::kBytes;
      using V = Vector<S, kBytes>;
      for (std::int64_t c = 0; c < kDepth; c += kVectorLength<S, kBytes>) {
        V in[kFrom * kFrom], out[kPlanes];
#pragma GCC unroll 36
        for (int i = 0; i < kFrom * kFrom; ++i) {
          in[i] = load_vector<S, kBytes>(rows[i] + c);
        }
        sandwich<kM, S>(in, out);
#pragma GCC unroll 36
        for (int i = 0; i < kPlanes; ++i) {
          store_vector(planes.row(i, first + tile) + c, out[i]);
        }
      }
    });
  }
}

// Kernels [., ., 3, 3] seen from one side: which channels are lanes, and which the product's depth.
// `E` is const where they are only read.
template <typename E>
struct Kernels {
  E* data;
  std::int64_t lanes, lane_stride, depth, depth_stride;
};

// Kernels laid out for vectors: [kStep][9][lanes], few enough for the first-level cache.
constexpr std::int64_t kStep = 16;
template <typename S>
constexpr std::int64_t kMostLanes = std::max({kLanes<S, 16>, kLanes<S, 32>, kLanes<S, 64>});
template <typename S>
struct Taps {
  alignas(64) S at[kStep * kKernelSize * kMostLanes<S>];
};

// As many rows as a vector has numbers, to columns: each step takes every row apart into two.
template <typename S, int kBytes>
GSALIGN_INLINE void turn(Vector<S, kBytes> (&rows)[kVectorLength<S, kBytes>]) {
  constexpr int kCount = kVectorLength<S, kBytes>;
  for (int step = 1; step < kCount; step *= 2) {
    Vector<S, kBytes> next[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = interleaved<0, S>(rows[i], rows[i + kCount / 2]);
      next[2 * i + 1] = interleaved<1, S>(rows[i], rows[i + kCount / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      rows[i] = next[i];
    }
  }
}

// Whether a step's kernels are whole squares of vectors, a lane's numbers in a row.
template <typename E>
bool square(const Kernels<E>& kernels, std::int64_t lane, std::int64_t k, std::int64_t lanes) {
  return kernels.depth_stride == kKernelSize && lane + lanes <= kernels.lanes &&
         k + kStep <= kernels.depth;
}

// Calls `each(numbers, taps)` where squares of vectors begin, with their distances row to row.
template <typename S, int kBytes, typename E, typename Each>
GSALIGN_INLINE void for_squares(E* numbers, std::int64_t stride, S* taps, const Each& each) {
  constexpr std::int64_t kLength = kVectorLength<S, kBytes>;
  for (std::int64_t l = 0; l < kLanes<S, kBytes>; l += kLength) {
    for (std::int64_t i = 0; i < kStep * kKernelSize; i += kLength) {
      each(numbers + l * stride + i, taps + i * kLanes<S, kBytes> + l);
    }
  }
}

// Up to kStep kernels of each lane, from `lane` and depth `k` on, to taps.
template <typename S>
void read_taps(
    const Kernels<const S>& kernels, std::int64_t lane, std::int64_t k, std::int64_t lanes,
    Taps<S>& taps) {
  const std::int64_t many = std::min(lanes, kernels.lanes - lane);
  const std::int64_t deep = std::min(kStep, kernels.depth - k);
  const S* const first = kernels.data + lane * kernels.lane_stride + k * kernels.depth_stride;
  if (!square(kernels, lane, k, lanes)) {
    for (std::int64_t i = 0; i < deep; ++i) {
      for (std::int64_t l = 0; l < many; ++l) {
        const S* kernel = first + i * kernels.depth_stride + l * kernels.lane_stride;
#pragma GCC unroll 9
        for (int t = 0; t < kKernelSize; ++t) {
          taps.at[(i * kKernelSize + t) * lanes + l] = kernel[t];
        }
      }
    }
    return;
  }
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    for_squares<S, kBytes>(
        first, kernels.lane_stride, taps.at, [&](const S* numbers, S* to) GSALIGN_VECTOR_BODY {
          Vector<S, kBytes> rows[kVectorLength<S, kBytes>];
#pragma GCC unroll 16
          for (int r = 0; r < kVectorLength<S, kBytes>; ++r) {
            const S* row = numbers + r * kernels.lane_stride;
            rows[r] = load_vector<S, kBytes>(row);
            // Lanes lie far apart: hardware does not foresee the next step.
            __builtin_prefetch(row + kStep * kKernelSize);
          }
          turn<S, kBytes>(rows);
#pragma GCC unroll 16
          for (int r = 0; r < kVectorLength<S, kBytes>; ++r) {
            store_vector(to + r * kLanes<S, kBytes>, rows[r]);
          }
        });
  });
}

// Adds taps to the kernels they belong to, a lane's in a row.
template <typename S>
void add_taps(
    Taps<S>& taps, std::int64_t lane, std::int64_t k, std::int64_t lanes,
    const Kernels<S>& kernels) {
  S* const first = kernels.data + lane * kernels.lane_stride + k * kKernelSize;
  if (!square(kernels, lane, k, lanes)) {
    const std::int64_t many = std::min(lanes, kernels.lanes - lane);
    const std::int64_t deep = std::min(kStep, kernels.depth - k);
    for (std::int64_t l = 0; l < many; ++l) {
      for (std::int64_t i = 0; i < deep * kKernelSize; ++i) {
        first[l * kernels.lane_stride + i] += taps.at[i * lanes + l];
      }
    }
    return;
  }
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    for_squares<S, kBytes>(
        first, kernels.lane_stride, taps.at, [&](S* numbers, const S* from) GSALIGN_VECTOR_BODY {
          Vector<S, kBytes> rows[kVectorLength<S, kBytes>];
#pragma GCC unroll 16
          for (int r = 0; r < kVectorLength<S, kBytes>; ++r) {
            rows[r] = load_vector<S, kBytes>(from + r * kLanes<S, kBytes>);
          }
          turn<S, kBytes>(rows);
#pragma GCC unroll 16
          for (int r = 0; r < kVectorLength<S, kBytes>; ++r) {
            S* to = numbers + r * kernels.lane_stride;
            store_vector(to, load_vector<S, kBytes>(to) + rows[r]);
          }
        });
  });
}

// The kernels of a panel from `lane` on, and of a block from depth `first` on, to planes
// [kPlanes][kDepth][lanes]; lanes past the last are 0.
template <typename S>
void make_kernels(
    const Kernels<const S>& kernels, std::int64_t lane, std::int64_t first, Taps<S>& taps,
    const Planes<S>& planes) {
  if (lane + planes.lanes > kernels.lanes) {
    std::fill_n(taps.at, kStep * kKernelSize * planes.lanes, S(0));
  }
  const std::int64_t deep = std::min(kDepth, kernels.depth - first);
  for (std::int64_t k = 0; k < deep; k += kStep) {
    read_taps(kernels, lane, first + k, planes.lanes, taps);
    with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
      constexpr int kBytes = decltype(width)::kBytes;
      constexpr std::int64_t kMany = kLanes<S, kBytes>;
      using V = Vector<S, kBytes>;
      for (std::int64_t i = 0; i < std::min(kStep, deep - k); ++i) {
        for (std::int64_t l = 0; l < kMany; l += kVectorLength<S, kBytes>) {
          V in[kKernelSize], out[kPlanes];
#pragma GCC unroll 9
          for (int t = 0; t < kKernelSize; ++t) {
            in[t] = load_vector<S, kBytes>(taps.at + (i * kKernelSize + t) * kMany + l);
          }
          sandwich<kKernel, S>(in, out);
#pragma GCC unroll 36
          for (int p = 0; p < kPlanes; ++p) {
            store_vector(planes.row(p, k + i) + l, out[p]);
          }
        }
      }
    });
  }
}

// The other way for gradients: planes back to kernels, added to what is there.
template <typename S>
void add_kernels(
    const Planes<S>& planes, std::int64_t lane, std::int64_t first, Taps<S>& taps,
    const Kernels<S>& kernels) {
  const std::int64_t deep = std::min(kDepth, kernels.depth - first);
  for (std::int64_t k = 0; k < deep; k += kStep) {
    with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
      constexpr int kBytes = decltype(width)::kBytes;
      constexpr std::int64_t kMany = kLanes<S, kBytes>;
      using V = Vector<S, kBytes>;
      for (std::int64_t i = 0; i < std::min(kStep, deep - k); ++i) {
        for (std::int64_t l = 0; l < kMany; l += kVectorLength<S, kBytes>) {
          V in[kPlanes], out[kKernelSize];
#pragma GCC unroll 36
          for (int p = 0; p < kPlanes; ++p) {
            in[p] = load_vector<S, kBytes>(planes.row(p, k + i) + l);
          }
          sandwich<kKernelBack, S>(in, out);
#pragma GCC unroll 9
          for (int t = 0; t < kKernelSize; ++t) {
            store_vector(taps.at + (i * kKernelSize + t) * kMany + l, out[t]);
          }
        }
      }
    });
    add_taps(taps, lane, first + k, planes.lanes, kernels);
  }
}

}  // namespace gsalign::conv
