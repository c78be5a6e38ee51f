// Masked prototype alignment on the CPU, forward and backward.
//
// Samples are grouped by label once. A class is one unit of work: its rows are summed, then read
// again from the cache for everything else. A class of more than kPieceRows samples is cut into
// pieces instead, and its sums into channels, for several threads to work on it. Every sum has one
// order that depends on the labels alone, so every bit is the same for any number of threads. The
// backward pass takes its scalars of a row from the forward pass, and needs one pass over the rows.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "prototype.h"
#include "prototype_rows.h"

namespace gsalign::prototype {
namespace {

// Rows of a piece: features and masks of so many samples stay in the L2 cache.
constexpr std::int64_t kPieceRows = 32;

// The batch by label: classes in the order in which their first samples come, samples in their own.
class Classes {
 public:
  Classes(const std::int64_t* labels, std::int64_t batch) : order_(batch), starts_(1) {
    // An open table of at least twice as many slots as labels: slot -> class, and a sample of it.
    int bits = 1;
    while ((std::int64_t(1) << bits) < 2 * batch) {
      ++bits;
    }
    const std::uint64_t last_slot = (std::uint64_t(1) << bits) - 1;
    constexpr std::int64_t kFree = -1;
    std::vector<std::int64_t> slots(last_slot + 1, kFree), class_of(batch), sample_of;
    for (std::int64_t b = 0; b < batch; ++b) {
      std::uint64_t slot = mixed(labels[b]) >> (64 - bits);
      while (slots[slot] != kFree && labels[sample_of[slots[slot]]] != labels[b]) {
        slot = (slot + 1) & last_slot;
      }
      if (slots[slot] == kFree) {
        slots[slot] = count();
        sample_of.push_back(b);
        starts_.push_back(0);
      }
      class_of[b] = slots[slot];
      ++starts_[class_of[b] + 1];
    }
    largest_ = *std::max_element(starts_.begin(), starts_.end());
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    std::vector<std::int64_t> next(starts_);
    for (std::int64_t b = 0; b < batch; ++b) {
      order_[next[class_of[b]]++] = b;
    }
  }

  std::int64_t count() const { return static_cast<std::int64_t>(starts_.size()) - 1; }
  std::int64_t size(std::int64_t index) const { return starts_[index + 1] - starts_[index]; }
  std::int64_t largest() const { return largest_; }
  // The samples of a class.
  const std::int64_t* begin(std::int64_t index) const { return order_.data() + starts_[index]; }
  const std::int64_t* end(std::int64_t index) const { return order_.data() + starts_[index + 1]; }

 private:
  // Spreads labels over the high bits, whatever pattern they have.
  static std::uint64_t mixed(std::int64_t label) {
    std::uint64_t word = static_cast<std::uint64_t>(label) * 0x9e3779b97f4a7c15ULL;
    word ^= word >> 32;
    return word * 0x9e3779b97f4a7c15ULL;
  }

  std::vector<std::int64_t> order_, starts_;
  std::int64_t largest_;
};

// Some samples of a class, and which of its pieces they are.
struct Piece {
  std::int64_t index;
  const std::int64_t *begin, *end;
};

std::vector<Piece> pieces_of(const Classes& classes) {
  std::vector<Piece> pieces;
  for (std::int64_t k = 0; k < classes.count(); ++k) {
    for (const std::int64_t* b = classes.begin(k); b < classes.end(k); b += kPieceRows) {
      pieces.push_back({k, b, std::min(b + kPieceRows, classes.end(k))});
    }
  }
  return pieces;
}

template <typename S>
struct Batch {
  const S *features, *masks;  // [size, channels]
  std::int64_t size, channels;

