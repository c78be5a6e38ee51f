// Token warp on the CPU: one pass over the tokens forward, one over tokens and gradient backward.
//
// Both are bound by memory. Results that no cache would hold are written past the caches (otherwise
// every line is read before it is overwritten), and while a sample is worked on, the next one is
// fetched: its rows are asked for in order, where the taps of the warp jump about.
//
// Backward gathers instead of scattering: queries are listed by the tokens they read, and every
// token sums what the queries of its four surrounding cells owe it, in one order.
// Nothing is added atomically, so the result does not depend on threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cpu.h"
#include "../common/memory.h"
#include "../common/tensor.h"
#include "token_rows.h"
#include "warp.h"

namespace gsalign::warp {
namespace {

constexpr std::int64_t kQueryBlock = 32;

// Channels are worked on in chunks of this many bytes: long enough for memory to see streams, short
// enough for the rows around a token to stay in the near caches.
constexpr std::int64_t kChunkBytes = 4096;

// From this many samples on, a unit of work is a sample; below, a part of one: forward a block of
// kQueryBlock queries, backward a chunk of channels.
constexpr std::int64_t kWholeSamples = 8;

constexpr std::int64_t kLine = 64;  // bytes of a cache line

// Asks for a row that is needed later; where there is none, `row` is null. Always inlined: GCC
// takes a function that only prefetches for one without effects, and drops calls of it.
GSALIGN_INLINE void fetch_row(const void* row, std::int64_t bytes) {
  if (row != nullptr) {
    const char* from = static_cast<const char*>(row);
    for (std::int64_t offset = 0; offset < bytes; offset += kLine) {
      __builtin_prefetch(from + offset, 0, 2);
    }
  }
}

// Whether a tensor of rows is written past the caches.
template <typename T>
bool streams(const T* out, std::int64_t values, std::int64_t channels) {
  const std::int64_t alignment = rows_for<T>().alignment;
  return values * static_cast<std::int64_t>(sizeof(T)) > kStreamedBytes &&
         reinterpret_cast<std::uintptr_t>(out) % alignment == 0 &&
         channels * sizeof(T) % alignment == 0;
}

// The arguments both passes share, as plain numbers.
struct Shape {
  std::int64_t batch, channels, prefix, points, queries;
  int height, width;
  double eta;

  std::int64_t tokens() const { return prefix + queries; }
  std::int64_t sample() const { return tokens() * channels; }
};

Shape checked_shape(
    const Tensor& tokens, const Tensor& source_points, const Tensor& angle, const Tensor& basis,
    std::int64_t height, std::int64_t width, double eta, std::int64_t prefix) {
  STD_TORCH_CHECK(tokens.dim() == 3, "tokens: wanted [B, N, C], got ", shape_text(tokens));
  STD_TORCH_CHECK(
      height >= 1 && width >= 1 && height <= INT32_MAX && width <= INT32_MAX / height,
      "size: wanted positive lengths, got ", height, " x ", width);
  STD_TORCH_CHECK(prefix >= 0, "prefix: wanted at least 0, got ", prefix);
  const std::int64_t queries = height * width;
  check_shape("tokens", tokens, {-1, prefix + queries, -1});
  check_shape("source_points", source_points, {-1, 2});
  const std::int64_t points = source_points.size(0);
  check_shape("angle", angle, {tokens.size(0)});
  check_shape("basis", basis, {queries, points});
  const ScalarType type = compute_type(tokens.scalar_type());
  check_type("source_points", source_points, type);
  check_type("angle", angle, type);
  check_type("basis", basis, type);
  return {tokens.size(0),           tokens.size(2),          prefix, points, queries,
          static_cast<int>(height), static_cast<int>(width), eta};
}

// A = M S, the points read before rotation; the same for every sample.
template <typename R>
std::vector<Point<R>> base_map(const Shape& shape, const Tensor& basis, const Tensor& points) {
  std::vector<Point<R>> map(shape.queries);
  for (std::int64_t q = 0; q < shape.queries; ++q) {
    map[q] = base_point(
        data<R>(basis) + q * shape.points, data<R>(points), static_cast<int>(shape.points));
  }
  return map;
}

// Where one query of one sample reads.
template <typename R>
struct Tap {
  Point<R> rotated;
  Axis<R> x, y;

