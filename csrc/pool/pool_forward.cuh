// Forward kernel of masked part pooling; pool_kernels.cuh tells of the design.
#pragma once

#include "pool_weights.cuh"

namespace gsalign::pool {

template <typename T>
struct Results {
  T* pooled;              // [batch, parts, channels]
  float* visibility;      // [batch, parts]
  float* totals;          // [batch, parts]
  std::int32_t* peaks;    // [batch, parts]
  std::int32_t* winners;  // [batch, parts, channels], with maxima
  bool binary;            // visibility
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
  float* sums;     // of the groups of threads
  float* weights;  // [parts][rows]
  int* leaders;    // [rows]: the part with the largest weight of all channels, or -1
  float *totals, *largest;
  int* peaks;  // [parts]
  int parts, rows;

  GSALIGN_DEVICE Table(unsigned char* shared, const ForwardLayout& layout, const ForwardPlan& plan)
      : sums(reinterpret_cast<float*>(shared)),
        weights(reinterpret_cast<float*>(shared + layout.weights)),
        leaders(reinterpret_cast<int*>(shared + layout.leaders)),
        totals(reinterpret_cast<float*>(shared + layout.totals)),
        largest(reinterpret_cast<float*>(shared + layout.largest)),
        peaks(reinterpret_cast<int*>(shared + layout.peaks)),
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
      constexpr int kAhead = 2;  // logits are asked for together, before any weight is stored
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
  template <typename T>
  GSALIGN_DEVICE void write_summary(
      const MaskSets& masks, int sample, int first_part, const Results<T>& results) const {
    for (int p = thread_index() / kWarpSize; p < parts; p += block_size() / kWarpSize) {
      if (thread_index() % kWarpSize == 0 && first_part + p < masks.parts) {
        const std::int64_t out = static_cast<std::int64_t>(sample) * masks.parts + first_part + p;
        const bool nowhere = peaks[p] == Largest::kNowhere;
        results.visibility[out] = nowhere ? 0.0f : largest[p];
        results.totals[out] = totals[p];
        results.peaks[out] = nowhere || results.binary ? -1 : peaks[p];
      }
    }
  }
};

// A block owns a sample and a tile of channels.
struct Place {
  int sample, first_channel;

  GSALIGN_DEVICE static Place of(int block, int channels, int tile_channels) {
    const int tiles = channels > 0 ? divide_up(channels, tile_channels) : 1;
    const int sample = block / tiles;
    return {sample, (block - sample * tiles) * tile_channels};
  }
};

// What a block does with its tile of channels of a sample: 2^lane_bits lanes with kVector channels
// each, and 2^group_bits groups of such lanes, of which each takes every so many-th kRows rows.
template <typename T, int kVector, int kParts, bool kMaxima, bool kOnce>
struct Tile {
  using Accumulator = std::conditional_t<kMaxima, Maxima<kParts, kVector>, Sums<kParts, kVector>>;

  const Problem<T>& problem;
  const Results<T>& results;
  const Table& table;
  int lane_bits, group_bits;
  const T* column;  // the thread's channels of the sample's first row

  GSALIGN_DEVICE int lanes() const { return 1 << lane_bits; }
  GSALIGN_DEVICE int first_row() const { return (thread_index() >> lane_bits) * kRows; }
  GSALIGN_DEVICE int row_step() const { return kRows << group_bits; }
  // Rows of a stretch that are read: none where there are no channels.
  GSALIGN_DEVICE int rows_of(int stretch_row) const {
    const int left = problem.masks.positions - stretch_row;
    return problem.channels == 0 ? 0 : (kOnce || left < table.rows ? left : table.rows);
  }
  // Asks for a stretch's rows from `row` on.
  GSALIGN_DEVICE void read(Block<T, kVector>& next, int stretch_row, int row) const {
    const int bytes = problem.row_bytes;
    next.read(row_after(column, stretch_row + row, bytes), bytes, rows_of(stretch_row) - row);
  }

  // Goes through the thread's rows of a stretch, of which `next` holds the first, always asking for
  // the next ones ahead.
  GSALIGN_DEVICE void accumulate(
      Accumulator& accumulator, Block<T, kVector>& next, const float* weights,
      int stretch_row) const {
    const int rows = rows_of(stretch_row);
    GSALIGN_UNROLL_BY(1)
    for (int row = first_row(); row < rows; row += row_step()) {
      const Block<T, kVector> now = next;
      read(next, stretch_row, row + row_step());
      float x[kRows][kVector];
      GSALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        unpack_values<T, kVector>(now.rows[r], x[r]);
      }
      GSALIGN_UNROLL
      for (int p = 0; p < kParts; ++p) {
        float w[kRows];
        load_values<float, kRows>(weights + p * table.rows + row, w);
        accumulator.add(p, w, x, stretch_row + row, rows - row);
      }
    }
  }

