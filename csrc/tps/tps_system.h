// The system of thin-plate interpolation on the CPU: factored once, solved for any right-hand side.
//
// [[Phi + reg I, P], [P^T, 0]] [w; a] = [g1; g2] is indefinite, but Phi is positive definite on
// what is orthogonal to P = [1, x, y]. Three Householder reflections take P to its triangular
// factor, Q^T P = [R; 0]; then with Phi' = Q^T Phi Q + reg I the block behind the first three rows
// has a Cholesky factor, without pivoting:
//
//   R^T w1 = g2,   L L^T z = (Q^T g1)[3:] - Phi'[3:, :3] w1,   w = Q [w1; z],
//   R a = (Q^T g1)[:3] - Phi'[:3, :3] w1 - Phi'[:3, 3:] z.
//
// The flow does not depend on the figures, so several samples go through it side by side (`E` is
// a vector, one lane each); one sample alone (`E` is double) fills the vectors along its rows. Half
// the operations of a general factorisation. Everything in double: the systems are small, and their
// condition grows to thousands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/lanes.h"

namespace gsalign::tps {

// U(r2) and its derivative by r2; see radial_basis in tps.h, which has them for scalars.
template <typename E>
struct LaneBasis {
  E value, slope;
};

template <typename E>
GSALIGN_INLINE LaneBasis<E> lane_basis(const E& squared_distance) {
  const E smallest = E{} + 1e-8;
  const auto below = squared_distance < smallest;
  const E log = logarithm<double>(below ? smallest : squared_distance);
  const E half_log = 0.5 * log + (squared_distance - squared_distance);
  return {squared_distance * half_log, half_log + (below ? E{} : E{} + 0.5)};
}

template <typename E>
GSALIGN_INLINE E absolute(const E& value) {
  return value < E{} ? -value : value;
}
template <typename E>
GSALIGN_INLINE E larger(const E& a, const E& b) {
  return a < b ? b : a;
}

// sum_k a[k] b[k]
GSALIGN_INLINE double dot(const double* a, const double* b, std::int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t k = 0; k < count; ++k) {
    sum += a[k] * b[k];
  }
  return sum;
}
template <typename E>
GSALIGN_INLINE E dot(const E* a, const E* b, std::int64_t count) {
  E sums[4] = {};  // in flight at once, as each takes a few cycles
  std::int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (std::int64_t i = 0; i < 4; ++i) {
      sums[i] += a[k + i] * b[k + i];
    }
  }
  for (; k < count; ++k) {
    sums[0] += a[k] * b[k];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sums[r] = sum_k rows[r][k] b[k], for four rows at once: `b` is read once for them.
GSALIGN_INLINE void four_dots(
    const double* const rows[4], const double* b, std::int64_t count, double sums[4]) {
  const double *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  double s0 = 0.0, s1 = 0.0, s2 = 0.0, s3 = 0.0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (std::int64_t k = 0; k < count; ++k) {
    s0 += r0[k] * b[k];
    s1 += r1[k] * b[k];
    s2 += r2[k] * b[k];
    s3 += r3[k] * b[k];
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}
template <typename E>
GSALIGN_INLINE void four_dots(const E* const rows[4], const E* b, std::int64_t count, E sums[4]) {
  const E *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  E s0{}, s1{}, s2{}, s3{};
  for (std::int64_t k = 0; k < count; ++k) {
    const E factor = b[k];
    s0 += r0[k] * factor;
    s1 += r1[k] * factor;
    s2 += r2[k] * factor;
    s3 += r3[k] * factor;
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

// The largest magnitude of a row, 0 of none.
GSALIGN_INLINE double largest_of(const double* x, std::int64_t count) {
  double largest = 0.0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t k = 0; k < count; ++k) {
    largest = __builtin_fabs(x[k]) > largest ? __builtin_fabs(x[k]) : largest;
  }
  return largest;
}
template <typename E>
GSALIGN_INLINE E largest_of(const E* x, std::int64_t count) {
  E largest{};
  for (std::int64_t k = 0; k < count; ++k) {
    largest = larger(largest, absolute(x[k]));
  }
  return largest;
}

// y[k] += factor x[k]
template <typename E>
GSALIGN_INLINE void add_scaled(E* __restrict y, const E& factor, const E* x, std::int64_t count) {
#pragma GCC ivdep
  for (std::int64_t k = 0; k < count; ++k) {
    y[k] += factor * x[k];
  }
}

// One system, or one per lane, in size(count) elements of working memory.
template <typename E>
class System {
 public:
  // Elements of the factors: packed lower triangle of Phi' and L, reflections with R, their scales.
  static constexpr std::int64_t size(std::int64_t count) {
    return count * (count + 1) / 2 + 3 * count + 3;
  }

  System(E* memory, std::int64_t count)
      : count_(count),
        triangle_(memory),
        reflections_(memory + count * (count + 1) / 2),
        scales_(reflections_ + 3 * count) {}

  // Why a sample was not solved: 0 it was, 1 its system is singular, 2 its points are not finite.
  struct Outcome {
    E singular, finite;  // 0 or 1; 0 or NaN

    std::int32_t info(std::int64_t index) const {
      if (lane(finite, index) != 0.0) {
        return 2;
      }
      return lane(singular, index) != 0.0 ? 1 : 0;
    }
  };

  // Factors the system of the points (x, y), `count` each; `work` has 4 count elements.
  GSALIGN_INLINE Outcome factor(const E* x, const E* y, double regularization, E* work) {
    const E largest = assemble(x, y, regularization);
    E farthest = E{} + 1.0;
    Outcome outcome{};
    for (std::int64_t i = 0; i < count_; ++i) {
      farthest = larger(farthest, larger(absolute(x[i]), absolute(y[i])));
      outcome.finite += (x[i] - x[i]) + (y[i] - y[i]);
    }
    const double tolerance = static_cast<double>(count_) * std::numeric_limits<double>::epsilon();
    const E vanishing_height = (2.0 * tolerance * __builtin_sqrt(double(count_))) * farthest;
    for (std::int64_t j = 0; j < 3; ++j) {
      const E height = absolute(reflect(j));
      // The rounding of the second column reaches the third multiplied by what ties the two.
      const E magnified = j < 2 ? E{} + 1.0 : 1.0 + absolute(r(1, 2) / r(1, 1));
      outcome.singular = height <= vanishing_height * magnified ? E{} + 1.0 : outcome.singular;
    }
    for (std::int64_t j = 0; j < 3; ++j) {
      transform(j, work, work + count_);
    }
    const E vanishing_pivot = tolerance * (largest + regularization);
    const E smallest_pivot = cholesky(work);
    outcome.singular = smallest_pivot <= vanishing_pivot ? E{} + 1.0 : outcome.singular;
    return outcome;
  }

  // Makes every later result of one sample NaN.
  GSALIGN_INLINE void spoil(std::int64_t index) {
    for (std::int64_t j = 0; j < 3; ++j) {
      set_lane(scales_[j], index, std::numeric_limits<double>::quiet_NaN());
    }
  }

  // Solves in place for one right-hand side [g1 (count), g2 (3)] -> [w, a].
  GSALIGN_INLINE void solve(E* g) const {
    for (std::int64_t j = 0; j < 3; ++j) {
      apply(j, g);
    }
    E* g2 = g + count_;
    const E w0 = g2[0] / r(0, 0);
    const E w1 = (g2[1] - r(0, 1) * w0) / r(1, 1);
    const E w2 = (g2[2] - r(0, 2) * w0 - r(1, 2) * w1) / r(2, 2);
    const E w[3] = {w0, w1, w2};
    E t[3];
    for (std::int64_t c = 0; c < 3; ++c) {
      t[c] = g[c];
      for (std::int64_t d = 0; d < 3; ++d) {
        t[c] -= (c < d ? row(d)[c] : row(c)[d]) * w[d];
      }
    }
    for (std::int64_t i = 3; i < count_; ++i) {
      const E* l = row(i);
      const E rest = g[i] - (l[0] * w0 + l[1] * w1 + l[2] * w2) - dot(l + 3, g + 3, i - 3);
      g[i] = rest * l[i];
    }
    for (std::int64_t i = count_; i-- > 3;) {
      const E* l = row(i);
      g[i] *= l[i];
      add_scaled(g + 3, -g[i], l + 3, i - 3);
      for (std::int64_t c = 0; c < 3; ++c) {
        t[c] -= l[c] * g[i];
      }
    }
    g[0] = w0;
    g[1] = w1;
    g[2] = w2;
    for (std::int64_t j = 3; j-- > 0;) {
      apply(j, g);
    }
    g2[2] = t[2] / r(2, 2);
    g2[1] = (t[1] - r(1, 2) * g2[2]) / r(1, 1);
    g2[0] = (t[0] - r(0, 1) * g2[1] - r(0, 2) * g2[2]) / r(0, 0);
  }

 private:
  E* row(std::int64_t i) const { return triangle_ + i * (i + 1) / 2; }
  // R stands in the reflections, on and above their diagonal.
  const E& r(std::int64_t i, std::int64_t j) const { return reflections_[j * count_ + i]; }

  // Phi + reg I into the triangle, [1, x, y] into the reflections; the largest entry of Phi.
  GSALIGN_INLINE E assemble(const E* x, const E* y, double regularization) {
    E largest{};
    for (std::int64_t i = 0; i < count_; ++i) {
      E* phi = row(i);
      const E xi = x[i], yi = y[i];
#pragma GCC ivdep
      for (std::int64_t j = 0; j < i; ++j) {
        const E dx = xi - x[j], dy = yi - y[j];
        phi[j] = lane_basis(dx * dx + dy * dy).value;
      }
      largest = larger(largest, largest_of(phi, i));
      phi[i] = E{} + regularization;
      reflections_[i] = E{} + 1.0;
      reflections_[count_ + i] = x[i];
      reflections_[2 * count_ + i] = y[i];
    }
    return largest;
  }

  // Column j of P to its reflection: v below the diagonal (v_j = 1), R on and above it; the columns
  // after it are transformed. Returns the element on the diagonal of R.
  GSALIGN_INLINE E reflect(std::int64_t j) {
    E* v = reflections_ + j * count_;
    const E norm = square_root(dot(v + j, v + j, count_ - j));
    const E alpha = v[j];
    const E beta = alpha < E{} ? norm : -norm;
    scales_[j] = (beta - alpha) / beta;
    const E inverse = 1.0 / (alpha - beta);
    for (std::int64_t i = j + 1; i < count_; ++i) {
      v[i] *= inverse;
    }
    v[j] = beta;
    for (std::int64_t later = j + 1; later < 3; ++later) {
      apply(j, reflections_ + later * count_);
    }
    return beta;
  }

  // g = H_j g
  GSALIGN_INLINE void apply(std::int64_t j, E* g) const {
    const E* v = reflections_ + j * count_;
    const std::int64_t below = count_ - j - 1;
    const E along = scales_[j] * (g[j] + dot(v + j + 1, g + j + 1, below));
    g[j] -= along;
    add_scaled(g + j + 1, -along, v + j + 1, below);
  }

  // Phi = H_j Phi H_j, as Phi - v w^T - w v^T.
  GSALIGN_INLINE void transform(std::int64_t j, E* v, E* w) {
    const E* stored = reflections_ + j * count_;
    for (std::int64_t i = 0; i < count_; ++i) {
      v[i] = i < j ? E{} : (i == j ? E{} + 1.0 : stored[i]);
      w[i] = E{};
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      const E* phi = row(i);
      const E vi = v[i];
      E sum = phi[i] * vi;
      sum += dot(phi, v, i);
      add_scaled(w, vi, phi, i);
      w[i] += sum;
    }
    const E scale = scales_[j];
    const E half = 0.5 * scale * scale * dot(w, v, count_);
    for (std::int64_t i = 0; i < count_; ++i) {
      w[i] = scale * w[i] - half * v[i];
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      E* phi = row(i);
      const E vi = v[i], wi = w[i];
#pragma GCC ivdep
      for (std::int64_t k = 0; k <= i; ++k) {
        phi[k] -= vi * w[k] + wi * v[k];
      }
    }
  }

  // L in place, the inverses of its diagonal on the diagonal; returns the smallest pivot. `work`
  // has 4 count elements.
  GSALIGN_INLINE E cholesky(E* work) {
    if constexpr (kLanesOf<E> > 1) {
      return cholesky_by_rows(work);
    } else {
      return cholesky_by_panels(work);
    }
  }

  // Four rows at a time, as dot products with the rows above, each read once for the four: for
  // lanes, whose products need no sum across a vector.
  GSALIGN_INLINE E cholesky_by_rows(E* work) {
    E smallest = E{} + std::numeric_limits<double>::infinity();
    for (std::int64_t first = 3; first < count_; first += 4) {
      const std::int64_t rows = std::min<std::int64_t>(4, count_ - first);
      E* block[4];
      for (std::int64_t i = 0; i < 4; ++i) {
        block[i] = row(first + std::min(i, rows - 1));
      }
      const E* from[4] = {block[0] + 3, block[1] + 3, block[2] + 3, block[3] + 3};
      for (std::int64_t j = 3; j < first; ++j) {
        const E* above = row(j);
        E sums[4];
        four_dots(from, above + 3, j - 3, sums);
        for (std::int64_t i = 0; i < rows; ++i) {
          work[i] = (block[i][j] - sums[i]) * above[j];
        }
        for (std::int64_t i = 0; i < rows; ++i) {
          block[i][j] = work[i];
        }
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = first; j < first + i; ++j) {
          const E* above = row(j);
          block[i][j] = (block[i][j] - dot(block[i] + 3, above + 3, j - 3)) * above[j];
        }
        const std::int64_t own = first + i;
        const E pivot = block[i][own] - dot(block[i] + 3, block[i] + 3, own - 3);
        smallest = pivot < smallest ? pivot : smallest;
        block[i][own] = 1.0 / square_root(pivot);
      }
    }
    return smallest;
  }

  // Four columns at a time, taken off the rows behind them along the rows: for one sample, whose
  // vectors lie along the rows.
  GSALIGN_INLINE E cholesky_by_panels(E* work) {
    E smallest = E{} + std::numeric_limits<double>::infinity();
    for (std::int64_t first = 3; first < count_; first += 4) {
      const std::int64_t columns = std::min<std::int64_t>(4, count_ - first);
      // Columns of the panel, each contiguous; those there are none of are zero.
      E* panel[4] = {work, work + count_, work + 2 * count_, work + 3 * count_};
      std::fill_n(work, 4 * count_, E{});
      for (std::int64_t c = 0; c < columns; ++c) {
        const std::int64_t own = first + c;
        E pivot = row(own)[own];
        for (std::int64_t d = 0; d < c; ++d) {
          pivot -= panel[d][own] * panel[d][own];
        }
        smallest = pivot < smallest ? pivot : smallest;
        const E inverse = 1.0 / square_root(pivot);
        row(own)[own] = inverse;
        for (std::int64_t i = own + 1; i < count_; ++i) {
          E value = row(i)[own];
          for (std::int64_t d = 0; d < c; ++d) {
            value -= panel[d][i] * panel[d][own];
          }
          row(i)[own] = panel[c][i] = value * inverse;
        }
      }
      for (std::int64_t i = first + columns; i < count_; ++i) {
        E* to = row(i);
        const E f0 = panel[0][i], f1 = panel[1][i], f2 = panel[2][i], f3 = panel[3][i];
#pragma GCC ivdep
        for (std::int64_t k = first + columns; k <= i; ++k) {
          to[k] -= (f0 * panel[0][k] + f1 * panel[1][k]) + (f2 * panel[2][k] + f3 * panel[3][k]);
        }
      }
    }
    return smallest;
  }

  std::int64_t count_;
  E *triangle_, *reflections_, *scales_;
};

}  // namespace gsalign::tps
