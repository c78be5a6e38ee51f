// How the masked prototype loss is laid over the chip: blocks, threads, shared memory.
//
// Plain C++, so that kernels, launcher and host tests ask the same functions.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::prototype {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kRounds = 4;     // labels that a thread compares at a time
constexpr int kMaxSamples = 1 << 30;

// Blocks of the kernels over classes per multiprocessor, at least, where the channels allow it.
// Most of them only find that their sample's class is another's, and a class of many samples needs
// many to work on its channels; more would do nothing but read labels.
constexpr int kClassBlocks = 64;

GSALIGN_HOST_DEVICE int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Shared memory of the kernels over classes, in bytes: counts of the scan, sums of the warps over a
// tile of channels and one number beside each, then the members of a window: indices, scalars.
struct ClassLayout {
  int sums, extras, members, scalars, total;

  GSALIGN_HOST_DEVICE static ClassLayout make(
      int batch, int threads, int tile_channels, int scalar_bytes) {
    const int warps = threads / 32, window = kRounds * threads;
    const int held = round_up(batch < window ? batch : window, 4);
    ClassLayout layout{};
    layout.sums = round_up(kRounds * warps * 4, 16);
    layout.extras = layout.sums + warps * tile_channels * 4;
    layout.members = layout.extras + round_up(warps * 4, 16);
    layout.scalars = layout.members + held * 4;
    layout.total = layout.scalars + held * scalar_bytes;
    return layout;
  }
};

struct Plan {
  bool vectors;     // four channels per lane, else one
  int tiles;        // of the channels, one per warp's width
  int groups;       // blocks per sample of the kernels over classes, which share its tiles
  int row_threads;  // of a block of the kernel over rows
};

inline Plan make_plan(
    std::int64_t batch, std::int64_t channels, bool vectors, int threads, int multiprocessors) {
  const std::int64_t lane = vectors ? 4 : 1, tile = 32 * lane;
  const std::int64_t tiles = (channels + tile - 1) / tile;
  const std::int64_t blocks = static_cast<std::int64_t>(kClassBlocks) * multiprocessors;
  std::int64_t groups = (blocks + batch - 1) / batch;
  groups = groups < tiles ? groups : tiles;
  const std::int64_t row_threads = 32 * tiles < threads ? 32 * tiles : threads;
  return {
      vectors, static_cast<int>(tiles), static_cast<int>(groups), static_cast<int>(row_threads)};
}

}  // namespace gsalign::prototype
