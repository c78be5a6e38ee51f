// CUDA kernels of the masked prototype loss: two launches forward, one backward.
//
// What has to move, for V = B * D values of 4 bytes:
//   means     reads the features, writes every sample's class mean           2 V * 4 bytes
//   rows      reads features, means and masks, writes 24 bytes per sample    3 V * 4 bytes
//   backward  reads features, masks and a mean per class, writes both
//             gradients; the rows it reads a second time are in the cache    4 V * 4 bytes
// for about 70 operations per value, half of them in two logarithms. A training batch (B 128,
// D 768) is 0.4 MB a tensor: it lies in the L2 cache, and what a launch costs is its start, about
// 2 us, and the longest chain of reads that wait for each other (not measured). So the chains
// are kept short (labels -> rows -> sums; a row, three times from the L1 cache; labels -> scalars
// -> rows), and the final sum over the samples is made by whichever block comes last.
//
// Classes. A block of `means` and `backward` owns a class if no sample before its own has the same
// label; others end there, having read the labels up to that sample. The owner lists the class's
// members in the order of the batch, a window of labels at a time, by ballots and counts: any
// labels, no table, no B x B matrix, no order of arrival. A warp takes a member's row at a time, 32
// lanes wide, and the sums of the warps are added in the order of the warps; blocks of one sample
// share the tiles of channels. Where the labels do not fit one window, each pass over the members
// lists them again.
//
// Backward needs no sum over channels: the forward pass keeps four scalars of each row (see
// prototype.h), so that all that is left is a sum over the members, channel by channel.
//
// Each sum has one order, that depends on labels and sizes alone: the same bits on every run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/launch.h"
#include "../common/natural_log.h"
#include "prototype.h"
#include "prototype_plan.h"

namespace gsalign::prototype {

// Tensors are contiguous.
struct Problem {
  const float *features, *masks;  // [batch, channels]
  const std::int64_t* labels;     // [batch]
  int batch, channels;
  int tiles, groups, window;  // as planned
};

// ---- pieces ----

// The samples of one class within a window of the labels, in order, in shared memory.
class Members {
 public:
  GSALIGN_DEVICE Members(
      const Problem& problem, int sample, unsigned char* shared, const ClassLayout& layout)
      : labels_(problem.labels),
        label_(problem.labels[sample]),
        batch_(problem.batch),
        window_(problem.window),
        words_(reinterpret_cast<unsigned*>(shared)),
        samples_(reinterpret_cast<int*>(shared + layout.members)) {}

  GSALIGN_DEVICE int count() const { return count_; }
  GSALIGN_DEVICE int sample(int place) const { return samples_[place]; }

  // Holds the window that begins with sample `first`: note(sample, place) is called once for each
  // member, by one thread, and what it writes can be read by all thereafter.
  template <typename Note>
  GSALIGN_DEVICE void hold(int first, Note note) {
    if (first == held_) {
      return;
    }
    held_ = first;
    const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize;
    const int lane = thread_index() % kWarpSize;
    const int end = batch_ - first < window_ ? batch_ : first + window_;
    const int rounds = (end - first + block_size() - 1) / block_size();
    unsigned same = 0u;  // a bit per round; the labels of all rounds are on their way at once
    GSALIGN_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      const int sample = first + r * block_size() + thread_index();
      same |= sample < end && labels_[sample] == label_ ? 1u << r : 0u;
    }
    GSALIGN_UNROLL_BY(1)
    for (int r = 0; r < rounds; ++r) {
      const unsigned word = ballot((same >> r & 1u) != 0);
      if (lane == 0) {
        words_[r * warps + warp] = word;
      }
    }
    barrier();  // the words are there; and the window before has been read
    count_ = 0;
    GSALIGN_UNROLL_BY(1)
    for (int r = 0; r < rounds; ++r) {
      const unsigned own = words_[r * warps + warp];
      int place = count_ + count_bits(own & ((1u << lane) - 1u));
      for (int w = 0; w < warps; ++w) {
        const int here = count_bits(words_[r * warps + w]);
        place += w < warp ? here : 0;
        count_ += here;
      }
      if ((same >> r & 1u) != 0) {
        const int sample = first + r * block_size() + thread_index();
        samples_[place] = sample;
        note(sample, place);
      }
    }
    barrier();
  }

