// CUDA kernels of thin-plate splines: solve and its adjoint, evaluation and its gradients.
//
// Solve. For K control points and V right-hand sides, in double for every type of coordinates:
//   matrix       K^2/2 radial functions, each a logarithm of about 40 operations
//   projection   three reflections Q of [1, x, y]; Q^T Phi Q as one update of rank 6: 6 K^2
//   factors      n^3/6 multiply-adds with n = K - 3: 152 k for K = 100, of an H100's 64 per cycle
//                and multiprocessor; but each reads two numbers of shared memory and writes one,
//                and shared memory gives 16 doubles a cycle, so 3 n^3/96 cycles: 29 k for K = 100
//   solve        n^2 multiply-adds per right-hand side, in 2 n steps that wait for one another
// against bytes of global memory that do not matter: the factors, 4 K^2 per sample, are the most of
// them. So latency of the steps bounds small K and shared memory's width large K, and the design
// keeps steps short: one block per sample, whose matrix lies in shared memory as a packed lower
// triangle (66 KB for K = 128) and passes once through one launch. The projected matrix is positive
// definite, so there are no pivots to search and the control flow is fixed. The factorisation is
// L D L^T with columns left unscaled, A_ij -= A_is A_js / A_ss, which needs one barrier a step:
// nobody writes what another reads. Matrices that do not fit are worked on where the factors are
// kept, in global memory, by the same code. No thread waits for the host, nothing depends on data.
//
// Evaluation, see tps_device.cuh: a thread per point, 35 + V instructions per control point and
// 8 bytes of output at V = 2. With K = 16 a point's 592 instructions take ten times what writing
// those does (an H200's 33 T instructions and 4.3 TB a second, computed). So it is bound by
// arithmetic. Backward for coefficients and control points is the same arithmetic once more, laid
// over (slice of the points, control point); each block leaves one row of sums, and a second launch
// adds the rows in a fixed order. The gradient of the points themselves is a launch of its own with
// a thread per point. No atomics, so the same bits on every run.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/launch.h"
#include "tps.h"
#include "tps_device.cuh"
#include "tps_plan.h"

namespace gsalign::tps {

// ---- solve ----

// Where things lie in shared memory, see SolveLayout; the matrix perhaps in global memory.
struct System {
  double* r;           // R by rows: 00, 01, 02, 11, 12, 22
  double* dots;        // up to 6 kSolveColumns dot products
  double* affine;      // [3, columns]: the first three rows of Q^T w
  double* warps;       // one number per warp
  double* reflectors;  // [3, points], each of squared length 2; Q = H_0 H_1 H_2, H = I - v v^T
  double* work;
  double* gradients;  // [points, 2]
  double* matrix;
  int points;