  Tap(Point<R> base, R cosine, R sine, const Shape& shape)
      : rotated(rotate(base, cosine, sine)),
        x(clamp_axis(rotated.x, shape.width)),
        y(clamp_axis(rotated.y, shape.height)) {}

  std::int64_t cell(const Shape& shape) const {
    return std::int64_t(y.cell) * shape.width + x.cell;
  }

  // Corner 2 u + l is `u` rows below and `l` columns right of the cell.
  R weight(int corner) const {
    return (corner >> 1 ? y.fraction : R(1) - y.fraction) *
           (corner & 1 ? x.fraction : R(1) - x.fraction);
  }

  // Whether that corner is inside the map.
  bool reads(int corner) const {
    return (!(corner >> 1) || y.has_next) && (!(corner & 1) || x.has_next);
  }

  // Rows of the four tokens read, first index y, second x; `nothing` stands in for those outside.
  template <typename T>
  void rows(
      const T* map, std::int64_t stride, const T* nothing, const Shape& shape,
      const T* out[4]) const {
    const T* first = map + cell(shape) * stride;
    const T* below = first + shape.width * stride;
    out[0] = first;
    out[1] = x.has_next ? first + stride : nothing;
    out[2] = y.has_next ? below : nothing;
    out[3] = x.has_next && y.has_next ? below + stride : nothing;
  }
};

// Where a query of a sample reads, ready for any chunk of channels.
template <typename T>
struct Reads {
  const T* rows[4];  // at the first channel; null outside the map
  Compute<T> weights[4];
};

template <typename T>
void forward(
    const Shape& shape, const T* tokens, const std::vector<Point<Compute<T>>>& base,
    const Compute<T>* angle, T* out) {
  using R = Compute<T>;
  constexpr std::int64_t chunk_channels = kChunkBytes / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t chunks = ceil_div(shape.channels, chunk_channels);
  const std::vector<T> nothing(std::min(chunk_channels, shape.channels), store<T>(R(0)));
  // A unit of work: a sample, or where there are few of them a block of a sample's queries.
  const std::int64_t unit_queries = shape.batch >= kWholeSamples ? shape.queries : kQueryBlock;
  const std::int64_t units = ceil_div(shape.queries, unit_queries);
  const bool streamed = streams(out, shape.batch * shape.sample(), shape.channels);
  const auto blend = streamed ? rows_for<T>().blend_streamed : rows_for<T>().blend;
  parallel_for(
      shape.batch * units, [&] { return std::vector<Reads<T>>(unit_queries); },
      [&](std::vector<Reads<T>>& reads, std::int64_t unit) {
        const std::int64_t sample = unit / units;
        const std::int64_t begin = unit % units * unit_queries;
        const std::int64_t count = std::min(unit_queries, shape.queries - begin);
        const T* in = tokens + sample * shape.sample();
        T* to = out + sample * shape.sample();
        if (begin == 0) {
          std::copy_n(in, shape.prefix * shape.channels, to);
        }
        const T* map = in + shape.prefix * shape.channels;
        T* warped = to + (shape.prefix + begin) * shape.channels;
        const T* own = map + begin * shape.channels;
        const R cosine = std::cos(angle[sample]), sine = std::sin(angle[sample]);
        for (std::int64_t q = 0; q < count; ++q) {
          const Tap<R> tap(base[begin + q], cosine, sine, shape);
          tap.rows(map, shape.channels, static_cast<const T*>(nullptr), shape, reads[q].rows);
          for (int corner = 0; corner < 4; ++corner) {
            reads[q].weights[corner] = static_cast<R>(shape.eta) * tap.weight(corner);
          }
        }
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
          const std::int64_t first = chunk * chunk_channels;
          const std::int64_t channels = std::min(chunk_channels, shape.channels - first);
          // The same rows of the next chunk, then of the next sample.
          const bool last = chunk + 1 == chunks;
          const bool fetched = streamed && (!last || sample + 1 < shape.batch);
          const T* next = last ? own + shape.sample() : own + first + chunk_channels;
          for (std::int64_t q = 0; q < count; ++q) {
            const T* rows[4];
            for (int i = 0; i < 4; ++i) {
              const T* row = reads[q].rows[i];
              rows[i] = row == nullptr ? nothing.data() : row + first;
            }
            const std::int64_t offset = q * shape.channels;
            fetch_row(
                fetched ? next + offset : nullptr, channels * static_cast<std::int64_t>(sizeof(T)));
            blend(warped + offset + first, own + offset + first, rows, reads[q].weights, channels);
          }
        }
        if (streamed) {
          stream_fence();
        }
      });
}

// Which queries read each token of a sample, and with what weight: for token t the entries
// first[t] to first[t + 1], those of its upper left cell first, then in order of the query.
template <typename R>
struct Readers {
  std::vector<Tap<R>> taps;
  std::vector<std::int32_t> first, queries, next;
  std::vector<R> weights;