  // Holds the first window with a member and returns its beginning. There is one: the sample that
  // the label is of.
  template <typename Note>
  GSALIGN_DEVICE int hold_first(Note note) {
    int first = -window_;
    do {
      first += window_;
      hold(first, note);
    } while (count_ == 0 && batch_ - first > window_);
    return first;
  }

 private:
  const std::int64_t* labels_;
  std::int64_t label_;
  int batch_, window_;
  unsigned* words_;
  int* samples_;
  int held_ = -1, count_ = 0;
};

// Where a warp stands within a tile: the first of kVector channels of the thread's lane.
template <int kVector>
GSALIGN_DEVICE int channel_of(int tile) {
  return (tile * kWarpSize + thread_index() % kWarpSize) * kVector;
}

// The sums over the warps, in their order, of each lane's channels and of one number `extra` of
// each warp, in every thread. Before `shared` is put to use again, the caller's barrier.
template <int kVector>
GSALIGN_DEVICE void sum_over_warps(
    float (&total)[kVector], float& extra, unsigned char* shared, const ClassLayout& layout) {
  const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize;
  const int lane = thread_index() % kWarpSize;
  float* sums = reinterpret_cast<float*>(shared + layout.sums) + lane * kVector;
  float* extras = reinterpret_cast<float*>(shared + layout.extras);
  store_values<float, kVector>(sums + warp * kWarpSize * kVector, total);
  if (lane == 0) {
    extras[warp] = extra;
  }
  barrier();
  extra = 0.0f;
  GSALIGN_UNROLL
  for (int v = 0; v < kVector; ++v) {
    total[v] = 0.0f;
  }
  for (int w = 0; w < warps; ++w) {
    float other[kVector];
    load_values<float, kVector>(sums + w * kWarpSize * kVector, other);
    GSALIGN_UNROLL
    for (int v = 0; v < kVector; ++v) {
      total[v] += other[v];
    }
    extra += extras[w];
  }
}

struct alignas(8) Pair {
  float a, b;
};

// The sum over the block, the same in every thread. `scratch` has room for a pair per warp.
GSALIGN_DEVICE Pair block_sum(Pair value, Pair* scratch) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    value.a += shuffle_xor(value.a, mask);
    value.b += shuffle_xor(value.b, mask);
  }
  if (thread_index() % kWarpSize == 0) {
    scratch[thread_index() / kWarpSize] = value;
  }
  barrier();
  Pair sum{0.0f, 0.0f};
  for (int w = 0; w < block_size() / kWarpSize; ++w) {
    sum.a += scratch[w].a;
    sum.b += scratch[w].b;
  }
  return sum;
}

// ---- forward ----

