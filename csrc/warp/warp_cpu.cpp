// Token warp on the CPU: one pass over the tokens forward, one over tokens and gradient backward.
//
// Backward gathers instead of scattering: queries are bucketed by the cell they read in, and every
// token sums what the queries of its four surrounding cells owe it, in the order of the queries.
// Nothing is added atomically, so the result does not depend on threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "warp.h"

namespace gsalign::warp {
namespace {

constexpr std::int64_t kQueryBlock = 32;   // output tokens per unit of forward work
constexpr std::int64_t kRegisterRow = 64;  // channels whose sums stay in registers

// out[c] = x[c] + sum_i weight[i] * tap[i][c]
template <typename T>
GSALIGN_CLONES static void blend_row(
    T* __restrict out, const T* x, const T* const taps[4], const Compute<T> weights[4],
    std::int64_t count) {
  const T *t0 = taps[0], *t1 = taps[1], *t2 = taps[2], *t3 = taps[3];
  const Compute<T> w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    const Compute<T> sampled =
        (w0 * load(t0[c]) + w1 * load(t1[c])) + (w2 * load(t2[c]) + w3 * load(t3[c]));
    out[c] = store<T>(load(x[c]) + sampled);
  }
}

// out[c] = base[c] + sum_i weights[i] * (source + rows[i] * stride)[c]
template <typename T>
GSALIGN_CLONES static void gather_row(
    T* __restrict out, const T* base, const T* source, std::int64_t stride,
    const std::int32_t* rows, const Compute<T>* weights, std::int64_t entries, std::int64_t count) {
  for (std::int64_t begin = 0; begin < count; begin += kRegisterRow) {
    Compute<T> sum[kRegisterRow];
    const std::int64_t length = std::min(kRegisterRow, count - begin);
    if (length == kRegisterRow) {
#pragma omp simd
      for (std::int64_t c = 0; c < kRegisterRow; ++c) {
        sum[c] = load(base[begin + c]);
      }
      for (std::int64_t i = 0; i < entries; ++i) {
        const T* row = source + rows[i] * stride + begin;
        const Compute<T> weight = weights[i];
#pragma omp simd
        for (std::int64_t c = 0; c < kRegisterRow; ++c) {
          sum[c] += weight * load(row[c]);
        }
      }
#pragma omp simd
      for (std::int64_t c = 0; c < kRegisterRow; ++c) {
        out[begin + c] = store<T>(sum[c]);
      }
    } else {
      for (std::int64_t c = 0; c < length; ++c) {
        sum[c] = load(base[begin + c]);
      }
      for (std::int64_t i = 0; i < entries; ++i) {
        const T* row = source + rows[i] * stride + begin;
        for (std::int64_t c = 0; c < length; ++c) {
          sum[c] += weights[i] * load(row[c]);
        }
      }
      for (std::int64_t c = 0; c < length; ++c) {
        out[begin + c] = store<T>(sum[c]);
      }
    }
  }
}

// dots[i] = sum_c gradient[c] * tap[i][c], for four taps in one pass.
template <typename T>
GSALIGN_CLONES static void four_dots(
    const T* gradient, const T* const taps[4], std::int64_t count, Compute<T> dots[4]) {
  const T *t0 = taps[0], *t1 = taps[1], *t2 = taps[2], *t3 = taps[3];
  Compute<T> d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (std::int64_t c = 0; c < count; ++c) {
    const Compute<T> g = load(gradient[c]);
    d0 += g * load(t0[c]);
    d1 += g * load(t1[c]);
    d2 += g * load(t2[c]);
    d3 += g * load(t3[c]);
  }
  dots[0] = d0;
  dots[1] = d1;
  dots[2] = d2;
  dots[3] = d3;
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

  void weights(R out[4]) const {
    out[0] = (R(1) - y.fraction) * (R(1) - x.fraction);
    out[1] = (R(1) - y.fraction) * x.fraction;
    out[2] = y.fraction * (R(1) - x.fraction);
    out[3] = y.fraction * x.fraction;
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

template <typename T>
void forward(
    const Shape& shape, const T* tokens, const std::vector<Point<Compute<T>>>& base,
    const Compute<T>* angle, T* out) {
  using R = Compute<T>;
  const std::vector<T> nothing(shape.channels, store<T>(R(0)));
  const std::int64_t blocks = ceil_div(shape.queries, kQueryBlock);
  parallel_for(shape.batch * blocks, [&](std::int64_t unit) {
    const std::int64_t sample = unit / blocks;
    const std::int64_t begin = unit % blocks * kQueryBlock;
    const std::int64_t end = std::min(begin + kQueryBlock, shape.queries);
    const T* in = tokens + sample * shape.sample();
    T* to = out + sample * shape.sample();
    if (begin == 0) {
      std::copy_n(in, shape.prefix * shape.channels, to);
    }
    const T* map = in + shape.prefix * shape.channels;
    T* warped = to + shape.prefix * shape.channels;
    const R cosine = std::cos(angle[sample]), sine = std::sin(angle[sample]);
    for (std::int64_t q = begin; q < end; ++q) {
      const Tap<R> tap(base[q], cosine, sine, shape);
      const T* rows[4];
      R weights[4];
      tap.rows(map, shape.channels, nothing.data(), shape, rows);
      tap.weights(weights);
      for (R& weight : weights) {
        weight *= static_cast<R>(shape.eta);
      }
      blend_row(
          warped + q * shape.channels, map + q * shape.channels, rows, weights, shape.channels);
    }
  });
}

// The queries of a sample, bucketed by the cell they read in; within a cell in ascending order.
class Buckets {
 public:
  template <typename R>
  Buckets(const std::vector<Tap<R>>& taps, const Shape& shape)
      : first_(shape.queries + 1, 0), queries_(shape.queries) {
    for (const Tap<R>& tap : taps) {
      ++first_[tap.cell(shape) + 1];
    }
    for (std::int64_t cell = 0; cell < shape.queries; ++cell) {
      first_[cell + 1] += first_[cell];
    }
    std::vector<std::int32_t> next(first_.begin(), first_.end() - 1);
    for (std::int64_t q = 0; q < shape.queries; ++q) {
      queries_[next[taps[q].cell(shape)]++] = static_cast<std::int32_t>(q);
    }
  }

  const std::int32_t* begin(std::int64_t cell) const { return queries_.data() + first_[cell]; }
  const std::int32_t* end(std::int64_t cell) const { return queries_.data() + first_[cell + 1]; }

 private:
  std::vector<std::int32_t> first_, queries_;
};

// One sample, one chunk of channels: the tokens' gradient, and this chunk's share of the gradients
// of source points ([K, 2]) and angle, left in `partial` [2K + 1].
template <typename T>
void backward_chunk(
    const Shape& shape, const T* gradient, const T* tokens, const T* nothing,
    const std::vector<Point<Compute<T>>>& base, const Compute<T>* basis, Compute<T> angle,
    std::int64_t count, T* grad_tokens, double* partial) {
  using R = Compute<T>;
  const R cosine = std::cos(angle), sine = std::sin(angle);
  const R eta = static_cast<R>(shape.eta);
  std::vector<Tap<R>> taps;
  taps.reserve(shape.queries);
  for (std::int64_t q = 0; q < shape.queries; ++q) {
    taps.emplace_back(base[q], cosine, sine, shape);
  }
  const Buckets buckets(taps, shape);

  std::vector<std::int32_t> rows;
  std::vector<R> weights;
  for (int row = 0; row < shape.height; ++row) {
    for (int column = 0; column < shape.width; ++column) {
      rows.clear();
      weights.clear();
      for (int up = 0; up < 2; ++up) {
        for (int left = 0; left < 2; ++left) {
          if (row < up || column < left) {
            continue;
          }
          const std::int64_t cell = std::int64_t(row - up) * shape.width + (column - left);
          for (const std::int32_t* q = buckets.begin(cell); q != buckets.end(cell); ++q) {
            const Tap<R>& tap = taps[*q];
            if ((left && !tap.x.has_next) || (up && !tap.y.has_next)) {
              continue;
            }
            R four[4];
            tap.weights(four);
            rows.push_back(*q);
            weights.push_back(eta * four[2 * up + left]);
          }
        }
      }
      const std::int64_t token = std::int64_t(row) * shape.width + column;
      gather_row(
          grad_tokens + token * shape.channels, gradient + token * shape.channels, gradient,
          shape.channels, rows.data(), weights.data(), static_cast<std::int64_t>(rows.size()),
          count);
    }
  }

  const R scale_x = eta * position_scale<R>(shape.width);
  const R scale_y = eta * position_scale<R>(shape.height);
  std::fill_n(partial, 2 * shape.points + 1, 0.0);
  for (std::int64_t q = 0; q < shape.queries; ++q) {
    const Tap<R>& tap = taps[q];
    if (!tap.x.free && !tap.y.free) {
      continue;
    }
    const T* read[4];
    R dots[4];
    tap.rows(tokens, shape.channels, nothing, shape, read);
    four_dots(gradient + q * shape.channels, read, count, dots);
    Point<R> g =
        position_gradient(tap.x.fraction, tap.y.fraction, dots[0], dots[1], dots[2], dots[3]);
    g.x = tap.x.free ? g.x * scale_x : R(0);
    g.y = tap.y.free ? g.y * scale_y : R(0);
    partial[2 * shape.points] += angle_gradient(g, tap.rotated);
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
  const std::vector<T> nothing(std::min(kChannelChunk, shape.channels), store<T>(R(0)));
  const std::int64_t chunks = ceil_div(shape.channels, kChannelChunk);
  const std::int64_t columns = 2 * shape.points + 1;
  std::vector<double> partials(shape.batch * chunks * columns);
  parallel_for(shape.batch * chunks, [&](std::int64_t unit) {
    const std::int64_t sample = unit / chunks;
    const std::int64_t first = unit % chunks * kChannelChunk;
    const std::int64_t head = sample * shape.sample();
    const std::int64_t map = head + shape.prefix * shape.channels + first;
    if (first == 0) {
      std::copy_n(gradient + head, shape.prefix * shape.channels, grad_tokens + head);
    }
    backward_chunk(
        shape, gradient + map, tokens + map, nothing.data(), base, basis, angle[sample],
        std::min(kChannelChunk, shape.channels - first), grad_tokens + map,
        partials.data() + unit * columns);
  });
  // Few numbers, summed in one fixed order.
  std::vector<double> points(2 * shape.points, 0.0);
  for (std::int64_t sample = 0; sample < shape.batch; ++sample) {
    double sum = 0.0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* partial = partials.data() + (sample * chunks + chunk) * columns;
      for (std::int64_t k = 0; k < 2 * shape.points; ++k) {
        points[k] += partial[k];
      }
      sum += partial[2 * shape.points];
    }
    grad_angle[sample] = static_cast<R>(sum);
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
  const Tensor out = empty(in, {shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
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
  const Tensor grad_tokens =
      empty(in, {shape.batch, shape.tokens(), shape.channels}, in.scalar_type());
  const Tensor grad_points = empty(in, {shape.points, 2}, type);
  const Tensor grad_angle = empty(in, {shape.batch}, type);
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
