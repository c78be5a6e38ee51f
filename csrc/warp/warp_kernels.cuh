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
// taps are gathered from shared memory, where eight lanes read one 128-byte row without bank
// conflicts. The block walks over several tiles of its sample, as many as it takes to fill the chip
// once, so that the grid and the lists below are made once for them.
//
// Backward needs the transposed gather: which queries read this token? Queries are put in the order
// of the cell (upper left corner) they read, by a counting sort in shared memory: counts by integer
// atomics (whose sum has no order), a prefix sum, then every query's place is the number of queries
// before it with the same cell. A token then collects from two stretches of that list: the cells
// (i, j-1), (i, j) lie side by side, and so do (i-1, j-1), (i-1, j). No floating-point atomics, one
// fixed order, so the same bits on every run. Clamping may put all queries into one cell; the lists
// hold any distribution.
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

// Rows of one tile of one sample, in shared memory where staged, else in place.
template <typename T, bool kStaged>
struct Tile {
  const T* start;
  int stride;  // values between rows; a sample in global memory may exceed 2^31 values

  GSALIGN_DEVICE const T* row(int query) const {
    if (kStaged) {
      return start + query * stride;
    }
    return start + static_cast<std::int64_t>(query) * stride;
  }
};

// Starts the copies of a tile's rows into shared memory. Lanes past the last channel copy nothing.
template <typename T, int kVector>
GSALIGN_DEVICE void stage(
    T* target, const T* source, int rows, int channels, int lane_bits, int channels_left) {
  const int row_values = kVector << lane_bits;
  for (int i = thread_index(); i < rows << lane_bits; i += block_size()) {
    const int row = i >> lane_bits;
    const int offset = (i & ((1 << lane_bits) - 1)) * kVector;
    if (offset < channels_left) {
      copy_async_16(
          target + row * row_values + offset,
          source + static_cast<std::int64_t>(row) * channels + offset);
    }
  }
}

// Rows that the warp leaves as they are.
template <typename T, int kVector>
GSALIGN_DEVICE void copy_prefix(
    T* target, const T* source, int rows, int channels, int lane_bits, int channels_left) {
  for (int i = thread_index(); i < rows << lane_bits; i += block_size()) {
    const int offset = (i & ((1 << lane_bits) - 1)) * kVector;
    if (offset < channels_left) {
      const std::int64_t at = static_cast<std::int64_t>(i >> lane_bits) * channels + offset;
      float values[kVector];
      load_values<T, kVector>(source + at, values);
      store_values<T, kVector>(target + at, values);
    }
  }
}

// sum += weight * values at `source`, which is not read where it does not exist.
template <typename T, int kVector>
GSALIGN_DEVICE void accumulate(
    float (&sum)[kVector], float weight, const T* source, bool exists = true) {
  float values[kVector];
  load_values<T, kVector>(source, values, exists);
  GSALIGN_UNROLL
  for (int i = 0; i < kVector; ++i) {
    sum[i] += weight * values[i];
  }
}