// means[b] = the mean of the class of sample b, for every b. Also sets `arrived`, where the blocks
// of the next launch announce themselves, to zero.
template <int kVector>
GSALIGN_KERNEL(kThreads, kResidentBlocks)
prototype_means_kernel(Problem problem, float* means, int* arrived) {
  if (block_index() == 0 && thread_index() == 0) {
    *arrived = 0;
  }
  const int sample = block_index() / problem.groups, group = block_index() % problem.groups;
  const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize;
  unsigned char* shared = shared_memory();
  const ClassLayout layout =
      ClassLayout::make(problem.batch, block_size(), problem.window, kWarpSize * kVector, 0);
  Members members(problem, sample, shared, layout);
  const auto note = [](int, int) {};
  const int start = members.hold_first(note);
  const bool owner = members.sample(0) == sample;

  for (int tile = group; owner && tile < problem.tiles; tile += problem.groups) {
    if (tile != group) {
      barrier();  // the sums of the tile before have been read
    }
    const int channel = channel_of<kVector>(tile);
    const bool exists = channel < problem.channels;
    float total[kVector] = {}, unused = 0.0f;
    int count = 0;
    for (int first = start; first < problem.batch; first += problem.window) {
      members.hold(first, note);
      count += members.count();
      for (int i = warp; i < members.count(); i += warps) {
        const std::int64_t row = static_cast<std::int64_t>(members.sample(i)) * problem.channels;
        float values[kVector];
        load_values<float, kVector>(problem.features + row + channel, values, exists);
        GSALIGN_UNROLL
        for (int v = 0; v < kVector; ++v) {
          total[v] += values[v];
        }
      }
    }
    sum_over_warps<kVector>(total, unused, shared, layout);
    GSALIGN_UNROLL
    for (int v = 0; v < kVector; ++v) {
      total[v] /= static_cast<float>(count);
    }
    for (int first = start; first < problem.batch; first += problem.window) {
      members.hold(first, note);
      for (int i = warp; exists && i < members.count(); i += warps) {
        const std::int64_t row = static_cast<std::int64_t>(members.sample(i)) * problem.channels;
        store_values<float, kVector>(means + row + channel, total);
      }
    }
  }
}

// Shared memory of the kernel over rows: four sums, and whether the block is the last.
inline int row_bytes(int threads) {
  return 4 * threads / kWarpSize * static_cast<int>(sizeof(Pair)) + 16;
}

// A block per sample: its distance and its sum of m log m to `shares` [batch, 2], its scalars to
// `norms` [batch, kKept]. The last block to come adds the shares.
template <int kVector>
GSALIGN_KERNEL(kThreads)
prototype_rows_kernel(
    Problem problem, const float* means, float elements, float* norms, float* shares, int* arrived,
    float* alignment, float* entropy) {
  const int warps = block_size() / kWarpSize;
  Pair* scratch = reinterpret_cast<Pair*>(shared_memory());
  int* last = reinterpret_cast<int*>(scratch + 4 * warps);
  const std::int64_t start = static_cast<std::int64_t>(block_index()) * problem.channels;
  const float *features = problem.features + start, *masks = problem.masks + start,
              *mean = means + start;
  // Calls visit(f, mu, m) for every channel; a thread comes to its channels in order.
  const auto for_channels = [&](auto visit) {
    for (int c = thread_index() * kVector; c < problem.channels; c += block_size() * kVector) {
      float f[kVector], mu[kVector], m[kVector];
      load_values<float, kVector>(features + c, f);
      load_values<float, kVector>(mean + c, mu);
      load_values<float, kVector>(masks + c, m);
      GSALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) {
        visit(f[v], mu[v], m[v]);
      }
    }
  };

  Pair sums{0.0f, 0.0f};
  for_channels([&](float f, float mu, float) {
    sums.a += f * f;
    sums.b += mu * mu;
  });
  sums = block_sum(sums, scratch);
  const float feature_norm = square_root(sums.a), mean_norm = square_root(sums.b);
  const float unit = inverse_norm(feature_norm), centre = inverse_norm(mean_norm);

  sums = {0.0f, 0.0f};
  for_channels([&](float f, float mu, float m) {
    const float q = centre * mu * m;
    sums.a += q * q;
    sums.b += f * q;
  });
  sums = block_sum(sums, scratch + warps);
  const float product_norm = square_root(sums.a), feature_product = sums.b;
  const float pull = inverse_norm(product_norm);

  sums = {0.0f, 0.0f};
  for_channels([&](float f, float mu, float m) {
    const float error = unit * f - pull * (centre * mu * m);
    sums.a += error * error;
    sums.b += m * natural_log(clamped_mask(m));
  });
  sums = block_sum(sums, scratch + 2 * warps);

  if (thread_index() == 0) {
    const std::int64_t row = block_index();
    shares[2 * row] = sums.a;
    shares[2 * row + 1] = sums.b;
    norms[kKept * row] = feature_norm;
    norms[kKept * row + 1] = product_norm;
    norms[kKept * row + 2] = feature_product;
    norms[kKept * row + 3] = mean_norm;
    *last = arrives_last(arrived, problem.batch) ? 1 : 0;
  }
  barrier();
  if (*last != 0) {
    sums = {0.0f, 0.0f};
    for (std::int64_t b = thread_index(); b < problem.batch; b += block_size()) {
      sums.a += load_written(shares + 2 * b);
      sums.b += load_written(shares + 2 * b + 1);
    }
    sums = block_sum(sums, scratch + 3 * warps);
    if (thread_index() == 0) {
      *alignment = sums.a / elements;
      *entropy = -sums.b / elements;
    }
  }
}

