// Row arithmetic of the token warp on every instruction set of this processor, against plain loops
// in double (row_sets.h).
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/warp/token_rows.h"
#include "row_sets.h"

namespace gsalign::warp {
namespace {

constexpr std::int64_t kStride = 144;  // values between rows, a multiple of every alignment
constexpr std::int64_t kRowCount = 7;

template <typename T>
void check(const Rows<T>& rows, int* checks) {
  using R = Compute<T>;
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  alignas(64) static T source[kRowCount * kStride];
  alignas(64) static T out[kStride + 64];
  for (T& value : source) {
    value = store<T>(static_cast<R>(normal(random)));
  }
  const T canary = store<T>(R(77));
  for (int count = 0; count <= 130; ++count) {
    const T* row[kRowCount];
    for (std::int64_t i = 0; i < kRowCount; ++i) {
      row[i] = source + i * kStride;
    }
    const T* const taps[4] = {row[1], row[2], row[3], row[4]};
    const R weights[5] = {R(0.1), R(-0.7), R(0.31), R(0.05), R(1.3)};
    const std::int32_t list[5] = {3, 0, 6, 6, 2};
    for (int streamed = 0; streamed < 2; ++streamed) {
      std::fill(out, out + kStride + 64, canary);
      (streamed ? rows.blend_streamed : rows.blend)(out, row[0], taps, weights, count);
      for (int c = 0; c < count; ++c) {
        double wanted = load(row[0][c]);
        for (int i = 0; i < 4; ++i) {
          wanted += double(weights[i]) * load(taps[i][c]);
        }
        expect_near(load(out[c]), wanted, kTolerance<T>, "blend", count);
      }
      expect_near(load(out[count]), 77.0, 0.0, "blend: past the end", count);
      std::fill(out, out + kStride + 64, canary);
      (streamed ? rows.gather_streamed : rows.gather)(
          out, row[5], source, kStride, list, weights, count % 6, count);
      for (int c = 0; c < count; ++c) {
        double wanted = load(row[5][c]);
        for (int i = 0; i < count % 6; ++i) {
          wanted += double(weights[i]) * load(row[list[i]][c]);
        }
        expect_near(load(out[c]), wanted, kTolerance<T>, "gather", count);
      }
      expect_near(load(out[count]), 77.0, 0.0, "gather: past the end", count);
    }
    R dots[4];
    rows.dots(row[0], taps, count, dots);
    for (int i = 0; i < 4; ++i) {
      double wanted = 0.0;
      for (int c = 0; c < count; ++c) {
        wanted += double(load(row[0][c])) * load(taps[i][c]);
      }
      expect_near(dots[i], wanted, sizeof(R) == 8 ? 1e-13 : 1e-5, "dots", count);
    }
    ++*checks;
  }
  // What must survive rounding: ties, overflow, infinity and NaN.
  const double special[] = {
      1.00390625,
      1.01171875,
      70000.0,
      -1e38,
      std::numeric_limits<double>::infinity(),
      std::numeric_limits<double>::quiet_NaN()};
  for (double value : special) {
    std::vector<T> ones(128, store<T>(R(0))), filled(128, store<T>(static_cast<R>(value)));
    alignas(64) T got[128];
    const T* const nothing[4] = {ones.data(), ones.data(), ones.data(), ones.data()};
    const R none[4] = {};
    rows.blend(got, filled.data(), nothing, none, 128);
    for (const T& one : got) {
      const bool same = std::isnan(double(load(filled[0]))) ? std::isnan(double(load(one)))
                                                            : load(one) == load(filled[0]);
      if (!same) {
        std::printf("blend: %g became %g\n", double(load(filled[0])), double(load(one)));
        std::exit(1);
      }
    }
  }
}

void run() {
  CHECK_ROW_SETS
}

}  // namespace
}  // namespace gsalign::warp

int main() {
  gsalign::warp::run();
}
