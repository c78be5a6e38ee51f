// CUDA kernels of the token warp: forward, backward, and the two small ones around them.
//
// What has to move (s bytes per value, V = B * (P + H*W) * C values):
//   forward   reads the tokens once, writes the result once                         2 V s bytes
//   backward  reads the tokens and the gradient once, writes one gradient           3 V s bytes
// for about 5 (forward) and 13 (backward) multiply-adds per value, on an H200 (computed) a sixth
// and a quarter of what its arithmetic units could do in that time: both passes are bound by
// memory. The grids, fractions and dot products are a few kilobytes per sample and tile, and stay
// on the chip.
//
// How. A block owns one sample and a tile of channels 128 bytes wide: 8 lanes, each with 16 bytes
// of a token's row. The tile of all H*W tokens (and of their gradients) comes into shared memory by
// asynchronous 16-byte copies, while the threads work out where each token reads. Then the four
// corners are gathered from shared memory, where eight lanes read one 128-byte row without bank
// conflicts. The block walks over several tiles of its sample, as many as it takes to fill the chip
// once, so that the grid and the lists below are made once for them; the next tile comes while one
// is worked on.
//
// On an H200 these kernels wait for instructions before they wait for memory, so everything that is
// the same for all channels is worked out once per query and kept: four weights and four rows,
// where a corner that does not exist is a row of zeros, not a branch.
//
// Backward needs the transposed gather: which queries read this token? Queries are put in the order
// of the cell (upper left corner) they read, by a counting sort in shared memory: counts by integer
// atomics (whose sum has no order), a prefix sum, then every query's place is the number of queries
// before it with the same cell. A token's readers stand in two stretches of that order: the cells
// (i, j-1), (i, j) lie side by side, and so do (i-1, j-1), (i-1, j). They are copied, each with its
// weight, into one list per token (a sparse matrix by rows, the transpose of the gather). No
// floating-point atomics, one fixed order, so the same bits on every run. Clamping may put all
// queries into one cell; the lists hold any distribution.
//
// The grid's gradient is four dot products per query over the channels, summed over a query's
// lanes, then over the block's tiles, projected on the basis, and left as one row of partial sums
// per block. A second kernel adds the rows in a fixed order. Values of a row, with Q = basis^T dG
// [K, 2]: Q R(theta) for the source points (K pairs) and sum_k <Q_k, dR/dtheta s_k> for the angle.
//
// Maps too large for shared memory are read through the caches by the same code (kStaged = false),
// and where not even the lists fit, they lie in device memory, a stretch per block. Channels that
// do not come in 16-byte vectors take one value per lane (kVector = 1).
#pragma once

#include <type_traits>

#include "../common/launch.h"
#include "counting_sort.cuh"
#include "warp.h"
#include "warp_plan.h"

namespace gsalign::warp {

// What both passes are given. Tensors are contiguous.
template <typename T>
struct Problem {
  const T* tokens;             // [batch, prefix + height * width, channels]
  const float* source_points;  // [points, 2]
  const float* angle;          // [batch]
  const float* basis;          // [height * width, points]
  const float* base;           // [height * width, 2] = basis * source_points, or null: made here
  float eta;
  int height, width, prefix, channels, points;
  int lane_bits;          // 2^lane_bits lanes share a row of a tile
  int groups;             // blocks per sample
  int buffers;            // tiles in shared memory at a time
  unsigned char* tables;  // table_bytes per block, or null: the tables are in shared memory
  int table_bytes;

