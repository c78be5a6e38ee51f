// Masked prototype alignment on the CPU, forward and backward.
//
// Samples are sorted by label once, so that class sums cost one addition per element. Work is cut
// into units of one class and kChannelChunk channels for the class sums, of one sample for the
// rest; every sum has one fixed order, so every bit is the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/natural_log.h"
#include "../common/tensor.h"
#include "prototype.h"

namespace gsalign::prototype {
namespace {

// The batch sorted by label; members of a class keep their order.
class Classes {
 public:
  Classes(const std::int64_t* labels, std::int64_t batch) : order_(batch) {
    std::iota(order_.begin(), order_.end(), std::int64_t(0));
    std::stable_sort(order_.begin(), order_.end(), [labels](std::int64_t a, std::int64_t b) {
      return labels[a] < labels[b];
    });
    for (std::int64_t i = 0; i < batch; ++i) {
      if (i == 0 || labels[order_[i]] != labels[order_[i - 1]]) {
        starts_.push_back(i);
      }
    }
    starts_.push_back(batch);
  }

  std::int64_t count() const { return static_cast<std::int64_t>(starts_.size()) - 1; }
  std::int64_t size(std::int64_t index) const { return starts_[index + 1] - starts_[index]; }
  // The samples of a class.
  const std::int64_t* begin(std::int64_t index) const { return order_.data() + starts_[index]; }
  const std::int64_t* end(std::int64_t index) const { return order_.data() + starts_[index + 1]; }

 private:
  std::vector<std::int64_t> order_, starts_;
};

// For each sample the mean of its class over rows [B, D]: written to `means`, or added when `kAdd`.
template <bool kAdd, typename S>
void spread_class_means(const Classes& classes, const S* rows, std::int64_t channels, S* means) {
  const std::int64_t chunks = ceil_div(channels, kChannelChunk);
  parallel_for(classes.count() * chunks, [&](std::int64_t unit) {
    const std::int64_t index = unit / chunks;
    const std::int64_t channel = unit % chunks * kChannelChunk;
    const std::int64_t count = std::min(kChannelChunk, channels - channel);
    const Scratch<S> sum(kChannelChunk);
    std::fill_n(sum.data(), count, S(0));
    for (const std::int64_t* b = classes.begin(index); b != classes.end(index); ++b) {
      row_add(sum.data(), S(1), rows + *b * channels + channel, count);
    }
    const S share = S(1) / static_cast<S>(classes.size(index));
    for (const std::int64_t* b = classes.begin(index); b != classes.end(index); ++b) {
      S* target = means + *b * channels + channel;
      if constexpr (kAdd) {
        row_add(target, share, sum.data(), count);
      } else {
        row_store(target, share, sum.data(), count);
      }
    }
  });
}

template <typename S>
struct Norms {
  S feature, mean, product;  // |f|, |mu| and |c m|, where c = mu / max(|mu|, 1e-12)
};

// sum_c (scale a[c] m[c])^2
template <typename S>
GSALIGN_CLONES static S row_masked_square(
    const S* __restrict a, const S* __restrict m, S scale, std::int64_t count) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < count; ++c) {
    const S product = scale * a[c] * m[c];
    sum += product * product;
  }
  return sum;
}

template <typename S>
Norms<S> row_norms(const S* feature, const S* mean, const S* mask, std::int64_t count) {
  Norms<S> norms;
  norms.feature = std::sqrt(row_dot(feature, feature, count));
  norms.mean = std::sqrt(row_dot(mean, mean, count));
  norms.product = std::sqrt(row_masked_square(mean, mask, S(1) / clamped_norm(norms.mean), count));
  return norms;
}

// The row's factors: g = unit f is the normalised feature, c = centre mu the normalised class mean,
// q = c m, and prototype q the prototype.
template <typename S>
struct Scales {
  S unit, centre, prototype;
};

template <typename S>
Scales<S> row_scales(const Norms<S>& norms) {
  return {
      S(1) / clamped_norm(norms.feature), S(1) / clamped_norm(norms.mean),
      S(1) / clamped_norm(norms.product)};
}

