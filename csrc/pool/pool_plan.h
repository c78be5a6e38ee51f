// How masked part pooling is laid over the chip: limits, shared-memory layouts, sizes of blocks.
//
// Plain C++, so that kernels, launchers and host tests ask the same functions. What decides the
// order of a sum (groups of rows, units, columns) depends on the problem's sizes but never on the
// batch or the chip, so that a sample gets the same bits whatever it is batched with.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::pool {

constexpr int kRows = 4;             // rows of tokens that a thread works on together
constexpr int kMaxParts = 512;       // of a mask set, so that every layout below fits every GPU
constexpr int kMaxLength = 1 << 24;  // positions, channels, tokens before the map

template <typename T>
constexpr int kForwardThreads = sizeof(T) == 4 ? 256 : 128;  // at most
constexpr int kWantedForwardBlocks = 2;  // per multiprocessor, before tiles become narrower
constexpr int kTableBytes = 32 * 1024;   // of weights held at a time
constexpr int kBackwardThreads = 128;
constexpr int kUnitRows = kRows * kBackwardThreads / 32;  // a warp takes kRows of a unit's rows
constexpr int kGradientBytes = 36 * 1024;                 // of pooled gradients held at a time
constexpr int kFinishThreads = 256;
constexpr int kFinishPositions = 32;  // of a block
constexpr int kFinishParts = 8;       // summed over the batch between two barriers

// Blocks that a multiprocessor's 65,536 registers must hold, as the compiler is told: all that
// there are at B 64, N 128, C 768, but with maxima and where several rounds over the tokens are
// needed.
constexpr int kForwardBlocks = 3;
constexpr int kForwardBlocksOfRest = 2;
constexpr int kBackwardBlocks = 4;
constexpr int kBackwardBlocksOfMaxima = 3;

// Parts that are accumulated side by side in registers, as a constant of the compiled kernel: 1, 4,
// 6 or 8 sums. Maxima keep their positions too, and single values are the rare case.
inline int parts_at_once(int parts, bool vectors, bool maxima) {
  if (maxima) {
    return 4;
  }
  if (!vectors) {
    return 8;
  }
  if (parts <= 1) {
    return 1;
  }
  return parts <= 4 ? 4 : (parts <= 6 ? 6 : 8);
}
// Whether a kernel may have more parts than it accumulates at once, which takes further rounds.
GSALIGN_HOST_DEVICE constexpr bool takes_rounds(int parts_at_once, bool maxima) {
  return maxima || parts_at_once == 8;
}

// ---- forward ----

struct ForwardPlan {
  bool vectors;      // 16-byte vectors, else single values
  bool once;         // one round over the tokens is enough: all parts at once
  bool whole;        // the table of weights holds all of them, which are then made once
  int parts;         // accumulated at once
  int lane_bits;     // 2^lane_bits lanes share a row
  int group_bits;    // 2^group_bits threads share a column, each with every so many-th kRows rows
  int held_parts;    // of the table of weights in shared memory
  int held_rows;     // likewise, a multiple of kRows
  int shared_bytes;  // of a block

  GSALIGN_HOST_DEVICE int threads() const { return 1 << (lane_bits + group_bits); }
};

// The sums of the groups, with maxima their positions after them; the weights by part, the leading
// channel of each row, what is known of each part (total, largest weight, its position).
struct ForwardLayout {
  int weights, leaders, totals, largest, peaks, total;

  GSALIGN_HOST_DEVICE static ForwardLayout make(
      const ForwardPlan& plan, int lane_values, bool maxima) {
    ForwardLayout layout{};
    layout.weights = plan.threads() * plan.parts * lane_values * (maxima ? 8 : 4);
    layout.leaders = layout.weights + plan.held_parts * plan.held_rows * 4;
    layout.totals = layout.leaders + plan.held_rows * 4;
    layout.largest = layout.totals + plan.held_parts * 4;
    layout.peaks = layout.largest + plan.held_parts * 4;
    layout.total = layout.peaks + plan.held_parts * 4;
    return layout;
  }
};