  GSALIGN_HOST_DEVICE int queries() const { return height * width; }
};

// ---- pieces ----

// Where a block stands: its sample, and its first tile.
struct Place {
  int sample, group;
};
GSALIGN_DEVICE Place place_of(int block, int groups) {
  return {block / groups, block % groups};
}

template <typename T>
GSALIGN_DEVICE Point<float> base_of(const Problem<T>& problem, int query) {
  if (problem.base != nullptr) {
    return {problem.base[2 * query], problem.base[2 * query + 1]};
  }
  const float* row = problem.basis + static_cast<std::int64_t>(query) * problem.points;
  Point<float> sum{0.0f, 0.0f};
  GSALIGN_UNROLL_BY(4)
  for (int k = 0; k < problem.points; ++k) {
    sum.x = multiply_add(row[k], problem.source_points[2 * k], sum.x);
    sum.y = multiply_add(row[k], problem.source_points[2 * k + 1], sum.y);
  }
  return sum;
}

struct Tap {
  Axis<float> x, y;
};
struct alignas(8) Pair {
  float x, y;
};
// Where a query reads. The backward kernel asks twice, when it counts a cell's queries and when it
// lists them; were the sums rounded apart, a query could be counted in one cell and weighed for its
// neighbour. So every rounding up to the cell is fixed: the operations here, and in clamp_axis an
// addition and two products, which the compiler has no way to fuse.
template <typename T>
GSALIGN_DEVICE Tap tap_of(const Problem<T>& problem, int query, float cosine, float sine) {
  const Point<float> base = base_of(problem, query);
  const float x = multiply_add(base.x, cosine, -multiply(base.y, sine));
  const float y = multiply_add(base.x, sine, multiply(base.y, cosine));
  return {clamp_axis(x, problem.width), clamp_axis(y, problem.height)};
}

// The channels of one lane in the rows of a tile, in shared memory where staged, else in place.
template <typename T, int kVector, bool kStaged>
struct Tile {
  const T* start;  // this lane's channels in row 0
  int stride;      // values between rows; a sample in global memory may exceed 2^31 values

