// How a token warp is laid over the chip: shared-memory layouts, limits, and the choice of tiles.
//
// Plain C++, so that kernels, launcher and host tests ask the same functions.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::warp {

constexpr int kThreads = 256;
constexpr int kForwardChunk = 256;    // queries whose taps the forward kernel holds at a time
constexpr int kMaxQueries = 1 << 24;  // queries and cells are packed with flags into 32 bits
constexpr int kInlinePoints = 16;     // above, A = M S is made once by its own kernel
constexpr int kMaxSharedBytes = 112 * 1024;  // of a staged tile: leaves room for a second block

// Blocks that a multiprocessor's 65,536 registers hold of the staged kernels, which take up to 48
// (forward) and 64 (backward) per thread; compiling for the targets is tested against it.
constexpr int kForwardBlocks = 5;
constexpr int kBackwardBlocks = 4;

// Forward: fractions (pairs of floats) and cells of a chunk of queries, then the tile.
struct ForwardLayout {
  int cells, tile, total;

  GSALIGN_HOST_DEVICE static ForwardLayout make(int queries, int row_bytes, bool staged) {
    ForwardLayout layout{};
    const int held = queries < kForwardChunk ? queries : kForwardChunk;
    layout.cells = round_up_16(held * 8);
    layout.tile = layout.cells + round_up_16(held * 4);
    layout.total = layout.tile + (staged ? queries * row_bytes : 0);
    return layout;
  }
};

// Backward: fractions and indices in sorted order, the bounds of the cells, the gradient by
// position per query (where the cells lie before they are sorted), scratch of the scan, two tiles.
// The sums over slices reuse the tables once the tiles are done.
struct BackwardLayout {
  int readers, bounds, gradient, scratch, tokens, gradients, total;

  GSALIGN_HOST_DEVICE static BackwardLayout make(int queries, int row_bytes, bool staged) {
    BackwardLayout layout{};
    const int tile = staged ? queries * row_bytes : 0;
    const int slices = 2 * kThreads * 4;
    layout.readers = round_up_16(queries * 8);
    layout.bounds = layout.readers + round_up_16(queries * 8);
    layout.gradient = layout.bounds + round_up_16((queries + 1) * 4);
    layout.gradient = layout.gradient < slices ? slices : layout.gradient;
    layout.scratch = layout.gradient + round_up_16(queries * 8);
    layout.tokens = layout.scratch + 32 * 4;
    layout.gradients = layout.tokens + tile;
    layout.total = layout.gradients + tile;
    return layout;
  }
};

// What the choice depends on; read from the device once.
struct Chip {
  int multiprocessors;
  int shared_per_block;           // bytes a block may ask for
  int shared_per_multiprocessor;  // bytes
};

struct Plan {
  bool vectors;      // 16-byte vectors, else single values
  bool staged;       // tiles in shared memory, else read in place
  int lane_bits;     // 2^lane_bits lanes share a row of a tile
  int groups;        // blocks per sample
  int shared_bytes;  // dynamic shared memory
  int table_bytes;   // per block in device memory, where shared memory cannot hold the tables
};

template <typename Layout>
inline Plan make_plan(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch, const Chip& chip,
    int blocks_per_multiprocessor) {
  const int lane_values = vectors ? 16 / value_bytes : 1;
  const int limit =
      chip.shared_per_block < kMaxSharedBytes ? chip.shared_per_block : kMaxSharedBytes;
  const auto fits = [&](int lane_bits) {
    const int row_bytes = (lane_values << lane_bits) * value_bytes;
    return queries <= limit / row_bytes && Layout::make(queries, row_bytes, true).total <= limit;
  };
  const auto tiles = [&](int lane_bits) { return divide_up(channels, lane_values << lane_bits); };

  Plan plan{vectors, false, vectors ? 3 : 5, 1, 0, 0};
  if (vectors) {
    // Rows of 128 bytes read shared memory without conflicts; 64 are better than no staging.
    plan.staged = fits(3) || fits(2);
    plan.lane_bits = plan.staged && !fits(3) ? 2 : 3;
    if (plan.lane_bits == 3 && batch * tiles(3) < chip.multiprocessors) {
      plan.lane_bits = 2;  // a small batch: narrower tiles make more blocks
    }
  }
  while (plan.lane_bits > 0 && (lane_values << (plan.lane_bits - 1)) >= channels) {
    --plan.lane_bits;  // no lanes without channels
  }
  plan.shared_bytes =
      Layout::make(queries, (lane_values << plan.lane_bits) * value_bytes, plan.staged).total;
  if (plan.shared_bytes > chip.shared_per_block) {  // a large map, not staged
    plan.table_bytes = plan.shared_bytes;
    plan.shared_bytes = 0;
  }

  int resident = chip.shared_per_multiprocessor / (plan.shared_bytes + 1024);
  resident = resident < 1 ? 1 : resident;
  resident = resident < blocks_per_multiprocessor ? resident : blocks_per_multiprocessor;
  const std::int64_t slots = static_cast<std::int64_t>(resident) * chip.multiprocessors;
  const std::int64_t all = tiles(plan.lane_bits);
  std::int64_t each = (batch * all + slots - 1) / slots;
  each = each < 1 ? 1 : (each > all ? all : each);
  plan.groups = static_cast<int>((all + each - 1) / each);
  return plan;
}

inline Plan plan_forward(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch,
    const Chip& chip) {
  return make_plan<ForwardLayout>(
      queries, channels, value_bytes, vectors, batch, chip, kForwardBlocks);
}

inline Plan plan_backward(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch,
    const Chip& chip) {
  return make_plan<BackwardLayout>(
      queries, channels, value_bytes, vectors, batch, chip, kBackwardBlocks);
}

}  // namespace gsalign::warp
