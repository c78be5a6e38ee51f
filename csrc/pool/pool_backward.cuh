// Backward kernels of masked part pooling; pool_kernels.cuh tells of the design.
#pragma once

#include "pool_weights.cuh"

namespace gsalign::pool {

// What concerns the masks of what comes back, and where their gradient goes.
struct MaskGradients {
  const float* visibility;    // [batch, parts]
  const float* totals;        // [batch, parts]
  const std::int32_t* peaks;  // [batch, parts]
  float* masks;               // like the masks
  // For the finishing kernel, or null where there is none: gradients by the weights, of the sums
  // alone [batch, parts, positions], and each unit's share of d / d total [batch, units, parts].
  float *weights, *slopes;
};

template <typename T>
struct Gradients : MaskGradients {
  const T* pooled;              // [batch, parts, channels]
  const std::int32_t* winners;  // [batch, parts, channels], with maxima
  T* tokens;                    // [batch, prefix + positions, channels]
};

// Gradients by the masks at one position from those by the parts' weights, `gradient_of(part)`. The
// channels are shared out to `sharing` threads, of which this is number `share`.
template <typename GradientOf>
GSALIGN_DEVICE void write_mask_gradients(
    const MaskSets& masks, int sample, int position, int share, int sharing, float* target,
    GradientOf gradient_of) {
  const Weights weights(masks, sample, position);
  float mean = 0.0f;
  if (masks.activation == Activation::kSoftmax) {
    GSALIGN_UNROLL_BY(2)
    for (int p = 0; p < masks.parts; ++p) {
      mean += weights.part(p) * gradient_of(p);
    }
  }
  float* column = target + sample * masks.set_stride + position;
  GSALIGN_UNROLL_BY(1)
  for (int q = share; q < masks.channels(); q += sharing) {
    float gradient = q >= masks.background ? gradient_of(q - masks.background) : 0.0f;
    if (masks.activation != Activation::kNone) {
      const float weight = weights.channel(q);
      gradient = masks.activation == Activation::kSoftmax ? weight * (gradient - mean)
                                                          : gradient * (weight * (1.0f - weight));
    }
    column[q * masks.positions] = gradient;
  }
}

// ---- sums over the lanes of a warp ----

// Adds up kCount values over the lanes. Lanes halve the values among them as they go, so that all
// sums together take about kCount shuffles: a lane ends with those from the returned index on, in
// values[0] to values[kKeptSums<kCount> - 1]. Where an odd number is left, both lanes keep all.
template <int kCount, int kDistance = kWarpSize / 2, int kSize>
GSALIGN_DEVICE int sum_over_lanes(float (&values)[kSize]) {
  if constexpr (kDistance == 0) {
    return 0;
  } else if constexpr (kCount % 2 == 0) {
    constexpr int kHalf = kCount / 2;
    const bool upper = (thread_index() & kDistance) != 0;
    GSALIGN_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float mine = upper ? values[i + kHalf] : values[i];
      const float theirs = upper ? values[i] : values[i + kHalf];
      values[i] = mine + shuffle_xor(theirs, kDistance);
    }
    return (upper ? kHalf : 0) + sum_over_lanes<kHalf, kDistance / 2>(values);
  } else {
    GSALIGN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      values[i] += shuffle_xor(values[i], kDistance);
    }
    return sum_over_lanes<kCount, kDistance / 2>(values);
  }
}
template <int kCount, int kDistance = kWarpSize / 2>
constexpr int kKeptSums = kKeptSums < kCount % 2 == 0 ? kCount / 2 : kCount,
              kDistance / 2 >
    ;
template <int kCount>
constexpr int kKeptSums<kCount, 0> = kCount;
// Bits of the lane's index in which lanes with the same sums differ.
template <int kCount, int kDistance = kWarpSize / 2>
constexpr int kAlikeLanes = kCount % 2 == 0 ? kAlikeLanes<kCount / 2, kDistance / 2>
                                            : (kDistance | kAlikeLanes<kCount, kDistance / 2>);
template <int kCount>
constexpr int kAlikeLanes<kCount, 0> = 0;

// ---- pass over the tokens ----

// Shared memory of a block.
struct Stage {
  float* gradients;  // pooled gradients by part, in pieces, of the columns at hand
  int* winners;      // with maxima: the rows they belong to
  float* weights;    // [parts][kUnitRows], over the divisors
  float* dots;       // [warps][parts][kRows]