template <typename T, int kVector>
GSALIGN_DEVICE float dot(const float (&a)[kVector], const T* source, bool exists = true) {
  float values[kVector];
  load_values<T, kVector>(source, values, exists);
  float sum = 0.0f;
  GSALIGN_UNROLL
  for (int i = 0; i < kVector; ++i) {
    sum += a[i] * values[i];
  }
  return sum;
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

// The cell of a tap and whether its right and lower neighbours exist, in one word.
constexpr unsigned kRight = 1u << 30;
constexpr unsigned kDown = 1u << 31;
constexpr unsigned kFreeX = 1u << 28;
constexpr unsigned kFreeY = 1u << 29;
constexpr unsigned kCellMask = kRight - 1;
static_assert(kMaxQueries <= 1 << 28, "a query must leave its flags room");

template <typename T, int kVector, bool kStaged>
GSALIGN_KERNEL(kThreads)
warp_forward_kernel(Problem<T> problem, T* output) {
  const int queries = problem.queries();
  const int width = problem.width;
  const int lanes = 1 << problem.lane_bits;
  const int tile_channels = kVector * lanes;
  const int tiles = divide_up(problem.channels, tile_channels);
  // An item is a tile, and where tiles are read in place, a chunk of its queries.
  const int chunks = kStaged ? 1 : divide_up(queries, kForwardChunk);
  const Place place = place_of(block_index(), problem.groups);
  const std::int64_t sample_offset =
      static_cast<std::int64_t>(place.sample) * (problem.prefix + queries) * problem.channels;
  const std::int64_t map_offset = static_cast<std::int64_t>(problem.prefix) * problem.channels;

  const ForwardLayout layout =
      ForwardLayout::make(queries, tile_channels * static_cast<int>(sizeof(T)), kStaged);
  unsigned char* shared = shared_memory();
  Pair* fractions = reinterpret_cast<Pair*>(shared);
  unsigned* cells = reinterpret_cast<unsigned*>(shared + layout.cells);
  T* staged = reinterpret_cast<T*>(shared + layout.tile);

  float sine, cosine;
  sine_cosine(problem.angle[place.sample], &sine, &cosine);

  int held = -1;  // first query of the chunk whose taps are in shared memory
  for (int item = place.group; item < tiles * chunks; item += problem.groups) {
    const int first_channel = item / chunks * tile_channels;
    const int channels_left = problem.channels - first_channel;
    const T* source = problem.tokens + sample_offset + first_channel;
    T* target = output + sample_offset + first_channel;
    const int first_query = item % chunks * kForwardChunk;
    const int last_query =
        kStaged || first_query + kForwardChunk > queries ? queries : first_query + kForwardChunk;

    if (kStaged) {
      stage<T, kVector>(
          staged, source + map_offset, queries, problem.channels, problem.lane_bits, channels_left);
    }
    if (first_query == 0) {
      copy_prefix<T, kVector>(
          target, source, problem.prefix, problem.channels, problem.lane_bits, channels_left);
    }
    const Tile<T, kStaged> tile{
        kStaged ? staged : source + map_offset, kStaged ? tile_channels : problem.channels};
    const std::int64_t row_step = static_cast<std::int64_t>(width) * tile.stride;

    for (int chunk = first_query; chunk < last_query; chunk += kForwardChunk) {
      const int count = last_query - chunk < kForwardChunk ? last_query - chunk : kForwardChunk;
      if (held != chunk) {
        for (int i = thread_index(); i < count; i += block_size()) {
          const Tap tap = tap_of(problem, chunk + i, cosine, sine);
          fractions[i] = {tap.x.fraction, tap.y.fraction};
          cells[i] = static_cast<unsigned>(tap.y.cell * width + tap.x.cell) |
                     (tap.x.has_next ? kRight : 0u) | (tap.y.has_next ? kDown : 0u);
        }
        held = chunk;
      }
      wait_async_copies();
      barrier();
      for (int i = thread_index(); i < count << problem.lane_bits; i += block_size()) {
        const int slot = i >> problem.lane_bits;
        const int offset = (i & (lanes - 1)) * kVector;
        if (offset < channels_left) {
          const Pair fraction = fractions[slot];
          const unsigned word = cells[slot];
          const int cell = static_cast<int>(word & kCellMask);
          const bool right = (word & kRight) != 0;
          const bool down = (word & kDown) != 0;
          const float upper = problem.eta * (1.0f - fraction.y);
          const float lower = problem.eta * fraction.y;
          float sum[kVector];
          load_values<T, kVector>(tile.row(chunk + slot) + offset, sum);
          const T* corner = tile.row(cell) + offset;
          const T* below = corner + row_step;
          accumulate<T, kVector>(sum, upper * (1.0f - fraction.x), corner);
          accumulate<T, kVector>(sum, upper * fraction.x, corner + tile.stride, right);
          accumulate<T, kVector>(sum, lower * (1.0f - fraction.x), below, down);
          accumulate<T, kVector>(sum, lower * fraction.x, below + tile.stride, right && down);
          store_values<T, kVector>(
              target + map_offset + static_cast<std::int64_t>(chunk + slot) * problem.channels +
                  offset,
              sum);
        }
      }
      barrier();  // before the taps or the tile are overwritten
    }
  }
}

// ---- backward ----

// A query with four flags (which neighbours of its cell exist, which axes are free), and its cell.
struct alignas(8) Reader {
  unsigned query_and_flags;
  int cell;

  GSALIGN_DEVICE int query() const { return static_cast<int>(query_and_flags & (kFreeX - 1)); }
  GSALIGN_DEVICE bool has(unsigned flag) const { return (query_and_flags & flag) != 0; }
};

// Fills the sorted tables. `cells` (aligned to 16) holds one int per query and may lie where the
// caller's accumulators do. The caller's barrier must follow before tables or `cells` are touched.
template <typename T>
GSALIGN_DEVICE void sort_queries(
    const Problem<T>& problem, float cosine, float sine, Pair* fractions, Reader* readers,
    int* bounds, int* cells, int* scratch) {
  const int queries = problem.queries();
  for (int i = thread_index(); i <= queries; i += block_size()) {
    bounds[i] = 0;
  }
  barrier();
  for (int q = thread_index(); q < queries; q += block_size()) {
    const Tap tap = tap_of(problem, q, cosine, sine);
    const int cell = tap.y.cell * problem.width + tap.x.cell;
    cells[q] = cell;
    count_one(bounds + 1 + cell);
  }
  barrier();
  place_in_order(cells, queries, bounds, queries, scratch, [&](int q, int place) {
    const Tap tap = tap_of(problem, q, cosine, sine);
    fractions[place] = {tap.x.fraction, tap.y.fraction};
    const unsigned flags = (tap.x.free ? kFreeX : 0u) | (tap.y.free ? kFreeY : 0u) |
                           (tap.x.has_next ? kRight : 0u) | (tap.y.has_next ? kDown : 0u);
    readers[place] = {static_cast<unsigned>(q) | flags, cells[q]};
  });
}

// Partial sums of a block: `point_sums` [2 * points][blocks], `angle_sums` [batch][groups].
template <typename T, int kVector, bool kStaged>
GSALIGN_KERNEL(kThreads)
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
      BackwardLayout::make(queries, tile_channels * static_cast<int>(sizeof(T)), kStaged);
  unsigned char* shared = shared_memory();
  if (!kStaged && problem.tables != nullptr) {
    shared = problem.tables + static_cast<std::int64_t>(block_index()) * problem.table_bytes;
  }
  Pair* fractions = reinterpret_cast<Pair*>(shared);
  Reader* readers = reinterpret_cast<Reader*>(shared + layout.readers);
  int* bounds = reinterpret_cast<int*>(shared + layout.bounds);
  Pair* gradient = reinterpret_cast<Pair*>(shared + layout.gradient);
  int* scratch = reinterpret_cast<int*>(shared + layout.scratch);
  T* staged_tokens = reinterpret_cast<T*>(shared + layout.tokens);
  T* staged_gradients = reinterpret_cast<T*>(shared + layout.gradients);

  float sine, cosine;
  sine_cosine(problem.angle[place.sample], &sine, &cosine);

  for (int tile = place.group; tile < tiles; tile += problem.groups) {
    const bool first_tile = tile == place.group;
    const int first_channel = tile * tile_channels;
    const int channels_left = problem.channels - first_channel;
    const T* token_source = problem.tokens + sample_offset + first_channel;
    const T* gradient_source = grad_output + sample_offset + first_channel;
    T* target = grad_tokens + sample_offset + first_channel;
    if (kStaged) {
      stage<T, kVector>(
          staged_gradients, gradient_source + map_offset, queries, problem.channels,
          problem.lane_bits, channels_left);
      stage<T, kVector>(
          staged_tokens, token_source + map_offset, queries, problem.channels, problem.lane_bits,
          channels_left);
    }
    copy_prefix<T, kVector>(
        target, gradient_source, problem.prefix, problem.channels, problem.lane_bits,
        channels_left);
    if (first_tile) {  // while the copies are under way
      sort_queries(
          problem, cosine, sine, fractions, readers, bounds, reinterpret_cast<int*>(gradient),
          scratch);
    }
    wait_async_copies();
    barrier();
    const int stride = kStaged ? tile_channels : problem.channels;
    const Tile<T, kStaged> token_tile{kStaged ? staged_tokens : token_source + map_offset, stride};
    const Tile<T, kStaged> gradient_tile{
        kStaged ? staged_gradients : gradient_source + map_offset, stride};

    const std::int64_t row_step = static_cast<std::int64_t>(width) * stride;

    // Gradient by position: every round takes whole warps, for the shuffles.
    const int work = queries << problem.lane_bits;
    for (int round = 0; round < work; round += block_size()) {
      const int i = round + thread_index();
      const int lane = i & (lanes - 1);
      const int offset = lane * kVector;
      Reader reader{0u, 0};
      Point<float> sum{0.0f, 0.0f};
      if (i < work) {
        const int slot = i >> problem.lane_bits;
        reader = readers[slot];
        if (offset < channels_left) {
          const bool right = reader.has(kRight);
          const bool down = reader.has(kDown);
          float dy[kVector];
          load_values<T, kVector>(gradient_tile.row(reader.query()) + offset, dy);
          const T* corner = token_tile.row(reader.cell) + offset;
          const Pair fraction = fractions[slot];
          sum = position_gradient(
              fraction.x, fraction.y, dot<T, kVector>(dy, corner),
              dot<T, kVector>(dy, corner + stride, right),
              dot<T, kVector>(dy, corner + row_step, down),
              dot<T, kVector>(dy, corner + row_step + stride, right && down));
        }
      }
      for (int mask = lanes / 2; mask > 0; mask /= 2) {
        sum.x += shuffle_xor(sum.x, mask);
        sum.y += shuffle_xor(sum.y, mask);
      }
      if (i < work && lane == 0) {
        const int query = reader.query();
        const float x = reader.has(kFreeX) ? sum.x : 0.0f;
        const float y = reader.has(kFreeY) ? sum.y : 0.0f;
        const Pair before = first_tile ? Pair{0.0f, 0.0f} : gradient[query];
        gradient[query] = {before.x + x, before.y + y};
      }
    }

    // Gradient of the tokens: own gradient plus what the queries that read this token send back.
    const int step = block_size() >> problem.lane_bits;
    const int step_column = step % width;
    int column = (thread_index() >> problem.lane_bits) % width;
    for (int i = thread_index(); i < work; i += block_size()) {
      const int token = i >> problem.lane_bits;
      const int offset = (i & (lanes - 1)) * kVector;
      if (offset < channels_left) {
        float sum[kVector];
        load_values<T, kVector>(gradient_tile.row(token) + offset, sum);
        for (int up = 0; up < 2 && up * width <= token; ++up) {
          const int cell = token - up * width;
          const int middle = bounds[cell];
          const int end = bounds[cell + 1];
          for (int e = bounds[column > 0 ? cell - 1 : cell]; e < end; ++e) {
            const Pair fraction = fractions[e];
            const float along_x = e < middle ? fraction.x : 1.0f - fraction.x;
            const float along_y = up != 0 ? fraction.y : 1.0f - fraction.y;
            accumulate<T, kVector>(
                sum, problem.eta * along_x * along_y,
                gradient_tile.row(readers[e].query()) + offset);
          }
        }
        store_values<T, kVector>(
            target + map_offset + static_cast<std::int64_t>(token) * problem.channels + offset,
            sum);
      }
      column += step_column;
      column -= column >= width ? width : 0;
    }
    barrier();  // before the tiles are overwritten, and for the gradient below
  }

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
  if (plan.vectors && plan.staged) {
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
