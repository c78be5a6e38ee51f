// Splines at a block of points on the CPU, forward and backward: the inner loops of tps and warp.
//
// Templated on the bytes of a vector and always inlined, for with_vectors(). Blocks are always
// worked on whole: a short one repeats its last point, and the gradients there are zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/cpu.h"
#include "../common/lanes.h"
#include "tps.h"

namespace gsalign::tps {

// Points are worked on in blocks of this many, which stay in the first-level cache.
constexpr std::int64_t kPointBlock = 64;

template <typename R, int kBytes>
constexpr std::int64_t kBlockVectors = kPointBlock / kVectorLength<R, kBytes>;

// Vectors whose logarithms are taken side by side: more need more registers than there are.
template <typename R, int kBytes>
constexpr int kSideBySide = kBytes == 64 ? 4 : 2;

// One sample's spline: coefficients [K + 3, V], control points [K, 2].
template <typename R>
struct Spline {
  const R* coefficients;
  const R* control_points;
  std::int64_t points, columns;

  const R* weights(std::int64_t k) const { return coefficients + k * columns; }
  const R* affine() const { return coefficients + points * columns; }
};

// The points of a block.
template <typename R>
struct alignas(64) PointBlock {
  R x[kPointBlock], y[kPointBlock];
  std::int64_t count;

  // After the first `count` points are set.
  GSALIGN_INLINE void fill() {
    std::fill(x + count, x + kPointBlock, x[count - 1]);
    std::fill(y + count, y + kPointBlock, y[count - 1]);
  }

  // Pixels `begin` to `begin + length` of a map, in row-major order.
  GSALIGN_INLINE void set_pixels(
      std::int64_t begin, std::int64_t length, std::int64_t height, std::int64_t width,
      bool align_corners) {
    count = length;
    std::int64_t row = begin / width, column = begin % width;
    for (std::int64_t n = 0; n < length;) {
      const std::int64_t stretch = std::min(width - column, length - n);
      const R at = pixel_position<R>(row, height, align_corners);
      for (std::int64_t i = 0; i < stretch; ++i) {
        x[n + i] = pixel_position<R>(column + i, width, align_corners);
        y[n + i] = at;
      }
      n += stretch;
      column = 0;
      ++row;
    }
    fill();
  }
};

// The points of a block as seen from a control point, a few vectors of them side by side.
template <typename R, int kBytes, int kCount>
struct Seen {
  using V = Vector<R, kBytes>;
  V dx[kCount], dy[kCount], r2[kCount];

  GSALIGN_INLINE Seen(const PointBlock<R>& at, std::int64_t first, const R* control_point) {
    for (int j = 0; j < kCount; ++j) {
      dx[j] =
          load_vector<R, kBytes>(at.x + first + j * kVectorLength<R, kBytes>) - control_point[0];
      dy[j] =
          load_vector<R, kBytes>(at.y + first + j * kVectorLength<R, kBytes>) - control_point[1];
    }
    for (int j = 0; j < kCount; ++j) {
      r2[j] = dx[j] * dx[j] + dy[j] * dy[j];
    }
  }