  explicit Readers(const Shape& shape)
      : first(shape.queries + 1),
        queries(4 * shape.queries),
        next(shape.queries),
        weights(4 * shape.queries) {
    taps.reserve(shape.queries);
  }

  void set(const Shape& shape, const std::vector<Point<R>>& base, R cosine, R sine) {
    const auto token = [&](const Tap<R>& tap, int corner) {
      return tap.cell(shape) + (corner >> 1) * shape.width + (corner & 1);
    };
    taps.clear();
    std::fill(first.begin(), first.end(), 0);
    for (std::int64_t q = 0; q < shape.queries; ++q) {
      const Tap<R>& tap = taps.emplace_back(base[q], cosine, sine, shape);
      for (int corner = 0; corner < 4; ++corner) {
        if (tap.reads(corner)) {
          ++first[token(tap, corner) + 1];
        }
      }
    }
    for (std::int64_t t = 0; t < shape.queries; ++t) {
      first[t + 1] += first[t];
      next[t] = first[t];
    }
    const R eta = static_cast<R>(shape.eta);
    for (int corner = 3; corner >= 0; --corner) {
      for (std::int64_t q = 0; q < shape.queries; ++q) {
        const Tap<R>& tap = taps[q];
        // A clamped query gives nothing beyond the border, not even nothing times infinity.
        if (tap.reads(corner)) {
          const std::int32_t entry = next[token(tap, corner)]++;
          queries[entry] = static_cast<std::int32_t>(q);
          weights[entry] = eta * tap.weight(corner);
        }
      }
    }
  }
};

// What both halves of the backward pass are given.
template <typename T>
struct BackwardRows {
  const T *gradient, *tokens;  // the map of one sample, from the first channel of the chunk on
  const T *next_gradient, *next_tokens;  // those of the next unit, or null
  T* grad_tokens;
  const T* nothing;
  std::int64_t count;  // channels
};

// One chunk of channels of one sample: the tokens' gradient, and by query the gradient by position
// [Q, 2], in pixels and without eta.
template <typename T>
void backward_chunk(
    const Shape& shape, const Readers<Compute<T>>& readers, const BackwardRows<T>& rows,
    typename Rows<T>::Gather gather, Compute<T>* by_position) {
  using R = Compute<T>;
  const auto four_dots = rows_for<T>().dots;
  const std::int64_t bytes = rows.count * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t q = 0; q < shape.queries; ++q) {
    const std::int64_t offset = q * shape.channels;
    const std::int32_t entry = readers.first[q];
    fetch_row(rows.next_gradient == nullptr ? nullptr : rows.next_gradient + offset, bytes);
    fetch_row(rows.next_tokens == nullptr ? nullptr : rows.next_tokens + offset, bytes);
    gather(
        rows.grad_tokens + offset, rows.gradient + offset, rows.gradient, shape.channels,
        readers.queries.data() + entry, readers.weights.data() + entry,
        readers.first[q + 1] - entry, rows.count);

    const Tap<R>& tap = readers.taps[q];
    Point<R> g{R(0), R(0)};
    if (tap.x.free || tap.y.free) {
      const T* read[4];
      R dots[4];
      tap.rows(rows.tokens, shape.channels, rows.nothing, shape, read);
      four_dots(rows.gradient + offset, read, rows.count, dots);
      g = position_gradient(tap.x.fraction, tap.y.fraction, dots[0], dots[1], dots[2], dots[3]);
    }
    by_position[2 * q] = tap.x.free ? g.x : R(0);
    by_position[2 * q + 1] = tap.y.free ? g.y : R(0);
  }
}

