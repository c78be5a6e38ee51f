// Splines in vectors of every width that this processor has, against one number at a time. Prints
// one line per width: its bytes, and `skipped` or the number of checks. Exits with 1 at the first
// wrong figure, and says which.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/tps/tps_block.h"
#include "../../csrc/tps/tps_system.h"

namespace gsalign::tps {
namespace {

void expect_near(double actual, double wanted, double tolerance, const char* what, int count) {
  if (!(std::fabs(actual - wanted) <= tolerance * (1.0 + std::fabs(wanted)))) {
    std::printf("%s with %d points: got %.17g, wanted %.17g\n", what, count, actual, wanted);
    std::exit(1);
  }
}

// A system per lane, factored and solved, against the same systems one by one.
template <typename E>
GSALIGN_INLINE void check_systems(int count, int* checks) {
  constexpr std::int64_t lanes = kLanesOf<E>;
  const std::int64_t size = System<double>::size(count), order = count + 3;
  std::mt19937 random(count);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  const Scratch<double> memory((size + 6 * count + order) * lanes), alone(size + 6 * count + order);
  E* all = reinterpret_cast<E*>(memory.data());
  E *x = all + size, *y = x + count, *work = y + count, *rhs = work + 4 * count;
  for (std::int64_t i = 0; i < 2 * count * lanes; ++i) {
    reinterpret_cast<double*>(x)[i] = uniform(random);
  }
  for (std::int64_t i = 0; i < order * lanes; ++i) {
    reinterpret_cast<double*>(rhs)[i] = uniform(random);
  }
  if (count > 4) {  // one sample with a point twice
    set_lane(x[count - 1], lanes - 1, lane(x[1], lanes - 1));
    set_lane(y[count - 1], lanes - 1, lane(y[1], lanes - 1));
  }
  const std::vector<double> given(
      reinterpret_cast<double*>(rhs), reinterpret_cast<double*>(rhs) + order * lanes);
  System<E> system(all, count);
  const auto outcome = system.factor(x, y, 0.0, work);
  system.solve(rhs);
  for (std::int64_t l = 0; l < lanes; ++l) {
    double* one = alone.data();
    double *px = one + size, *py = px + count, *place = py + count, *right = place + 4 * count;
    for (int i = 0; i < count; ++i) {
      px[i] = lane(x[i], l);
      py[i] = lane(y[i], l);
    }
    for (std::int64_t i = 0; i < order; ++i) {
      right[i] = given[i * lanes + l];
    }
    System<double> single(one, count);
    const auto told = single.factor(px, py, 0.0, place);
    const bool repeated = count > 4 && l == lanes - 1;
    expect_near(told.info(0), repeated ? 1 : 0, 0.0, "info of one", count);
    expect_near(outcome.info(l), repeated ? 1 : 0, 0.0, "info of a lane", count);
    single.solve(right);
    for (std::int64_t i = 0; !repeated && i < order; ++i) {
      expect_near(lane(rhs[i], l), right[i], 1e-7, "solution", count);
    }
    ++*checks;
  }
  // Rows to columns and back.
  if constexpr (lanes > 1) {
    E rows[lanes];
    for (std::int64_t i = 0; i < lanes * lanes; ++i) {
      set_lane(rows[i / lanes], i % lanes, static_cast<double>(i));
    }
    transpose(rows);
    for (std::int64_t i = 0; i < lanes * lanes; ++i) {
      expect_near(lane(rows[i % lanes], i / lanes), i, 0.0, "transposed", count);
    }
  }
}

// A block of points of one spline, and its gradients, against sums in double.
template <int kBytes, typename R>
GSALIGN_INLINE void check_block(int points, int columns, int* checks) {
  std::mt19937 random(points + 100 * columns);
  std::uniform_real_distribution<R> uniform(R(-1), R(1));
  std::vector<R> coefficients((points + 3) * columns), control(2 * points);
  for (R& value : coefficients) {
    value = uniform(random);
  }
  for (R& value : control) {
    value = uniform(random);
  }
  PointBlock<R> at;
  at.count = 50;
  for (std::int64_t n = 0; n < at.count; ++n) {
    at.x[n] = uniform(random);
    at.y[n] = uniform(random);
  }
  at.x[0] = control[0];  // on a control point
  at.y[0] = control[1];
  at.fill();
  const Spline<R> spline{coefficients.data(), control.data(), points, columns};
  const Scratch<R> values(columns * kPointBlock), again(columns * kPointBlock),
      rows(points * kPointBlock), gradient(columns * kPointBlock);
  evaluate_block<kBytes, Rows::none, R>(spline, at, nullptr, values.data());
  logarithm_rows<kBytes>(control.data(), points, at, rows.data());
  evaluate_block<kBytes, Rows::read, R>(spline, at, rows.data(), again.data());
  const double tolerance = sizeof(R) == 8 ? 1e-12 : 2e-5;
  const auto radial = [](double r2) { return 0.5 * r2 * std::log(std::max(r2, 1e-8)); };
  const std::int64_t numbers = (points + 3) * columns + 2 * points;
  std::vector<double> wanted(numbers, 0.0), totals(numbers);
  for (int v = 0; v < columns; ++v) {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      gradient[v * kPointBlock + n] = n < at.count ? uniform(random) : R(0);
    }
  }
  for (std::int64_t n = 0; n < at.count; ++n) {
    for (int v = 0; v < columns; ++v) {
      const double g = gradient[v * kPointBlock + n];
      const R* affine = spline.affine();
      double sum = affine[v] + double(affine[columns + v]) * at.x[n] +
                   double(affine[2 * columns + v]) * at.y[n];
      wanted[points * columns + v] += g;
      wanted[(points + 1) * columns + v] += g * at.x[n];
      wanted[(points + 2) * columns + v] += g * at.y[n];
      for (int k = 0; k < points; ++k) {
        const double dx = double(at.x[n]) - control[2 * k];
        const double dy = double(at.y[n]) - control[2 * k + 1];
        const double r2 = dx * dx + dy * dy, weight = spline.weights(k)[v];
        const double slope = 0.5 * (std::log(std::max(r2, 1e-8)) + (r2 < 1e-8 ? 0.0 : 1.0));
        sum += weight * radial(r2);
        wanted[k * columns + v] += g * radial(r2);
        wanted[(points + 3) * columns + 2 * k] -= 2.0 * slope * g * weight * dx;
        wanted[(points + 3) * columns + 2 * k + 1] -= 2.0 * slope * g * weight * dy;
      }
      expect_near(values[v * kPointBlock + n], sum, tolerance, "value", points);
      expect_near(again[v * kPointBlock + n], sum, tolerance, "value by rows", points);
    }
  }
  SplineGradient<R, kBytes> sums(points, columns, totals.data());
  sums.template add<false>(spline, at, gradient.data(), nullptr, nullptr);
  sums.flush();
  for (std::int64_t i = 0; i < numbers; ++i) {
    expect_near(totals[i], wanted[i], 4 * tolerance, "gradient", points);
  }
  ++*checks;
}

template <int kBytes>
GSALIGN_INLINE int check_width() {
  int checks = 0;
  for (const int count : {3, 4, 5, 7, 9, 12, 25, 40}) {
    check_systems<double>(count, &checks);
    check_systems<Lanes<kBytes>>(count, &checks);
  }
  for (const int points : {3, 9, 30}) {
    for (const int columns : {1, 2, 5}) {
      check_block<kBytes, float>(points, columns, &checks);
      check_block<kBytes, double>(points, columns, &checks);
    }
  }
  return checks;
}

void run() {
  std::printf("16 %d\n", check_width<16>());
#if defined(GSALIGN_X86_LEVELS)
  const auto body = [](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    std::printf("%d %d\n", kBytes, check_width<kBytes>());
  };
  if (vector_bytes() >= 32) {
    detail::run_32(body);
  } else {
    std::printf("32 skipped\n");
  }
  if (vector_bytes() >= 64) {
    detail::run_64(body);
  } else {
    std::printf("64 skipped\n");
  }
#endif
}

}  // namespace
}  // namespace gsalign::tps

int main() {
  gsalign::tps::run();
}