  GSALIGN_DEVICE Stage(unsigned char* shared, const BackwardLayout& layout)
      : gradients(reinterpret_cast<float*>(shared)),
        winners(reinterpret_cast<int*>(shared + layout.winners)),
        weights(reinterpret_cast<float*>(shared + layout.weights)),
        dots(reinterpret_cast<float*>(shared + layout.dots)) {}

  GSALIGN_DEVICE float dot(int p, int row, int padded_parts) const {
    const int first = row / kRows * kRows;
    return dots[first * padded_parts + p * kRows + (row - first)];
  }
};

// What a warp does with its kRows rows of a unit.
template <typename T, int kVector, int kParts, bool kMaxima>
struct Rows {
  const T* source;
  T* target;
  int row_bytes;  // from one of the source's rows to the next
  int channels;   // stride of the target's rows
  int first_row;  // of the sample
  int rows_left;  // in the sample, from there on
  int columns;    // at hand, of kVector channels
  int padded_parts;
  Stage stage;  // of whose weights and dot products `slot` is the rows' first
  int slot;

  GSALIGN_DEVICE void read(Block<T, kVector>& block, int column) const {
    block.read(source + column * kVector, row_bytes, column < columns ? rows_left : 0);
  }

  // Rows whose tokens and gradients are in registers together: as many as leave room for 24 or 32
  // dot products.
  static constexpr int kSide = kVector == 8 && (kParts > 4 || kMaxima) ? kRows / 2 : kRows;

  // back += weight * gradient of part p, dots += x * gradient, for the rows from `row` on.
  template <bool kBack, bool kDots>
  GSALIGN_DEVICE void add_part(
      int p, int column, int row, const float (&x)[kSide][kVector], float (&back)[kSide][kVector],
      float* dots) const {
    float gradient[kVector];
    Pieces<kVector>::load(stage.gradients, p, column, columns, gradient);
    int winner[kVector];
    if constexpr (kMaxima) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        winner[i] = stage.winners[(p * kVector + i) * columns + column] - first_row - row;
      }
    }
    float weights[kRows];
    if constexpr (kBack) {
      load_values<float, kRows>(stage.weights + p * kUnitRows + slot, weights);
    }
    GSALIGN_UNROLL
    for (int r = 0; r < kSide; ++r) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        const bool counts = !kMaxima || winner[i] == r;
        if constexpr (kBack) {
          back[r][i] += counts ? weights[row + r] * gradient[i] : 0.0f;
        }
        if constexpr (kDots) {
          dots[r] += counts ? x[r][i] * gradient[i] : 0.0f;
        }
      }
    }
  }

  // One round over the columns at hand: the dot products of kParts parts, and with the first of
  // them the gradient of the tokens, for which all parts are needed. `next` holds the first block.
  template <bool kFirst>
  GSALIGN_DEVICE void round(int first_part, Block<T, kVector>& next, bool adds) const {
    const int lane = thread_index() % kWarpSize;
    float dots[kParts * kRows];
    GSALIGN_UNROLL
    for (int i = 0; i < kParts * kRows; ++i) {
      dots[i] = 0.0f;
    }
    GSALIGN_UNROLL_BY(1)
    for (int column = lane; column < columns; column += kWarpSize) {
      const Block<T, kVector> now = next;
      read(next, column + kWarpSize);
      GSALIGN_UNROLL
      for (int row = 0; row < kRows; row += kSide) {
        forget_memory();
        float x[kSide][kVector];
        float back[kSide][kVector];
        GSALIGN_UNROLL
        for (int r = 0; r < kSide; ++r) {
          unpack_values<T, kVector>(now.rows[row + r], x[r]);
          GSALIGN_UNROLL
          for (int i = 0; i < kVector; ++i) {
            back[r][i] = 0.0f;
          }
        }
        GSALIGN_UNROLL
        for (int p = 0; p < kParts; ++p) {
          add_part<kFirst, true>(first_part + p, column, row, x, back, dots + p * kRows + row);
        }
        if constexpr (kFirst) {
          // With six there are no others, but the loop keeps the compiler from taking up all rows
          // at once, for which there are not enough registers.
          GSALIGN_UNROLL_BY(1)
          for (int p = kParts; (kMaxima || kParts >= 6) && p < padded_parts; ++p) {
            add_part<true, false>(p, column, row, x, back, nullptr);
          }
          GSALIGN_UNROLL
          for (int r = 0; r < kSide; ++r) {
            if (row + r < rows_left) {
              store_values<T, kVector>(
                  target + static_cast<std::int64_t>(row + r) * channels + column * kVector,
                  back[r]);
            }
          }
        }
      }
    }
    const int first = sum_over_lanes<kParts * kRows>(dots);
    if ((lane & kAlikeLanes<kParts * kRows>) == 0) {
      GSALIGN_UNROLL
      for (int i = 0; i < kKeptSums<kParts * kRows>; ++i) {
        float& sum = stage.dots[slot * padded_parts + first_part * kRows + first + i];
        sum = adds ? sum + dots[i] : dots[i];
      }
    }
  }
};

