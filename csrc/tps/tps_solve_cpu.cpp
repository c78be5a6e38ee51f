// Batched solve of thin-plate splines on the CPU, and its adjoint from the same factors.
//
// Full groups of samples, one to a lane of a vector, are solved side by side, those left over one
// by one. The factors go out sample by sample, so that each can be taken apart from the batch it
// was solved in.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "tps_system.h"

namespace gsalign::tps {
namespace {

// Working memory holds element i of every lane's sample side by side; tensors hold samples one
// after another, `stride` apart. Here `length` numbers of every sample pass from one to the other.
template <typename E>
GSALIGN_INLINE void take_lanes(
    E* out, const double* from, std::int64_t stride, std::int64_t length) {
  constexpr std::int64_t lanes = kLanesOf<E>;
  if constexpr (lanes == 1) {
    std::copy_n(from, length, out);
  } else {
    std::int64_t i = 0;
    for (; i + lanes <= length; i += lanes) {
      E rows[lanes];
      for (std::int64_t l = 0; l < lanes; ++l) {
        std::memcpy(&rows[l], from + l * stride + i, sizeof(E));
      }
      transpose(rows);
      for (std::int64_t l = 0; l < lanes; ++l) {
        out[i + l] = rows[l];
      }
    }
    for (; i < length; ++i) {
      for (std::int64_t l = 0; l < lanes; ++l) {
        set_lane(out[i], l, from[l * stride + i]);
      }
    }
  }
}
template <typename E>
GSALIGN_INLINE void give_lanes(
    double* to, const E* values, std::int64_t stride, std::int64_t length) {
  constexpr std::int64_t lanes = kLanesOf<E>;
  if constexpr (lanes == 1) {
    std::copy_n(values, length, to);
  } else {
    std::int64_t i = 0;
    for (; i + lanes <= length; i += lanes) {
      E rows[lanes];
      for (std::int64_t l = 0; l < lanes; ++l) {
        rows[l] = values[i + l];
      }
      transpose(rows);
      for (std::int64_t l = 0; l < lanes; ++l) {
        std::memcpy(to + l * stride + i, &rows[l], sizeof(E));
      }
    }
    for (; i < length; ++i) {
      for (std::int64_t l = 0; l < lanes; ++l) {
        to[l * stride + i] = lane(values[i], l);
      }
    }
  }
}

// The same for [count, columns] of every sample, which lie column by column in working memory,
// `length` elements apart.
template <typename E, typename R>
GSALIGN_INLINE void take_columns(
    E* __restrict out, std::int64_t length, const R* __restrict from, std::int64_t stride,
    std::int64_t count, std::int64_t columns) {
  constexpr std::int64_t lanes = kLanesOf<E>;
  double* to = reinterpret_cast<double*>(out);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t v = 0; v < columns; ++v) {
      for (std::int64_t l = 0; l < lanes; ++l) {
        to[(v * length + i) * lanes + l] = static_cast<double>(from[l * stride + i * columns + v]);
      }
    }
  }
}
template <typename E, typename R>
GSALIGN_INLINE void give_columns(
    R* __restrict to, std::int64_t stride, const E* __restrict values, std::int64_t length,
    std::int64_t count, std::int64_t columns) {
  constexpr std::int64_t lanes = kLanesOf<E>;
  const double* from = reinterpret_cast<const double*>(values);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t v = 0; v < columns; ++v) {
      for (std::int64_t l = 0; l < lanes; ++l) {
        to[l * stride + i * columns + v] = static_cast<R>(from[(v * length + i) * lanes + l]);
      }
    }
  }
}

struct Shape {
  std::int64_t batch, count, columns;

  std::int64_t order() const { return count + 3; }
  std::int64_t factors() const { return System<double>::size(count); }
  // Elements of working memory that a group takes.
  std::int64_t work() const { return factors() + 6 * count + 2 * order() * columns; }
};

