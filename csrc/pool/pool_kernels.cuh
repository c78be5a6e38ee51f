// CUDA kernels of masked part pooling, and their launches.
//
// What has to move (s bytes per value; V = B N C values of the map; Q channels of masks):
//   forward   reads the tokens                          V s bytes, and P / N of that for the result
//   backward  reads tokens, writes their gradient     2 V s bytes, and P / N of that for pooled
//   ones
// for P multiply-adds per value forward and 2 P backward; masks are 4 B Q N bytes, 2 % and 4 % of
// the tokens' in float32 and bfloat16 at P 6 and C 768. At B 64, N 128, C 768 on an H200 (132
// multiprocessors, copy 4.15 TB/s), P 6:
//                          bytes    floor    instructions per 16 bytes    at four a cycle, 1.75 GHz
//   forward  float32     25.2 MB   6.1 us     24 FMA of about  38                           2.0 us
//            bfloat16    12.6 MB   3.0 us     48 FMA of about  74                           2.0 us
//   backward float32     50.3 MB  12.1 us     48 FMA of about  80                           4.3 us
//            bfloat16    25.2 MB   6.1 us     96 FMA of about 160                           4.3 us
// (instructions of the loops as compiled for sm_90; times are computed, nothing is measured here).
// So memory bounds both passes as long as instructions stay few and loads are asked for early: a
// multiprocessor must have 30 to 40 KB under way.
//
// Forward. A block owns a sample and a tile of channels, 2^lane_bits lanes with 16 bytes of a row
// each. It makes the weights of all positions once, in shared memory, part by part: threads write
// and read neighbouring words, and one 16-byte load brings the weights of the four rows that a
// thread works on. A thread reads its four rows a round ahead, the first ones before the weights
// are made, and keeps the sums of kParts parts in registers (48 for bfloat16 at P 6). Eight groups
// of threads share the rows, and add their sums in shared memory in the order of the groups, so the
// order of a sum does not depend on how wide the tiles are, which does depend on the batch. 384
// blocks (three per multiprocessor) make 47 KB under way, twice that in float32. The first tile's
// block also writes visibilities, totals and peaks. More parts than kParts take further rounds over
// the tile, whose tokens the caches still hold.
//
// Backward. grad x[n] = sum_p w[p, n] g[p] / d[p] and the dot products x[n] g[p], of which come the
// masks' gradients, are sums over parts and over channels. So rows are split, not channels: a warp
// owns four rows and walks over all channels, the dot products stay in registers until the rows are
// done, and are then summed over the lanes by halves (27 shuffles for 24 of them). The pooled
// gradients, P C values that all rows use, lie in shared memory as float32. Blocks of 16 rows make
// 512 of them; each reads 9 KB of pooled gradients (bfloat16) for its 24 KB of tokens, from the
// second-level cache. With more than eight parts the dot products take another round; where even
// the pooled gradients of a row do not fit, columns come in tiles.
//
// The gradient by a part's total, sum_n w[p, n] d[p, n] / d[p], is a sum over a sample's positions
// that nothing before the pass knows (what was pooled is stored rounded). So the weighted mean, and
// the sum over the batch of shared masks, need what other blocks found: blocks leave dot products
// (4 B P N bytes) and one share of that sum per 16 rows, and a second, small kernel adds them in a
// fixed order and goes through the activation. Means and maxima of masks per sample are done in one
// launch.
//
// No atomics: the same bits on every run.
#pragma once

#include <type_traits>

#include "pool_backward.cuh"
#include "pool_forward.cuh"