// Pooled gradients of the columns from `first_column` on; zero for the parts that fill up. kAhead
// of them are asked for together, before any is stored.
template <int kAhead, typename T, int kVector, bool kMaxima>
GSALIGN_DEVICE void stage_gradients(
    const Stage& stage, const Gradients<T>& gradients, const Problem<T>& problem,
    const BackwardPlan& plan, int first_column, int columns) {
  const int sample = afresh(block_index()) / plan.blocks();
  const int parts = problem.masks.parts;
  const int count = plan.padded_parts * columns;
  for (int start = thread_index(); start < count; start += kAhead * block_size()) {
    Packed<T, kVector> packed[kAhead];
    int part[kAhead], column[kAhead];
    std::int64_t at[kAhead];
    GSALIGN_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int i = start + k * block_size();
      part[k] = i / columns;
      column[k] = i - part[k] * columns;
      at[k] = (static_cast<std::int64_t>(sample) * parts + part[k]) * problem.channels +
              (first_column + column[k]) * kVector;
      packed[k] = load_packed<T, kVector>(gradients.pooled + at[k], part[k] < parts);
    }
    GSALIGN_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (part[k] >= plan.padded_parts) {
        continue;
      }
      float values[kVector];
      unpack_values<T, kVector>(packed[k], values);
      Pieces<kVector>::store(stage.gradients, part[k], column[k], columns, values);
      if constexpr (kMaxima) {
        GSALIGN_UNROLL
        for (int i = 0; i < kVector; ++i) {
          stage.winners[(part[k] * kVector + i) * columns + column[k]] =
              part[k] < parts ? gradients.winners[at[k] + i] : -1;
        }
      }
    }
  }
}

// Weights over divisors of a unit's rows; zero where there are none.
GSALIGN_DEVICE void stage_weights(
    const Stage& stage, const MaskSets& masks, const float* totals, int sample, int first_row,
    int padded_parts) {
  const int row = thread_index() % kUnitRows;
  const int share = thread_index() / kUnitRows;
  const int sharing = block_size() / kUnitRows;
  if (first_row + row >= masks.positions) {
    for (int p = share; p < padded_parts; p += sharing) {
      stage.weights[p * kUnitRows + row] = 0.0f;
    }
    return;
  }
  const Weights weights(masks, sample, first_row + row);
  for (int p = share; p < padded_parts; p += sharing) {
    stage.weights[p * kUnitRows + row] =
        p < masks.parts ? weights.part(p) / masks.divisor_of(totals[p]) : 0.0f;
  }
}

