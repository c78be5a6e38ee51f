// Forward kernel of masked part pooling; pool_kernels.cuh tells of the design.
#pragma once

#include "pool_weights.cuh"

namespace gsalign::pool {

template <typename T>
struct Results {
  T* pooled;            // [batch, parts, channels]
  float* visibility;    // [batch, parts]
  float* totals;        // [batch, parts]
  std::int32_t* peaks;  // [batch, parts]
  std::int32_t* winners;  // [batch, parts, channels], with maxima
  bool binary;          // visibility
};

// A thread's sums of weighted tokens, part by part.
template <int kParts, int kVector>
struct Sums {
  float sum[kParts][kVector];

  GSALIGN_DEVICE void clear() {
    GSALIGN_UNROLL
    for (int p = 0; p < kParts; ++p) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        sum[p][i] = 0.0f;
      }
    }
  }
  // Weights of rows that do not exist are zero, and so are their tokens.
  GSALIGN_DEVICE void add(
      int p, const float (&weights)[kRows], const float (&x)[kRows][kVector], int, int) {
    GSALIGN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        sum[p][i] += weights[r] * x[r][i];
      }
    }
  }
};

// A thread's largest weighted tokens, and their rows.
template <int kParts, int kVector>
struct Maxima {
  float largest[kParts][kVector];
  int at[kParts][kVector];

  GSALIGN_DEVICE void clear() {
    GSALIGN_UNROLL
    for (int p = 0; p < kParts; ++p) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        largest[p][i] = -HUGE_VALF;
        at[p][i] = Largest::kNowhere;
      }
    }
  }
  GSALIGN_DEVICE void add(
      int p, const float (&weights)[kRows], const float (&x)[kRows][kVector], int first_row,
      int rows_left) {
    GSALIGN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GSALIGN_UNROLL
      for (int i = 0; i < kVector; ++i) {
        // Rows come in order: the first of equal ones stays, and so does the first NaN.
        const float value = weights[r] * x[r][i];
        const float best = largest[p][i];
        const bool taken =
            (value > best) | ((value != value) & (best == best)) | (at[p][i] == Largest::kNowhere);
        if (taken & (r < rows_left)) {
          largest[p][i] = value;
          at[p][i] = first_row + r;
        }
      }
    }
  }
};

// Shared memory of a block.
struct Table {
  float* weights;  // [parts][rows]
  int* leaders;    // [rows]: the part with the largest weight of all channels, or -1
  float *totals, *largest;
  int* peaks;  // [parts]
  float* sums;
  int parts, rows;

  GSALIGN_DEVICE Table(unsigned char* shared, const ForwardLayout& layout, const ForwardPlan& plan)
      : weights(reinterpret_cast<float*>(shared)),
        leaders(reinterpret_cast<int*>(shared + layout.leaders)),
        totals(reinterpret_cast<float*>(shared + layout.totals)),
        largest(reinterpret_cast<float*>(shared + layout.largest)),
        peaks(reinterpret_cast<int*>(shared + layout.peaks)),
        sums(reinterpret_cast<float*>(shared + layout.sums)),
        parts(plan.held_parts),
        rows(plan.held_rows) {}

