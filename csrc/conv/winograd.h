// Winograd's minimal filtering F(4x4, 3x3): 4 x 4 outputs of a 3 x 3 kernel by 36 products per
// channel instead of 144 (Lavin and Gray, arXiv 1509.09308).
//
// With `d` the 6 x 6 inputs of a tile and `g` the kernel, the tile's outputs are
// A [(G g G^T) * (B^T d B)] A^T, `*` element by element. Over channels each of the 36 elements is a
// matrix product. The backward pass is the same steps turned: each matrix becomes its transpose.
#pragma once

#include <array>
#include <type_traits>

#include "../common/numbers.h"

namespace gsalign::conv {

constexpr int kTile = 4;                    // outputs along a side of a tile
constexpr int kTaps = 3;                    // of the kernel along a side
constexpr int kSide = kTile + kTaps - 1;    // inputs along a side
constexpr int kPlanes = kSide * kSide;      // products of a tile
constexpr int kKernelSize = kTaps * kTaps;  // numbers of a kernel
constexpr int kOutputs = kTile * kTile;     // of a tile

template <int kRowsOf, int kColumnsOf>
struct Matrix {
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  double at[kRows][kColumns] = {};

  constexpr Matrix<kColumns, kRows> turned() const {
    Matrix<kColumns, kRows> result;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        result.at[j][i] = at[i][j];
      }
    }
    return result;
  }
};

namespace detail {

// Where polynomials are evaluated, beside infinity. Half the rounding error of the usual 0, +-1,
// +-2 in float32, and powers that are exact.
constexpr int kFinite = kSide - 1;
constexpr std::array<double, kFinite> kAt = {0.0, 0.75, -0.75, 1.5, -1.5};

constexpr double power(double base, int exponent) {
  double result = 1.0;
  for (int i = 0; i < exponent; ++i) {
    result *= base;
  }
  return result;
}

// Coefficients of the product of (x - a) over the points but one; of all where that is kFinite.
constexpr std::array<double, kSide> roots_but(int left_out) {
  std::array<double, kSide> polynomial = {1.0};
  for (int j = 0; j < kFinite; ++j) {
    if (j != left_out) {
      for (int i = kSide - 1; i >= 0; --i) {
        polynomial[i] = (i > 0 ? polynomial[i - 1] : 0.0) - kAt[j] * polynomial[i];
      }
    }
  }
  return polynomial;
}

constexpr Matrix<kSide, kSide> input_matrix() {  // B^T
  Matrix<kSide, kSide> result;
  for (int i = 0; i < kSide; ++i) {
    const auto polynomial = roots_but(i);
    for (int j = 0; j < kSide; ++j) {
      result.at[i][j] = polynomial[j];
    }
  }
  return result;
}

constexpr Matrix<kSide, kTaps> kernel_matrix() {  // G
  Matrix<kSide, kTaps> result;
  for (int i = 0; i < kFinite; ++i) {
    double apart = 1.0;
    for (int j = 0; j < kFinite; ++j) {
      apart *= j == i ? 1.0 : kAt[i] - kAt[j];
    }
    for (int j = 0; j < kTaps; ++j) {
      result.at[i][j] = power(kAt[i], j) / apart;
    }
  }
  result.at[kFinite][kTaps - 1] = 1.0;
  return result;
}

constexpr Matrix<kTile, kSide> output_matrix() {  // A
  Matrix<kTile, kSide> result;
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kFinite; ++j) {
      result.at[i][j] = power(kAt[j], i);
    }
  }
  result.at[kTile - 1][kFinite] = 1.0;
  return result;
}

}  // namespace detail

// From inputs, kernels and products, and back for gradients.
inline constexpr auto kInput = detail::input_matrix();
inline constexpr auto kKernel = detail::kernel_matrix();
inline constexpr auto kOutput = detail::output_matrix();
inline constexpr auto kInputBack = kInput.turned();
inline constexpr auto kKernelBack = kKernel.turned();
inline constexpr auto kOutputBack = kOutput.turned();

// out = (M in)^T, row by row.
template <const auto& kM, typename S, typename V, int kIn, int kOut>
GSALIGN_INLINE void multiply_turned(const V (&in)[kIn], V (&out)[kOut]) {
  using M = std::remove_cvref_t<decltype(kM)>;
  constexpr int kWidth = kIn / M::kColumns;
  static_assert(kIn == M::kColumns * kWidth && kOut == M::kRows * kWidth);
  // Unrolled, the conditions are constants: what is multiplied by 0 is never touched.
#pragma GCC unroll 6
  for (int c = 0; c < kWidth; ++c) {
#pragma GCC unroll 6
    for (int i = 0; i < M::kRows; ++i) {
      V sum{};
      bool empty = true;
#pragma GCC unroll 6
      for (int j = 0; j < M::kColumns; ++j) {
        if (kM.at[i][j] != 0.0) {
          const V term = static_cast<S>(kM.at[i][j]) * in[j * kWidth + c];
          sum = empty ? term : sum + term;
          empty = false;
        }
      }
      out[c * M::kRows + i] = sum;
    }
  }
}

// out = M in M^T, `in` and `out` square, row by row. `V` holds the same element of several tiles.
template <const auto& kM, typename S, typename V, int kIn, int kOut>
GSALIGN_INLINE void sandwich(const V (&in)[kIn], V (&out)[kOut]) {
  using M = std::remove_cvref_t<decltype(kM)>;
  static_assert(kIn == M::kColumns * M::kColumns && kOut == M::kRows * M::kRows);
  V half[M::kColumns * M::kRows];
  multiply_turned<kM, S>(in, half);
  multiply_turned<kM, S>(half, out);
}

}  // namespace gsalign::conv