// Calls `run(element, memory, first sample)` for every full group and every sample left over, in
// functions compiled for this processor's vectors.
template <typename Run>
void for_groups(const Shape& shape, const Run& run) {
  const std::int64_t lanes = vector_bytes() / std::int64_t(sizeof(double));
  const std::int64_t full = shape.batch / lanes;
  const auto memory = [&] { return Scratch<double>(shape.work() * (full > 0 ? lanes : 1)); };
  parallel_for(
      full + shape.batch % lanes, memory, [&](const Scratch<double>& work, std::int64_t group) {
        with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
          using Group = Lanes<decltype(width)::kBytes>;
          if (group < full) {
            run(Group{}, reinterpret_cast<Group*>(work.data()), group * lanes);
          } else {
            run(double{}, work.data(), full * lanes + group - full);
          }
        });
      });
}

template <typename E, typename R>
GSALIGN_INLINE void solve_group(
    E* memory, const Shape& shape, const R* points, const R* values, double regularization,
    R* coefficients, double* factors, std::int32_t* info) {
  const std::int64_t count = shape.count, order = shape.order();
  E* x = memory + shape.factors();
  E* y = x + count;
  E* work = y + count;
  E* rhs = work + 4 * count;
  take_columns(x, count, points, 2 * count, count, 2);  // and y behind it
  System<E> system(memory, count);
  const auto outcome = system.factor(x, y, regularization, work);
  for (std::int64_t l = 0; l < kLanesOf<E>; ++l) {
    info[l] = outcome.info(l);
    if (info[l] != 0) {
      system.spoil(l);
    }
  }
  take_columns(rhs, order, values, count * shape.columns, count, shape.columns);
  for (std::int64_t v = 0; v < shape.columns; ++v) {
    E* column = rhs + v * order;
    std::fill_n(column + count, 3, E{});
    system.solve(column);
  }
  give_columns(coefficients, order * shape.columns, rhs, order, order, shape.columns);
  give_lanes(factors, memory, shape.factors(), shape.factors());
}

// L is symmetric, so its adjoint is the same solve: L z = g, dL = -z w^T, dv = z[:K].
template <typename E, typename R>
GSALIGN_INLINE void backward_group(
    E* memory, const Shape& shape, const R* grad, const R* coefficients, const R* points,
    const double* factors, R* grad_points, R* grad_values) {
  const std::int64_t count = shape.count, order = shape.order(), columns = shape.columns;
  E* x = memory + shape.factors();
  E* y = x + count;
  E* gx = y + count;
  E* gy = gx + count;
  E* z = gy + count;
  E* w = z + order * columns;
  take_columns(x, count, points, 2 * count, count, 2);  // and y behind it
  take_lanes(memory, factors, shape.factors(), shape.factors());
  take_columns(z, order, grad, order * columns, order, columns);
  take_columns(w, order, coefficients, order * columns, order, columns);
  const System<E> system(memory, count);
  for (std::int64_t v = 0; v < columns; ++v) {
    system.solve(z + v * order);
  }
  give_columns(grad_values, count * columns, z, order, count, columns);
  // The entries 1, x, y of a point's row and column, then the distances, each pair once.
  for (std::int64_t i = 0; i < count; ++i) {
    gx[i] = gy[i] = E{};
    for (std::int64_t v = 0; v < columns; ++v) {
      const E *zv = z + v * order, *wv = w + v * order;
      gx[i] -= zv[i] * wv[count + 1] + zv[count + 1] * wv[i];
      gy[i] -= zv[i] * wv[count + 2] + zv[count + 2] * wv[i];
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    E sum_x{}, sum_y{};
    for (std::int64_t j = 0; j < i; ++j) {
      E pull{};
      for (std::int64_t v = 0; v < columns; ++v) {
        const E *zv = z + v * order, *wv = w + v * order;
        pull -= zv[i] * wv[j] + zv[j] * wv[i];
      }
      const E dx = x[i] - x[j], dy = y[i] - y[j];
      pull *= 2.0 * lane_basis(dx * dx + dy * dy).slope;
      const E tx = pull * dx, ty = pull * dy;
      sum_x += tx;
      sum_y += ty;
      gx[j] -= tx;
      gy[j] -= ty;
    }
    gx[i] += sum_x;
    gy[i] += sum_y;
  }
  give_columns(grad_points, 2 * count, gx, count, count, 2);  // and gy behind it
}

std::tuple<Tensor, Tensor, Tensor> tps_solve(
    const Tensor& control_points, const Tensor& values, double regularization, bool check_errors) {
  check_shape("control_points", control_points, {-1, -1, 2});
  const std::int64_t batch = control_points.size(0), count = control_points.size(1);
  STD_TORCH_CHECK(count >= 3, "control_points: wanted at least 3 points, got ", count);
  check_shape("values", values, {batch, count, -1});
  check_type("values", values, control_points.scalar_type());
  const Shape shape{batch, count, values.size(2)};
  const std::int64_t order = shape.order(), columns = shape.columns;
  const Tensor points = as_contiguous(control_points), wanted = as_contiguous(values);
  const Tensor coefficients = empty({batch, order, columns}, wanted.scalar_type());
  const Tensor factors = empty({batch, shape.factors()}, ScalarType::Double);
  const Tensor info = empty({batch}, ScalarType::Int);
  dispatch_coordinates("control_points", points.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    for_groups(shape, [&](auto element, auto* memory, std::int64_t first) GSALIGN_VECTOR_BODY {
      solve_group<decltype(element), R>(
          memory, shape, data<R>(points) + first * count * 2,
          data<R>(wanted) + first * count * columns, regularization,
          mutable_data<R>(coefficients) + first * order * columns,
          mutable_data<double>(factors) + first * shape.factors(),
          mutable_data<std::int32_t>(info) + first);
    });
  });
  for (std::int64_t b = 0; check_errors && b < batch; ++b) {
    const std::int32_t outcome = data<std::int32_t>(info)[b];
    STD_TORCH_CHECK(
        outcome != 1, "control_points: those of sample ", b,
        " give a singular system; some are equal, or all lie on one line");
    STD_TORCH_CHECK(outcome != 2, "control_points: those of sample ", b, " are not finite");
  }
  return {coefficients, factors, info};
}