// One sample's share of the gradients of source points and angle, `partial` [2 K + 1], from the
// gradients by position that its chunks left, [chunks, Q, 2].
template <typename R>
GSALIGN_CLONES static void project(
    const Shape& shape, const std::vector<Point<R>>& base, const R* basis, R angle,
    const R* by_position, std::int64_t chunks, double* partial) {
  const R cosine = std::cos(angle), sine = std::sin(angle);
  const R scale_x = static_cast<R>(shape.eta) * position_scale<R>(shape.width);
  const R scale_y = static_cast<R>(shape.eta) * position_scale<R>(shape.height);
  std::fill_n(partial, 2 * shape.points + 1, 0.0);
  for (std::int64_t q = 0; q < shape.queries; ++q) {
    Point<R> g{R(0), R(0)};
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const R* of_chunk = by_position + (chunk * shape.queries + q) * 2;
      g.x += of_chunk[0];
      g.y += of_chunk[1];
    }
    g.x *= scale_x;
    g.y *= scale_y;
    partial[2 * shape.points] += angle_gradient(g, rotate(base[q], cosine, sine));
    const Point<R> before = rotate_back(g, cosine, sine);
    const R* row = basis + q * shape.points;
    for (std::int64_t k = 0; k < shape.points; ++k) {
      partial[2 * k] += static_cast<double>(row[k]) * before.x;
      partial[2 * k + 1] += static_cast<double>(row[k]) * before.y;
    }
  }
}

