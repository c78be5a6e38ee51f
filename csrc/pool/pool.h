// Scalar arithmetic of the masked part pooling, shared by CPU code, CUDA kernels and their tests.
//
// Numbers of the modes and activations are those of the operator's schema. S is float, or double
// where the CPU serves float64. Compile without -ffast-math, which would drop the NaN cases.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/host_device.h"

namespace gsalign::pool {

enum class Mode : int { kWeightedMean = 0, kMean = 1, kMax = 2 };
enum class Activation : int { kNone = 0, kSoftmax = 1, kSigmoid = 2 };
enum class Visibility : int { kContinuous = 0, kBinary = 1 };

// exp(x) without branches, tables or calls, so that loops over it vectorise; within 1.2 units in
// the last place. Below -87.33 it is exactly 0 (a logit of -infinity hides a part completely),
// above 88.72 infinite, NaN stays NaN. A GPU has an instruction for it, which the library's expf
// makes as exact in a third of the arithmetic.
GSALIGN_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  // The sum's last bits are the nearest integer k to x / log 2: exp(x) = 2^k exp(r), |r| < 0.347.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const float fraction = (series * r) * r + r + 1.0f;
  // 2^k in two halves: k = 128 alone has no float.
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const std::int32_t power = bits - 0x4b400000;
  const std::int32_t low = power >> 1, high = power - low;
  const std::int32_t low_bits = (low + 127) * (1 << 23), high_bits = (high + 127) * (1 << 23);
  float low_scale, high_scale;
  std::memcpy(&low_scale, &low_bits, sizeof(low_scale));
  std::memcpy(&high_scale, &high_bits, sizeof(high_scale));
  const float result = fraction * low_scale * high_scale;
  const float bounded = x < -87.33f ? 0.0f : (x > 88.72f ? HUGE_VALF : result);
  return x != x ? x : bounded;
#endif
}

GSALIGN_HOST_DEVICE double exponential(double x) {
  return exp(x);
}

template <typename S>
GSALIGN_HOST_DEVICE S sigmoid(S logit) {
  return S(1) / (S(1) + exponential(-logit));
}

// What the sum of m x is divided by.
template <typename S>
GSALIGN_HOST_DEVICE S divisor(Mode mode, S total, std::int64_t positions, S eps) {
  if (mode == Mode::kWeightedMean) {
    return total < eps ? eps : total;
  }
  return static_cast<S>(positions > 1 ? positions : 1);
}

// Whether the divisor depends on the weights: a clamped sum has no gradient.
template <typename S>
GSALIGN_HOST_DEVICE bool total_is_free(Mode mode, S total, S eps) {
  return mode == Mode::kWeightedMean && total >= eps;
}

// Whether a value takes the place of the largest so far: the first of equal ones stays, a NaN wins
// over every number, and the first of several stays too. `!(value <= largest)` holds for greater
// values and where either is NaN.
template <typename S>
GSALIGN_HOST_DEVICE bool takes_over(S value, S largest) {
  return !(value <= largest) & (largest == largest);
}

}  // namespace gsalign::pool