  double elements() const {
    return static_cast<double>(std::max<std::int64_t>(size * channels, 1));
  }
};

// Where the mean of a class stands in means [B, D]: in the row of its first sample.
template <typename S>
S* class_mean(const Classes& classes, std::int64_t index, S* means, std::int64_t channels) {
  return means + *classes.begin(index) * channels;
}

// `count` channels of the mean of a class, from `channel` on.
template <typename S>
void make_mean(
    const Classes& classes, std::int64_t index, const Batch<S>& batch, std::int64_t channel,
    std::int64_t count, S* means) {
  S* mean = class_mean(classes, index, means, batch.channels) + channel;
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    add_rows<kBytes>(
        mean, batch.features + channel, classes.begin(index), classes.end(index), batch.channels,
        count);
    scale_row<kBytes>(mean, S(1) / static_cast<S>(classes.size(index)), count);
  });
}

// The losses of the samples of a piece, and what is kept of them: the class mean in their rows of
// `means`, and their rows of `norms` [B, kKept].
template <typename S>
void lose_piece(
    const Classes& classes, const Piece& piece, const Batch<S>& batch, S* means, S* norms,
    double* distances, double* logarithms) {
  const std::int64_t channels = batch.channels;
  const S* mean = class_mean(classes, piece.index, means, channels);
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    const double mean_norm = row_norm<kBytes>(mean, channels);
    const auto centre = static_cast<S>(inverse_norm(mean_norm));
    for (const std::int64_t* b = piece.begin; b != piece.end; ++b) {
      const S *feature = batch.features + *b * channels, *mask = batch.masks + *b * channels;
      const RowSums sums = row_sums<kBytes>(feature, mean, mask, centre, channels);
      S* kept = norms + *b * kKept;
      kept[0] = static_cast<S>(sums.feature_norm);
      kept[1] = static_cast<S>(sums.product_norm);
      kept[2] = static_cast<S>(sums.feature_product);
      kept[3] = static_cast<S>(mean_norm);
      logarithms[*b] = sums.logarithms;
      distances[*b] = row_distance<kBytes>(
          feature, mean, mask, static_cast<S>(inverse_norm(sums.feature_norm)), centre,
          static_cast<S>(inverse_norm(sums.product_norm)), channels);
    }
  });
  for (const std::int64_t* b = piece.begin; b != piece.end; ++b) {
    S* kept = means + *b * channels;
    if (kept != mean) {
      std::memcpy(kept, mean, sizeof(S) * channels);
    }
  }
}

template <typename S>
void forward(
    const Classes& classes, const Batch<S>& batch, S* means, S* norms, S* alignment, S* entropy) {
  const std::int64_t channels = batch.channels;
  std::vector<double> distances(batch.size), logarithms(batch.size);
  if (classes.largest() <= kPieceRows) {
    parallel_for(classes.count(), [&](std::int64_t k) {
      make_mean(classes, k, batch, 0, channels, means);
      lose_piece(
          classes, {k, classes.begin(k), classes.end(k)}, batch, means, norms, distances.data(),
          logarithms.data());
    });
  } else {
    const std::int64_t chunks = ceil_div(channels, kChannelChunk);
    parallel_for(classes.count() * chunks, [&](std::int64_t unit) {
      const std::int64_t channel = unit % chunks * kChannelChunk;
      make_mean(
          classes, unit / chunks, batch, channel, std::min(kChannelChunk, channels - channel),
          means);
    });
    const std::vector<Piece> pieces = pieces_of(classes);
    parallel_for(std::ssize(pieces), [&](std::int64_t i) {
      lose_piece(classes, pieces[i], batch, means, norms, distances.data(), logarithms.data());
    });
  }
  double distance = 0.0, logarithm = 0.0;
  for (std::int64_t b = 0; b < batch.size; ++b) {
    distance += distances[b];
    logarithm += logarithms[b];
  }
  *alignment = static_cast<S>(distance / batch.elements());
  *entropy = static_cast<S>(-logarithm / batch.elements());
}

template <typename S>
struct Slopes {
  double alignment;  // twice the gradient by a squared error
  S entropy;         // gradient by an element of m log m, negative
};

// What the forward pass kept.
template <typename S>
struct Kept {
  const S *means, *norms;  // [B, D], [B, kKept]

