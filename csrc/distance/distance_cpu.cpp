// Visibility-weighted distances of part embeddings, and the nearest by them, on the CPU.
//
// Work is cut into units of some gallery images times some queries. A unit reads its gallery images
// block by block and passes all its queries by each, tile by tile (tile.h). No distance depends on
// the cut.
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "embeddings.h"
#include "nearest.h"
#include "tile.h"

namespace gsalign::distance {
namespace {

// Queries of a unit: enough that reading the gallery once for them costs little beside them.
constexpr std::int64_t kPanelsOfUnit = 16;

template <typename T>
Embeddings<T> embeddings(const Tensor& tensor) {
  return {data<T>(tensor),  tensor.size(0),   tensor.size(1),  tensor.size(2),
          tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename S>
Visibilities<S> visibilities(const Tensor& tensor) {
  return {data<S>(tensor), tensor.stride(0), tensor.stride(1)};
}

// Both sides of a call, the queries laid out.
template <typename T>
struct Sides {
  using S = Compute<T>;

  Sides(
      const Tensor& query, const Tensor& gallery, const Tensor& query_visibility,
      const Tensor& gallery_visibility, std::int64_t metric)
      : metric(static_cast<Metric>(metric)),
        panels(embeddings<S>(query), visibilities<S>(query_visibility), this->metric),
        gallery(embeddings<T>(gallery)),
        seen(visibilities<S>(gallery_visibility)) {}

  Metric metric;
  QueryPanels<S> panels;
  Embeddings<T> gallery;
  Visibilities<S> seen;

  std::int64_t groups() const { return ceil_div(panels.count(), kPanelsOfUnit); }
  std::int64_t block_rows() const { return GalleryBlock<S>::rows(gallery.parts, gallery.channels); }
  GalleryBlock<S> make_block() const { return GalleryBlock<S>(gallery.parts, gallery.channels); }
};

// Calls `take(panel, first gallery image, images, tile [images][lanes])` for all distances of a
// group of panels to the gallery images [first, end).
template <typename T, typename S, typename Take>
void for_tiles(
    const Sides<T>& sides, GalleryBlock<S>& block, std::int64_t group, std::int64_t first,
    std::int64_t end, S unmatched, const Take& take) {
  alignas(64) S result[kMostTileRows * kMostLanes<S>];
  const std::int64_t first_panel = group * kPanelsOfUnit;
  const std::int64_t end_panel = std::min(first_panel + kPanelsOfUnit, sides.panels.count());
  const std::int64_t step = sides.block_rows(), tile = tile_rows();
  for (std::int64_t start = first; start < end; start += step) {
    const std::int64_t count = std::min(step, end - start);
    block.read(sides.gallery, sides.seen, sides.metric, start, count);
    for (std::int64_t panel = first_panel; panel < end_panel; ++panel) {
      for (std::int64_t r = 0; r < count; r += tile) {
        make_tile<S>(
            sides.metric, sides.panels.vectors_of(panel),
            {block.row(r), block.stride(), block.weights(r), sides.panels.data(panel),
             sides.panels.weights(panel), sides.gallery.parts, sides.gallery.channels, unmatched,
             result});
        take(panel, start + r, std::min(tile, count - r), result);
      }
    }
  }
}

template <typename T, typename S>
void all_distances(const Sides<T>& sides, S unmatched, S* out) {
  const std::int64_t images = sides.gallery.images, step = sides.block_rows();
  const std::int64_t blocks = ceil_div(images, step);
  parallel_for(
      blocks * sides.groups(), [&] { return sides.make_block(); },
      [&](GalleryBlock<S>& block, std::int64_t unit) {
        const std::int64_t first = unit % blocks * step;
        for_tiles(
            sides, block, unit / blocks, first, std::min(first + step, images), unmatched,
            [&](std::int64_t panel, std::int64_t start, std::int64_t count, const S* tile) {
              const std::int64_t lanes = sides.panels.lanes_of(panel);
              for (std::int64_t l = 0; l < sides.panels.queries_of(panel); ++l) {
                S* row = out + (sides.panels.first_of(panel) + l) * images + start;
                for (std::int64_t r = 0; r < count; ++r) {
                  row[r] = tile[r * lanes + l];
                }
              }
            });
      });
}

// A stretch of the gallery for a group of queries is a unit: as many stretches as keep the threads
// at work. Each has its own heaps, which meet at the end.
template <typename T, typename S>
void nearest(
    const Sides<T>& sides, std::int64_t queries, std::int64_t k, S* distances,
    std::int64_t* indices) {
  const std::int64_t images = sides.gallery.images, step = sides.block_rows();
  const std::int64_t blocks = ceil_div(images, step);
  const std::int64_t wanted = ceil_div(2 * torch::stable::get_num_threads(), sides.groups());
  const std::int64_t length = ceil_div(blocks, std::min(wanted, blocks)) * step;
  const std::int64_t stretches = ceil_div(images, length);
  std::vector<Candidate<S>> heaps(stretches * queries * k);
  std::vector<std::int64_t> sizes(stretches * queries);
  parallel_for(
      stretches * sides.groups(), [&] { return sides.make_block(); },
      [&](GalleryBlock<S>& block, std::int64_t unit) {
        const std::int64_t stretch = unit % stretches, group = unit / stretches;
        const std::int64_t first_query = sides.panels.first_of(group * kPanelsOfUnit);
        std::vector<Key<S>> bounds(kPanelsOfUnit * sides.panels.lanes(), kOpen<S>);
        for_tiles(
            sides, block, group, stretch * length, std::min((stretch + 1) * length, images),
            std::numeric_limits<S>::infinity(),
            [&](std::int64_t panel, std::int64_t start, std::int64_t count, const S* tile) {
              const std::int64_t lanes = sides.panels.lanes_of(panel);
              const std::int64_t query = sides.panels.first_of(panel);
              const std::int64_t filled = sides.panels.queries_of(panel);
              Key<S>* bound = bounds.data() + query - first_query;
              // Lanes without a query have the bound 0, below which nothing is.
              std::fill(bound + filled, bound + lanes, Key<S>(0));
              if (!any_nearer(tile, bound, count, lanes)) {
                return;
              }
              for (std::int64_t r = 0; r < count; ++r) {
                for (std::int64_t l = 0; l < filled; ++l) {
                  const Candidate<S> candidate{key_of(tile[r * lanes + l]), start + r};
                  if (candidate.key < bound[l]) {
                    const std::int64_t list = stretch * queries + query + l;
                    bound[l] = offer(heaps.data() + list * k, &sizes[list], k, candidate);
                  }
                }
              }
            });
      });
  parallel_for(
      queries, [] { return std::vector<Candidate<S>>(); },
      [&](std::vector<Candidate<S>>& found, std::int64_t query) {
        found.clear();
        for (std::int64_t stretch = 0; stretch < stretches; ++stretch) {
          const std::int64_t list = stretch * queries + query;
          const auto heap = heaps.begin() + list * k;
          found.insert(found.end(), heap, heap + sizes[list]);
        }
        std::partial_sort(found.begin(), found.begin() + k, found.end());
        for (std::int64_t i = 0; i < k; ++i) {
          using Word = typename Bits<S>::Word;
          distances[query * k + i] = bit_cast<S>(static_cast<Word>(found[i].key));
          indices[query * k + i] = found[i].index;
        }
      });
}

void check_arguments(
    const Tensor& query, const Tensor& gallery, const Tensor& query_visibility,
    const Tensor& gallery_visibility, std::int64_t metric) {
  check_shape("query", query, {-1, -1, -1});
  check_shape("gallery", gallery, {-1, query.size(1), query.size(2)});
  check_shape("query_visibility", query_visibility, {query.size(0), query.size(1)});
  check_shape("gallery_visibility", gallery_visibility, {gallery.size(0), query.size(1)});
  const ScalarType type = compute_type(gallery.scalar_type());
  check_type("query", query, type);
  check_type("query_visibility", query_visibility, type);
  check_type("gallery_visibility", gallery_visibility, type);
  STD_TORCH_CHECK(
      metric == kCosine || metric == kEuclidean, "metric: wanted 0 (cosine) or 1 (Euclidean), got ",
      metric);
}

Tensor part_distance(
    const Tensor& query, const Tensor& gallery, const Tensor& query_visibility,
    const Tensor& gallery_visibility, std::int64_t metric, double unmatched) {
  check_arguments(query, gallery, query_visibility, gallery_visibility, metric);
  const Tensor result = empty({query.size(0), gallery.size(0)}, query.scalar_type());
  if (result.numel() == 0) {
    return result;
  }
  dispatch_features("gallery", gallery.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    const Sides<T> sides(query, gallery, query_visibility, gallery_visibility, metric);
    all_distances(sides, static_cast<S>(unmatched), mutable_data<S>(result));
  });
  return result;
}

std::tuple<Tensor, Tensor> part_search(
    const Tensor& query, const Tensor& gallery, const Tensor& query_visibility,
    const Tensor& gallery_visibility, std::int64_t k, std::int64_t metric) {
  check_arguments(query, gallery, query_visibility, gallery_visibility, metric);
  STD_TORCH_CHECK(
      k >= 0 && k <= gallery.size(0), "k: wanted 0 to ", gallery.size(0),
      " (the size of the gallery), got ", k);
  const Tensor distances = empty({query.size(0), k}, query.scalar_type());
  const Tensor indices = empty({query.size(0), k}, ScalarType::Long);
  if (distances.numel() == 0) {
    return {distances, indices};
  }
  dispatch_features("gallery", gallery.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    const Sides<T> sides(query, gallery, query_visibility, gallery_visibility, metric);
    nearest(
        sides, query.size(0), k, mutable_data<S>(distances), mutable_data<std::int64_t>(indices));
  });
  return {distances, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("part_distance", TORCH_BOX(&part_distance));
  m.impl("part_search", TORCH_BOX(&part_search));
}

}  // namespace gsalign::distance
