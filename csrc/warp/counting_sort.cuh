// Stable counting sort of a block's items by cell, in shared memory: the same order on every run.
#pragma once

#include "../common/launch.h"
#include "warp_plan.h"

namespace gsalign::warp {

// Exclusive prefix sum of n counts in shared memory, in place, between barriers of its own.
// `scratch` has room for one int per warp.
GSALIGN_DEVICE void exclusive_scan(int* counts, int n, int* scratch) {
  const int each = divide_up(n, block_size());
  const int begin = thread_index() * each;
  const int lane = thread_index() % kWarpSize;
  const int warp = thread_index() / kWarpSize;
  int own = 0;
  for (int i = begin; i < begin + each && i < n; ++i) {
    own += counts[i];
  }
  int inclusive = own;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = shuffle_up(inclusive, distance);
    inclusive += lane >= distance ? below : 0;
  }
  if (lane == kWarpSize - 1) {
    scratch[warp] = inclusive;
  }
  barrier();
  int before = inclusive - own;
  for (int w = 0; w < warp; ++w) {
    before += scratch[w];
  }
  for (int i = begin; i < begin + each && i < n; ++i) {
    const int count = counts[i];
    counts[i] = before;
    before += count;
  }
  barrier();
}

// Gives every item of `cells` (aligned to 16) its place in the order of cells, items of one cell
// staying in their own order: put(item, place), once per item. `bounds` holds a zero, then the
// number of items of every cell, counted with count_one() before a barrier; when the caller's
// barrier after this is passed, cell c has the places from bounds[c] to bounds[c + 1]. `scratch`
// has room for one int per warp.
//
// An item's place is that of its cell, plus the items before it in its chunk (a block's worth) with
// the same cell: a count, not an atomic ticket, whose order would vary.
template <typename Put>
GSALIGN_DEVICE void place_in_order(
    const int* cells, int items, int* bounds, int cell_count, int* scratch, Put put) {
  // bounds[c + 1] is the first place of cell c after the scan, and its end after placing.
  exclusive_scan(bounds + 1, cell_count, scratch);
  for (int chunk = 0; chunk < items; chunk += block_size()) {
    if (chunk > 0) {
      barrier();  // the places of the chunk before are counted
    }
    const int item = chunk + thread_index();
    int place = 0;
    if (item < items) {
      const int cell = cells[item];
      place = bounds[cell + 1];
      int other = chunk;
      for (; other + 4 <= item; other += 4) {
        const Int4 four = load_four(cells + other);
        place += (four.a == cell) + (four.b == cell) + (four.c == cell) + (four.d == cell);
      }
      for (; other < item; ++other) {
        place += cells[other] == cell;
      }
    }
    barrier();  // all have read the ends of the chunks before
    if (item < items) {
      put(item, place);
      count_one(bounds + 1 + cells[item]);
    }
  }
}

}  // namespace gsalign::warp
