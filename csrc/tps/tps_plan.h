// How splines are laid over the chip: how factors lie in memory, layouts of shared memory, blocks.
//
// Plain C++, so that kernels, launcher and host tests ask the same functions.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace gsalign::tps {

constexpr int kMaxSolvePoints = 1024;
constexpr int kSolveThreads = 256;  // at most, of a block that solves
constexpr int kSolveColumns = 8;    // right-hand sides solved at a time
constexpr int kInPlaceColumns = 4;  // the same where the matrix does not fit in shared memory
constexpr int kSmallestTile = 128;  // points of a block that sums gradients
constexpr int kHeadDoubles = 128;   // of shared memory: see SolveLayout

// Place of row i in a packed lower triangle, whose entry (i, j <= i) lies at triangle(i) + j.
GSALIGN_HOST_DEVICE int triangle(int i) {
  return i * (i + 1) / 2;
}

// The factors of a sample in global memory: the packed lower triangle of Q^T Phi Q, of which rows
// and columns from 3 on hold the factorisation, then the three reflectors without their leading
// zeros, then R by rows.
GSALIGN_HOST_DEVICE std::int64_t factor_doubles(int points) {
  return static_cast<std::int64_t>(triangle(points)) + 3 * points + 3;
}
// Entry i >= j of reflector j lies this far after the triangle, plus i.
GSALIGN_HOST_DEVICE int reflector_start(int j, int points) {
  return j * points - j * (j + 1) / 2;
}

// Shared memory of a block that solves, in doubles: R, the reflectors' products, dot products and
// the affine part of the solution in the head; reflectors [3, points]; then room for the vectors W
// while the matrix is made, for right-hand sides [points + 3, columns] after; the gradients of the
// control points; the matrix where it fits.
struct SolveLayout {
  int reflectors, work, gradients, matrix, total;

  GSALIGN_HOST_DEVICE static SolveLayout make(int points, int columns, bool backward, bool staged) {
    SolveLayout layout{};
    layout.reflectors = kHeadDoubles;
    layout.work = layout.reflectors + 3 * points;
    const int sides = (points + 3) * columns;
    layout.gradients = layout.work + (sides < 3 * points ? 3 * points : sides);
    layout.matrix = layout.gradients + (backward ? 2 * points : 0);
    layout.total = layout.matrix + (staged ? triangle(points) : 0);
    return layout;
  }
};

struct SolvePlan {
  bool staged;       // the matrix in shared memory, else in place in `factors`
  int threads;       // per block
  int columns;       // right-hand sides solved at a time
  int splits;        // blocks per sample, each with its share of the columns
  int share;         // columns of a block
  int shared_bytes;  // dynamic shared memory
};

// Many columns of few samples (control points shared by a batch, a basis) are spread over blocks,
// which factor the matrix each for itself; in place they cannot, forward.
inline SolvePlan plan_solve(
    int points, int columns, bool backward, std::int64_t batch, int multiprocessors,
    int shared_per_block) {
  SolvePlan plan{true, 0, 0, 1, 0, 0};
  const auto bytes = [&](int most) {
    plan.columns = columns < 1 ? 1 : (columns < most ? columns : most);
    return SolveLayout::make(points, plan.columns, backward, plan.staged).total *
           static_cast<int>(sizeof(double));
  };
  plan.shared_bytes = bytes(kSolveColumns);
  if (plan.shared_bytes > shared_per_block) {
    plan.staged = false;
    plan.shared_bytes = bytes(kInPlaceColumns);
  }
  // Few rows leave most threads of a wide block idle, but waiting at its barriers.
  plan.threads = points <= 16 ? 32 : (points <= 32 ? 64 : (points <= 64 ? 128 : kSolveThreads));
  const int groups = columns < 1 ? 1 : (columns - 1) / plan.columns + 1;
  int each = groups;
  if ((plan.staged || backward) && batch > 0 && batch < multiprocessors) {
    const int wanted = static_cast<int>((multiprocessors + batch - 1) / batch);
    each = (groups + wanted - 1) / wanted;
  }
  plan.splits = (groups + each - 1) / each;
  plan.share = each * plan.columns;
  return plan;
}

// Threads of a block that has a point per thread.
inline int evaluation_threads(int count, int most) {
  const int wanted = count > most ? most : (count + 31) / 32 * 32;
  return wanted < 32 ? 32 : wanted;
}

// Points of a block that sums gradients: as many as shared memory is set aside for, fewer where the
// batch alone makes too few blocks to fill the chip.
inline int plan_tile(int count, int most, std::int64_t batch, int multiprocessors) {
  int tile = most;
  while (tile / 2 >= kSmallestTile &&
         batch * ((count + tile - 1) / tile) < 2 * static_cast<std::int64_t>(multiprocessors)) {
    tile /= 2;
  }
  return tile;
}

}  // namespace gsalign::tps
