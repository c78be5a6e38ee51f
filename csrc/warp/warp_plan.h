// How a token warp is laid over the chip: shared-memory layouts, limits, and the choice of tiles.
//
// Plain C++, so that kernels, launcher and host tests ask the same functions.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::warp {

constexpr int kThreads = 256;
constexpr int kCorners = 4;           // tokens that a query reads
constexpr int kForwardChunk = 256;    // queries whose taps the forward kernel holds at a time
constexpr int kMaxQueries = 1 << 24;  // queries and cells are packed with flags into 32 bits
constexpr int kInlinePoints = 16;     // above, A = M S is made once by its own kernel
constexpr int kMaxSharedBytes = 112 * 1024;  // of a staged tile: leaves room for a second block
constexpr int kReservedBytes = 1024;         // of shared memory, by the system for every block

// Blocks with staged tiles that the compiler leaves a multiprocessor registers for.
constexpr int kForwardBlocks = 4;
constexpr int kBackwardBlocks = 4;

// Bytes of a tile: a row per token and, for corners that do not exist, a row of zeros.
GSALIGN_HOST_DEVICE int tile_bytes(int queries, int row_bytes) {
  return (queries + 1) * row_bytes;
}

// Forward: weights and rows of the four corners of a chunk of queries, then the tiles.
struct ForwardLayout {
  int rows, tiles, total;

  GSALIGN_HOST_DEVICE static ForwardLayout make(int queries, int row_bytes, int buffers) {
    ForwardLayout layout{};
    const int held = queries < kForwardChunk ? queries : kForwardChunk;
    layout.rows = held * 16;
    layout.tiles = layout.rows + held * 16;
    layout.total = layout.tiles + buffers * tile_bytes(queries, row_bytes);
    return layout;
  }
};

// Backward, per query: the rows it reads, its fractions, where its cell's queries stand in the
// order of cells, and that order; per token: where its readers stand in the list of readers, and
// that list. Then the gradient by position per query (where the cells lie before they are sorted),
// scratch of the scans, and two tiles. The sums over slices reuse the tables once the tiles are
// done.
struct BackwardLayout {
  int fractions, bounds, order, starts, readers, gradient, scratch, tokens, gradients, total;

  GSALIGN_HOST_DEVICE static BackwardLayout make(int queries, int row_bytes, int buffers) {
    BackwardLayout layout{};
    const int tile = buffers > 0 ? tile_bytes(queries, row_bytes) : 0;
    const int slices = 2 * kThreads * 4;
    layout.fractions = queries * 16;
    layout.bounds = layout.fractions + round_up_16(queries * 8);
    layout.order = layout.bounds + round_up_16((queries + 1) * 4);
    layout.starts = layout.order + round_up_16(queries * 4);
    layout.readers = layout.starts + round_up_16((queries + 1) * 4);
    layout.gradient = layout.readers + queries * kCorners * 8;
    layout.gradient = layout.gradient < slices ? slices : layout.gradient;
    layout.scratch = layout.gradient + round_up_16(queries * 8);
    layout.tokens = layout.scratch + 32 * 4;
    layout.gradients = layout.tokens + tile;
    // No corner is looked for among the gradients, so that their tile ends without zeros.
    layout.total = layout.gradients + (buffers > 0 ? queries * row_bytes : 0);
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
  int buffers;       // tiles in shared memory at a time, 0: read in place
  int lane_bits;     // 2^lane_bits lanes share a row of a tile
  int groups;        // blocks per sample
  int shared_bytes;  // dynamic shared memory
  int table_bytes;   // per block in device memory, where shared memory cannot hold the tables
};

template <typename Layout>
inline Plan make_plan(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch, const Chip& chip,
    int blocks_per_multiprocessor, bool ahead) {
  const int lane_values = vectors ? 16 / value_bytes : 1;
  const int limit =
      chip.shared_per_block < kMaxSharedBytes ? chip.shared_per_block : kMaxSharedBytes;
  const auto fits = [&](int lane_bits) {
    const int row_bytes = (lane_values << lane_bits) * value_bytes;
    return queries <= limit / row_bytes - 1 && Layout::make(queries, row_bytes, 1).total <= limit;
  };
  const auto tiles = [&](int lane_bits) { return divide_up(channels, lane_values << lane_bits); };

  Plan plan{vectors, 0, vectors ? 3 : 5, 1, 0, 0};
  if (vectors) {
    // Rows of 128 bytes read shared memory without conflicts; 64 are better than no staging.
    plan.buffers = fits(3) || fits(2) ? 1 : 0;
    plan.lane_bits = plan.buffers > 0 && !fits(3) ? 2 : 3;
    if (plan.lane_bits == 3 && batch * tiles(3) < chip.multiprocessors) {
      plan.lane_bits = 2;  // a small batch: narrower tiles make more blocks
    }
  }
  while (plan.lane_bits > 0 && (lane_values << (plan.lane_bits - 1)) >= channels) {
    --plan.lane_bits;  // no lanes without channels
  }
  const int row_bytes = (lane_values << plan.lane_bits) * value_bytes;
  const auto shared = [&](int buffers) { return Layout::make(queries, row_bytes, buffers).total; };
  plan.shared_bytes = shared(plan.buffers);
  if (plan.shared_bytes > chip.shared_per_block) {  // a large map, not staged
    plan.table_bytes = plan.shared_bytes;
    plan.shared_bytes = 0;
  }

  int resident = chip.shared_per_multiprocessor / (plan.shared_bytes + kReservedBytes);
  resident = resident < 1 ? 1 : resident;
  resident = resident < blocks_per_multiprocessor ? resident : blocks_per_multiprocessor;
  const std::int64_t slots = static_cast<std::int64_t>(resident) * chip.multiprocessors;
  const std::int64_t all = tiles(plan.lane_bits);
  std::int64_t each = (batch * all + slots - 1) / slots;
  each = each < 1 ? 1 : (each > all ? all : each);
  plan.groups = static_cast<int>((all + each - 1) / each);
  if (ahead && plan.buffers == 1 && each > 1 &&
      (shared(2) + kReservedBytes) * resident <= chip.shared_per_multiprocessor) {
    plan.buffers = 2;  // the next tile comes while this one is worked on
    plan.shared_bytes = shared(2);
  }
  return plan;
}

inline Plan plan_forward(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch,
    const Chip& chip) {
  return make_plan<ForwardLayout>(
      queries, channels, value_bytes, vectors, batch, chip, kForwardBlocks, true);
}

inline Plan plan_backward(
    int queries, int channels, int value_bytes, bool vectors, std::int64_t batch,
    const Chip& chip) {
  return make_plan<BackwardLayout>(
      queries, channels, value_bytes, vectors, batch, chip, kBackwardBlocks, false);
}

}  // namespace gsalign::warp