  // Adds up what the groups have, in the order of the groups, and writes it. `totals` are those of
  // the parts from `first_part` on.
  GSALIGN_DEVICE void combine(
      const Accumulator& accumulator, int first_part, const float* totals) const {
    using Exchange = Pieces<kVector>;
    const MaskSets& masks = problem.masks;
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
    const auto [sample, first_channel] =
        Place::of(afresh(block_index()), problem.channels, kVector << lane_bits);
    const int groups = 1 << group_bits;
    for (int i = thread_index(); i < kParts << lane_bits; i += block_size()) {
      const int p = i >> lane_bits;
      const int owner = i & (lanes() - 1);
      const int channel = first_channel + owner * kVector;
      if (first_part + p >= masks.parts || channel >= problem.channels) {
        continue;
      }
      const std::int64_t out =
          (static_cast<std::int64_t>(sample) * masks.parts + first_part + p) * problem.channels +
          channel;
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
            Exchange::load(sums, p, (g << lane_bits) + owner, block_size(), other);
            best.meet({other[k], at[g << lane_bits]});
          }
          const bool nowhere = best.at == Largest::kNowhere;
          result[k] = nowhere ? 0.0f : best.value;
          results.winners[out + k] = nowhere ? -1 : best.at;
        }
      } else {
        for (int g = 1; g < groups; ++g) {
          float other[kVector];
          Exchange::load(sums, p, (g << lane_bits) + owner, block_size(), other);
          GSALIGN_UNROLL
          for (int k = 0; k < kVector; ++k) {
            result[k] += other[k];
          }
        }
        const float by = masks.divisor_of(totals[p]);
        GSALIGN_UNROLL
        for (int k = 0; k < kVector; ++k) {
          result[k] /= by;
        }
      }
      store_values<T, kVector>(results.pooled + out, result);
    }
  }
};

// kOnce: one round over the tokens is enough; else groups of parts, and where the table does not
// hold all weights stretches of rows, take turns.
template <typename T, int kVector, int kParts, bool kMaxima, bool kOnce>
GSALIGN_KERNEL(kForwardThreads<T>, kOnce && !kMaxima ? kForwardBlocks : kForwardBlocksOfRest)
pool_forward_kernel(Problem<T> problem, ForwardPlan plan, Results<T> results) {
  using Tile = Tile<T, kVector, kParts, kMaxima, kOnce>;
  const MaskSets& masks = problem.masks;
  const auto [sample, first_channel] =
      Place::of(block_index(), problem.channels, kVector << plan.lane_bits);
  const Table table(shared_memory(), ForwardLayout::make(plan, kVector, kMaxima), plan);
  // Lanes past the last channel work on the tile's first ones, for nobody.
  const int channel = first_channel + (thread_index() & ((1 << plan.lane_bits) - 1)) * kVector;
  const T* column = problem.tokens + sample * problem.sample_stride +
                    (channel < problem.channels ? channel : first_channel);
  const Tile tile{problem, results, table, plan.lane_bits, plan.group_bits, afresh(column)};
  const bool tells = first_channel == 0;  // what is known of the parts, once per sample
  const bool with_leaders = results.binary && tells;
  // Weights of a stretch of rows, and what they say of the parts, between barriers.
  const auto prepare = [&, sample = sample](int first_part, int row, bool last) {
    table.fill(masks, sample, first_part, row, with_leaders);
    barrier();
    if (tells || masks.mode == Mode::kWeightedMean) {
      const int left = masks.positions - row;
      table.summarize(first_part, row, left < table.rows ? left : table.rows, with_leaders);
    }
    if (tells && last) {
      table.write_summary(masks, sample, first_part, results);
    }
  };

  typename Tile::Accumulator accumulator;
  Block<T, kVector> next;
  if constexpr (kOnce) {
    tile.read(next, 0, tile.first_row());  // while the weights are made
    prepare(0, 0, true);
    accumulator.clear();
    tile.accumulate(accumulator, next, table.weights, 0);
    tile.combine(accumulator, 0, table.totals);
  } else {
    for (int part = 0; part < masks.parts; part += kParts) {
      const int held = plan.whole ? part : 0;  // where the table has this part
      accumulator.clear();
      for (int row = 0; row < masks.positions || row == 0; row += table.rows) {
        tile.read(next, row, tile.first_row());
        if (!plan.whole || part == 0) {
          prepare(part, row, row + table.rows >= masks.positions);
        }
        tile.accumulate(accumulator, next, table.weights + held * table.rows, row);
        if (!plan.whole) {
          barrier();  // the table is used up
        }
      }
      tile.combine(accumulator, part, table.totals + held);
      barrier();  // the sums are used up
    }
  }
}

}  // namespace gsalign::pool
