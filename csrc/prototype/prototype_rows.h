// Rows of the masked prototype loss in vectors of a given width, for with_vectors().
//
// Numbers of a row are visited in order, kBytes at a time; sums have two vectors of partial sums,
// even and odd steps, so that one addition need not wait for the one before.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cpu.h"
#include "../common/lanes.h"
#include "prototype.h"

namespace gsalign::prototype {

// Calls visit(slice, turn), where slice.load(row) reads the next numbers of a row and
// slice.store(row, value) writes them; turn is 0, 1, 0, 1, ... What a row lacks of a vector is read
// as zeros, which add nothing to any sum here.
template <typename R, int kBytes>
struct WholeSlice {
  using V = Vector<R, kBytes>;
  std::int64_t at;

  GSALIGN_INLINE V load(const R* row) const { return load_vector<R, kBytes>(row + at); }
  GSALIGN_INLINE void store(R* row, const V& value) const { store_vector(row + at, value); }
};

template <typename R, int kBytes>
struct PartSlice {
  using V = Vector<R, kBytes>;
  std::int64_t at, count;

  GSALIGN_INLINE V load(const R* row) const {
    V value{};
    for (std::int64_t i = 0; i < count; ++i) {
      value[i] = row[at + i];
    }
    return value;
  }
  GSALIGN_INLINE void store(R* row, const V& value) const {
    for (std::int64_t i = 0; i < count; ++i) {
      row[at + i] = value[i];
    }
  }
};

template <typename R, int kBytes, typename Visit>
GSALIGN_INLINE void for_slices(std::int64_t channels, Visit&& visit) {
  constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
  std::int64_t at = 0;
  for (; at + 2 * kLength <= channels; at += 2 * kLength) {
    visit(WholeSlice<R, kBytes>{at}, 0);
    visit(WholeSlice<R, kBytes>{at + kLength}, 1);
  }
  if (at + kLength <= channels) {
    visit(WholeSlice<R, kBytes>{at}, 0);
    at += kLength;
  }
  if (at < channels) {
    visit(PartSlice<R, kBytes>{at, channels - at}, 1);
  }
}

template <typename V>
GSALIGN_INLINE V at_least(const V& value, const V& least) {
  return value < least ? least : value;  // a NaN stays
}

// sum[c] = the sum of rows[index][c] over the indices from `begin` to `end`, in order. Four rows at
// a time, so that the sum is not read and written for each.
template <int kBytes, typename R>
GSALIGN_INLINE void add_rows(
    R* sum, const R* rows, const std::int64_t* begin, const std::int64_t* end, std::int64_t stride,
    std::int64_t channels) {
  using V = Vector<R, kBytes>;
  bool fresh = true;
  for (; end - begin >= 4; begin += 4) {
    const R *r0 = rows + begin[0] * stride, *r1 = rows + begin[1] * stride,
            *r2 = rows + begin[2] * stride, *r3 = rows + begin[3] * stride;
    for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
      const V first = slice.load(r0);
      slice.store(
          sum, (fresh ? first : slice.load(sum) + first) + slice.load(r1) + slice.load(r2) +
                   slice.load(r3));
    });
    fresh = false;
  }
  for (; begin < end; ++begin) {
    const R* row = rows + *begin * stride;
    for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
      const V next = slice.load(row);
      slice.store(sum, fresh ? next : slice.load(sum) + next);
    });
    fresh = false;
  }
}

// row[c] *= factor
template <int kBytes, typename R>
GSALIGN_INLINE void scale_row(R* row, R factor, std::int64_t channels) {
  for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
    slice.store(row, factor * slice.load(row));
  });
}

template <int kBytes, typename R>
GSALIGN_INLINE double row_norm(const R* row, std::int64_t channels) {
  using V = Vector<R, kBytes>;
  V sum[2] = {};
  for_slices<R, kBytes>(channels, [&](auto slice, int turn) GSALIGN_VECTOR_BODY {
    const V value = slice.load(row);
    sum[turn] += value * value;
  });
  return std::sqrt(sum_of<R>(sum[0] + sum[1]));
}