  GSALIGN_DEVICE static System make(int points, const SolveLayout& layout, double* in_place) {
    double* shared = reinterpret_cast<double*>(shared_memory());
    System system{};
    system.r = shared;
    system.dots = shared + 8;
    system.affine = system.dots + 6 * kSolveColumns;
    system.warps = system.affine + 3 * kSolveColumns;
    static_assert(
        8 + 9 * kSolveColumns + kSolveThreads / kWarpSize <= kHeadDoubles, "the head is too small");
    system.reflectors = shared + layout.reflectors;
    system.work = shared + layout.work;
    system.gradients = shared + layout.gradients;
    system.matrix = in_place != nullptr ? in_place : shared + layout.matrix;
    system.points = points;
    return system;
  }
  GSALIGN_DEVICE double* reflector(int a) const { return reflectors + a * points; }
};

// Q = I - V T V^T with T upper triangular, ones on its diagonal.
struct Products {
  double t01, t02, t12;
};

struct Triple {
  double a, b, c;
};
GSALIGN_DEVICE Triple apply(const Products& t, const Triple& v) {  // T v
  return {v.a + t.t01 * v.b + t.t02 * v.c, v.b + t.t12 * v.c, v.c};
}
GSALIGN_DEVICE Triple apply_transposed(const Products& t, const Triple& v) {  // T^T v
  return {v.a, t.t01 * v.a + v.b, t.t02 * v.a + t.t12 * v.b + v.c};
}

GSALIGN_DEVICE double larger(double a, double b) {
  return a < b ? b : a;
}

// out[d] = sum of term(d, i) over first <= i < last, a warp to each, in a fixed order. Visible
// after the caller's barrier.
template <typename Term>
GSALIGN_DEVICE void warp_dots(int dots, int first, int last, double* out, Term term) {
  const int lane = thread_index() % kWarpSize;
  for (int d = thread_index() / kWarpSize; d < dots; d += block_size() / kWarpSize) {
    double sum = 0.0;
    for (int i = first + lane; i < last; i += kWarpSize) {
      sum += term(d, i);
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
    }
    if (lane == 0) {
      out[d] = sum;
    }
  }
}

// Calls visit(i, j) for first <= j <= i < last: 16 threads to a row, which read and write 128
// consecutive bytes of it.
template <typename Visit>
GSALIGN_DEVICE void for_triangle(int first, int last, Visit visit) {
  for (int i = first + thread_index() / 16; i < last; i += block_size() / 16) {
    for (int j = first + thread_index() % 16; j <= i; j += 16) {
      visit(i, j);
    }
  }
}

// The largest |coordinate|, NaN when one is not finite; every warp finds it for itself. The points
// lie where reflectors 1 and 2 will.
GSALIGN_DEVICE double largest_coordinate(const System& system) {
  double largest = 0.0, finite = 0.0;
  for (int i = thread_index() % kWarpSize; i < system.points; i += kWarpSize) {
    const double x = system.reflector(1)[i], y = system.reflector(2)[i];
    largest = larger(largest, larger(std::fabs(x), std::fabs(y)));
    finite += (x - x) + (y - y);  // 0, or NaN for infinity and NaN
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    largest = larger(largest, shuffle_xor(largest, mask));
    finite += shuffle_xor(finite, mask);
  }
  return largest + finite;
}

// Fills the matrix with Phi + reg I and returns the largest |entry| of Phi.
GSALIGN_DEVICE double assemble(const System& system, double regularization) {
  const double* x = system.reflector(1);
  const double* y = system.reflector(2);
  double largest = 0.0;
  for_triangle(0, system.points, [&](int i, int j) {
    const double dx = x[i] - x[j], dy = y[i] - y[j];
    const double u = radial_basis(dx * dx + dy * dy).value;
    largest = larger(largest, std::fabs(u));
    system.matrix[triangle(i) + j] = i == j ? u + regularization : u;
  });
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    largest = larger(largest, shuffle_xor(largest, mask));
  }
  if (thread_index() % kWarpSize == 0) {
    system.warps[thread_index() / kWarpSize] = largest;
  }
  barrier();
  for (int w = 0; w < block_size() / kWarpSize; ++w) {
    largest = larger(largest, system.warps[w]);
  }
  return largest;
}

// [1, x, y] -> R and the reflectors that make it, in place.
GSALIGN_DEVICE void reflect(const System& system) {
  for (int step = 0; step < 3; ++step) {
    double* own = system.reflector(step);
    warp_dots(3 - step, step, system.points, system.dots, [&](int d, int i) {
      return own[i] * system.reflector(step + d)[i];
    });
    barrier();
    const double norm = std::sqrt(system.dots[0]);
    const double head = own[step];
    const double diagonal = head > 0.0 ? -norm : norm;  // away from the head: nothing cancels
    const double half_square = norm * (norm + std::fabs(head));  // of the unscaled reflector
    double factor[2] = {0.0, 0.0}, row[2] = {0.0, 0.0};
    for (int k = step + 1; k < 3; ++k) {
      const double other = system.reflector(k)[step];
      factor[k - step - 1] = (system.dots[k - step] - diagonal * other) / half_square;
      row[k - step - 1] = other - (head - diagonal) * factor[k - step - 1];
    }
    barrier();  // all have read the heads
    const double scale = 1.0 / std::sqrt(half_square);
    for (int i = thread_index(); i < system.points; i += block_size()) {
      const double v = i < step ? 0.0 : (i == step ? head - diagonal : own[i]);
      for (int k = step + 1; k < 3; ++k) {
        system.reflector(k)[i] -= v * factor[k - step - 1];
      }
      own[i] = v * scale;
    }
    if (thread_index() == 0) {
      const int place = step == 0 ? 0 : (step == 1 ? 3 : 5);
      system.r[place] = diagonal;
      for (int k = step + 1; k < 3; ++k) {
        system.r[place + k - step] = row[k - step - 1];
      }
    }
    barrier();
  }
}

// T of the reflectors. Ends with the dot products still being read: a barrier must come before the
// next are made.
GSALIGN_DEVICE Products products_of(const System& system) {
  warp_dots(3, 0, system.points, system.dots, [&](int d, int i) {
    return system.reflector(d == 2 ? 1 : 0)[i] * system.reflector(d == 0 ? 1 : 2)[i];
  });
  barrier();
  const double d01 = system.dots[0], d02 = system.dots[1], d12 = system.dots[2];
  return {-d01, d01 * d12 - d02, -d12};
}