  GSALIGN_DEVICE const T* row(int index) const {
    if (kStaged) {
      return start + index * stride;
    }
    return start + static_cast<std::int64_t>(index) * stride;
  }
  // Values of the row of a corner.
  GSALIGN_DEVICE void load(int index, float (&values)[kVector]) const {
    load_values<T, kVector>(row(index), values, kStaged || index >= 0);
  }
  GSALIGN_DEVICE void accumulate(float (&sum)[kVector], float weight, int index) const {
    float values[kVector];
    load(index, values);
    GSALIGN_UNROLL
    for (int i = 0; i < kVector; ++i) {
      sum[i] += weight * values[i];
    }
  }
  GSALIGN_DEVICE float dot(const float (&a)[kVector], int index) const {
    float values[kVector];
    load(index, values);
    float sum = 0.0f;
    GSALIGN_UNROLL
    for (int i = 0; i < kVector; ++i) {
      sum += a[i] * values[i];
    }
    return sum;
  }
};

// Rows of the four corners of a tap. One that does not exist is the row behind the last, which is
// zero, in a staged tile, and -1 in place.
template <bool kStaged>
GSALIGN_DEVICE Int4 corner_rows(const Tap& tap, int width, int queries) {
  const int missing = kStaged ? queries : -1;
  const int cell = tap.y.cell * width + tap.x.cell;
  return {
      cell, tap.x.has_next ? cell + 1 : missing, tap.y.has_next ? cell + width : missing,
      tap.x.has_next && tap.y.has_next ? cell + width + 1 : missing};
}

// The row of zeros of a staged tile.
template <typename T, int kVector>
GSALIGN_DEVICE void clear_last_row(T* tile, int rows, int lane_bits) {
  const float zeros[kVector] = {};
  if (thread_index() < 1 << lane_bits) {
    store_values<T, kVector>(tile + ((rows << lane_bits) + thread_index()) * kVector, zeros);
  }
}

// Starts the copies of a tile's rows into shared memory. Lanes past the last channel copy nothing.
template <typename T, int kVector>
GSALIGN_DEVICE void stage(
    T* target, const T* source, int rows, int channels, int lane_bits, int channels_left) {
  const int offset = (thread_index() & ((1 << lane_bits) - 1)) * kVector;
  if (offset < channels_left) {
    const int first = thread_index() >> lane_bits;
    const int step = block_size() >> lane_bits;
    const int target_step = step * (kVector << lane_bits);
    const std::int64_t source_step = static_cast<std::int64_t>(step) * channels;
    target += first * (kVector << lane_bits) + offset;
    source += static_cast<std::int64_t>(first) * channels + offset;
    GSALIGN_UNROLL_BY(4)
    for (int row = first; row < rows; row += step) {
      copy_async_16(target, source);
      target += target_step;
      source += source_step;
    }
  }
}

// Rows that the warp leaves as they are.
template <typename T, int kVector>
GSALIGN_DEVICE void copy_prefix(
    T* target, const T* source, int rows, int channels, int lane_bits, int channels_left) {
  const int offset = (thread_index() & ((1 << lane_bits) - 1)) * kVector;
  if (offset < channels_left) {
    GSALIGN_UNROLL_BY(1)
    for (int row = thread_index() >> lane_bits; row < rows; row += block_size() >> lane_bits) {
      const std::int64_t at = static_cast<std::int64_t>(row) * channels + offset;
      float values[kVector];
      load_values<T, kVector>(source + at, values);
      store_values<T, kVector>(target + at, values);
    }
  }
}

// ---- A = M S, for many control points ----

// One warp per query; lanes share the control points.
GSALIGN_KERNEL(kThreads)
warp_base_kernel(
    const float* basis, const float* source_points, float* base, int queries, int points) {
  const int warps = block_size() / kWarpSize;
  const int query = block_index() * warps + thread_index() / kWarpSize;
  Point<float> sum{0.0f, 0.0f};
  if (query < queries) {
    for (int k = thread_index() % kWarpSize; k < points; k += kWarpSize) {
      const float m = basis[static_cast<std::int64_t>(query) * points + k];
      sum.x += m * source_points[2 * k];
      sum.y += m * source_points[2 * k + 1];
    }
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sum.x += shuffle_xor(sum.x, mask);
    sum.y += shuffle_xor(sum.y, mask);
  }
  if (query < queries && thread_index() % kWarpSize == 0) {
    base[2 * query] = sum.x;
    base[2 * query + 1] = sum.y;
  }
}

// ---- forward ----

template <typename T, int kVector, bool kStaged>
GSALIGN_KERNEL(kThreads, kStaged ? kForwardBlocks : 3)
warp_forward_kernel(Problem<T> problem, T* output) {
  const int queries = problem.queries();
  const int width = problem.width;
  const int lanes = 1 << problem.lane_bits;
  const int tile_channels = kVector * lanes;
  const int tiles = divide_up(problem.channels, tile_channels);
  // An item is a tile, and where tiles are read in place, a chunk of its queries.
  const int chunks = kStaged ? 1 : divide_up(queries, kForwardChunk);
  const int items = tiles * chunks;
  const Place place = place_of(block_index(), problem.groups);
  const std::int64_t sample_offset =
      static_cast<std::int64_t>(place.sample) * (problem.prefix + queries) * problem.channels;
  const std::int64_t map_offset = static_cast<std::int64_t>(problem.prefix) * problem.channels;

  const ForwardLayout layout = ForwardLayout::make(
      queries, tile_channels * static_cast<int>(sizeof(T)), kStaged ? problem.buffers : 0);
  unsigned char* shared = shared_memory();
  float* weights = reinterpret_cast<float*>(shared);
  int* rows = reinterpret_cast<int*>(shared + layout.rows);
  T* buffer = reinterpret_cast<T*>(shared + layout.tiles);
  T* other_buffer = buffer + (problem.buffers > 1 ? (queries + 1) * tile_channels : 0);

  float sine, cosine;
  sine_cosine(problem.angle[place.sample], &sine, &cosine);

  // Starts the copies of an item's tile.
  const auto fetch = [&](T* target, int item) {
    const int first_channel = item * tile_channels;
    stage<T, kVector>(
        target, problem.tokens + sample_offset + map_offset + first_channel, queries,
        problem.channels, problem.lane_bits, problem.channels - first_channel);
  };
  if (kStaged) {
    fetch(buffer, place.group);
    commit_async_copies();
    clear_last_row<T, kVector>(buffer, queries, problem.lane_bits);
    clear_last_row<T, kVector>(other_buffer, queries, problem.lane_bits);
  }

  const int offset = (thread_index() & (lanes - 1)) * kVector;
  const int first_slot = thread_index() >> problem.lane_bits;
  const int step = block_size() >> problem.lane_bits;
  int held = -1;  // first query of the chunk whose taps are in shared memory
  for (int item = place.group; item < items; item += problem.groups) {
    const int first_channel = item / chunks * tile_channels;
    const int channels_left = problem.channels - first_channel;
    const T* source = problem.tokens + sample_offset + first_channel;
    T* target = output + sample_offset + first_channel;
    const int first_query = item % chunks * kForwardChunk;
    const int last_query =
        kStaged || first_query + kForwardChunk > queries ? queries : first_query + kForwardChunk;
    const bool more = item + problem.groups < items;

    if (kStaged && problem.buffers > 1) {
      if (more) {
        fetch(other_buffer, item + problem.groups);
      }
      commit_async_copies();
    }
    if (first_query == 0) {
      copy_prefix<T, kVector>(
          target, source, problem.prefix, problem.channels, problem.lane_bits, channels_left);
    }
    const Tile<T, kVector, kStaged> tile{
        (kStaged ? buffer : source + map_offset) + offset,
        kStaged ? tile_channels : problem.channels};

    for (int chunk = first_query; chunk < last_query; chunk += kForwardChunk) {
      const int count = last_query - chunk < kForwardChunk ? last_query - chunk : kForwardChunk;
      if (held != chunk) {
        for (int i = thread_index(); i < count; i += block_size()) {
          const Tap tap = tap_of(problem, chunk + i, cosine, sine);
          const float upper = problem.eta * (1.0f - tap.y.fraction);
          const float lower = problem.eta * tap.y.fraction;
          const float four[4] = {
              upper * (1.0f - tap.x.fraction), upper * tap.x.fraction,
              lower * (1.0f - tap.x.fraction), lower * tap.x.fraction};
          store_values<float, 4>(weights + 4 * i, four);
          store_four(rows + 4 * i, corner_rows<kStaged>(tap, width, queries));
        }
        held = chunk;
      }
      if (problem.buffers > 1) {
        wait_older_async_copies();
      } else {
        wait_async_copies();
      }
      barrier();
      if (offset < channels_left) {
        T* written = target + map_offset + offset +
                     static_cast<std::int64_t>(chunk + first_slot) * problem.channels;
        const std::int64_t written_step = static_cast<std::int64_t>(step) * problem.channels;
        for (int slot = first_slot; slot < count; slot += step) {
          float weight[4], sum[kVector];
          load_values<float, 4>(weights + 4 * slot, weight);
          const Int4 row = load_four(rows + 4 * slot);
          load_values<T, kVector>(tile.row(chunk + slot), sum);
          tile.accumulate(sum, weight[0], row.a);
          tile.accumulate(sum, weight[1], row.b);
          tile.accumulate(sum, weight[2], row.c);
          tile.accumulate(sum, weight[3], row.d);
          store_values<T, kVector>(written, sum);
          written += written_step;
        }
      }
      barrier();  // before the taps or the tile are overwritten
    }
    if (kStaged && problem.buffers > 1) {
      T* const swapped = buffer;
      buffer = other_buffer;
      other_buffer = swapped;
    } else if (kStaged && more) {
      fetch(buffer, item + problem.groups);
    }
  }
}

// ---- backward ----

struct alignas(8) Reader {
  float weight;
  int query;
};

// The tables of a backward block; warp_plan.h says where they lie.
struct Tables {
  int* rows;        // [queries][4]
  Pair* fractions;  // [queries]
  int* bounds;      // [queries + 1] cell c's queries are order[bounds[c]] to order[bounds[c + 1]]
  int* order;       // [queries]
  int* starts;      // [queries + 1] token t's readers are readers[starts[t]] to ...[starts[t + 1]]
  Reader* readers;  // [4 * queries]
  Pair* gradient;   // [queries]
  int* scratch;     // [32]