// ---- backward ----

struct alignas(16) Scalars {
  RowGradients<float> by;
};

template <int kVector>
GSALIGN_KERNEL(kThreads, kResidentBlocks)
prototype_backward_kernel(
    Problem problem, const float* means, const float* norms, const float* grad_alignment,
    const float* grad_entropy, float elements, float* grad_features, float* grad_masks) {
  const int sample = block_index() / problem.groups, group = block_index() % problem.groups;
  const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize;
  unsigned char* shared = shared_memory();
  const ClassLayout layout = ClassLayout::make(
      problem.batch, block_size(), problem.window, kWarpSize * kVector, sizeof(Scalars));
  Scalars* scalars = reinterpret_cast<Scalars*>(shared + layout.scalars);
  const float slope = 2.0f * *grad_alignment / elements;
  const float entropy_slope = *grad_entropy / elements;
  const float mean_norm = norms[static_cast<std::int64_t>(sample) * kKept + 3];
  const float centre = inverse_norm(mean_norm);

  Members members(problem, sample, shared, layout);
  const auto note = [&](int member, int place) {
    const float* kept = norms + static_cast<std::int64_t>(member) * kKept;
    scalars[place] = {row_gradients(kept[0], kept[1], kept[2], slope)};
  };
  const int start = members.hold_first(note);
  const bool owner = members.sample(0) == sample;

  for (int tile = group; owner && tile < problem.tiles; tile += problem.groups) {
    if (tile != group) {
      barrier();  // the sums of the tile before have been read
    }
    const int channel = channel_of<kVector>(tile);
    const bool exists = channel < problem.channels;
    float mean[kVector];
    load_values<float, kVector>(
        means + static_cast<std::int64_t>(sample) * problem.channels + channel, mean, exists);

    // The masks' gradient, and what the class mean gets: the sum of m (by q) over the members.
    float total[kVector] = {}, along = 0.0f;
    int count = 0;
    for (int first = start; first < problem.batch; first += problem.window) {
      members.hold(first, note);
      count += members.count();
      for (int i = warp; i < members.count(); i += warps) {
        const std::int64_t at =
            static_cast<std::int64_t>(members.sample(i)) * problem.channels + channel;
        const RowGradients<float> by = scalars[i].by;
        along += by.along;
        float f[kVector], m[kVector], grad[kVector];
        load_values<float, kVector>(problem.features + at, f, exists);
        load_values<float, kVector>(problem.masks + at, m, exists);
        GSALIGN_UNROLL
        for (int v = 0; v < kVector; ++v) {
          const float c = centre * mean[v];
          const float by_product = by.cross * f[v] + by.product * (c * m[v]);
          const float raised = clamped_mask(m[v]);
          const float free = m[v] < raised ? 0.0f : 1.0f;
          grad[v] = by_product * c - entropy_slope * (natural_log(raised) + free);
          total[v] += by_product * m[v];
        }
        if (exists) {
          store_values<float, kVector>(grad_masks + at, grad);
        }
      }
    }
    sum_over_warps<kVector>(total, along, shared, layout);
    const ClassGradient<float> by_class =
        class_gradient(mean_norm, along, static_cast<float>(count));
    GSALIGN_UNROLL
    for (int v = 0; v < kVector; ++v) {
      total[v] = by_class.scale * total[v] - by_class.radial * mean[v];
    }

    // The features' own gradient, and their share of the class mean's.
    for (int first = start; first < problem.batch; first += problem.window) {
      members.hold(first, note);
      for (int i = warp; exists && i < members.count(); i += warps) {
        const std::int64_t at =
            static_cast<std::int64_t>(members.sample(i)) * problem.channels + channel;
        const RowGradients<float> by = scalars[i].by;
        float f[kVector], m[kVector], grad[kVector];
        load_values<float, kVector>(problem.features + at, f);
        load_values<float, kVector>(problem.masks + at, m);
        GSALIGN_UNROLL
        for (int v = 0; v < kVector; ++v) {
          grad[v] = by.feature * f[v] + by.cross * (centre * mean[v] * m[v]) + total[v];
        }
        store_values<float, kVector>(grad_features + at, grad);
      }
    }
  }
}