// matrix -> Q^T matrix Q = matrix - V W^T - W V^T, W = Y - V S / 2, Y = matrix V T, S = T^T V^T Y.
GSALIGN_DEVICE void project(const System& system, const Products& t) {
  const int points = system.points;
  const double *v0 = system.reflector(0), *v1 = system.reflector(1), *v2 = system.reflector(2);
  double *w0 = system.work, *w1 = w0 + points, *w2 = w1 + points;
  for (int i = thread_index(); i < points; i += block_size()) {
    Triple sum{0.0, 0.0, 0.0};
    const double* row = system.matrix + triangle(i);
    for (int j = 0; j < points; ++j) {
      const double entry = j <= i ? row[j] : system.matrix[triangle(j) + i];
      sum.a += entry * v0[j];
      sum.b += entry * v1[j];
      sum.c += entry * v2[j];
    }
    // Row i of (matrix V) T: the transposed product, as a row times T is.
    const Triple y = apply_transposed(t, sum);
    w0[i] = y.a;
    w1[i] = y.b;
    w2[i] = y.c;
  }
  barrier();
  warp_dots(9, 0, points, system.dots, [&](int d, int i) {
    return system.reflector(d / 3)[i] * system.work[d % 3 * points + i];
  });
  barrier();
  const double* m = system.dots;                              // V^T Y by rows
  const Triple s0 = apply_transposed(t, {m[0], m[3], m[6]});  // columns of S
  const Triple s1 = apply_transposed(t, {m[1], m[4], m[7]});
  const Triple s2 = apply_transposed(t, {m[2], m[5], m[8]});
  for (int i = thread_index(); i < points; i += block_size()) {
    w0[i] -= 0.5 * (v0[i] * s0.a + v1[i] * s0.b + v2[i] * s0.c);
    w1[i] -= 0.5 * (v0[i] * s1.a + v1[i] * s1.b + v2[i] * s1.c);
    w2[i] -= 0.5 * (v0[i] * s2.a + v1[i] * s2.b + v2[i] * s2.c);
  }
  barrier();
  for_triangle(0, points, [&](int i, int j) {
    system.matrix[triangle(i) + j] -= v0[i] * w0[j] + w0[i] * v0[j] + v1[i] * w1[j] +
                                      w1[i] * v1[j] + v2[i] * w2[j] + w2[i] * v2[j];
  });
  barrier();
}

// L D L^T of rows and columns 3 on, columns unscaled: A_is = L_is D_s, and 1 / D_s on the diagonal.
// Returns whether every pivot was above `smallest`; all threads find the same.
GSALIGN_DEVICE bool factorize(const System& system, double smallest) {
  bool definite = true;
  double inverse = 0.0;
  for (int step = 3; step < system.points; ++step) {
    const double pivot = system.matrix[triangle(step) + step];
    if (thread_index() == 0 && step > 3) {
      system.matrix[triangle(step) - 1] = inverse;  // of the step before, which no one reads now
    }
    definite = definite && pivot > smallest;  // a NaN is not
    inverse = 1.0 / pivot;
    for (int i = step + 1 + thread_index() / 16; i < system.points; i += block_size() / 16) {
      double* row = system.matrix + triangle(i);
      const double factor = row[step] * inverse;
      for (int j = step + 1 + thread_index() % 16; j <= i; j += 16) {
        row[j] -= factor * system.matrix[triangle(j) + step];
      }
    }
    barrier();
  }
  if (thread_index() == 0 && system.points > 3) {
    system.matrix[triangle(system.points) - 1] = inverse;
  }
  barrier();
  return definite;
}