// What follows from a unit's dot products: the gradients by the masks, or what the finishing kernel
// needs for them.
GSALIGN_DEVICE void use_dots(
    const MaskSets& masks, const BackwardPlan& plan, const MaskGradients& gradients,
    const Stage& stage) {
  const int blocks = plan.blocks();
  const int block = afresh(block_index());
  const int sample = block / blocks;
  const int unit = block - sample * blocks;
  const int unit_row = unit * kUnitRows;
  const std::int64_t parts_before = static_cast<std::int64_t>(sample) * masks.parts;
  const float* totals = gradients.totals + parts_before;
  if (gradients.weights == nullptr) {
    // Nothing else is to come in: on to the masks.
    const int row = thread_index() % kUnitRows;
    const int position = unit_row + row;
    if (position < masks.positions) {
      write_mask_gradients(
          masks, sample, position, thread_index() / kUnitRows, block_size() / kUnitRows,
          gradients.masks, [&](int p) {
            const float gradient =
                stage.dot(p, row, plan.padded_parts) / masks.divisor_of(totals[p]);
            return gradients.peaks[parts_before + p] == position
                       ? gradient + gradients.visibility[parts_before + p]
                       : gradient;
          });
    }
    return;
  }
  const int count = masks.parts * kUnitRows;
  for (int start = 0; start < count; start += block_size()) {
    const int i = start + thread_index();
    const int p = i / kUnitRows;
    const int position = unit_row + i % kUnitRows;
    const float by = i < count ? masks.divisor_of(totals[p]) : 1.0f;
    float slope = 0.0f;
    if (i < count && position < masks.positions) {
      const float dot = stage.dot(p, i % kUnitRows, plan.padded_parts);
      gradients.weights[(parts_before + p) * masks.positions + position] = dot / by;
      slope = stage.weights[i] * dot;
    }
    for (int mask = kUnitRows / 2; mask > 0; mask /= 2) {
      slope += shuffle_xor(slope, mask);
    }
    if (i < count && i % kUnitRows == 0 && unit < plan.units) {
      gradients.slopes[(static_cast<std::int64_t>(sample) * plan.units + unit) * masks.parts + p] =
          slope / by;
    }
  }
}

// A block owns a unit of a sample's rows, a warp kRows of them.
template <typename T, int kVector, int kParts, bool kMaxima>
GSALIGN_KERNEL(kBackwardThreads, kMaxima ? kBackwardBlocksOfMaxima : kBackwardBlocks)
pool_backward_kernel(Problem<T> problem, BackwardPlan plan, Gradients<T> gradients) {
  const MaskSets& masks = problem.masks;
  const int blocks = plan.blocks();
  const int sample = block_index() / blocks;
  const int unit = block_index() - sample * blocks;
  const int unit_row = unit * kUnitRows;
  const int slot = thread_index() / kWarpSize * kRows;
  const int all_columns = problem.channels / kVector;
  const float* totals = gradients.totals + static_cast<std::int64_t>(sample) * masks.parts;
  T* target = gradients.tokens + static_cast<std::int64_t>(sample) *
                                     (problem.prefix + masks.positions) * problem.channels;
  const Stage stage(shared_memory(), BackwardLayout::make(plan, kVector, kMaxima));

  // What is before the map has no part in it.
  float nothing[kVector] = {};
  for (int row = unit; row < problem.prefix; row += blocks) {
    T* before = target + static_cast<std::int64_t>(row) * problem.channels;
    for (int column = thread_index(); column < all_columns; column += block_size()) {
      store_values<T, kVector>(before + column * kVector, nothing);
    }
  }

  Rows<T, kVector, kParts, kMaxima> rows{
      row_after(
          problem.tokens + sample * problem.sample_stride, unit_row + slot, problem.row_bytes),
      target + static_cast<std::int64_t>(problem.prefix + unit_row + slot) * problem.channels,
      problem.row_bytes,
      problem.channels,
      unit_row + slot,
      masks.positions - unit_row - slot,
      all_columns < plan.columns ? all_columns : plan.columns,
      plan.padded_parts,
      stage,
      slot};
  const int lane = thread_index() % kWarpSize;
  Block<T, kVector> next;
  rows.read(next, lane);  // while shared memory is filled
  stage_weights(stage, masks, totals, sample, unit_row, plan.padded_parts);
  int first_column = 0;
  do {
    const bool again = first_column > 0;
    if (again) {
      const int columns_left = all_columns - first_column;
      rows.columns = columns_left < plan.columns ? columns_left : plan.columns;
      rows.read(next, lane);
      barrier();  // the pooled gradients are used up
    }
    stage_gradients<(kParts < 8 ? 4 : 2), T, kVector, kMaxima>(
        stage, gradients, problem, plan, first_column, rows.columns);
    barrier();
    rows.template round<true>(0, next, again);
    for (int p = kParts; takes_rounds(kParts, kMaxima) && p < plan.padded_parts; p += kParts) {
      rows.read(next, lane);
      rows.template round<false>(p, next, again);
    }
    rows.source += static_cast<std::int64_t>(rows.columns) * kVector;
    rows.target += static_cast<std::int64_t>(rows.columns) * kVector;
    first_column += plan.columns;
  } while (first_column < all_columns);
  barrier();
  use_dots(masks, plan, gradients, stage);
}

