// Part embeddings as the tiles read them: queries lane by lane, gallery images as rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../common/cpu.h"
#include "tile.h"

namespace gsalign::distance {

// A tensor [images, parts, channels] of any strides; nothing of it is copied as a whole.
template <typename T>
struct Embeddings {
  const T* data;
  std::int64_t images, parts, channels;
  std::int64_t image_stride, part_stride, channel_stride;

  const T* part(std::int64_t image, std::int64_t part) const {
    return data + image * image_stride + part * part_stride;
  }
};

// Visibilities [images, parts], in the type that is computed in.
template <typename S>
struct Visibilities {
  const S* data;
  std::int64_t image_stride, part_stride;

  // A visibility's share of a weight. What is no visibility (negative, NaN) is NaN; the sum makes
  // -0 of a -0 +0, so that weights have one zero.
  S weight(std::int64_t image, std::int64_t part) const {
    return std::sqrt(data[image * image_stride + part * part_stride]) + S(0);
  }
};

template <typename S>
struct Bits;
template <>
struct Bits<float> {
  using Word = std::uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Word kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNan = 0x7fc00000u;
};
template <>
struct Bits<double> {
  using Word = std::uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Word kMagnitude = 0x7fffffffffffffffu, kInfinity = 0x7ff0000000000000u,
                        kNan = 0x7ff8000000000000u;
};

// The largest magnitude, as bits: those of a NaN are greater than those of infinity.
template <typename S>
GSALIGN_CLONES static typename Bits<S>::Word row_largest(const S* row, std::int64_t count) {
  using Word = typename Bits<S>::Word;
  Word largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t c = 0; c < count; ++c) {
    const Word magnitude = bit_cast<Word>(row[c]) & Bits<S>::kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// sum_c (scale row[c])^2
template <typename S>
GSALIGN_CLONES static S row_square(const S* row, S scale, std::int64_t count) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < count; ++c) {
    const S value = scale * row[c];
    sum += value * value;
  }
  return sum;
}

// row[c] *= scale, then *= factor: the two together may not be a number that can be held.
template <typename S>
GSALIGN_CLONES static void row_scale(S* row, S scale, S factor, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    row[c] = (scale * row[c]) * factor;
  }
}

// A part as it is compared: one that is not finite is all NaN, and for the cosine its length is 1,
// where it has one (zeros stay). It is scaled by a power of two first, so that no square over- or
// underflows.
template <typename S>
void prepare(Metric metric, S* row, std::int64_t count) {
  using Number = Bits<S>;
  const auto largest = row_largest(row, count);
  if (largest >= Number::kInfinity) {
    std::fill_n(row, count, std::numeric_limits<S>::quiet_NaN());
    return;
  }
  if (metric != kCosine || largest == 0) {
    return;
  }
  const int exponent = static_cast<int>(largest >> Number::kMantissa) - Number::kBias;
  const int most = Number::kBias - 1;
  const S scale = std::ldexp(S(1), -std::clamp(exponent, -most, most));
  row_scale(row, scale, S(1) / std::sqrt(row_square(row, scale, count)), count);
}

// One image as the tiles want it: `row` [parts, channels] in the type of the sums, `weights`
// [parts]. Parts that are not seen are not read.
template <typename T, typename S>
void read_image(
    const Embeddings<T>& from, const Visibilities<S>& visibilities, std::int64_t image,
    Metric metric, S* row, S* weights) {
  for (std::int64_t p = 0; p < from.parts; ++p) {
    S* target = row + p * from.channels;
    weights[p] = visibilities.weight(image, p);
    if (weights[p] == S(0)) {
      std::fill_n(target, from.channels, S(0));
      continue;
    }
    const T* source = from.part(image, p);
    if (from.channel_stride == 1) {
      row_load(target, source, from.channels);
    } else {
      for (std::int64_t c = 0; c < from.channels; ++c) {
        target[c] = load(source[c * from.channel_stride]);
      }
    }
    prepare(metric, target, from.channels);
  }
}