// Solves for the right-hand sides [points + 3, columns] in system.work, in place, between barriers
// of its own: the caller's barrier must come before the call, and after reading the result.
GSALIGN_DEVICE void substitute(const System& system, const Products& t, int columns) {
  const int points = system.points;
  const double* r = system.r;
  const double* matrix = system.matrix;
  double* sides = system.work;
  double* below = sides + points * columns;  // rows of the affine part
  // Threads are laid over (row, column); a few may be left over.
  const int column = thread_index() % columns;
  const int rows = block_size() / columns;
  const int row = thread_index() / columns < rows ? thread_index() / columns : points;

  // R^T w_1 = g_2, and V^T g_1.
  if (thread_index() < columns) {
    const double a = below[column] / r[0];
    const double b = (below[columns + column] - r[1] * a) / r[3];
    system.affine[column] = a;
    system.affine[columns + column] = b;
    system.affine[2 * columns + column] =
        (below[2 * columns + column] - r[2] * a - r[4] * b) / r[5];
  }
  warp_dots(3 * columns, 0, points, system.dots, [&](int d, int i) {
    return system.reflector(d / columns)[i] * sides[i * columns + d % columns];
  });
  barrier();
  const Triple w1{
      system.affine[column], system.affine[columns + column], system.affine[2 * columns + column]};
  const Triple projected = apply_transposed(
      t, {system.dots[column], system.dots[columns + column], system.dots[2 * columns + column]});
  // Q^T g_1, and below row 3 less the columns of Phi' that w_1 answers for.
  for (int i = row; i < points; i += rows) {
    double value = sides[i * columns + column] - system.reflector(0)[i] * projected.a -
                   system.reflector(1)[i] * projected.b - system.reflector(2)[i] * projected.c;
    if (i >= 3) {
      const double* entry = matrix + triangle(i);
      value -= entry[0] * w1.a + entry[1] * w1.b + entry[2] * w1.c;
    }
    sides[i * columns + column] = value;
  }
  barrier();
  for (int step = 3; step < points - 1; ++step) {
    const double solved = sides[step * columns + column] * matrix[triangle(step) + step];
    for (int i = step + 1 + row; i < points; i += rows) {
      sides[i * columns + column] -= matrix[triangle(i) + step] * solved;
    }
    barrier();
  }
  for (int step = points - 1; step > 3; --step) {
    const double solved = sides[step * columns + column] * matrix[triangle(step) + step];
    for (int i = 3 + row; i < step; i += rows) {
      sides[i * columns + column] -= matrix[triangle(step) + i] * solved;
    }
    barrier();
  }
  for (int i = 3 + row; i < points; i += rows) {
    sides[i * columns + column] *= matrix[triangle(i) + i];
  }
  barrier();
  // V^T [w_1; z], and Phi'[3:, :3]^T z.
  warp_dots(6 * columns, 0, points, system.dots, [&](int d, int i) {
    const int c = d % columns, a = d / columns;
    if (a < 3) {
      return system.reflector(a)[i] *
             (i < 3 ? system.affine[i * columns + c] : sides[i * columns + c]);
    }
    return i < 3 ? 0.0 : matrix[triangle(i) + a - 3] * sides[i * columns + c];
  });
  barrier();
  const double* dot = system.dots + column;
  const Triple back = apply(t, {dot[0], dot[columns], dot[2 * columns]});
  const auto rotated = [&](int i, double value) {
    return value - system.reflector(0)[i] * back.a - system.reflector(1)[i] * back.b -
           system.reflector(2)[i] * back.c;
  };
  for (int i = 3 + row; i < points; i += rows) {
    sides[i * columns + column] = rotated(i, sides[i * columns + column]);
  }
  if (thread_index() < columns) {  // the first three rows, before and after they are overwritten
    const double a =
        sides[column] - dot[3 * columns] - matrix[0] * w1.a - matrix[1] * w1.b - matrix[3] * w1.c;
    const double b = sides[columns + column] - dot[4 * columns] - matrix[1] * w1.a -
                     matrix[2] * w1.b - matrix[4] * w1.c;
    const double c = sides[2 * columns + column] - dot[5 * columns] - matrix[3] * w1.a -
                     matrix[4] * w1.b - matrix[5] * w1.c;
    const double along_y = c / r[5];
    const double along_x = (b - r[4] * along_y) / r[3];
    below[column] = (a - r[1] * along_x - r[2] * along_y) / r[0];
    below[columns + column] = along_x;
    below[2 * columns + column] = along_y;
    sides[column] = rotated(0, w1.a);
    sides[columns + column] = rotated(1, w1.b);
    sides[2 * columns + column] = rotated(2, w1.c);
  }
  barrier();
}