  double feature_norm(std::int64_t b) const { return norms[b * kKept]; }
  double product_norm(std::int64_t b) const { return norms[b * kKept + 1]; }
  double feature_product(std::int64_t b) const { return norms[b * kKept + 2]; }
  double mean_norm(std::int64_t b) const { return norms[b * kKept + 3]; }
};

template <typename S>
RowGradients<S> narrowed(const RowGradients<double>& by) {
  return {
      static_cast<S>(by.feature), static_cast<S>(by.cross), static_cast<S>(by.product),
      static_cast<S>(by.along)};
}

// Gradients of the samples of a piece but for what comes through the class mean, whose sums over
// the piece are left in `total` and returned.
template <typename S>
double pull_piece(
    const Piece& piece, const Batch<S>& batch, const Kept<S>& kept, const Slopes<S>& slopes,
    S* grad_features, S* grad_masks, S* total) {
  const std::int64_t channels = batch.channels;
  const S* mean = kept.means + *piece.begin * channels;
  const auto centre = static_cast<S>(inverse_norm(kept.mean_norm(*piece.begin)));
  double along = 0.0;
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    for (const std::int64_t* b = piece.begin; b != piece.end; ++b) {
      const RowGradients<double> by = row_gradients(
          kept.feature_norm(*b), kept.product_norm(*b), kept.feature_product(*b), slopes.alignment);
      along += by.along;
      row_backward<kBytes>(
          batch.features + *b * channels, mean, batch.masks + *b * channels, centre,
          narrowed<S>(by), slopes.entropy, channels, grad_features + *b * channels,
          grad_masks + *b * channels, total, b == piece.begin);
    }
  });
  return along;
}

// Makes the sums over a class what each of its samples gets through the class mean.
template <typename S>
void share_class(
    const Classes& classes, std::int64_t index, const Kept<S>& kept, std::int64_t channels,
    double along, S* total) {
  const std::int64_t first = *classes.begin(index);
  const ClassGradient<double> by =
      class_gradient(kept.mean_norm(first), along, static_cast<double>(classes.size(index)));
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    class_backward<decltype(width)::kBytes>(
        total, kept.means + first * channels,
        ClassGradient<S>{static_cast<S>(by.scale), static_cast<S>(by.radial)}, channels);
  });
}

template <typename S>
void add_share(const Piece& piece, const S* share, std::int64_t channels, S* grad_features) {
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    for (const std::int64_t* b = piece.begin; b != piece.end; ++b) {
      add_row<kBytes>(grad_features + *b * channels, share, channels);
    }
  });
}

template <typename S>
void backward(
    const Classes& classes, const Batch<S>& batch, const Kept<S>& kept, S grad_alignment,
    S grad_entropy, S* grad_features, S* grad_masks) {
  const std::int64_t channels = batch.channels;
  const Slopes<S> slopes{
      2.0 * grad_alignment / batch.elements(), static_cast<S>(grad_entropy / batch.elements())};
  if (classes.largest() <= kPieceRows) {
    parallel_for(
        classes.count(), [&] { return Scratch<S>(channels); },
        [&](const Scratch<S>& total, std::int64_t k) {
          const Piece piece{k, classes.begin(k), classes.end(k)};
          const double along =
              pull_piece(piece, batch, kept, slopes, grad_features, grad_masks, total.data());
          share_class(classes, k, kept, channels, along, total.data());
          add_share(piece, total.data(), channels, grad_features);
        });
    return;
  }
  const std::vector<Piece> pieces = pieces_of(classes);
  const Scratch<S> totals(std::ssize(pieces) * channels);
  std::vector<double> along(pieces.size());
  parallel_for(std::ssize(pieces), [&](std::int64_t i) {
    along[i] = pull_piece(
        pieces[i], batch, kept, slopes, grad_features, grad_masks, totals.data() + i * channels);
  });
  std::vector<std::int64_t> firsts;  // the first piece of each class, then the number of pieces
  for (std::int64_t i = 0; i < std::ssize(pieces); ++i) {
    if (i == 0 || pieces[i].index != pieces[i - 1].index) {
      firsts.push_back(i);
    }
  }
  firsts.push_back(std::ssize(pieces));
  parallel_for(classes.count(), [&](std::int64_t k) {
    S* total = totals.data() + firsts[k] * channels;
    double sum = along[firsts[k]];
    for (std::int64_t i = firsts[k] + 1; i < firsts[k + 1]; ++i) {
      sum += along[i];
      with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
        add_row<decltype(width)::kBytes>(total, totals.data() + i * channels, channels);
      });
    }
    share_class(classes, k, kept, channels, sum, total);
  });
  parallel_for(std::ssize(pieces), [&](std::int64_t i) {
    add_share(
        pieces[i], totals.data() + firsts[pieces[i].index] * channels, channels, grad_features);
  });
}