// Queries in panels of two vectors of lanes, the last of one where that is enough. Lanes without a
// query hold zeros.
template <typename S>
class QueryPanels {
 public:
  QueryPanels(const Embeddings<S>& from, const Visibilities<S>& visibilities, Metric metric)
      : queries_(from.images),
        lanes_(kVectorsOfPanel * vector_length<S>()),
        parts_(from.parts),
        width_(from.parts * from.channels),
        data_(count() * lanes_ * width_),
        weights_(count() * lanes_ * parts_) {
    parallel_for(
        count(), [this] { return Rows(lanes_ * width_, parts_); },
        [&](const Rows& rows, std::int64_t panel) {
          S* weights = weights_.data() + panel * lanes_ * parts_;
          const std::int64_t lanes = lanes_of(panel), filled = queries_of(panel);
          std::fill_n(weights, lanes * parts_, S(0));
          for (std::int64_t l = 0; l < lanes; ++l) {
            S* row = rows.embeddings.data() + l * width_;
            if (l >= filled) {
              std::fill_n(row, width_, S(0));
              continue;
            }
            read_image(from, visibilities, first_of(panel) + l, metric, row, rows.weights.data());
            for (std::int64_t p = 0; p < parts_; ++p) {
              weights[p * lanes + l] = rows.weights[p];
            }
          }
          turn(rows.embeddings.data(), lanes, data_.data() + panel * lanes_ * width_);
        });
  }

  std::int64_t count() const { return ceil_div(queries_, lanes_); }
  std::int64_t lanes() const { return lanes_; }
  std::int64_t first_of(std::int64_t panel) const { return panel * lanes_; }
  std::int64_t queries_of(std::int64_t panel) const {
    return std::min(lanes_, queries_ - panel * lanes_);
  }
  std::int64_t vectors_of(std::int64_t panel) const {
    return ceil_div(queries_of(panel), vector_length<S>());
  }
  std::int64_t lanes_of(std::int64_t panel) const { return vectors_of(panel) * vector_length<S>(); }
  const S* data(std::int64_t panel) const { return data_.data() + panel * lanes_ * width_; }
  const S* weights(std::int64_t panel) const { return weights_.data() + panel * lanes_ * parts_; }

 private:
  struct Rows {
    Rows(std::int64_t size, std::int64_t parts) : embeddings(size), weights(parts) {}
    Scratch<S> embeddings, weights;
  };

  // [lanes][width] to [width][lanes], few lines of the target at a time.
  void turn(const S* from, std::int64_t lanes, S* to) const {
    constexpr std::int64_t kStep = 16;
    for (std::int64_t first = 0; first < width_; first += kStep) {
      const std::int64_t end = std::min(first + kStep, width_);
      for (std::int64_t l = 0; l < lanes; ++l) {
        for (std::int64_t k = first; k < end; ++k) {
          to[k * lanes + l] = from[l * width_ + k];
        }
      }
    }
  }

  std::int64_t queries_, lanes_, parts_, width_;
  Scratch<S> data_, weights_;
};

// Some gallery images as rows. The block stays in the second-level cache while all queries of a
// unit go by it.
template <typename S>
class GalleryBlock {
 public:
  GalleryBlock(std::int64_t parts, std::int64_t channels)
      : parts_(parts),
        stride_(row_stride(parts, channels)),
        capacity_(rows(parts, channels)),
        data_(capacity_ * stride_),
        weights_(capacity_ * parts) {}

  // How many images a block holds: whole tiles of them.
  static std::int64_t rows(std::int64_t parts, std::int64_t channels) {
    const std::int64_t bytes = row_stride(parts, channels) * static_cast<std::int64_t>(sizeof(S));
    const std::int64_t tiles = kBlockBytes / (bytes * tile_rows());
    return std::clamp<std::int64_t>(tiles, 1, kMostTiles) * tile_rows();
  }

  // Reads images [first, first + count); rows without an image, up to a whole tile, hold zeros.
  template <typename T>
  void read(
      const Embeddings<T>& from, const Visibilities<S>& visibilities, Metric metric,
      std::int64_t first, std::int64_t count) {
    for (std::int64_t r = 0; r < count; ++r) {
      read_image(from, visibilities, first + r, metric, row(r), weights(r));
    }
    for (std::int64_t r = count; r < ceil_div(count, tile_rows()) * tile_rows(); ++r) {
      std::fill_n(row(r), stride_, S(0));
      std::fill_n(weights(r), parts_, S(0));
    }
  }

  S* row(std::int64_t index) const { return data_.data() + index * stride_; }
  S* weights(std::int64_t index) const { return weights_.data() + index * parts_; }
  std::int64_t stride() const { return stride_; }

 private:
  static constexpr std::int64_t kBlockBytes = std::int64_t(256) << 10;
  static constexpr std::int64_t kMostTiles = 16;

  // An odd number of cache lines: rows a power of two apart would fall into one set of the cache.
  static std::int64_t row_stride(std::int64_t parts, std::int64_t channels) {
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(S));
    return (ceil_div(parts * channels, kLine) | 1) * kLine;
  }

  std::int64_t parts_, stride_, capacity_;
  Scratch<S> data_, weights_;
};

}  // namespace gsalign::distance