// Blocks over (sample, share of the columns); the first of a sample writes `factors` [batch,
// factor_doubles(points)] and `info` [batch]. In place a sample has only that one.
template <typename R, bool kStaged>
GSALIGN_KERNEL(kSolveThreads, 2)
tps_solve_kernel(
    const R* control_points, const R* values, double regularization, int points, int columns,
    int columns_at_once, int share, int splits, R* coefficients, double* factors, int* info) {
  const std::int64_t sample = block_index() / splits;
  const bool keeps = block_index() % splits == 0;
  double* own_factors = factors + sample * factor_doubles(points);
  const System system = System::make(
      points, SolveLayout::make(points, columns_at_once, false, kStaged),
      kStaged ? nullptr : own_factors);
  const R* at = control_points + sample * points * 2;
  for (int i = thread_index(); i < points; i += block_size()) {
    system.reflector(0)[i] = 1.0;
    system.reflector(1)[i] = static_cast<double>(at[2 * i]);
    system.reflector(2)[i] = static_cast<double>(at[2 * i + 1]);
  }
  barrier();
  const double coordinate = largest_coordinate(system);
  const double phi = assemble(system, regularization);
  reflect(system);
  const Products t = products_of(system);
  project(system, t);
  const double rounding = points * 2.220446049250313e-16;
  const bool definite = factorize(system, rounding * (phi + regularization));

  // Points on a line leave R_22 a few roundings, which R_12 / R_11 magnifies: how much the second
  // reflection turns when its column is rounded.
  const double smallest =
      2.0 * rounding * std::sqrt(static_cast<double>(points)) * larger(1.0, coordinate);
  const double magnified = smallest * (1.0 + std::fabs(system.r[4] / system.r[3]));
  bool independent = true;
  for (const int place : {0, 3, 5}) {
    const double diagonal = std::fabs(system.r[place]);
    independent =
        independent && diagonal > (place == 5 ? magnified : smallest) && diagonal - diagonal == 0.0;
  }
  const bool finite = coordinate - coordinate == 0.0;
  const bool solved = finite && independent && definite;
  const double nan = NAN;
  if (keeps && thread_index() == 0) {
    info[sample] = solved ? 0 : (finite ? 1 : 2);
  }

  // A sample without a solution gets NaN for R, from which every gradient becomes NaN.
  const int entries = triangle(points);
  if (kStaged && keeps) {
    for (int i = thread_index(); i < entries; i += block_size()) {
      own_factors[i] = system.matrix[i];
    }
  }
  for (int a = 0; keeps && a < 3; ++a) {
    double* target = own_factors + entries + reflector_start(a, points);
    for (int i = a + thread_index(); i < points; i += block_size()) {
      target[i] = system.reflector(a)[i];
    }
  }
  for (int i = thread_index(); keeps && i < 6; i += block_size()) {
    own_factors[entries + 3 * points - 3 + i] = solved ? system.r[i] : nan;
  }

  const int begin = block_index() % splits * share;
  const int end = columns - begin < share ? columns : begin + share;
  for (int first = begin; first < end; first += columns_at_once) {
    const int here = end - first < columns_at_once ? end - first : columns_at_once;
    for (int i = thread_index(); i < (points + 3) * here; i += block_size()) {
      const std::int64_t row = i / here;
      system.work[i] =
          row < points
              ? static_cast<double>(values[(sample * points + row) * columns + first + i % here])
              : 0.0;
    }
    barrier();
    substitute(system, t, here);
    for (int i = thread_index(); i < (points + 3) * here; i += block_size()) {
      coefficients[(sample * (points + 3) + i / here) * columns + first + i % here] =
          static_cast<R>(solved ? system.work[i] : nan);
    }
    // A thread overwrites only what it has read itself, so no barrier.
  }
}