  // Weights of the rows from `first_row` on and the parts from `first_part` on; zero where there
  // are none. Few rows are shared out to several threads, each with its own parts.
  GSALIGN_DEVICE void fill(
      const MaskSets& masks, int sample, int first_part, int first_row, bool with_leaders) const {
    const int sharing = rows < block_size() ? block_size() / rows : 1;
    for (int i = thread_index(); i < rows * sharing; i += block_size()) {
      const int share = i / rows;
      const int row = i - share * rows;
      const int position = first_row + row;
      if (position >= masks.positions) {
        for (int p = share; p < parts; p += sharing) {
          weights[p * rows + row] = 0.0f;
        }
        continue;
      }
      const Weights all(masks, sample, position);
      constexpr int kAhead = 4;  // logits are asked for together, before any weight is stored
      GSALIGN_UNROLL_BY(1)
      for (int p0 = share; p0 < parts; p0 += kAhead * sharing) {
        float logits[kAhead];
        GSALIGN_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          const int part = first_part + p0 + k * sharing;
          logits[k] = part < masks.parts ? all.logit(masks.background + part) : 0.0f;
        }
        GSALIGN_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          const int p = p0 + k * sharing;
          if (p < parts) {
            weights[p * rows + row] = first_part + p < masks.parts ? all.weight(logits[k]) : 0.0f;
          }
        }
      }
      if (with_leaders && share == 0) {
        Largest leader = Largest::nothing();
        GSALIGN_UNROLL_BY(1)
        for (int q = 0; q < masks.channels(); ++q) {
          leader.meet({all.channel(q), q});
        }
        leaders[row] = leader.value > 0.0f ? leader.at - masks.background : -1;
      }
    }
  }

  // Totals, largest weights and their positions, over the rows seen so far: a warp per part, always
  // the same one. With leaders, `largest` becomes 1 where the part leads somewhere, else 0.
  GSALIGN_DEVICE void summarize(int first_part, int first_row, int count, bool with_leaders) const {
    const int lane = thread_index() % kWarpSize;
    for (int p = thread_index() / kWarpSize; p < parts; p += block_size() / kWarpSize) {
      float total = 0.0f;
      Largest peak = Largest::nothing();
      GSALIGN_UNROLL_BY(2)
      for (int row = lane; row < count; row += kWarpSize) {
        const float weight = weights[p * rows + row];
        total += weight;
        const bool leads = with_leaders && leaders[row] == first_part + p;
        peak.meet({with_leaders ? (leads ? 1.0f : 0.0f) : weight, first_row + row});
      }
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        total += shuffle_xor(total, mask);
        peak.meet({shuffle_xor(peak.value, mask), shuffle_xor(peak.at, mask)});
      }
      if (lane == 0) {
        if (first_row > 0) {
          total += totals[p];
          peak.meet({largest[p], peaks[p]});
        }
        totals[p] = total;
        largest[p] = peak.value;
        peaks[p] = peak.at;
      }
    }
  }

  // What summarize() found, by the threads that found it.
  GSALIGN_DEVICE void write_summary(
      const MaskSets& masks, int sample, int first_part, bool binary, float* out_visibility,
      float* out_totals, std::int32_t* out_peaks) const {
    for (int p = thread_index() / kWarpSize; p < parts; p += block_size() / kWarpSize) {
      if (thread_index() % kWarpSize == 0 && first_part + p < masks.parts) {
        const std::int64_t out = static_cast<std::int64_t>(sample) * masks.parts + first_part + p;
        const bool nowhere = peaks[p] == Largest::kNowhere;
        out_visibility[out] = nowhere ? 0.0f : largest[p];
        out_totals[out] = totals[p];
        out_peaks[out] = nowhere || binary ? -1 : peaks[p];
      }
    }
  }
};

