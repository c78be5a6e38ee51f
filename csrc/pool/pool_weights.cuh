// What the pooling kernels share: masks and the weights made of them, tokens by groups of rows.
#pragma once

#include "../common/launch.h"
#include "pool.h"
#include "pool_plan.h"

namespace gsalign::pool {

struct MaskSets {
  const float* start;       // [sets, background + parts, positions]
  std::int64_t set_stride;  // 0 where all samples share one set
  int background;           // channels before the parts: 0 or 1
  int parts, positions;
  Mode mode;
  Activation activation;
  float eps;

  GSALIGN_HOST_DEVICE int channels() const { return background + parts; }
  // What a part's sum is divided by; a maximum is not.
  GSALIGN_DEVICE float divisor_of(float total) const {
    return mode == Mode::kMax ? 1.0f : divisor(mode, total, positions, eps);
  }
};

// The weights of all channels at one position. They are made when asked for: what costs much, the
// softmax's sum, is kept.
class Weights {
 public:
  GSALIGN_DEVICE Weights(const MaskSets& masks, int sample, int position)
      : logits_(masks.start + sample * masks.set_stride + position),
        stride_(masks.positions),
        background_(masks.background),
        activation_(masks.activation),
        largest_(0.0f),
        scale_(1.0f) {
    if (activation_ == Activation::kSoftmax) {
      const int channels = masks.channels();
      largest_ = -HUGE_VALF;
      GSALIGN_UNROLL_BY(4)
      for (int q = 0; q < channels; ++q) {
        const float logit = this->logit(q);
        largest_ = logit > largest_ ? logit : largest_;
      }
      float sum = 0.0f;
      GSALIGN_UNROLL_BY(4)
      for (int q = 0; q < channels; ++q) {
        sum += exponential(logit(q) - largest_);
      }
      scale_ = 1.0f / sum;
    }
  }

  GSALIGN_DEVICE float logit(int q) const { return logits_[q * stride_]; }
  GSALIGN_DEVICE float weight(float logit) const {
    if (activation_ == Activation::kSoftmax) {
      return exponential(logit - largest_) * scale_;
    }
    return activation_ == Activation::kSigmoid ? sigmoid(logit) : logit;
  }
  GSALIGN_DEVICE float channel(int q) const { return weight(logit(q)); }
  GSALIGN_DEVICE float part(int p) const { return channel(background_ + p); }

 private:
  const float* logits_;
  int stride_, background_;
  Activation activation_;
  float largest_, scale_;
};

// The largest of some values and where it is. NaN is larger than every number, and of equal ones
// the first is the largest, as in the reference; nothing at all is below -infinity.
struct Largest {
  float value;
  int at;

  static constexpr int kNowhere = 0x7fffffff;

  GSALIGN_DEVICE static Largest nothing() { return {-HUGE_VALF, kNowhere}; }
  GSALIGN_DEVICE void meet(const Largest& other) {
    const bool nan = value != value;
    const bool other_nan = other.value != other.value;
    const bool same = (other.value == value) | (other_nan & nan);
    if ((other.value > value) | (other_nan & !nan) | (same & (other.at < at))) {
      *this = other;
    }
  }
};

// What the passes over the tokens are given.
template <typename T>
struct Problem {
  MaskSets masks;
  const T* tokens;             // the first one of the map; its channels are contiguous
  std::int64_t sample_stride;  // in values
  int row_bytes;               // from one row to the next, at most 2^31 - 1
  int batch, channels, prefix;
};

// The same place some rows further on: one multiply-add, for which a row's bytes are an int.
template <typename T>
GSALIGN_DEVICE const T* row_after(const T* place, int rows, int row_bytes) {
  return reinterpret_cast<const T*>(
      reinterpret_cast<const char*>(place) + static_cast<std::int64_t>(rows) * row_bytes);
}

// kVector channels of kRows rows, as stored.
template <typename T, int kVector>
struct Block {
  Packed<T, kVector> rows[kRows];

  // Rows from `rows_left` on do not exist and are zero. Where there is none at all nothing is done:
  // nobody asks for such a block.
  GSALIGN_DEVICE void read(const T* source, int row_bytes, int rows_left) {
    if (rows_left >= kRows) {
      GSALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        rows[r] = load_packed<T, kVector>(row_after(source, r, row_bytes));
      }
    } else if (rows_left > 0) {
      GSALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        rows[r] = load_packed<T, kVector>(row_after(source, r, row_bytes), r < rows_left);
      }
    }
  }
};

// Consecutive values in shared memory are stored in pieces of 16 bytes, so that neighbouring
// threads' pieces lie side by side and no two of them meet in a bank.
template <int kVector>
struct Pieces {
  static constexpr int kSize = kVector % 4 == 0 ? 4 : 1;
  static constexpr int kCount = kVector / kSize;

  // Values of item `i` of `stride` items, of vector `vector`.
  GSALIGN_DEVICE static void load(
      const float* table, int vector, int i, int stride, float (&values)[kVector]) {
    GSALIGN_UNROLL
    for (int j = 0; j < kCount; ++j) {
      float piece[kSize];
      load_values<float, kSize>(table + ((vector * kCount + j) * stride + i) * kSize, piece);
      GSALIGN_UNROLL
      for (int k = 0; k < kSize; ++k) {
        values[j * kSize + k] = piece[k];
      }
    }
  }
  GSALIGN_DEVICE static void store(
      float* table, int vector, int i, int stride, const float (&values)[kVector]) {
    GSALIGN_UNROLL
    for (int j = 0; j < kCount; ++j) {
      float piece[kSize];
      GSALIGN_UNROLL
      for (int k = 0; k < kSize; ++k) {
        piece[k] = values[j * kSize + k];
      }
      store_values<float, kSize>(table + ((vector * kCount + j) * stride + i) * kSize, piece);
    }
  }
};

}  // namespace gsalign::pool
