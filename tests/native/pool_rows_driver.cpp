// Row arithmetic of the masked part pooling on every instruction set of this processor, against
// plain loops in double (row_sets.h).
#include <algorithm>
#include <random>
#include <vector>

#include "../../csrc/pool/pool_rows.h"
#include "row_sets.h"

namespace gsalign::pool {
namespace {

constexpr std::int64_t kStride = 160;  // values between rows, a multiple of every alignment
constexpr std::int64_t kRowCount = kRowGroup;

template <typename T>
void check(const Rows<T>& rows, int* checks) {
  using R = Compute<T>;
  constexpr std::int64_t kKept = kKeptStride<R>;
  // Sums of products of any sign: what rounding may take is a share of the largest.
  const double summed = sizeof(R) == 8 ? 1e-13 : 2e-6;
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  alignas(64) static T source[2 * kRowCount * kStride];  // twice: rows behind are asked for
  alignas(64) static T gradients[kPartTile * kStride], out[2 * kStride];
  for (T& value : source) {
    value = store<T>(static_cast<R>(normal(random)));
  }
  for (T& value : gradients) {
    value = store<T>(static_cast<R>(normal(random)));
  }
  R weights[kRowGroup * kPartTile];
  for (R& value : weights) {
    value = static_cast<R>(normal(random));
  }
  std::vector<R> kept(kPartTile * kKept), carry(2 * kStride);
  const T canary = store<T>(R(77));
  for (int count = 0; count <= 130; ++count) {
    const int parts = count % kPartTile + 1;
    // Forward: kept[p] = sum_i w[i p] x_i in two steps of unequal size, divided and stored.
    const int step = count % kRowCount;
    rows.add_rows[parts - 1](RowSums<T>{kept.data(), weights, source, kStride, step, count, true});
    rows.add_rows[parts - 1](RowSums<T>{
        kept.data(), weights + step * parts, source + step * kStride, kStride, kRowCount - step,
        count, false});
    for (int p = 0; p < parts; ++p) {
      std::fill(out, out + 2 * kStride, canary);
      rows.release(out, kept.data() + p * kKept, R(3), count);
      for (int c = 0; c < count; ++c) {
        double wanted = 0.0;
        for (int i = 0; i < kRowCount; ++i) {
          wanted += double(weights[i * parts + p]) * load(source[i * kStride + c]);
        }
        expect_near(load(out[c]), wanted / 3, summed + kTolerance<T>, "add_rows", count);
      }
      expect_near(load(out[count]), 77.0, 0.0, "release: past the end", count);
    }
    // Backward: what keep() stores, used for two tokens; once alone, once with sums carried in.
    for (int p = 0; p < parts; ++p) {
      rows.keep(kept.data() + p * kKept, gradients + p * kStride, R(2), count);
    }
    for (int stage = 0; stage < 3; ++stage) {  // plain, past the caches, in two steps
      std::fill(out, out + 2 * kStride, canary);
      R dots[2][kPartTile];
      const auto run = [&](const R* carried, R* to, bool streamed) {
        rows.token_gradients[parts - 1](TokenGradients<T>{
            .kept = kept.data(),
            .weights = {weights, weights + parts},
            .rows = {source, source + kStride},
            .dots = {dots[0], dots[1]},
            .carried = {carried, carried ? carried + kStride : nullptr},
            .carry = {to, to ? to + kStride : nullptr},
            .gradients = {out, out + kStride},
            .channels = count,
            .ahead = 2 * kStride,
            .streamed = streamed});
      };
      if (stage == 2) {
        run(nullptr, carry.data(), false);
      }
      run(stage == 2 ? carry.data() : nullptr, nullptr, stage == 1);
      for (int i = 0; i < 2; ++i) {
        for (int c = 0; c < count; ++c) {
          double wanted = 0.0;
          for (int p = 0; p < parts; ++p) {
            wanted += double(weights[i * parts + p]) * load(gradients[p * kStride + c]) / 2;
          }
          expect_near(
              load(out[i * kStride + c]), stage == 2 ? 2 * wanted : wanted, summed + kTolerance<T>,
              "token_gradients", count);
        }
        expect_near(
            load(out[i * kStride + count]), 77.0, 0.0, "token_gradients: past the end", count);
        for (int p = 0; p < parts; ++p) {
          double wanted = 0.0;
          for (int c = 0; c < count; ++c) {
            wanted += double(load(gradients[p * kStride + c])) / 2 * load(source[i * kStride + c]);
          }
          expect_near(dots[i][p], wanted, sizeof(R) == 8 ? 1e-13 : 1e-5, "dots", count);
        }
      }
    }
    ++*checks;
  }
}

void run() {
  CHECK_ROW_SETS
}

}  // namespace
}  // namespace gsalign::pool

int main() {
  gsalign::pool::run();
}