// ---- masks, where sums over all positions or samples come in ----

// A block owns kFinishPositions positions of a mask set. `samples` share it: the whole batch, or
// one. All samples of a shared set have the totals and peaks of the first.
GSALIGN_KERNEL(kFinishThreads)
pool_finish_kernel(MaskSets masks, int samples, int units, int blocks, MaskGradients gradients) {
  const int set = block_index() / blocks;
  const int column = thread_index() % kFinishPositions;
  const int position = block_index() % blocks * kFinishPositions + column;
  const int share = thread_index() / kFinishPositions;
  const int sharing = block_size() / kFinishPositions;
  const bool exists = position < masks.positions;
  const std::int64_t first = static_cast<std::int64_t>(set) * masks.parts;

  const FinishLayout layout = FinishLayout::make(masks.parts, block_size());
  float* slopes = reinterpret_cast<float*>(shared_memory());
  float* shown = reinterpret_cast<float*>(shared_memory() + layout.shown);
  float* by_weight = reinterpret_cast<float*>(shared_memory() + layout.gradients);
  float* partial = reinterpret_cast<float*>(shared_memory() + layout.partial);

  // d / d total and what the largest weight sends back, a warp per part.
  const int lane = thread_index() % kWarpSize;
  const int warps = block_size() / kWarpSize;
  for (int p = thread_index() / kWarpSize; p < masks.parts; p += warps) {
    float slope = 0.0f, sent = 0.0f;
    if (samples > 0 && total_is_free(masks.mode, gradients.totals[first + p], masks.eps)) {
      const float* share_of = gradients.slopes + first * units + p;
      const std::int64_t count = static_cast<std::int64_t>(samples) * units;
      for (std::int64_t i = lane; i < count; i += kWarpSize) {
        slope += share_of[i * masks.parts];
      }
    }
    for (int b = lane; b < samples; b += kWarpSize) {
      sent += gradients.visibility[first + static_cast<std::int64_t>(b) * masks.parts + p];
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      slope += shuffle_xor(slope, mask);
      sent += shuffle_xor(sent, mask);
    }
    if (lane == 0) {
      slopes[p] = slope;
      shown[p] = sent;
    }
  }

  // Gradients by the weights, summed over the samples in a fixed order: every so many-th by one
  // thread, and then the threads' sums.
  const float* source = gradients.weights + first * masks.positions + position;
  if (samples == 1) {
    for (int p = share; p < masks.parts && exists; p += sharing) {
      by_weight[p * kFinishPositions + column] =
          source[static_cast<std::int64_t>(p) * masks.positions];
    }
    barrier();
  }
  for (int p0 = 0; p0 < masks.parts && samples != 1; p0 += kFinishParts) {
    float sums[kFinishParts] = {};
    for (int b = share; b < samples && exists; b += sharing) {
      GSALIGN_UNROLL
      for (int k = 0; k < kFinishParts; ++k) {
        const int p = p0 + k;
        sums[k] += p < masks.parts
                       ? source[(static_cast<std::int64_t>(b) * masks.parts + p) * masks.positions]
                       : 0.0f;
      }
    }
    GSALIGN_UNROLL
    for (int k = 0; k < kFinishParts; ++k) {
      partial[k * block_size() + thread_index()] = sums[k];
    }
    barrier();
    for (int k = share; k < kFinishParts && p0 + k < masks.parts; k += sharing) {
      float sum = 0.0f;
      for (int s = 0; s < sharing; ++s) {
        sum += partial[k * block_size() + s * kFinishPositions + column];
      }
      by_weight[(p0 + k) * kFinishPositions + column] = sum;
    }
    barrier();
  }

  if (exists) {
    write_mask_gradients(masks, set, position, share, sharing, gradients.masks, [&](int p) {
      const float gradient = by_weight[p * kFinishPositions + column] - slopes[p];
      const bool peak = samples > 0 && gradients.peaks[first + p] == position;
      return peak ? gradient + shown[p] : gradient;
    });
  }
}

}  // namespace gsalign::pool