  GSALIGN_DEVICE static Tables at(unsigned char* memory, const BackwardLayout& layout) {
    return {
        reinterpret_cast<int*>(memory),
        reinterpret_cast<Pair*>(memory + layout.fractions),
        reinterpret_cast<int*>(memory + layout.bounds),
        reinterpret_cast<int*>(memory + layout.order),
        reinterpret_cast<int*>(memory + layout.starts),
        reinterpret_cast<Reader*>(memory + layout.readers),
        reinterpret_cast<Pair*>(memory + layout.gradient),
        reinterpret_cast<int*>(memory + layout.scratch)};
  }
};

// Calls visit(place, down, right) for every query that reads a token, in a fixed order: its place
// in the order of cells, and whether the token is one of its lower, one of its right corners.
template <typename Visit>
GSALIGN_DEVICE void for_readers(const int* bounds, int token, int width, Visit visit) {
  const int before = token % width > 0 ? 1 : 0;
  for (int down = 0; down < 2 && down * width <= token; ++down) {
    const int cell = token - down * width;
    const int end = bounds[cell + 1];
    for (int place = bounds[cell - before]; place < end; ++place) {
      visit(place, down != 0, place < bounds[cell]);
    }
  }
}

// Fills all tables but the gradient, in whose place the cells lie meanwhile. The caller's barrier
// must follow before they are read.
template <bool kStaged, typename T>
GSALIGN_DEVICE void fill_tables(
    const Problem<T>& problem, float cosine, float sine, const Tables& tables) {
  const int queries = problem.queries();
  int* cells = reinterpret_cast<int*>(tables.gradient);
  for (int i = thread_index(); i <= queries; i += block_size()) {
    tables.bounds[i] = 0;
  }
  barrier();
  for (int q = thread_index(); q < queries; q += block_size()) {
    const Tap tap = tap_of(problem, q, cosine, sine);
    const Int4 rows = corner_rows<kStaged>(tap, problem.width, queries);
    store_four(tables.rows + 4 * q, rows);
    tables.fractions[q] = {tap.x.fraction, tap.y.fraction};
    cells[q] = rows.a;
    count_one(tables.bounds + 1 + rows.a);
  }
  barrier();
  place_in_order(cells, queries, tables.bounds, queries, tables.scratch, [&](int q, int place) {
    tables.order[place] = q;
  });
  barrier();
  for (int token = thread_index(); token < queries; token += block_size()) {
    int count = 0;
    for_readers(tables.bounds, token, problem.width, [&](int, bool, bool) { ++count; });
    tables.starts[token + 1] = count;
    if (token == 0) {
      tables.starts[0] = 0;
    }
  }
  barrier();
  exclusive_scan(tables.starts + 1, queries, tables.scratch);
  // starts[token + 1] is where the token's list begins, and its end once it is written.
  for (int token = thread_index(); token < queries; token += block_size()) {
    int at = tables.starts[token + 1];
    for_readers(tables.bounds, token, problem.width, [&](int place, bool down, bool right) {
      const int query = tables.order[place];
      const Pair fraction = tables.fractions[query];
      const float along_x = right ? fraction.x : 1.0f - fraction.x;
      const float along_y = down ? fraction.y : 1.0f - fraction.y;
      tables.readers[at++] = {problem.eta * along_x * along_y, query};
    });
    tables.starts[token + 1] = at;
  }
}

// Partial sums of a block: `point_sums` [2 * points][blocks], `angle_sums` [batch][groups].
template <typename T, int kVector, bool kStaged>
GSALIGN_KERNEL(kThreads, kStaged ? kBackwardBlocks : 3)
warp_backward_kernel(
    Problem<T> problem, const T* grad_output, T* grad_tokens, float* point_sums, float* angle_sums,
    std::int64_t blocks) {
  const int queries = problem.queries();
  const int width = problem.width;
  const int lanes = 1 << problem.lane_bits;
  const int tile_channels = kVector * lanes;
  const int tiles = divide_up(problem.channels, tile_channels);
  const Place place = place_of(block_index(), problem.groups);
  const std::int64_t sample_offset =
      static_cast<std::int64_t>(place.sample) * (problem.prefix + queries) * problem.channels;
  const std::int64_t map_offset = static_cast<std::int64_t>(problem.prefix) * problem.channels;

  const BackwardLayout layout =
      BackwardLayout::make(queries, tile_channels * static_cast<int>(sizeof(T)), kStaged ? 1 : 0);
  unsigned char* shared = shared_memory();
  if (!kStaged && problem.tables != nullptr) {
    shared = problem.tables + static_cast<std::int64_t>(block_index()) * problem.table_bytes;
  }
  const Tables tables = Tables::at(shared, layout);
  Pair* gradient = tables.gradient;
  T* staged_tokens = reinterpret_cast<T*>(shared + layout.tokens);
  T* staged_gradients = reinterpret_cast<T*>(shared + layout.gradients);

  float sine, cosine;
  sine_cosine(problem.angle[place.sample], &sine, &cosine);

  // Starts the copies of a tile of the tokens or of the gradients.
  const auto fetch = [&](T* target, const T* source, int tile) {
    const int first_channel = tile * tile_channels;
    stage<T, kVector>(
        target, source + sample_offset + map_offset + first_channel, queries, problem.channels,
        problem.lane_bits, problem.channels - first_channel);
  };
  if (kStaged) {
    fetch(staged_gradients, grad_output, place.group);
    fetch(staged_tokens, problem.tokens, place.group);
    clear_last_row<T, kVector>(staged_tokens, queries, problem.lane_bits);
  }

  fill_tables<kStaged>(problem, cosine, sine, tables);  // while the copies are under way

  const int lane = thread_index() & (lanes - 1);
  const int offset = lane * kVector;
  const int first_slot = thread_index() >> problem.lane_bits;
  const int step = block_size() >> problem.lane_bits;
  for (int tile = place.group; tile < tiles; tile += problem.groups) {
    const bool first_tile = tile == place.group;
    const bool more = kStaged && tile + problem.groups < tiles;
    const int first_channel = tile * tile_channels;
    const int channels_left = problem.channels - first_channel;
    const T* token_source = problem.tokens + sample_offset + first_channel;
    const T* gradient_source = grad_output + sample_offset + first_channel;
    T* target = grad_tokens + sample_offset + first_channel;
    copy_prefix<T, kVector>(
        target, gradient_source, problem.prefix, problem.channels, problem.lane_bits,
        channels_left);
    wait_async_copies();
    barrier();
    const int stride = kStaged ? tile_channels : problem.channels;
    const Tile<T, kVector, kStaged> token_tile{
        (kStaged ? staged_tokens : token_source + map_offset) + offset, stride};
    const Tile<T, kVector, kStaged> gradient_tile{
        (kStaged ? staged_gradients : gradient_source + map_offset) + offset, stride};

    // Gradient by position: every round takes whole warps, for the shuffles.
    for (int first = 0; first < queries; first += step) {
      const int query = first + first_slot;
      Point<float> sum{0.0f, 0.0f};
      if (query < queries && offset < channels_left) {
        float dy[kVector];
        load_values<T, kVector>(gradient_tile.row(query), dy);
        const Int4 row = load_four(tables.rows + 4 * query);
        const Pair fraction = tables.fractions[query];
        sum = position_gradient(
            fraction.x, fraction.y, token_tile.dot(dy, row.a), token_tile.dot(dy, row.b),
            token_tile.dot(dy, row.c), token_tile.dot(dy, row.d));
      }
      GSALIGN_UNROLL
      for (int mask = kVector > 1 ? 4 : kWarpSize / 2; mask > 0; mask /= 2) {
        if (mask < lanes) {
          sum.x += shuffle_xor(sum.x, mask);
          sum.y += shuffle_xor(sum.y, mask);
        }
      }
      if (query < queries && lane == 0) {
        const Pair before = first_tile ? Pair{0.0f, 0.0f} : gradient[query];
        gradient[query] = {before.x + sum.x, before.y + sum.y};
      }
    }
    if (more) {
      barrier();  // all have read the tokens
      fetch(staged_tokens, problem.tokens, tile + problem.groups);
    }

    // Gradient of the tokens: own gradient plus what the queries that read this token send back.
    if (offset < channels_left) {
      T* written =
          target + map_offset + offset + static_cast<std::int64_t>(first_slot) * problem.channels;
      const std::int64_t written_step = static_cast<std::int64_t>(step) * problem.channels;
      for (int token = first_slot; token < queries; token += step) {
        float sum[kVector];
        load_values<T, kVector>(gradient_tile.row(token), sum);
        const int end = tables.starts[token + 1];
        GSALIGN_UNROLL_BY(2)
        for (int e = tables.starts[token]; e < end; ++e) {
          const Reader reader = tables.readers[e];
          gradient_tile.accumulate(sum, reader.weight, reader.query);
        }
        store_values<T, kVector>(written, sum);
        written += written_step;
      }
    }
    barrier();  // before the tiles are overwritten, and for the gradient below
    if (more) {
      fetch(staged_gradients, grad_output, tile + problem.groups);
    }
  }

  // Clamped coordinates have no gradient.
  for (int q = thread_index(); q < queries; q += block_size()) {
    const Tap tap = tap_of(problem, q, cosine, sine);
    const Pair sum = gradient[q];
    gradient[q] = {tap.x.free ? sum.x : 0.0f, tap.y.free ? sum.y : 0.0f};
  }
  barrier();

  // basis^T gradient: threads are laid over (slice of the queries, control point), so that
  // neighbouring threads read neighbouring values of the basis.
  float* slices = reinterpret_cast<float*>(shared);  // [slices][points here][2], over the tables
  const float scale_x = problem.eta * position_scale<float>(width);
  const float scale_y = problem.eta * position_scale<float>(problem.height);
  float angle_sum = 0.0f;
  for (int first = 0; first < problem.points; first += block_size()) {
    const int here = problem.points - first < block_size() ? problem.points - first : block_size();
    int slice_count = block_size() / here;
    slice_count = slice_count < 16 ? slice_count : 16;
    const int slice = thread_index() / here;
    const int k = first + thread_index() % here;
    if (slice < slice_count) {
      Point<float> sum{0.0f, 0.0f};
      for (int q = slice; q < queries; q += slice_count) {
        const float m = problem.basis[static_cast<std::int64_t>(q) * problem.points + k];
        sum.x += m * gradient[q].x;
        sum.y += m * gradient[q].y;
      }
      slices[2 * thread_index()] = sum.x;
      slices[2 * thread_index() + 1] = sum.y;
    }
    barrier();
    if (slice == 0) {
      Point<float> sum{0.0f, 0.0f};
      for (int s = 0; s < slice_count; ++s) {
        sum.x += slices[2 * (s * here + thread_index())];
        sum.y += slices[2 * (s * here + thread_index()) + 1];
      }
      const Point<float> projected{sum.x * scale_x, sum.y * scale_y};
      const Point<float> source{problem.source_points[2 * k], problem.source_points[2 * k + 1]};
      angle_sum += angle_gradient(projected, rotate(source, cosine, sine));
      const Point<float> back = rotate_back(projected, cosine, sine);
      point_sums[(2 * k) * blocks + block_index()] = back.x;
      point_sums[(2 * k + 1) * blocks + block_index()] = back.y;
    }
    barrier();
  }
  // Sum of the threads' shares of the angle, within warps and then over warps.
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    angle_sum += shuffle_xor(angle_sum, mask);
  }
  if (thread_index() % kWarpSize == 0) {
    slices[thread_index() / kWarpSize] = angle_sum;
  }
  barrier();
  if (thread_index() == 0) {
    float sum = 0.0f;
    for (int w = 0; w < block_size() / kWarpSize; ++w) {
      sum += slices[w];
    }
    angle_sums[block_index()] = sum;
  }
}