// A sample's share of both losses: sum_c (g - prototype)^2 and sum_c m log max(m, 1e-6).
template <typename S>
GSALIGN_CLONES static void row_losses(
    const S* __restrict feature, const S* __restrict mean, const S* __restrict mask,
    Scales<S> scales, std::int64_t count, S* distance, S* logarithms) {
  S squares = 0, sum = 0;
#pragma omp simd reduction(+ : squares, sum)
  for (std::int64_t c = 0; c < count; ++c) {
    const S q = scales.centre * mean[c] * mask[c];
    const S error = scales.unit * feature[c] - scales.prototype * q;
    squares += error * error;
    sum += mask[c] * natural_log(clamped_mask(mask[c]));
  }
  *distance = squares;
  *logarithms = sum;
}

// sum_c e f and sum_c e q, where e = g - prototype.
template <typename S>
GSALIGN_CLONES static void row_error_dots(
    const S* __restrict feature, const S* __restrict mean, const S* __restrict mask,
    Scales<S> scales, std::int64_t count, S* with_feature, S* with_product) {
  S by_feature = 0, by_product = 0;
#pragma omp simd reduction(+ : by_feature, by_product)
  for (std::int64_t c = 0; c < count; ++c) {
    const S q = scales.centre * mean[c] * mask[c];
    const S error = scales.unit * feature[c] - scales.prototype * q;
    by_feature += error * feature[c];
    by_product += error * q;
  }
  *with_feature = by_feature;
  *with_product = by_product;
}

// Gradient by q, the class centre and the mask on the way: writes the gradients by the feature
// (that through g) and by the mask, leaves the gradient by the centre in `grad_centre`, and returns
// its dot product with the class mean. `slope` is the gradient by g of the loss for an error of 1.
template <typename S>
GSALIGN_CLONES static S row_gradients(
    const S* __restrict feature, const S* __restrict mean, const S* __restrict mask,
    Scales<S> scales, NormalizeAdjoint<S> to_feature, NormalizeAdjoint<S> to_product, S slope,
    S entropy_slope, std::int64_t count, S* __restrict grad_feature, S* __restrict grad_mask,
    S* __restrict grad_centre) {
  S with_mean = 0;
#pragma omp simd reduction(+ : with_mean)
  for (std::int64_t c = 0; c < count; ++c) {
    const S m = mask[c];
    const S centre = scales.centre * mean[c];
    const S q = centre * m;
    const S pull = slope * (scales.unit * feature[c] - scales.prototype * q);
    grad_feature[c] = to_feature.scale * pull - to_feature.radial * feature[c];
    const S by_product = -to_product.scale * pull - to_product.radial * q;
    const S logarithm = natural_log(clamped_mask(m));
    const S entropy = logarithm + (m < kSmallestMask<S> ? S(0) : S(1));
    grad_mask[c] = by_product * centre - entropy_slope * entropy;
    grad_centre[c] = by_product * m;
    with_mean += by_product * m * mean[c];
  }
  return with_mean;
}

// y[c] = scale * y[c] - radial * v[c]
template <typename S>
GSALIGN_CLONES static void row_normalize_adjoint(
    S* __restrict y, NormalizeAdjoint<S> adjoint, const S* __restrict v, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] = adjoint.scale * y[c] - adjoint.radial * v[c];
  }
}

template <typename S>
void forward(
    const Classes& classes, const S* features, const S* masks, std::int64_t batch,
    std::int64_t channels, S* means, S* alignment, S* entropy) {
  spread_class_means<false>(classes, features, channels, means);
  std::vector<S> distances(batch), logarithms(batch);
  parallel_for(batch, [&](std::int64_t b) {
    const S* feature = features + b * channels;
    const S* mean = means + b * channels;
    const S* mask = masks + b * channels;
    const Scales<S> scales = row_scales(row_norms(feature, mean, mask, channels));
    row_losses(feature, mean, mask, scales, channels, &distances[b], &logarithms[b]);
  });
  double distance = 0.0, logarithm = 0.0;
  for (std::int64_t b = 0; b < batch; ++b) {
    distance += distances[b];
    logarithm += logarithms[b];
  }
  const double elements = static_cast<double>(std::max<std::int64_t>(batch * channels, 1));
  *alignment = static_cast<S>(distance / elements);
  *entropy = static_cast<S>(-logarithm / elements);
}