template <typename T>
void backward(
    const Shape& shape, const T* gradient, const T* tokens,
    const std::vector<Point<Compute<T>>>& base, const Compute<T>* basis, const Compute<T>* angle,
    T* grad_tokens, Compute<T>* grad_points, Compute<T>* grad_angle) {
  using R = Compute<T>;
  constexpr std::int64_t chunk_channels = kChunkBytes / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t chunks = ceil_div(shape.channels, chunk_channels);
  const std::vector<T> nothing(std::min(chunk_channels, shape.channels), store<T>(R(0)));
  const std::int64_t columns = 2 * shape.points + 1, positions = 2 * shape.queries;
  const bool streamed = streams(grad_tokens, shape.batch * shape.sample(), shape.channels);
  const auto gather = streamed ? rows_for<T>().gather_streamed : rows_for<T>().gather;
  const Scratch<R> by_position(shape.batch * chunks * positions);

  const std::int64_t each = shape.batch >= kWholeSamples ? chunks : 1;  // chunks of a unit
  const std::int64_t units = shape.batch * (chunks / std::max<std::int64_t>(each, 1));
  parallel_for(
      units, [&] { return Readers<R>(shape); },
      [&](Readers<R>& readers, std::int64_t unit) {
        const std::int64_t sample = unit * each / chunks, from = unit * each % chunks;
        const std::int64_t head = sample * shape.sample();
        const std::int64_t map = head + shape.prefix * shape.channels;
        if (from == 0) {
          std::copy_n(gradient + head, shape.prefix * shape.channels, grad_tokens + head);
        }
        readers.set(shape, base, std::cos(angle[sample]), std::sin(angle[sample]));
        for (std::int64_t chunk = from; chunk < from + each; ++chunk) {
          const std::int64_t at = map + chunk * chunk_channels;
          // The same rows of the next chunk, then of the next sample.
          const bool last = chunk + 1 == chunks;
          const std::int64_t next = last ? map + shape.sample() : at + chunk_channels;
          const bool fetched = streamed && (!last || sample + 1 < shape.batch);
          const BackwardRows<T> rows{
              gradient + at,
              tokens + at,
              fetched ? gradient + next : nullptr,
              fetched ? tokens + next : nullptr,
              grad_tokens + at,
              nothing.data(),
              std::min(chunk_channels, shape.channels - chunk * chunk_channels)};
          backward_chunk(
              shape, readers, rows, gather,
              by_position.data() + (sample * chunks + chunk) * positions);
        }
        if (streamed) {
          stream_fence();
        }
      });

  std::vector<double> partials(shape.batch * columns);
  parallel_for(shape.batch, [&](std::int64_t sample) {
    project(
        shape, base, basis, angle[sample], by_position.data() + sample * chunks * positions, chunks,
        partials.data() + sample * columns);
  });
  // Few numbers, summed in one fixed order.
  std::vector<double> points(2 * shape.points, 0.0);
  for (std::int64_t sample = 0; sample < shape.batch; ++sample) {
    const double* partial = partials.data() + sample * columns;
    for (std::int64_t k = 0; k < 2 * shape.points; ++k) {
      points[k] += partial[k];
    }
    grad_angle[sample] = static_cast<R>(partial[2 * shape.points]);
  }
  std::copy(points.begin(), points.end(), grad_points);
}

Tensor warp_tokens(
    const Tensor& tokens, const Tensor& source_points, const Tensor& angle, const Tensor& basis,
    std::int64_t height, std::int64_t width, double eta, std::int64_t prefix) {
  const Shape shape =
      checked_shape(tokens, source_points, angle, basis, height, width, eta, prefix);
  const Tensor in = as_contiguous(tokens), points = as_contiguous(source_points),
               angles = as_contiguous(angle), matrix = as_contiguous(basis);
  const Tensor out = empty({shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using R = Compute<T>;
    forward<T>(
        shape, data<T>(in), base_map<R>(shape, matrix, points), data<R>(angles),
        mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> warp_tokens_backward(
    const Tensor& grad, const Tensor& tokens, const Tensor& source_points, const Tensor& angle,
    const Tensor& basis, std::int64_t height, std::int64_t width, double eta, std::int64_t prefix) {
  const Shape shape =
      checked_shape(tokens, source_points, angle, basis, height, width, eta, prefix);
  check_shape("grad", grad, {shape.batch, shape.tokens(), shape.channels});
  check_type("grad", grad, tokens.scalar_type());
  const Tensor gradient = as_contiguous(grad), in = as_contiguous(tokens),
               points = as_contiguous(source_points), angles = as_contiguous(angle),
               matrix = as_contiguous(basis);
  const ScalarType type = compute_type(in.scalar_type());
  const Tensor grad_tokens = empty({shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
  const Tensor grad_points = empty({shape.points, 2}, type);
  const Tensor grad_angle = empty({shape.batch}, type);
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using R = Compute<T>;
    backward<T>(
        shape, data<T>(gradient), data<T>(in), base_map<R>(shape, matrix, points), data<R>(matrix),
        data<R>(angles), mutable_data<T>(grad_tokens), mutable_data<R>(grad_points),
        mutable_data<R>(grad_angle));
  });
  return {grad_tokens, grad_points, grad_angle};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("warp_tokens", TORCH_BOX(&warp_tokens));
  m.impl("warp_tokens_backward", TORCH_BOX(&warp_tokens_backward));
}

}  // namespace gsalign::warp