// Adds the partial sums in a fixed order: block c < 2 * points adds column c of `point_sums`, the
// blocks after them take block_size() samples each of `angle_sums`.
GSALIGN_KERNEL(kThreads)
warp_reduce_kernel(
    const float* point_sums, const float* angle_sums, float* grad_source_points, float* grad_angle,
    int columns, std::int64_t blocks, int batch, int groups) {
  if (block_index() < columns) {
    float* warps = reinterpret_cast<float*>(shared_memory());
    const float* column = point_sums + block_index() * blocks;
    float sum = 0.0f;
    for (std::int64_t i = thread_index(); i < blocks; i += block_size()) {
      sum += column[i];
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
    }
    if (thread_index() % kWarpSize == 0) {
      warps[thread_index() / kWarpSize] = sum;
    }
    barrier();
    if (thread_index() == 0) {
      float total = 0.0f;
      for (int w = 0; w < block_size() / kWarpSize; ++w) {
        total += warps[w];
      }
      grad_source_points[block_index()] = total;
    }
  } else {
    const std::int64_t sample =
        static_cast<std::int64_t>(block_index() - columns) * block_size() + thread_index();
    if (sample < batch) {
      float sum = 0.0f;
      for (int g = 0; g < groups; ++g) {
        sum += angle_sums[sample * groups + g];
      }
      grad_angle[sample] = sum;
    }
  }
}