// The adjoint, blocks over (sample, share of the columns): L is symmetric, so L z = g is the same
// solve; the values get z[:points], the matrix gets -z w^T, which the control points are chained
// to. Where a sample has several blocks, theirs lie in `partials` [batch, splits, points, 2].
template <typename R, bool kStaged>
GSALIGN_KERNEL(kSolveThreads, 2)
tps_solve_backward_kernel(
    const R* grad, const R* coefficients, const R* control_points, const double* factors,
    int points, int columns, int columns_at_once, int share, int splits, R* grad_control_points,
    R* grad_values, double* partials) {
  const std::int64_t sample = block_index() / splits;
  const double* own_factors = factors + sample * factor_doubles(points);
  const System system = System::make(
      points, SolveLayout::make(points, columns_at_once, true, kStaged),
      kStaged ? nullptr : const_cast<double*>(own_factors));  // only read from here on
  const R* at = control_points + sample * points * 2;
  const int entries = triangle(points);
  if (kStaged) {
    for (int i = thread_index(); i < entries; i += block_size()) {
      system.matrix[i] = own_factors[i];
    }
  }
  for (int a = 0; a < 3; ++a) {
    const double* source = own_factors + entries + reflector_start(a, points);
    for (int i = thread_index(); i < points; i += block_size()) {
      system.reflector(a)[i] = i < a ? 0.0 : source[i];
    }
  }
  for (int i = thread_index(); i < 6; i += block_size()) {
    system.r[i] = own_factors[entries + 3 * points - 3 + i];
  }
  for (int i = thread_index(); i < 2 * points; i += block_size()) {
    system.gradients[i] = 0.0;
  }
  barrier();
  const Products t = products_of(system);

  const int lane = thread_index() % kWarpSize;
  const int warps = block_size() / kWarpSize;
  const R* w = coefficients + sample * (points + 3) * columns;
  const int begin = block_index() % splits * share;
  const int end = columns - begin < share ? columns : begin + share;
  for (int first = begin; first < end; first += columns_at_once) {
    const int here = end - first < columns_at_once ? end - first : columns_at_once;
    for (int i = thread_index(); i < (points + 3) * here; i += block_size()) {
      system.work[i] = static_cast<double>(
          grad[(sample * (points + 3) + i / here) * columns + first + i % here]);
    }
    barrier();
    substitute(system, t, here);
    const double* z = system.work;
    for (int i = thread_index(); i < points * here; i += block_size()) {
      grad_values[(sample * points + i / here) * columns + first + i % here] = static_cast<R>(z[i]);
    }
    // -(z_i w_j + z_j w_i), over the columns here: what pulls on both entries (i, j) and (j, i).
    const auto pull = [&](int i, int j) {
      double sum = 0.0;
      for (int c = 0; c < here; ++c) {
        const double wi =
            static_cast<double>(w[static_cast<std::int64_t>(i) * columns + first + c]);
        const double wj =
            static_cast<double>(w[static_cast<std::int64_t>(j) * columns + first + c]);
        sum -= z[i * here + c] * wj + z[j * here + c] * wi;
      }
      return sum;
    };
    for (int i = thread_index() / kWarpSize; i < points; i += warps) {  // a warp to a control point
      const double x = static_cast<double>(at[2 * i]), y = static_cast<double>(at[2 * i + 1]);
      double gx = 0.0, gy = 0.0;
      for (int j = lane; j < points; j += kWarpSize) {
        const double dx = x - static_cast<double>(at[2 * j]);
        const double dy = y - static_cast<double>(at[2 * j + 1]);
        const double factor = 2.0 * radial_basis(dx * dx + dy * dy).slope * pull(i, j);
        gx += factor * dx;
        gy += factor * dy;
      }
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        gx += shuffle_xor(gx, mask);
        gy += shuffle_xor(gy, mask);
      }
      if (lane == 0) {
        system.gradients[2 * i] += gx + pull(i, points + 1);
        system.gradients[2 * i + 1] += gy + pull(i, points + 2);
      }
    }
    barrier();  // before the right-hand sides are overwritten, and for the sums below
  }
  for (int i = thread_index(); i < 2 * points; i += block_size()) {
    if (splits == 1) {
      grad_control_points[sample * points * 2 + i] = static_cast<R>(system.gradients[i]);
    } else {
      partials[static_cast<std::int64_t>(block_index()) * points * 2 + i] = system.gradients[i];
    }
  }
}

// ---- evaluation ----

// Given points [batch, count, 2], or the pixels of a map, the same for every sample.
template <typename R>
struct Points {
  const R* given;  // null for a map
  int count, height, width;
  bool align_corners;

  GSALIGN_DEVICE R x(std::int64_t sample, int n) const {
    return given != nullptr ? given[(sample * count + n) * 2]
                            : pixel_position<R>(n % width, width, align_corners);
  }
  GSALIGN_DEVICE R y(std::int64_t sample, int n) const {
    return given != nullptr ? given[(sample * count + n) * 2 + 1]
                            : pixel_position<R>(n / width, height, align_corners);
  }
};

// A batch of splines: coefficients [batch, points + 3, columns], control points [batch, points, 2].
template <typename R>
struct Splines {
  const R* coefficients;
  const R* control_points;
  int batch, points, columns;

  GSALIGN_DEVICE SplineSample<R> sample(std::int64_t index) const {
    return SplineSample<R>::of(coefficients, control_points, points, columns, index);
  }
};

// A thread per point; blocks over (sample, group of columns, chunk of points).
template <typename R, int kColumns>
GSALIGN_KERNEL(kSplineThreads)
tps_evaluate_kernel(Splines<R> splines, Points<R> points, int groups, int chunks, R* output) {
  const std::int64_t sample = block_index() / chunks / groups;
  const int column = block_index() / chunks % groups * kColumns;
  const int n = block_index() % chunks * block_size() + thread_index();
  const bool exists = n < points.count;
  R value[kColumns];
  evaluate_spline(
      splines.sample(sample), column, exists ? points.x(sample, n) : R(0),
      exists ? points.y(sample, n) : R(0), reinterpret_cast<Centre<R, kColumns>*>(shared_memory()),
      value);
  if (exists) {
    R* target = output + (sample * points.count + n) * splines.columns + column;
    GSALIGN_UNROLL
    for (int v = 0; v < kColumns; ++v) {
      if (column + v < splines.columns) {
        target[v] = value[v];
      }
    }
  }
}

// Blocks of the kernels of gradients that must fit on a multiprocessor: 64 registers a thread in
// the hot case, 128 else, or ptxas spills a few for the sake of occupancy.
template <typename R, int kColumns>
constexpr int gradient_blocks() {
  return sizeof(R) * kColumns == 8 ? 4 : 2;
}