// ---- launching: shared by the CUDA entry points and the host tests ----

// Floats of workspace of a forward launch: two shares per sample, and the count of blocks that have
// come, an integer of the same size.
inline std::int64_t workspace_floats(std::int64_t batch) {
  return 2 * batch + 1;
}

// Calls `launch` with the number of values per lane, as a type, and with the shared memory of the
// kernels over classes.
template <typename Launch>
LaunchStatus for_plan(const Problem& problem, const Plan& plan, int scalar_bytes, Launch&& launch) {
  const auto with_lanes = [&](auto lane_values) {
    const ClassLayout layout = ClassLayout::make(
        problem.batch, plan.class_threads, plan.window, kWarpSize * lane_values(), scalar_bytes);
    return launch(lane_values, layout.total);
  };
  return plan.vectors ? with_lanes(std::integral_constant<int, 4>{})
                      : with_lanes(std::integral_constant<int, 1>{});
}

inline float element_count(const Problem& problem) {
  return static_cast<float>(problem.batch) * static_cast<float>(problem.channels);
}

// `workspace` has workspace_floats(batch) floats. Neither batch nor channels may be 0.
template <typename Stream>
LaunchStatus launch_forward(
    Problem problem, const Plan& plan, float* means, float* norms, float* workspace,
    float* alignment, float* entropy, Stream stream) {
  problem.tiles = plan.tiles;
  problem.groups = plan.groups;
  problem.window = plan.window;
  int* arrived = reinterpret_cast<int*>(workspace + 2 * static_cast<std::int64_t>(problem.batch));
  return for_plan(problem, plan, 0, [&](auto lane_values, int shared_bytes) {
    GSALIGN_LAUNCH(
        prototype_means_kernel<lane_values()>, problem.batch * plan.groups, plan.class_threads,
        shared_bytes, stream, problem, means, arrived);
    const LaunchStatus status = launch_status();
    if (status != kLaunched) {
      return status;
    }
    GSALIGN_LAUNCH(
        prototype_rows_kernel<lane_values()>, problem.batch, plan.row_threads,
        row_bytes(plan.row_threads), stream, problem, means, element_count(problem), norms,
        workspace, arrived, alignment, entropy);
    return launch_status();
  });
}

template <typename Stream>
LaunchStatus launch_backward(
    Problem problem, const Plan& plan, const float* means, const float* norms,
    const float* grad_alignment, const float* grad_entropy, float* grad_features, float* grad_masks,
    Stream stream) {
  problem.tiles = plan.tiles;
  problem.groups = plan.groups;
  problem.window = plan.window;
  return for_plan(problem, plan, sizeof(Scalars), [&](auto lane_values, int shared_bytes) {
    GSALIGN_LAUNCH(
        prototype_backward_kernel<lane_values()>, problem.batch * plan.groups, plan.class_threads,
        shared_bytes, stream, problem, means, norms, grad_alignment, grad_entropy,
        element_count(problem), grad_features, grad_masks);
    return launch_status();
  });
}

}  // namespace gsalign::prototype