// ---- launching: shared by the CUDA entry points and the host tests ----

// Floats of workspace of a backward launch: per block its tables, where they are not in shared
// memory, and one row of partial sums.
inline std::int64_t workspace_floats(const Plan& plan, int batch, int points) {
  const std::int64_t blocks = static_cast<std::int64_t>(batch) * plan.groups;
  return blocks * (plan.table_bytes / 4 + 2 * static_cast<std::int64_t>(points) + 1);
}

// Calls `launch(lane values, staged)`, both as types, for a plan.
template <typename T, typename Launch>
LaunchStatus for_plan(const Plan& plan, Launch&& launch) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  if (plan.vectors && plan.buffers > 0) {
    return launch(std::integral_constant<int, kVector>{}, std::true_type{});
  }
  if (plan.vectors) {
    return launch(std::integral_constant<int, kVector>{}, std::false_type{});
  }
  return launch(std::integral_constant<int, 1>{}, std::false_type{});
}

// base = basis * source_points.
template <typename Stream>
LaunchStatus launch_base(
    const float* basis, const float* source_points, float* base, int queries, int points,
    int threads, Stream stream) {
  const int blocks = divide_up(queries, threads / kWarpSize);
  GSALIGN_LAUNCH(
      warp_base_kernel, blocks, threads, 0, stream, basis, source_points, base, queries, points);
  return launch_status();
}