  // log(max(r2, 1e-8)) / 2; with it U = r2 half_log, and the slope is half_log + 1/2 (half_log
  // alone where clamped).
  GSALIGN_INLINE void half_logs(V (&out)[kCount]) const {
    // Positive numbers are in the order of their bits, and whole numbers have the faster maximum.
    // A NaN may get lost here, but stays in r2 itself.
    using I = typename detail::VectorOf<R, kBytes>::Mask;
    const I smallest = bit_cast<I>(V{} + R(1e-8));
    for (int j = 0; j < kCount; ++j) {
      const I bits = bit_cast<I>(r2[j]);
      out[j] = bit_cast<V>(bits > smallest ? bits : smallest);
    }
    half_logarithms<R>(out);
  }
};

// rows[k][n] = half logarithm of the distance of point n to control point k.
template <int kBytes, typename R>
GSALIGN_INLINE void logarithm_rows(
    const R* control_points, std::int64_t points, const PointBlock<R>& at, R* rows) {
  constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
  constexpr int kSide = kSideBySide<R, kBytes>;
  for (std::int64_t k = 0; k < points; ++k) {
    for (std::int64_t n = 0; n < kPointBlock; n += kSide * kLength) {
      const Seen<R, kBytes, kSide> seen(at, n, control_points + 2 * k);
      Vector<R, kBytes> half_log[kSide];
      seen.half_logs(half_log);
      for (int j = 0; j < kSide; ++j) {
        store_vector<R>(rows + k * kPointBlock + n + j * kLength, half_log[j]);
      }
    }
  }
}

// What becomes of the logarithms of a block: rows[k][n] as of logarithm_rows().
enum class Rows { none, written, read };

// out[v][n] = f_v(point n). With `rows` read no logarithm is taken: they are the same for every
// spline on these control points.
template <int kBytes, Rows kRows, typename R>
GSALIGN_INLINE void evaluate_block(
    const Spline<R>& spline, const PointBlock<R>& at, R* rows, R* __restrict out) {
  using V = Vector<R, kBytes>;
  constexpr std::int64_t kCount = kBlockVectors<R, kBytes>, kLength = kVectorLength<R, kBytes>;
  constexpr int kSide = kSideBySide<R, kBytes>;
  const std::int64_t columns = spline.columns;
  const R* affine = spline.affine();
  // U of kSide vectors from point `n` on.
  const auto basis = [&](std::int64_t k, std::int64_t n, V(&value)[kSide]) GSALIGN_VECTOR_BODY {
    const Seen<R, kBytes, kSide> seen(at, n, spline.control_points + 2 * k);
    R* row = rows + k * kPointBlock + n;
    if constexpr (kRows != Rows::read) {
      seen.half_logs(value);
    }
    for (int j = 0; j < kSide; ++j) {
      if constexpr (kRows == Rows::read) {
        value[j] = load_vector<R, kBytes>(row + j * kLength);
      } else if constexpr (kRows == Rows::written) {
        store_vector<R>(row + j * kLength, value[j]);
      }
      value[j] *= seen.r2[j];
    }
  };
  if (columns == 2) {  // a grid: both sums stay in registers
    V gx[kCount], gy[kCount];
    for (std::int64_t j = 0; j < kCount; ++j) {
      const V x = load_vector<R, kBytes>(at.x + j * kLength),
              y = load_vector<R, kBytes>(at.y + j * kLength);
      gx[j] = affine[0] + affine[2] * x + affine[4] * y;
      gy[j] = affine[1] + affine[3] * x + affine[5] * y;
    }
    for (std::int64_t k = 0; k < spline.points; ++k) {
      const R wx = spline.coefficients[2 * k], wy = spline.coefficients[2 * k + 1];
      for (std::int64_t j = 0; j < kCount; j += kSide) {
        V value[kSide];
        basis(k, j * kLength, value);
        for (int i = 0; i < kSide; ++i) {
          gx[j + i] += wx * value[i];
          gy[j + i] += wy * value[i];
        }
      }
    }
    for (std::int64_t j = 0; j < kCount; ++j) {
      store_vector<R>(out + j * kLength, gx[j]);
      store_vector<R>(out + kPointBlock + j * kLength, gy[j]);
    }
    return;
  }
  for (std::int64_t v = 0; v < columns; ++v) {
    for (std::int64_t j = 0; j < kCount; ++j) {
      const V x = load_vector<R, kBytes>(at.x + j * kLength),
              y = load_vector<R, kBytes>(at.y + j * kLength);
      store_vector<R>(
          out + v * kPointBlock + j * kLength,
          affine[v] + affine[columns + v] * x + affine[2 * columns + v] * y);
    }
  }
  for (std::int64_t k = 0; k < spline.points; ++k) {
    const R* weights = spline.weights(k);
    for (std::int64_t j = 0; j < kCount; j += kSide) {
      V value[kSide];
      basis(k, j * kLength, value);
      for (std::int64_t v = 0; v < columns; ++v) {
        for (int i = 0; i < kSide; ++i) {
          R* sum = out + v * kPointBlock + (j + i) * kLength;
          store_vector<R>(sum, load_vector<R, kBytes>(sum) + weights[v] * value[i]);
        }
      }
    }
  }
}

// The gradients of a spline's coefficients and control points, summed over blocks of points.
//
// Sums are kept per lane, and go to the totals (double) every kFlush blocks: no sum in float is
// longer than kFlush * kBlockVectors terms, and few additions cross the lanes.
template <typename R, int kBytes>
class SplineGradient {
 public:
  using V = Vector<R, kBytes>;
  static constexpr std::int64_t kFlush = 16;

  // Totals of [(K + 3) V] coefficients, then of [K, 2] control points; they start at zero.
  SplineGradient(std::int64_t points, std::int64_t columns, double* totals)
      : points_(points),
        columns_(columns),
        numbers_((points + 3) * columns + 2 * points),
        totals_(totals),
        sums_(numbers_ * kVectorLength<R, kBytes>) {
    std::fill_n(totals_, numbers_, 0.0);
    clear();
  }