void check_arguments(const Tensor& features, const Tensor& masks, const Tensor& labels) {
  check_shape("features", features, {-1, -1});
  check_shape("masks", masks, {features.size(0), features.size(1)});
  check_type("masks", masks, features.scalar_type());
  check_shape("labels", labels, {features.size(0)});
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: wanted int64");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_prototype_loss(
    const Tensor& features, const Tensor& masks, const Tensor& labels) {
  check_arguments(features, masks, labels);
  const Tensor in = as_contiguous(features), masks_in = as_contiguous(masks),
               labels_in = as_contiguous(labels);
  const std::int64_t batch = in.size(0), channels = in.size(1);
  const Tensor alignment = empty({}, in.scalar_type());
  const Tensor entropy = empty({}, in.scalar_type());
  const Tensor means = empty({batch, channels}, in.scalar_type());
  const Tensor norms = empty({batch, kKept}, in.scalar_type());
  const Classes classes(data<std::int64_t>(labels_in), batch);
  dispatch_coordinates("features", in.scalar_type(), [&](auto kind) {
    using S = decltype(kind);
    forward(
        classes, Batch<S>{data<S>(in), data<S>(masks_in), batch, channels}, mutable_data<S>(means),
        mutable_data<S>(norms), mutable_data<S>(alignment), mutable_data<S>(entropy));
  });
  return {alignment, entropy, means, norms};
}

std::tuple<Tensor, Tensor> masked_prototype_loss_backward(
    const Tensor& grad_alignment, const Tensor& grad_entropy, const Tensor& features,
    const Tensor& masks, const Tensor& labels, const Tensor& means, const Tensor& norms) {
  check_arguments(features, masks, labels);
  check_shape("grad_alignment", grad_alignment, {});
  check_type("grad_alignment", grad_alignment, features.scalar_type());
  check_shape("grad_entropy", grad_entropy, {});
  check_type("grad_entropy", grad_entropy, features.scalar_type());
  check_shape("means", means, {features.size(0), features.size(1)});
  check_type("means", means, features.scalar_type());
  check_shape("norms", norms, {features.size(0), kKept});
  check_type("norms", norms, features.scalar_type());
  const Tensor in = as_contiguous(features), masks_in = as_contiguous(masks),
               labels_in = as_contiguous(labels), means_in = as_contiguous(means),
               norms_in = as_contiguous(norms);
  const std::int64_t batch = in.size(0), channels = in.size(1);
  const Tensor grad_features = empty({batch, channels}, in.scalar_type());
  const Tensor grad_masks = empty({batch, channels}, in.scalar_type());
  const Classes classes(data<std::int64_t>(labels_in), batch);
  dispatch_coordinates("features", in.scalar_type(), [&](auto kind) {
    using S = decltype(kind);
    backward(
        classes, Batch<S>{data<S>(in), data<S>(masks_in), batch, channels},
        Kept<S>{data<S>(means_in), data<S>(norms_in)}, *data<S>(grad_alignment),
        *data<S>(grad_entropy), mutable_data<S>(grad_features), mutable_data<S>(grad_masks));
  });
  return {grad_features, grad_masks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("masked_prototype_loss", TORCH_BOX(&masked_prototype_loss));
  m.impl("masked_prototype_loss_backward", TORCH_BOX(&masked_prototype_loss_backward));
}

}  // namespace gsalign::prototype