// A block owns a sample and a tile of channels: 2^lane_bits lanes with kVector of them each.
template <typename T, int kVector, int kParts, bool kMaxima>
GSALIGN_KERNEL(kForwardThreads, kForwardBlocks<T>)
pool_forward_kernel(Problem<T> problem, ForwardPlan plan, Results<T> results) {
  using Accumulator =
      std::conditional_t<kMaxima, Maxima<kParts, kVector>, Sums<kParts, kVector>>;
  const MaskSets& masks = problem.masks;
  const int lanes = 1 << plan.lane_bits;
  const int lane = thread_index() & (lanes - 1);
  const int group = thread_index() >> plan.lane_bits;
  const int groups = 1 << plan.group_bits;
  const int tile_channels = kVector * lanes;
  const int tiles = problem.channels > 0 ? divide_up(problem.channels, tile_channels) : 1;
  const int sample = block_index() / tiles;
  const int tile = block_index() % tiles;
  const int first_channel = tile * tile_channels;
  // Lanes past the last channel work on the tile's first ones, for nobody.
  const int channel = first_channel + lane * kVector;
  const T* source = problem.tokens + sample * problem.sample_stride +
                    (channel < problem.channels ? channel : first_channel);

  const Table table(shared_memory(), ForwardLayout::make(plan, kVector, kMaxima), plan);
  const bool tells = tile == 0;
  const bool with_leaders = results.binary && tells;
  const bool needs_summary = tells || masks.mode == Mode::kWeightedMean;
  const int stretches = masks.positions > 0 ? divide_up(masks.positions, table.rows) : 1;
  const bool held_for_good = stretches == 1 && table.parts >= masks.parts;
  bool held = false;

  constexpr bool kRounds = takes_rounds(kParts, kMaxima);
  for (int first_part = 0; first_part < masks.parts; first_part += kParts) {
    const int held_part = held_for_good ? 0 : first_part;  // the table's first
    Accumulator accumulator;
    accumulator.clear();
    for (int stretch = 0; stretch < stretches; ++stretch) {
      const int first_row = stretch * table.rows;
      const int rows_here =
          masks.positions - first_row < table.rows ? masks.positions - first_row : table.rows;
      const int step = groups * kRows;
      // Ahead of their use: the first rows, while the weights are made, then always the next ones.
      Block<T, kVector> next;
      int row = group * kRows;
      const int rows_read = problem.channels > 0 ? rows_here : 0;
      const T* ahead = source + static_cast<std::int64_t>(first_row + row) * problem.row_stride;
      next.read(ahead, problem.row_stride, rows_read - row);
      if (!held || !held_for_good) {
        if (held) {
          barrier();  // the table is used up
        }
        table.fill(masks, sample, held_part, first_row, with_leaders);
        barrier();
        if (needs_summary) {
          table.summarize(held_part, first_row, rows_here, with_leaders);
        }
        if (tells && stretch == stretches - 1) {
          table.write_summary(
              masks, sample, held_part, results.binary, results.visibility, results.totals,
              results.peaks);
        }
        held = true;
      }
      const float* weights = table.weights + (first_part - held_part) * table.rows;
      GSALIGN_UNROLL_BY(2)
      for (; row < rows_read; row += step) {
        const Block<T, kVector> now = next;
        ahead += static_cast<std::int64_t>(step) * problem.row_stride;
        next.read(ahead, problem.row_stride, rows_read - row - step);
        float x[kRows][kVector];
        GSALIGN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          unpack_values<T, kVector>(now.rows[r], x[r]);
        }
        GSALIGN_UNROLL
        for (int p = 0; p < kParts; ++p) {
          float w[kRows];
          load_values<float, kRows>(weights + p * table.rows + row, w);
          accumulator.add(p, w, x, first_row + row, rows_read - row);
        }
      }
    }

    // The groups' sums meet in shared memory and are added in the order of the groups.
    using Exchange = Pieces<kVector>;
    float* sums = table.sums;
    int* positions = reinterpret_cast<int*>(sums + kParts * kVector * block_size());
    GSALIGN_UNROLL
    for (int p = 0; p < kParts; ++p) {
      if constexpr (kMaxima) {
        Exchange::store(sums, p, thread_index(), block_size(), accumulator.largest[p]);
        GSALIGN_UNROLL
        for (int i = 0; i < kVector; ++i) {
          positions[(p * kVector + i) * block_size() + thread_index()] = accumulator.at[p][i];
        }
      } else {
        Exchange::store(sums, p, thread_index(), block_size(), accumulator.sum[p]);
      }
    }
    barrier();
    for (int i = thread_index(); i < kParts << plan.lane_bits; i += block_size()) {
      const int p = i >> plan.lane_bits;
      const int owner = i & (lanes - 1);
      const int owned = first_channel + owner * kVector;
      if (first_part + p >= masks.parts || owned >= problem.channels) {
        continue;
      }
      const std::int64_t out =
          (static_cast<std::int64_t>(sample) * masks.parts + first_part + p) * problem.channels +
          owned;
      float result[kVector];
      Exchange::load(sums, p, owner, block_size(), result);
      if constexpr (kMaxima) {
        GSALIGN_UNROLL
        for (int k = 0; k < kVector; ++k) {
          const int* at = positions + (p * kVector + k) * block_size() + owner;
          Largest best{result[k], at[0]};
          GSALIGN_UNROLL_BY(1)
          for (int g = 1; g < groups; ++g) {
            float other[kVector];
            Exchange::load(sums, p, g * lanes + owner, block_size(), other);
            best.meet({other[k], at[g * lanes]});
          }
          const bool nowhere = best.at == Largest::kNowhere;
          result[k] = nowhere ? 0.0f : best.value;
          results.winners[out + k] = nowhere ? -1 : best.at;
        }
      } else {
        for (int g = 1; g < groups; ++g) {
          float other[kVector];
          Exchange::load(sums, p, g * lanes + owner, block_size(), other);
          GSALIGN_UNROLL
          for (int k = 0; k < kVector; ++k) {
            result[k] += other[k];
          }
        }
        const float by = masks.divisor_of(table.totals[first_part - held_part + p]);
        GSALIGN_UNROLL
        for (int k = 0; k < kVector; ++k) {
          result[k] /= by;
        }
      }
      store_values<T, kVector>(results.pooled + out, result);
    }
    if (!kRounds) {
      break;
    }
    if (first_part + kParts < masks.parts) {
      barrier();  // the sums are read
    }
  }
}

}  // namespace gsalign::pool
