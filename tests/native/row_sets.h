// Running the checks of a family's row functions on every instruction set that this processor has.
//
// Prints one line per set: its name, and `skipped` or the checks made. Exits with 1 at the first
// wrong figure, and says which.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/common/row_sets.h"

namespace gsalign {

template <typename T>
constexpr double kTolerance = 0.0;
template <>
inline constexpr double kTolerance<float> = 1e-6;
template <>
inline constexpr double kTolerance<double> = 1e-14;
template <>
inline constexpr double kTolerance<Half> = 6e-4;
template <>
inline constexpr double kTolerance<BFloat16> = 5e-3;

inline void expect_near(
    double actual, double wanted, double tolerance, const char* what, long channels) {
  if (!(std::fabs(actual - wanted) <= tolerance * (1.0 + std::fabs(wanted)))) {
    std::printf("%s with %ld channels: got %.9g, wanted %.9g\n", what, channels, actual, wanted);
    std::exit(1);
  }
}

// Calls check(set::kRows<T>, &checks) for every type of features.
#define CHECK_ROW_SET(set, kind)          \
  if (has_row_set(kind)) {                \
    int checks = 0;                       \
    check(set::kRows<float>, &checks);    \
    check(set::kRows<double>, &checks);   \
    check(set::kRows<Half>, &checks);     \
    check(set::kRows<BFloat16>, &checks); \
    std::printf("%s %d\n", #set, checks); \
  } else {                                \
    std::printf("%s skipped\n", #set);    \
  }

#if defined(GSALIGN_X86_ROWS)
#define CHECK_ROW_SETS                            \
  CHECK_ROW_SET(rows_baseline, RowSet::kBaseline) \
  CHECK_ROW_SET(rows_avx2, RowSet::kAvx2)         \
  CHECK_ROW_SET(rows_avx512, RowSet::kAvx512)     \
  CHECK_ROW_SET(rows_avx512_bf16, RowSet::kAvx512Bf16)
#else
#define CHECK_ROW_SETS CHECK_ROW_SET(rows_baseline, RowSet::kBaseline)
#endif

}  // namespace gsalign