  // Adds a block, for `gradient` [V][kPointBlock]; the points' own gradient is written to gx, gy
  // when kPoints.
  template <bool kPoints, bool kRows = false>
  GSALIGN_INLINE void add(
      const Spline<R>& spline, const PointBlock<R>& at, const R* gradient, R* gx, R* gy,
      const R* rows = nullptr) {
    constexpr std::int64_t kCount = kBlockVectors<R, kBytes>, kLength = kVectorLength<R, kBytes>;
    const R* affine = spline.affine();
    V px[kCount] = {}, py[kCount] = {};
    for (std::int64_t v = 0; v < columns_; ++v) {
      V constant{}, along_x{}, along_y{};
      for (std::int64_t j = 0; j < kCount; ++j) {
        const V g = load_vector<R, kBytes>(gradient + v * kPointBlock + j * kLength);
        constant += g;
        along_x += g * load_vector<R, kBytes>(at.x + j * kLength);
        along_y += g * load_vector<R, kBytes>(at.y + j * kLength);
        if constexpr (kPoints) {
          px[j] += affine[columns_ + v] * g;
          py[j] += affine[2 * columns_ + v] * g;
        }
      }
      increase(points_ * columns_ + v, constant);
      increase((points_ + 1) * columns_ + v, along_x);
      increase((points_ + 2) * columns_ + v, along_y);
    }
    const std::int64_t control = (points_ + 3) * columns_;
    for (std::int64_t k = 0; k < points_; ++k) {
      const R* weights = spline.weights(k);
      V value[kCount], slope[kCount], pull[kCount] = {};
      const Seen<R, kBytes, kCount> seen(at, 0, spline.control_points + 2 * k);
      if constexpr (kRows) {
        for (int j = 0; j < kCount; ++j) {
          value[j] = load_vector<R, kBytes>(rows + k * kPointBlock + j * kLength);
        }
      } else {
        seen.half_logs(value);
      }
      for (std::int64_t j = 0; j < kCount; ++j) {
        // d U / d point = 2 slope (point - centre), and the opposite for the centre.
        slope[j] = R(2) * value[j] + (seen.r2[j] < V{} + R(1e-8) ? V{} : V{} + R(1));
        value[j] *= seen.r2[j];
      }
      for (std::int64_t v = 0; v < columns_; ++v) {
        V sum{};
        for (std::int64_t j = 0; j < kCount; ++j) {
          const V g = load_vector<R, kBytes>(gradient + v * kPointBlock + j * kLength);
          sum += g * value[j];
          pull[j] += weights[v] * g;
        }
        increase(k * columns_ + v, sum);
      }
      V sum_x{}, sum_y{};
      for (std::int64_t j = 0; j < kCount; ++j) {
        const V factor = slope[j] * pull[j];
        const V tx = factor * seen.dx[j], ty = factor * seen.dy[j];
        sum_x -= tx;
        sum_y -= ty;
        if constexpr (kPoints) {
          px[j] += tx;
          py[j] += ty;
        }
      }
      increase(control + 2 * k, sum_x);
      increase(control + 2 * k + 1, sum_y);
    }
    if constexpr (kPoints) {
      for (std::int64_t j = 0; j < kCount; ++j) {
        store_vector<R>(gx + j * kLength, px[j]);
        store_vector<R>(gy + j * kLength, py[j]);
      }
    }
    if (++blocks_ == kFlush) {
      flush();
    }
  }

  // Brings the totals up to date.
  GSALIGN_INLINE void flush() {
    for (std::int64_t i = 0; i < numbers_; ++i) {
      totals_[i] += sum_of<R>(load_vector<R, kBytes>(sums_.data() + i * kVectorLength<R, kBytes>));
    }
    clear();
  }

 private:
  void clear() {
    std::fill_n(sums_.data(), numbers_ * kVectorLength<R, kBytes>, R(0));
    blocks_ = 0;
  }
  GSALIGN_INLINE void increase(std::int64_t number, const V& by) {
    R* sum = sums_.data() + number * kVectorLength<R, kBytes>;
    store_vector<R>(sum, load_vector<R, kBytes>(sum) + by);
  }

  std::int64_t points_, columns_, numbers_, blocks_ = 0;
  double* totals_;
  Scratch<R> sums_;
};

// Adds up what the units of work left, [batch, chunks, (K + 3) V + 2K], in one fixed order, into
// the gradients of the coefficients [batch, (K + 3) V] and of the control points [batch, 2K].
template <typename R>
void sum_partials(
    const std::vector<double>& partials, std::int64_t batch, std::int64_t chunks,
    std::int64_t of_coefficients, std::int64_t of_points, R* grad_coefficients,
    R* grad_control_points) {
  const std::int64_t numbers = of_coefficients + of_points;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < numbers; ++i) {
      double sum = 0.0;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[(b * chunks + chunk) * numbers + i];
      }
      if (i < of_coefficients) {
        grad_coefficients[b * of_coefficients + i] = static_cast<R>(sum);
      } else {
        grad_control_points[b * of_points + i - of_coefficients] = static_cast<R>(sum);
      }
    }
  }
}

}  // namespace gsalign::tps
