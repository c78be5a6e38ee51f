// Splines inside CUDA kernels: evaluation at a thread's point, the sums over a block's points that
// make the gradients of coefficients and control points, and the final sum over blocks.
//
// Nothing here knows where points come from; tps_kernels.cuh and warp's kernels bring their own.
// All threads of a block must call these functions together: they meet barriers inside.
//
// The logarithm is what costs: of the 37 instructions that a term of a float spline of two columns
// takes (forward, as compiled for sm_90) about 20 are its own; each further column takes one, the
// sums of the backward pass 41 in all. Against that stands one 16-byte read of shared memory that a
// warp shares. So a thread makes a logarithm once for kColumns columns: forward for the value,
// backward for value and slope.
#pragma once

#include <cstdint>

#include "../common/launch.h"
#include "tps.h"

namespace gsalign::tps {

constexpr int kSplineThreads = 256;    // threads of a block of every kernel over points
constexpr int kCentreChunk = 256;      // control points in shared memory at a time
constexpr int kTileBytes = 16 * 1024;  // of a block's points and their gradients
constexpr int kReducedNumbers = 32;    // numbers that a block of the final sum makes

// One sample's spline: coefficients [points + 3, columns], control points [points, 2].
template <typename R>
struct SplineSample {
  const R* coefficients;
  const R* control_points;
  int points, columns;

  GSALIGN_HOST_DEVICE static SplineSample of(
      const R* coefficients, const R* control_points, int points, int columns,
      std::int64_t sample) {
    return {
        coefficients + sample * (static_cast<std::int64_t>(points) + 3) * columns,
        control_points + sample * points * 2, points, columns};
  }
  // Coefficient of a row (control point, or 1, x, y after them); zero past the last column.
  GSALIGN_HOST_DEVICE R coefficient(int row, int column) const {
    return column < columns ? coefficients[static_cast<std::int64_t>(row) * columns + column]
                            : R(0);
  }
};

// ---- evaluation ----

// A control point and its weights of kColumns columns, as it lies in shared memory.
template <typename R, int kColumns>
struct alignas(16) Centre {
  R x, y;
  R weight[kColumns];
};

template <typename R, int kColumns>
GSALIGN_HOST_DEVICE int centre_bytes(int points) {
  return (points < kCentreChunk ? points : kCentreChunk) *
         static_cast<int>(sizeof(Centre<R, kColumns>));
}

template <typename R, int kColumns>
GSALIGN_DEVICE void stage_centres(
    Centre<R, kColumns>* staged, const SplineSample<R>& spline, int first, int count, int column) {
  for (int i = thread_index(); i < count; i += block_size()) {
    Centre<R, kColumns> centre;
    centre.x = spline.control_points[2 * (first + i)];
    centre.y = spline.control_points[2 * (first + i) + 1];
    GSALIGN_UNROLL
    for (int v = 0; v < kColumns; ++v) {
      centre.weight[v] = spline.coefficient(first + i, column + v);
    }
    staged[i] = centre;
  }
}

// Columns `column` to `column + kColumns` of the spline at the thread's point (zero past the last).
// `staged` has centre_bytes() bytes of shared memory, aligned to 16, free to be overwritten; before
// it is put to another use, the caller's barrier.
template <typename R, int kColumns>
GSALIGN_DEVICE void evaluate_spline(
    const SplineSample<R>& spline, int column, R x, R y, Centre<R, kColumns>* staged,
    R (&value)[kColumns]) {
  GSALIGN_UNROLL
  for (int v = 0; v < kColumns; ++v) {
    value[v] = spline.coefficient(spline.points, column + v) +
               spline.coefficient(spline.points + 1, column + v) * x +
               spline.coefficient(spline.points + 2, column + v) * y;
  }
  for (int first = 0; first < spline.points; first += kCentreChunk) {
    const int left = spline.points - first;
    const int count = left < kCentreChunk ? left : kCentreChunk;
    if (first > 0) {
      barrier();  // all have read the chunk before
    }
    stage_centres(staged, spline, first, count, column);
    barrier();
    for (int k = 0; k < count; ++k) {
      const Centre<R, kColumns> centre = staged[k];
      const R dx = x - centre.x, dy = y - centre.y;
      const R u = radial_basis(dx * dx + dy * dy).value;
      GSALIGN_UNROLL
      for (int v = 0; v < kColumns; ++v) {
        value[v] += centre.weight[v] * u;
      }
    }
  }
}

// ---- gradients of coefficients and control points ----

// A point and the gradient by the spline's value there, as they lie in shared memory.
template <typename R, int kColumns>
struct alignas(16) PointGradient {
  R x, y;
  R gradient[kColumns];
};

// The most points of a tile, a multiple of 32.
template <typename R, int kColumns>
GSALIGN_HOST_DEVICE int tile_points() {
  return kTileBytes / static_cast<int>(sizeof(PointGradient<R, kColumns>)) / 32 * 32;
}

// A row's sums over points: by its coefficients, and by its control point.
template <typename R, int kColumns>
struct alignas(16) RowSums {
  R weight[kColumns];
  R x, y;

