// Scalar arithmetic of the masked prototype loss, shared by CPU code, CUDA kernels and their tests.
//
// A row of features f, its class mean mu and its mask m make
//   g = f / max(|f|, 1e-12)     the normalised feature
//   c = mu / max(|mu|, 1e-12)   the class centre
//   q = c m,  p = q / max(|q|, 1e-12)   the prototype
// and the row's share of the alignment is sum (g - p)^2.
#pragma once

#include "../common/host_device.h"

namespace gsalign::prototype {

// S is float, or double where the CPU serves float64.
template <typename S>
constexpr S kSmallestNorm = S(1e-12);
template <typename S>
constexpr S kSmallestMask = S(1e-6);

template <typename S>
GSALIGN_HOST_DEVICE bool is_clamped(S norm) {
  return norm < kSmallestNorm<S>;  // a NaN is not
}

// What a vector of this norm is multiplied by; a NaN stays.
template <typename S>
GSALIGN_HOST_DEVICE S inverse_norm(S norm) {
  return S(1) / (is_clamped(norm) ? kSmallestNorm<S> : norm);
}

// What the logarithm of the entropy term is taken of; a NaN stays.
template <typename S>
GSALIGN_HOST_DEVICE S clamped_mask(S mask) {
  return mask < kSmallestMask<S> ? kSmallestMask<S> : mask;
}

// What the forward pass keeps of a row for the backward pass: |f|, |q|, f q and |mu|.
constexpr int kKept = 4;

// A row's gradients, for a loss of slope / 2 times sum (g - p)^2.
//
// With e = g - p, the gradient by f is  slope / |f| (e - g (e g)),  and by q  -slope / |q|
// (e - p (e p)). Where no norm is clamped, g g = p p = 1 and both are of the plane of f and q, with
// the cosine k = g p:
//   by f:  slope / |f| (k g - p)         by q:  slope / |q| (k p - g)
// A clamped norm is a constant: there the projection is left out, which is k = 1. So three dot
// products of a row are all that its gradients need, and nothing cancels where g is near p.
//
// The class mean gets c's gradient m (by q) summed over the class, through its own norm:
//   by mu:  (sum m (by q) - c (c sum m (by q))) / |mu|
// The product with c is q (by q) of each row, which is zero but for a clamped |q|.
template <typename S>
struct RowGradients {
  S feature;  // by f: feature f + cross q
  S cross;
  S product;  // by q: cross f + product q
  S along;    // q (by q), a row's part of c sum m (by q)
};

template <typename S>
GSALIGN_HOST_DEVICE RowGradients<S> row_gradients(
    S feature_norm, S product_norm, S feature_product, S slope) {
  const S unit = inverse_norm(feature_norm), pull = inverse_norm(product_norm);
  const S cosine = feature_product * unit * pull;
  RowGradients<S> result{};
  result.feature = slope * unit * unit * (is_clamped(feature_norm) ? S(1) : cosine);
  result.cross = -slope * unit * pull;
  result.product = slope * pull * pull * (is_clamped(product_norm) ? S(1) : cosine);
  if (is_clamped(product_norm)) {
    const S length = product_norm * pull;
    result.along = slope * (length * length - cosine);
  }
  return result;
}

// A sample's part of the gradient by its class's mean, per channel: scale G - radial mu, with G =
// sum m (by q) over the class and `along` = sum of the rows' along. The mean shares its gradient
// equally among `count` samples.
template <typename S>
struct ClassGradient {
  S scale, radial;
};

template <typename S>
GSALIGN_HOST_DEVICE ClassGradient<S> class_gradient(S mean_norm, S along, S count) {
  const S centre = inverse_norm(mean_norm);
  const S share = centre / count;
  return {share, is_clamped(mean_norm) ? S(0) : share * centre * along};
}

}  // namespace gsalign::prototype
