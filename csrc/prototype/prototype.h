// Scalar arithmetic of the masked prototype loss, shared by CPU code, CUDA kernels and their tests.
#pragma once

#include "../common/host_device.h"

namespace gsalign::prototype {

// S is float, or double where the CPU serves float64.
template <typename S>
constexpr S kSmallestNorm = S(1e-12);
template <typename S>
constexpr S kSmallestMask = S(1e-6);

// Norm a vector is divided by; a NaN stays.
template <typename S>
GSALIGN_HOST_DEVICE S clamped_norm(S norm) {
  return norm < kSmallestNorm<S> ? kSmallestNorm<S> : norm;
}

// Adjoint of v / max(|v|, 1e-12): the gradient by v is scale * g - radial * v, where g is the
// gradient by the quotient and `along` = sum g v. A clamped norm does not depend on v.
template <typename S>
struct NormalizeAdjoint {
  S scale, radial;
};

template <typename S>
GSALIGN_HOST_DEVICE NormalizeAdjoint<S> normalize_adjoint(S norm, S along) {
  const S scale = S(1) / clamped_norm(norm);
  return {scale, norm < kSmallestNorm<S> ? S(0) : along * scale * scale * scale};
}

// What the logarithm of the entropy term is taken of; a NaN stays.
template <typename S>
GSALIGN_HOST_DEVICE S clamped_mask(S mask) {
  return mask < kSmallestMask<S> ? kSmallestMask<S> : mask;
}

}  // namespace gsalign::prototype