  GSALIGN_DEVICE void operator+=(const RowSums& other) {
    GSALIGN_UNROLL
    for (int v = 0; v < kColumns; ++v) {
      weight[v] += other.weight[v];
    }
    x += other.x;
    y += other.y;
  }
};

// Shared memory of a block that sums over a tile: the tile, then a sum per thread.
template <typename R, int kColumns>
struct GradientLayout {
  int scratch, total;

  GSALIGN_HOST_DEVICE static GradientLayout make(int tile, int threads) {
    const int scratch = tile * static_cast<int>(sizeof(PointGradient<R, kColumns>));
    return {scratch, scratch + threads * static_cast<int>(sizeof(RowSums<R, kColumns>))};
  }
};

// Numbers that a block leaves per sample: gradients of coefficients [points + 3, columns], then of
// control points [points, 2].
GSALIGN_HOST_DEVICE std::int64_t partial_numbers(int points, int columns) {
  return (static_cast<std::int64_t>(points) + 3) * columns + 2 * static_cast<std::int64_t>(points);
}

// Adds the sums of `slices` threads, `stride` apart, into those of slice 0, pairwise. Threads with
// a slice of `slices` or more only meet the barriers. `scratch` has room for a sum per thread; the
// caller's barrier must follow before it is used again.
template <typename Sum>
GSALIGN_DEVICE void sum_slices(Sum& own, Sum* scratch, int slice, int slices, int stride) {
  // Every round writes places that no other round reads or writes, so one barrier each suffices.
  for (int alive = slices; alive > 1;) {
    const int half = (alive + 1) / 2;
    if (slice >= half && slice < alive) {
      scratch[thread_index()] = own;
    }
    barrier();
    if (slice + half < alive) {
      own += scratch[thread_index() + half * stride];
    }
    alive = half;
  }
}

// A thread's share of a row: points slice, slice + slices, ... of the tile. Runs of kRun terms are
// summed on their own, so that rounding does not grow with the length of the tile.
template <typename R, int kColumns, typename Term>
GSALIGN_DEVICE RowSums<R, kColumns> sum_points(
    const PointGradient<R, kColumns>* tile, int count, int slice, int slices, Term term) {
  constexpr int kRun = 64;
  RowSums<R, kColumns> sums{};
  for (int begin = slice; begin < count; begin += kRun * slices) {
    RowSums<R, kColumns> run{};
    const int end = begin + kRun * slices < count ? begin + kRun * slices : count;
    for (int n = begin; n < end; n += slices) {
      term(tile[n], run);
    }
    sums += run;
  }
  return sums;
}

// Writes the block's sums over the points of its tile into its row of partial_numbers(): columns
// `column` to `column + kColumns`, and the control points' share of those columns, which is added
// to what the columns before left (column 0 overwrites). `tile` must be visible to all threads, and
// is free again when this returns; before `scratch` is used again, the caller's barrier.
//
// Threads are laid over (slice of the points, row), neighbours on neighbouring rows, so that a warp
// reads one point, or few that lie side by side, and no sum passes through shuffles.
template <typename R, int kColumns>
GSALIGN_DEVICE void accumulate_gradient(
    const SplineSample<R>& spline, int column, const PointGradient<R, kColumns>* tile, int count,
    RowSums<R, kColumns>* scratch, R* partial) {
  const int points = spline.points;
  R* by_control_point = partial + (static_cast<std::int64_t>(points) + 3) * spline.columns;
  for (int first = 0; first < points + 3;) {
    const bool affine = first == points;  // the rows 1, x, y come last, on their own
    const int left = affine ? 3 : points - first;
    const int rows = left < block_size() ? left : block_size();
    const int slices = block_size() / rows;
    const int slice = thread_index() / rows;
    const int row = first + thread_index() % rows;
    RowSums<R, kColumns> sums{};
    if (slice < slices && affine) {
      sums = sum_points(
          tile, count, slice, slices,
          [&](const PointGradient<R, kColumns>& point, RowSums<R, kColumns>& run) {
            const R factor = row == points ? R(1) : (row == points + 1 ? point.x : point.y);
            GSALIGN_UNROLL
            for (int v = 0; v < kColumns; ++v) {
              run.weight[v] += point.gradient[v] * factor;
            }
          });
    } else if (slice < slices) {
      const R x = spline.control_points[2 * row], y = spline.control_points[2 * row + 1];
      R weight[kColumns];
      GSALIGN_UNROLL
      for (int v = 0; v < kColumns; ++v) {
        weight[v] = spline.coefficient(row, column + v);
      }
      sums = sum_points(
          tile, count, slice, slices,
          [&](const PointGradient<R, kColumns>& point, RowSums<R, kColumns>& run) {
            const R dx = point.x - x, dy = point.y - y;
            const Basis<R> basis = radial_basis(dx * dx + dy * dy);
            R pull = R(0);
            GSALIGN_UNROLL
            for (int v = 0; v < kColumns; ++v) {
              run.weight[v] += point.gradient[v] * basis.value;
              pull += point.gradient[v] * weight[v];
            }
            pull *= basis.slope;
            run.x += pull * dx;
            run.y += pull * dy;
          });
    }
    sum_slices(sums, scratch, slice, slices, rows);
    if (slice == 0) {
      R* by_coefficient = partial + static_cast<std::int64_t>(row) * spline.columns + column;
      GSALIGN_UNROLL
      for (int v = 0; v < kColumns; ++v) {
        if (column + v < spline.columns) {
          by_coefficient[v] = sums.weight[v];
        }
      }
      if (!affine) {  // d U / d point = 2 slope (point - centre), and the opposite for the centre
        const R before_x = column == 0 ? R(0) : by_control_point[2 * row];
        const R before_y = column == 0 ? R(0) : by_control_point[2 * row + 1];
        by_control_point[2 * row] = before_x - R(2) * sums.x;
        by_control_point[2 * row + 1] = before_y - R(2) * sums.y;
      }
    }
    if (!affine) {
      barrier();  // before the sums of the next rows take the scratch
    }
    first += rows;
  }
}

// Adds what the blocks left, `partials` [batch, chunks, numbers], in one fixed order and in double.
// A block makes kReducedNumbers numbers of one sample; threads over (slice of the chunks, number).
template <typename P, typename R>
GSALIGN_KERNEL(kSplineThreads)
tps_sum_partials_kernel(
    const P* partials, R* grad_coefficients, R* grad_control_points, int points, int columns,
    int chunks, int blocks_per_sample) {
  const std::int64_t numbers = partial_numbers(points, columns);
  const std::int64_t of_coefficients = numbers - 2 * static_cast<std::int64_t>(points);
  const std::int64_t sample = block_index() / blocks_per_sample;
  const std::int64_t number =
      static_cast<std::int64_t>(block_index() % blocks_per_sample) * kReducedNumbers +
      thread_index() % kReducedNumbers;
  const int slice = thread_index() / kReducedNumbers;
  const int slices = block_size() / kReducedNumbers;
  double sum = 0.0;
  if (number < numbers) {
    const P* column = partials + sample * chunks * numbers + number;
    for (int chunk = slice; chunk < chunks; chunk += slices) {
      sum += static_cast<double>(column[chunk * numbers]);
    }
  }
  sum_slices(sum, reinterpret_cast<double*>(shared_memory()), slice, slices, kReducedNumbers);
  if (slice == 0 && number < numbers) {
    if (number < of_coefficients) {
      grad_coefficients[sample * of_coefficients + number] = static_cast<R>(sum);
    } else {
      grad_control_points[sample * 2 * points + number - of_coefficients] = static_cast<R>(sum);
    }
  }
}

// Blocks per sample of the final sum; the launch has that times the batch.
GSALIGN_HOST_DEVICE int sum_blocks_per_sample(int points, int columns) {
  return static_cast<int>(
      (partial_numbers(points, columns) + kReducedNumbers - 1) / kReducedNumbers);
}

// Without chunks the gradients are zero.
template <typename P, typename R, typename Stream>
LaunchStatus launch_sum_partials(
    const P* partials, R* grad_coefficients, R* grad_control_points, int batch, int points,
    int columns, int chunks, int threads, Stream stream) {
  const int blocks_per_sample = sum_blocks_per_sample(points, columns);
  GSALIGN_LAUNCH(
      (tps_sum_partials_kernel<P, R>), batch * blocks_per_sample, threads,
      threads * static_cast<int>(sizeof(double)), stream, partials, grad_coefficients,
      grad_control_points, points, columns, chunks, blocks_per_sample);
  return launch_status();
}

}  // namespace gsalign::tps