inline ForwardPlan plan_forward(
    int parts, int positions, int channels, int value_bytes, bool vectors, bool maxima,
    std::int64_t batch, int multiprocessors) {
  const int lane_values = vectors ? 16 / value_bytes : 1;
  ForwardPlan plan{};
  plan.vectors = vectors;
  plan.parts = parts_at_once(parts, vectors, maxima);

  const int padded = divide_up(parts > 0 ? parts : 1, plan.parts) * plan.parts;
  const int rows = divide_up(positions > 0 ? positions : 1, kRows) * kRows;
  plan.whole = rows <= kTableBytes / 4 / padded;
  if (plan.whole) {
    plan.held_parts = padded;
    plan.held_rows = rows;
  } else {
    plan.parts = maxima ? plan.parts : 8;  // the only kernels that take rounds
    plan.held_parts = plan.parts;
    const int most = kTableBytes / 4 / plan.parts / kRows * kRows;
    plan.held_rows = rows < most ? rows : most;
  }

  plan.once = plan.whole && parts <= plan.parts;

  plan.group_bits = positions <= 512 ? 3 : (positions <= 1024 ? 4 : 5);
  const int least = 5 - plan.group_bits;                          // a block has one warp at least
  plan.lane_bits = (value_bytes == 4 ? 8 : 7) - plan.group_bits;  // kForwardThreads
  const auto tiles = [&] { return divide_up(channels, lane_values << plan.lane_bits); };
  while (plan.lane_bits > 2 && plan.lane_bits > least &&
         batch * tiles() < kWantedForwardBlocks * multiprocessors) {
    --plan.lane_bits;
  }
  while (plan.lane_bits > least && (lane_values << (plan.lane_bits - 1)) >= channels) {
    --plan.lane_bits;  // no lanes without channels
  }
  plan.shared_bytes = ForwardLayout::make(plan, lane_values, maxima).total;
  return plan;
}

// ---- backward ----

struct BackwardPlan {
  bool vectors;
  int parts;         // accumulated at once
  int padded_parts;  // all of them, up to a multiple of that
  int units;         // of kUnitRows rows of a sample: a block each
  int columns;       // of lane values, whose pooled gradients are in shared memory at a time
  int shared_bytes;

  // Of a sample: one even where there is no row, for what is before the map.
  GSALIGN_HOST_DEVICE int blocks() const { return units > 0 ? units : 1; }
};

// Pooled gradients, with maxima the positions they belong to; weights over divisors of a unit by
// part, and dot products by warp, part and row.
struct BackwardLayout {
  int winners, weights, dots, total;

  GSALIGN_HOST_DEVICE static BackwardLayout make(
      const BackwardPlan& plan, int lane_values, bool maxima) {
    const int table = plan.padded_parts * plan.columns * lane_values * 4;
    BackwardLayout layout{};
    layout.winners = round_up_16(table);
    layout.weights = layout.winners + (maxima ? round_up_16(table) : 0);
    layout.dots = layout.weights + plan.padded_parts * kUnitRows * 4;
    layout.total = layout.dots + plan.padded_parts * kUnitRows * 4;
    return layout;
  }
};

inline BackwardPlan plan_backward(
    int parts, int positions, int channels, int value_bytes, bool vectors, bool maxima) {
  const int lane_values = vectors ? 16 / value_bytes : 1;
  BackwardPlan plan{};
  plan.vectors = vectors;
  plan.parts = parts_at_once(parts, vectors, maxima);
  plan.padded_parts = divide_up(parts > 0 ? parts : 1, plan.parts) * plan.parts;

  const int all = divide_up(channels, lane_values);
  const int most = kGradientBytes / (plan.padded_parts * lane_values * (maxima ? 8 : 4));
  plan.columns = all <= most ? all : (most >= 32 ? most / 32 * 32 : (most > 1 ? most : 1));
  plan.columns = plan.columns > 1 ? plan.columns : 1;

  plan.units = divide_up(positions, kUnitRows);
  plan.shared_bytes = BackwardLayout::make(plan, lane_values, maxima).total;
  return plan;
}

// The gradients by the masks: per part the sum over the batch of what the parts' largest weights
// send back, and the slope of the total; gradients by the weights of the block's positions; and
// partial sums over the batch.
struct FinishLayout {
  int shown, gradients, partial, total;

  GSALIGN_HOST_DEVICE static FinishLayout make(int parts, int threads) {
    FinishLayout layout{};
    layout.shown = parts * 4;
    layout.gradients = layout.shown + parts * 4;
    layout.partial = layout.gradients + parts * kFinishPositions * 4;
    layout.total = layout.partial + kFinishParts * threads * 4;
    return layout;
  }
};

}  // namespace gsalign::pool
