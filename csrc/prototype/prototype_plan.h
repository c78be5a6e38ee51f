// How the masked prototype loss is laid over the chip: blocks, threads, shared memory.
//
// Plain C++, so that kernels, launcher and host tests ask the same functions.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::prototype {

constexpr int kThreads = 256;       // of a block, at most
constexpr int kResidentBlocks = 5;  // of the kernels over classes that a multiprocessor holds
constexpr int kRounds = 8;          // labels of a window that a thread compares, at most
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
      int batch, int threads, int window, int tile_channels, int scalar_bytes) {
    const int warps = threads / 32;
    const int held = round_up(batch < window ? batch : window, 4);
    ClassLayout layout{};
    layout.sums = round_up(window / 8, 16);
    layout.extras = layout.sums + warps * tile_channels * 4;
    layout.members = layout.extras + round_up(warps * 4, 16);
    layout.scalars = layout.members + held * 4;
    layout.total = layout.scalars + held * scalar_bytes;
    return layout;
  }
};

struct Plan {
  bool vectors;       // four channels per lane, else one
  int tiles;          // of the channels, one per warp's width
  int groups;         // blocks per sample of the kernels over classes, which share its tiles
  int window;         // labels that they look at in one go
  int class_threads;  // of a block of theirs
  int row_threads;    // of a block of the kernel over rows
};

// For at least one sample and one channel. `threads` bounds those of a block.
inline Plan make_plan(
    std::int64_t batch, std::int64_t channels, bool vectors, int threads, int multiprocessors) {
  const std::int64_t tile = vectors ? 32 * 4 : 32;
  const std::int64_t tiles = (channels + tile - 1) / tile;
  const std::int64_t blocks = static_cast<std::int64_t>(kClassBlocks) * multiprocessors;
  const std::int64_t wanted = (blocks + batch - 1) / batch;
  Plan plan{};
  plan.vectors = vectors;
  plan.tiles = static_cast<int>(tiles);
  plan.groups = static_cast<int>(wanted < tiles ? wanted : tiles);
  // A batch of one window has classes of few samples, a row or two for each warp of half a block,
  // and then twice as many blocks find room at once.
  plan.window = kRounds / 2 * threads;
  plan.class_threads = threads >= 64 && batch <= plan.window ? threads / 2 : threads;
  plan.row_threads = static_cast<int>(32 * tiles < threads ? 32 * tiles : threads);
  return plan;
}

}  // namespace gsalign::prototype
