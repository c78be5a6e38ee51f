// How an image warp is laid over the chip: limits, shared-memory layouts, the split of the
// channels.
//
// Plain C++, so that kernels, launchers and host tests ask the same functions. Layouts depend on
// the number of threads, so that host tests can run small blocks.
#pragma once

#include <cstdint>

#include "warp_plan.h"

namespace gsalign::warp {

constexpr std::int64_t kMaxSide = 1 << 24;    // pixel positions are exact in float32
constexpr std::int64_t kMaxPixels = 1 << 30;  // pixels are counted in 32 bits

// Output pixels are searched by tiles, and tiles by regions.
constexpr int kTileSide = 8;    // pixels
constexpr int kRegionSide = 8;  // tiles
constexpr int kTilePixels = kTileSide * kTileSide;
constexpr int kRegionTiles = kRegionSide * kRegionSide;

// A block of the image's gradient owns a patch of the image, a warp as many rows at a time as
// kOwned: so many pixels a thread.
constexpr int kPatchWidth = 32;
constexpr int kOwned = 2;
constexpr int kListed = 4;        // output pixels per thread that a block lists at a time
constexpr int kGradientStep = 4;  // channels that a thread sums up side by side
constexpr int kStridedStep = 4;   // channels read side by side where they are not one vector
constexpr int kSplineStep =
    2;  // the same for the gradient of the spline, which reads five values each
constexpr int kWantedBlocks = 4;     // per multiprocessor, before channels are kept together
constexpr int kSplinePixels = 1024;  // output pixels of a block of the spline's gradient, at most
constexpr int kFewestPixels = 64;    // and at least
// Blocks that a multiprocessor's registers hold: 64 a thread of the image's gradient, 80 of the
// spline's. The compiler is told, which else takes a few fewer and spills the rest.
constexpr int kGradientBlocks = 4;
constexpr int kSplineBlocks = 3;

struct Regions {
  int across, down;

  GSALIGN_HOST_DEVICE static Regions of(int height, int width) {
    constexpr int kSide = kTileSide * kRegionSide;
    return {divide_up(width, kSide), divide_up(height, kSide)};
  }
  GSALIGN_HOST_DEVICE int count() const { return across * down; }
};

struct Patches {
  int across, down, height;

  GSALIGN_HOST_DEVICE static Patches of(int height, int width, int threads) {
    const int rows = kOwned * threads / kPatchWidth;
    return {divide_up(width, kPatchWidth), divide_up(height, rows), rows};
  }
  GSALIGN_HOST_DEVICE int count() const { return across * down; }
};

// Image gradient: the listed output pixels (fractions, index, cell), the same in the order of the
// cells, the cells' bounds, regions and tiles found, scratch of the scans, control points.
struct PatchLayout {
  int pixels, cells, sorted_fractions, sorted_pixels, bounds, regions, tiles, scratch, centres;
  int listed, cell_columns, cell_count;

  GSALIGN_HOST_DEVICE static PatchLayout make(int threads) {
    PatchLayout layout{};
    layout.listed = kListed * threads;
    layout.cell_columns = kPatchWidth + 1;  // those left of the patch and above it reach into it
    layout.cell_count = layout.cell_columns * (kOwned * threads / kPatchWidth + 1);
    layout.pixels = layout.listed * 8;
    layout.cells = layout.pixels + layout.listed * 4;
    layout.sorted_fractions = layout.cells + layout.listed * 4;
    layout.sorted_pixels = layout.sorted_fractions + layout.listed * 8;
    layout.bounds = layout.sorted_pixels + layout.listed * 4;
    layout.regions = layout.bounds + round_up_16((layout.cell_count + 1) * 4);
    layout.tiles = layout.regions + threads * 4;
    layout.scratch = layout.tiles + threads * 4;
    layout.centres = layout.scratch + 32 * 4;
    return layout;
  }
};

// Channels over blocks: groups of so many, a multiple of those a thread works on side by side.
struct Share {
  int groups, channels;
};

// What a block of the image's gradient is told.
struct PatchWork {
  Patches patches;
  Regions regions;
  PatchLayout layout;
  Share share;
};

// All channels of a pixel share its position, so they are split only to fill the chip.
inline Share share_channels(std::int64_t blocks, int channels, int step, int multiprocessors) {
  const std::int64_t wanted = static_cast<std::int64_t>(kWantedBlocks) * multiprocessors;
  const int steps = divide_up(channels, step);
  std::int64_t groups = (wanted + blocks - 1) / blocks;
  groups = groups < 1 ? 1 : (groups > steps ? steps : groups);
  const int each = divide_up(steps, static_cast<int>(groups));
  return {divide_up(steps, each), each * step};
}

// Output pixels of a block of the spline's gradient: fewer where that fills the chip.
inline int spline_pixels(std::int64_t batch, int pixels, int multiprocessors) {
  int each = kSplinePixels;
  while (each > kFewestPixels && batch * divide_up(pixels, each) <
                                     static_cast<std::int64_t>(kWantedBlocks) * multiprocessors) {
    each /= 2;
  }
  return each;
}

}  // namespace gsalign::warp