// Gradient of the points, a thread per point; blocks over (sample, chunk of points).
template <typename R, int kColumns>
GSALIGN_KERNEL(kSplineThreads, gradient_blocks<R, kColumns>())
tps_points_backward_kernel(
    Splines<R> splines, Points<R> points, const R* grad, int chunks, R* grad_points) {
  const std::int64_t sample = block_index() / chunks;
  const int n = block_index() % chunks * block_size() + thread_index();
  const bool exists = n < points.count;
  const SplineSample<R> spline = splines.sample(sample);
  Centre<R, kColumns>* staged = reinterpret_cast<Centre<R, kColumns>*>(shared_memory());
  const R x = exists ? points.x(sample, n) : R(0);
  const R y = exists ? points.y(sample, n) : R(0);
  R gx = R(0), gy = R(0);
  for (int column = 0; column < spline.columns; column += kColumns) {
    R gradient[kColumns];
    GSALIGN_UNROLL
    for (int v = 0; v < kColumns; ++v) {
      gradient[v] = exists && column + v < spline.columns
                        ? grad[(sample * points.count + n) * spline.columns + column + v]
                        : R(0);
      gx += gradient[v] * spline.coefficient(spline.points + 1, column + v);
      gy += gradient[v] * spline.coefficient(spline.points + 2, column + v);
    }
    for (int first = 0; first < spline.points; first += kCentreChunk) {
      const int left = spline.points - first;
      const int count = left < kCentreChunk ? left : kCentreChunk;
      stage_centres(staged, spline, first, count, column);
      barrier();
      for (int k = 0; k < count; ++k) {
        const Centre<R, kColumns> centre = staged[k];
        const R dx = x - centre.x, dy = y - centre.y;
        R pull = R(0);
        GSALIGN_UNROLL
        for (int v = 0; v < kColumns; ++v) {
          pull += gradient[v] * centre.weight[v];
        }
        pull *= R(2) * radial_basis(dx * dx + dy * dy).slope;
        gx += pull * dx;
        gy += pull * dy;
      }
      barrier();
    }
  }
  if (exists) {
    grad_points[(sample * points.count + n) * 2] = gx;
    grad_points[(sample * points.count + n) * 2 + 1] = gy;
  }
}

// Sums of the gradients of coefficients and control points over a tile of points; blocks over
// (sample, tile). `partials` [batch, tiles, partial_numbers()].
template <typename R, int kColumns>
GSALIGN_KERNEL(kSplineThreads, gradient_blocks<R, kColumns>())
tps_gradient_kernel(
    Splines<R> splines, Points<R> points, const R* grad, int tile_size, int tiles, R* partials) {
  const std::int64_t sample = block_index() / tiles;
  const int begin = block_index() % tiles * tile_size;
  const int left = points.count - begin;
  const int count = left < tile_size ? left : tile_size;
  const SplineSample<R> spline = splines.sample(sample);
  PointGradient<R, kColumns>* tile = reinterpret_cast<PointGradient<R, kColumns>*>(shared_memory());
  RowSums<R, kColumns>* scratch = reinterpret_cast<RowSums<R, kColumns>*>(
      shared_memory() + GradientLayout<R, kColumns>::make(tile_size, block_size()).scratch);
  R* partial = partials + block_index() * partial_numbers(spline.points, spline.columns);
  // Without columns the control points still get their zeros.
  for (int column = 0; column == 0 || column < spline.columns; column += kColumns) {
    for (int i = thread_index(); i < count; i += block_size()) {
      const int n = begin + i;
      PointGradient<R, kColumns> point;
      point.x = points.x(sample, n);
      point.y = points.y(sample, n);
      GSALIGN_UNROLL
      for (int v = 0; v < kColumns; ++v) {
        point.gradient[v] = column + v < spline.columns
                                ? grad[(sample * points.count + n) * spline.columns + column + v]
                                : R(0);
      }
      tile[i] = point;
    }
    barrier();
    accumulate_gradient(spline, column, tile, count, scratch, partial);
  }
}

// ---- launching: shared by the CUDA entry points and the host tests ----

template <typename R, typename Stream>
LaunchStatus launch_solve(
    const R* control_points, const R* values, double regularization, int batch, int points,
    int columns, const SolvePlan& plan, R* coefficients, double* factors, int* info, int device,
    Stream stream) {
  const auto launch = [&](auto staged) {
    constexpr auto kernel = &tps_solve_kernel<R, staged()>;
    const LaunchStatus status = allow_shared_memory<kernel>(plan.shared_bytes, device);
    if (status != kLaunched) {
      return status;
    }
    GSALIGN_LAUNCH(
        kernel, batch * plan.splits, plan.threads, plan.shared_bytes, stream, control_points,
        values, regularization, points, columns, plan.columns, plan.share, plan.splits,
        coefficients, factors, info);
    return launch_status();
  };
  return plan.staged ? launch(std::true_type{}) : launch(std::false_type{});
}