template <typename T, typename Stream>
LaunchStatus launch_forward(
    Problem<T> problem, const Plan& plan, T* output, int batch, int threads, int device,
    Stream stream) {
  problem.lane_bits = plan.lane_bits;
  problem.buffers = plan.buffers;
  problem.groups = plan.groups;
  return for_plan<T>(plan, [&](auto lane_values, auto staged) {
    constexpr auto kernel = &warp_forward_kernel<T, lane_values(), staged()>;
    const LaunchStatus status = allow_shared_memory<kernel>(plan.shared_bytes, device);
    if (status != kLaunched) {
      return status;
    }
    GSALIGN_LAUNCH(
        kernel, batch * plan.groups, threads, plan.shared_bytes, stream, problem, output);
    return launch_status();
  });
}

// `workspace` has workspace_floats(plan, batch, points) floats, aligned to 16 bytes. With an empty
// batch or no channels only the reduction runs, and writes zeros.
template <typename T, typename Stream>
LaunchStatus launch_backward(
    Problem<T> problem, const Plan& plan, const T* grad_output, T* grad_tokens,
    float* grad_source_points, float* grad_angle, float* workspace, int batch, int threads,
    int device, Stream stream) {
  problem.lane_bits = plan.lane_bits;
  problem.buffers = plan.buffers;
  problem.groups = plan.groups;
  const std::int64_t blocks =
      problem.channels > 0 ? static_cast<std::int64_t>(batch) * plan.groups : 0;
  const int columns = 2 * problem.points;
  float* point_sums = workspace + blocks * (plan.table_bytes / 4);
  float* angle_sums = point_sums + blocks * columns;
  problem.tables = plan.table_bytes > 0 ? reinterpret_cast<unsigned char*>(workspace) : nullptr;
  problem.table_bytes = plan.table_bytes;
  if (blocks > 0) {
    const LaunchStatus status = for_plan<T>(plan, [&](auto lane_values, auto staged) {
      constexpr auto kernel = &warp_backward_kernel<T, lane_values(), staged()>;
      const LaunchStatus allowed = allow_shared_memory<kernel>(plan.shared_bytes, device);
      if (allowed != kLaunched) {
        return allowed;
      }
      GSALIGN_LAUNCH(
          kernel, static_cast<int>(blocks), threads, plan.shared_bytes, stream, problem,
          grad_output, grad_tokens, point_sums, angle_sums, blocks);
      return launch_status();
    });
    if (status != kLaunched) {
      return status;
    }
  }
  GSALIGN_LAUNCH(
      warp_reduce_kernel, columns + divide_up(batch, threads), threads,
      kWarpSize * static_cast<int>(sizeof(float)), stream, point_sums, angle_sums,
      grad_source_points, grad_angle, columns, blocks, batch, blocks > 0 ? plan.groups : 0);
  return launch_status();
}

}  // namespace gsalign::warp