namespace gsalign::pool {

// Calls `launch(lane values, parts at once, maxima)`, all as types, for a plan.
template <typename T, typename Plan, typename Launch>
LaunchStatus for_plan(const Plan& plan, Mode mode, Launch&& launch) {
  constexpr std::integral_constant<int, 16 / static_cast<int>(sizeof(T))> vector;
  constexpr std::integral_constant<int, 1> single;
  if (mode == Mode::kMax) {
    constexpr std::integral_constant<int, 4> parts;
    return plan.vectors ? launch(vector, parts, std::true_type{})
                        : launch(single, parts, std::true_type{});
  }
  constexpr std::false_type sums;
  if (!plan.vectors) {
    return launch(single, std::integral_constant<int, 8>{}, sums);
  }
  switch (plan.parts) {
    case 1:
      return launch(vector, std::integral_constant<int, 1>{}, sums);
    case 4:
      return launch(vector, std::integral_constant<int, 4>{}, sums);
    case 6:
      return launch(vector, std::integral_constant<int, 6>{}, sums);
    default:
      return launch(vector, std::integral_constant<int, 8>{}, sums);
  }
}

template <typename T>
std::int64_t forward_blocks(const ForwardPlan& plan, const Problem<T>& problem) {
  const int lane_values = plan.vectors ? 16 / static_cast<int>(sizeof(T)) : 1;
  const std::int64_t tiles = divide_up(problem.channels, lane_values << plan.lane_bits);
  return problem.batch * (tiles > 0 ? tiles : 1);
}
template <typename T>
std::int64_t backward_blocks(const BackwardPlan& plan, const Problem<T>& problem) {
  return problem.batch * static_cast<std::int64_t>(plan.blocks());
}

template <typename T, typename Stream>
LaunchStatus launch_forward(
    const Problem<T>& problem, const ForwardPlan& plan, const Results<T>& results, int device,
    Stream stream) {
  if (problem.batch == 0) {
    return kLaunched;
  }
  return for_plan<T>(plan, problem.masks.mode, [&](auto vector, auto parts, auto maxima) {
    const auto launch = [&](auto once) {
      constexpr auto kernel = &pool_forward_kernel<T, vector(), parts(), maxima(), once()>;
      const LaunchStatus allowed = allow_shared_memory<kernel>(plan.shared_bytes, device);
      if (allowed != kLaunched) {
        return allowed;
      }
      GSALIGN_LAUNCH(
          kernel, static_cast<int>(forward_blocks(plan, problem)), plan.threads(),
          plan.shared_bytes, stream, problem, plan, results);
      return launch_status();
    };
    if constexpr (takes_rounds(parts(), maxima())) {
      if (!plan.once) {
        return launch(std::false_type{});
      }
    }
    return launch(std::true_type{});
  });
}

// Whether the gradients by the masks need a kernel of their own.
inline bool needs_finish(const MaskSets& masks, bool shared) {
  return shared || masks.mode == Mode::kWeightedMean;
}
inline std::int64_t workspace_floats(
    const MaskSets& masks, bool shared, const BackwardPlan& plan, int batch) {
  const std::int64_t rows = masks.positions + static_cast<std::int64_t>(plan.units);
  return needs_finish(masks, shared) ? batch * masks.parts * rows : 0;
}

// `workspace` has workspace_floats() floats; `gradients` need not say where its parts lie.
template <typename T, typename Stream>
LaunchStatus launch_backward(
    const Problem<T>& problem, bool shared, const BackwardPlan& plan, Gradients<T> gradients,
    float* workspace, int device, Stream stream) {
  const MaskSets& masks = problem.masks;
  const bool finish = needs_finish(masks, shared);
  gradients.weights = finish ? workspace : nullptr;
  gradients.slopes =
      finish ? workspace + static_cast<std::int64_t>(problem.batch) * masks.parts * masks.positions
             : nullptr;
  if (problem.batch > 0) {
    const LaunchStatus status =
        for_plan<T>(plan, masks.mode, [&](auto vector, auto parts, auto maxima) {
          constexpr auto kernel = &pool_backward_kernel<T, vector(), parts(), maxima()>;
          const LaunchStatus allowed = allow_shared_memory<kernel>(plan.shared_bytes, device);
          if (allowed != kLaunched) {
            return allowed;
          }
          GSALIGN_LAUNCH(
              kernel, static_cast<int>(backward_blocks(plan, problem)), kBackwardThreads,
              plan.shared_bytes, stream, problem, plan, gradients);
          return launch_status();
        });
    if (status != kLaunched) {
      return status;
    }
  }
  const int sets = shared ? 1 : problem.batch;
  const int blocks = divide_up(masks.positions, kFinishPositions);
  if (!finish || sets * blocks == 0) {
    return kLaunched;
  }
  constexpr auto kernel = &pool_finish_kernel;
  const int bytes = FinishLayout::make(masks.parts, kFinishThreads).total;
  const LaunchStatus allowed = allow_shared_memory<kernel>(bytes, device);
  if (allowed != kLaunched) {
    return allowed;
  }
  GSALIGN_LAUNCH(
      kernel, sets * blocks, kFinishThreads, bytes, stream, masks, shared ? problem.batch : 1,
      plan.units, blocks, static_cast<const MaskGradients&>(gradients));
  return launch_status();
}

}  // namespace gsalign::pool