// `partials` has batch * splits * 2 * points doubles where the plan has several blocks per sample.
template <typename R, typename Stream>
LaunchStatus launch_solve_backward(
    const R* grad, const R* coefficients, const R* control_points, const double* factors, int batch,
    int points, int columns, const SolvePlan& plan, R* grad_control_points, R* grad_values,
    double* partials, int device, Stream stream) {
  const auto launch = [&](auto staged) {
    constexpr auto kernel = &tps_solve_backward_kernel<R, staged()>;
    const LaunchStatus status = allow_shared_memory<kernel>(plan.shared_bytes, device);
    if (status != kLaunched) {
      return status;
    }
    GSALIGN_LAUNCH(
        kernel, batch * plan.splits, plan.threads, plan.shared_bytes, stream, grad, coefficients,
        control_points, factors, points, columns, plan.columns, plan.share, plan.splits,
        grad_control_points, grad_values, partials);
    return launch_status();
  };
  const LaunchStatus status = plan.staged ? launch(std::true_type{}) : launch(std::false_type{});
  if (status != kLaunched || plan.splits == 1) {
    return status;
  }
  // The sum over blocks of a spline without columns: of control points alone.
  return launch_sum_partials(
      partials, static_cast<R*>(nullptr), grad_control_points, batch, points, 0, plan.splits,
      kSplineThreads, stream);
}

// Calls `launch` with the number of columns that a thread holds, as a type.
template <typename Launch>
LaunchStatus for_columns(int columns, Launch&& launch) {
  return columns <= 2 ? launch(std::integral_constant<int, 2>{})
                      : launch(std::integral_constant<int, 8>{});
}
inline int columns_per_thread(int columns) {
  return columns <= 2 ? 2 : 8;
}

// `chunks` blocks of `threads` points; batch, points.count and columns at least 1.
template <typename R, typename Stream>
LaunchStatus launch_evaluate(
    const Splines<R>& splines, const Points<R>& points, int threads, R* output, Stream stream) {
  const int chunks = (points.count + threads - 1) / threads;
  return for_columns(splines.columns, [&](auto held) {
    const int groups = (splines.columns + held() - 1) / held();
    GSALIGN_LAUNCH(
        (tps_evaluate_kernel<R, held()>), splines.batch * groups * chunks, threads,
        (centre_bytes<R, held()>(splines.points)), stream, splines, points, groups, chunks, output);
    return launch_status();
  });
}

// batch and points.count at least 1.
template <typename R, typename Stream>
LaunchStatus launch_points_backward(
    const Splines<R>& splines, const Points<R>& points, const R* grad, int threads, R* grad_points,
    Stream stream) {
  const int chunks = (points.count + threads - 1) / threads;
  return for_columns(splines.columns, [&](auto held) {
    GSALIGN_LAUNCH(
        (tps_points_backward_kernel<R, held()>), splines.batch * chunks, threads,
        (centre_bytes<R, held()>(splines.points)), stream, splines, points, grad, chunks,
        grad_points);
    return launch_status();
  });
}

// The most points of a tile for a number of columns.
template <typename R>
int most_tile_points(int columns) {
  return columns <= 2 ? tile_points<R, 2>() : tile_points<R, 8>();
}

// `partials` has batch * tiles * partial_numbers() values, tiles = ceil(points.count / tile). Both
// gradients are written even where there are no points. batch at least 1.
template <typename R, typename Stream>
LaunchStatus launch_gradient(
    const Splines<R>& splines, const Points<R>& points, const R* grad, int tile, int threads,
    R* partials, R* grad_coefficients, R* grad_control_points, Stream stream) {
  const int tiles = (points.count + tile - 1) / tile;
  if (tiles > 0) {
    const LaunchStatus status = for_columns(splines.columns, [&](auto held) {
      GSALIGN_LAUNCH(
          (tps_gradient_kernel<R, held()>), splines.batch * tiles, threads,
          (GradientLayout<R, held()>::make(tile, threads).total), stream, splines, points, grad,
          tile, tiles, partials);
      return launch_status();
    });
    if (status != kLaunched) {
      return status;
    }
  }
  return launch_sum_partials(
      partials, grad_coefficients, grad_control_points, splines.batch, splines.points,
      splines.columns, tiles, threads, stream);
}

}  // namespace gsalign::tps