template <typename S>
void backward(
    const Classes& classes, S grad_alignment, S grad_entropy, const S* features, const S* masks,
    const S* means, std::int64_t batch, std::int64_t channels, S* grad_features, S* grad_masks) {
  const S elements = static_cast<S>(std::max<std::int64_t>(batch * channels, 1));
  const S slope = S(2) * grad_alignment / elements;
  const S entropy_slope = grad_entropy / elements;
  const Scratch<S> grad_means(batch * channels);
  parallel_for(batch, [&](std::int64_t b) {
    const S* feature = features + b * channels;
    const S* mean = means + b * channels;
    const S* mask = masks + b * channels;
    const Norms<S> norms = row_norms(feature, mean, mask, channels);
    const Scales<S> scales = row_scales(norms);
    S with_feature, with_product;
    row_error_dots(feature, mean, mask, scales, channels, &with_feature, &with_product);
    S* grad_mean = grad_means.data() + b * channels;
    const S with_mean = row_gradients(
        feature, mean, mask, scales, normalize_adjoint(norms.feature, slope * with_feature),
        normalize_adjoint(norms.product, -slope * with_product), slope, entropy_slope, channels,
        grad_features + b * channels, grad_masks + b * channels, grad_mean);
    row_normalize_adjoint(grad_mean, normalize_adjoint(norms.mean, with_mean), mean, channels);
  });
  // A class mean is the mean of its samples: each gets the mean of what the class's rows want.
  spread_class_means<true>(classes, grad_means.data(), channels, grad_features);
}

void check_arguments(const Tensor& features, const Tensor& masks, const Tensor& labels) {
  check_shape("features", features, {-1, -1});
  check_shape("masks", masks, {features.size(0), features.size(1)});
  check_type("masks", masks, features.scalar_type());
  check_shape("labels", labels, {features.size(0)});
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: wanted int64");
}

std::tuple<Tensor, Tensor, Tensor> masked_prototype_loss(
    const Tensor& features, const Tensor& masks, const Tensor& labels) {
  check_arguments(features, masks, labels);
  const Tensor in = contiguous(features), masks_in = contiguous(masks),
               labels_in = contiguous(labels);
  const std::int64_t batch = in.size(0), channels = in.size(1);
  const Tensor alignment = empty({}, in.scalar_type());
  const Tensor entropy = empty({}, in.scalar_type());
  const Tensor means = empty({batch, channels}, in.scalar_type());
  const Classes classes(data<std::int64_t>(labels_in), batch);
  dispatch_coordinates("features", in.scalar_type(), [&](auto kind) {
    using S = decltype(kind);
    forward(
        classes, data<S>(in), data<S>(masks_in), batch, channels, mutable_data<S>(means),
        mutable_data<S>(alignment), mutable_data<S>(entropy));
  });
  return {alignment, entropy, means};
}

std::tuple<Tensor, Tensor> masked_prototype_loss_backward(
    const Tensor& grad_alignment, const Tensor& grad_entropy, const Tensor& features,
    const Tensor& masks, const Tensor& labels, const Tensor& means) {
  check_arguments(features, masks, labels);
  check_shape("grad_alignment", grad_alignment, {});
  check_type("grad_alignment", grad_alignment, features.scalar_type());
  check_shape("grad_entropy", grad_entropy, {});
  check_type("grad_entropy", grad_entropy, features.scalar_type());
  check_shape("means", means, {features.size(0), features.size(1)});
  check_type("means", means, features.scalar_type());
  const Tensor in = contiguous(features), masks_in = contiguous(masks),
               labels_in = contiguous(labels), means_in = contiguous(means);
  const std::int64_t batch = in.size(0), channels = in.size(1);
  const Tensor grad_features = empty({batch, channels}, in.scalar_type());
  const Tensor grad_masks = empty({batch, channels}, in.scalar_type());
  const Classes classes(data<std::int64_t>(labels_in), batch);
  dispatch_coordinates("features", in.scalar_type(), [&](auto kind) {
    using S = decltype(kind);
    backward(
        classes, *data<S>(grad_alignment), *data<S>(grad_entropy), data<S>(in), data<S>(masks_in),
        data<S>(means_in), batch, channels, mutable_data<S>(grad_features),
        mutable_data<S>(grad_masks));
  });
  return {grad_features, grad_masks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("masked_prototype_loss", TORCH_BOX(&masked_prototype_loss));
  m.impl("masked_prototype_loss_backward", TORCH_BOX(&masked_prototype_loss_backward));
}

}  // namespace gsalign::prototype