// What a row's losses and gradients follow from.
struct RowSums {
  double feature_norm, product_norm;  // |f| and |q|
  double feature_product;             // f q
  double logarithms;                  // sum m log max(m, 1e-6)
};

// `centre` is the inverse norm of the class mean.
template <int kBytes, typename R>
GSALIGN_INLINE RowSums
row_sums(const R* feature, const R* mean, const R* mask, R centre, std::int64_t channels) {
  using V = Vector<R, kBytes>;
  const V smallest = V{} + kSmallestMask<R>;
  V features[2] = {}, products[2] = {}, crossed[2] = {}, logarithms[2] = {};
  for_slices<R, kBytes>(channels, [&](auto slice, int turn) GSALIGN_VECTOR_BODY {
    const V f = slice.load(feature), m = slice.load(mask);
    const V q = centre * slice.load(mean) * m;
    features[turn] += f * f;
    products[turn] += q * q;
    crossed[turn] += f * q;
    logarithms[turn] += m * logarithm<R>(at_least(m, smallest));
  });
  return {
      std::sqrt(sum_of<R>(features[0] + features[1])),
      std::sqrt(sum_of<R>(products[0] + products[1])), sum_of<R>(crossed[0] + crossed[1]),
      sum_of<R>(logarithms[0] + logarithms[1])};
}

// sum (g - p)^2
template <int kBytes, typename R>
GSALIGN_INLINE double row_distance(
    const R* feature, const R* mean, const R* mask, R unit, R centre, R pull,
    std::int64_t channels) {
  using V = Vector<R, kBytes>;
  V sum[2] = {};
  for_slices<R, kBytes>(channels, [&](auto slice, int turn) GSALIGN_VECTOR_BODY {
    const V q = centre * slice.load(mean) * slice.load(mask);
    const V error = unit * slice.load(feature) - pull * q;
    sum[turn] += error * error;
  });
  return sum_of<R>(sum[0] + sum[1]);
}

// Writes the gradient by the mask and, but for what comes through the class mean, by the feature;
// adds m (by q) to `total`, or starts it if `fresh`. The loss has -entropy_slope sum m log m.
template <int kBytes, typename R>
GSALIGN_INLINE void row_backward(
    const R* feature, const R* mean, const R* mask, R centre, const RowGradients<R>& by,
    R entropy_slope, std::int64_t channels, R* grad_feature, R* grad_mask, R* total, bool fresh) {
  using V = Vector<R, kBytes>;
  const V smallest = V{} + kSmallestMask<R>, one = V{} + R(1);
  for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
    const V f = slice.load(feature), m = slice.load(mask);
    const V c = centre * slice.load(mean);
    const V q = c * m;
    const V by_product = by.cross * f + by.product * q;
    const V raised = at_least(m, smallest);
    // 1, or 0 where the mask was raised: then the difference is at least a rounding of 1e-6.
    const V excess = (raised - m) * R(1e30);
    const V free = one - (excess < one ? excess : one);
    slice.store(grad_feature, by.feature * f + by.cross * q);
    slice.store(grad_mask, by_product * c - entropy_slope * (logarithm<R>(raised) + free));
    const V part = by_product * m;
    slice.store(total, fresh ? part : slice.load(total) + part);
  });
}

// row = scale total - radial mean: what each sample of a class gets through the class mean.
template <int kBytes, typename R>
GSALIGN_INLINE void class_backward(
    R* total, const R* mean, const ClassGradient<R>& by, std::int64_t channels) {
  for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
    slice.store(total, by.scale * slice.load(total) - by.radial * slice.load(mean));
  });
}

// y[c] += x[c]
template <int kBytes, typename R>
GSALIGN_INLINE void add_row(R* y, const R* x, std::int64_t channels) {
  for_slices<R, kBytes>(channels, [&](auto slice, int) GSALIGN_VECTOR_BODY {
    slice.store(y, slice.load(y) + slice.load(x));
  });
}

}  // namespace gsalign::prototype