std::tuple<Tensor, Tensor> tps_solve_backward(
    const Tensor& grad, const Tensor& coefficients, const Tensor& control_points,
    const Tensor& factors) {
  check_shape("control_points", control_points, {-1, -1, 2});
  const std::int64_t batch = control_points.size(0), count = control_points.size(1);
  STD_TORCH_CHECK(count >= 3, "control_points: wanted at least 3 points, got ", count);
  check_shape("grad", grad, {batch, count + 3, -1});
  const Shape shape{batch, count, grad.size(2)};
  const std::int64_t order = shape.order(), columns = shape.columns;
  check_shape("coefficients", coefficients, {batch, order, columns});
  check_shape("factors", factors, {batch, shape.factors()});
  check_type("grad", grad, control_points.scalar_type());
  check_type("coefficients", coefficients, control_points.scalar_type());
  check_type("factors", factors, ScalarType::Double);
  const Tensor gradient = as_contiguous(grad), solution = as_contiguous(coefficients),
               points = as_contiguous(control_points), factored = as_contiguous(factors);
  const Tensor grad_points = empty({batch, count, 2}, points.scalar_type());
  const Tensor grad_values = empty({batch, count, columns}, points.scalar_type());
  dispatch_coordinates("control_points", points.scalar_type(), [&](auto kind) {
    using R = decltype(kind);
    for_groups(shape, [&](auto element, auto* memory, std::int64_t first) GSALIGN_VECTOR_BODY {
      backward_group<decltype(element), R>(
          memory, shape, data<R>(gradient) + first * order * columns,
          data<R>(solution) + first * order * columns, data<R>(points) + first * count * 2,
          data<double>(factored) + first * shape.factors(),
          mutable_data<R>(grad_points) + first * count * 2,
          mutable_data<R>(grad_values) + first * count * columns);
    });
  });
  return {grad_points, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("tps_solve", TORCH_BOX(&tps_solve));
  m.impl("tps_solve_backward", TORCH_BOX(&tps_solve_backward));
}

}  // namespace gsalign::tps
