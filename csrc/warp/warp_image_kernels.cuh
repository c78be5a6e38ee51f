// CUDA kernels of the image warp: forward, gradient of the image, gradients of the spline.
//
// What has to move (s bytes per value; N = B C H W image values, M = B C h w output values,
// Q = B h w output pixels):
//   forward          reads the image, writes the result                          (N + M) s bytes
//   image gradient   reads the result's gradient, writes the image's             (M + N) s bytes
//   spline gradient  reads the result's gradient and the image                   (M + N) s bytes
// and what has to be computed: a position takes one logarithm and nine other instructions per
// control point. A multiprocessor makes 16 logarithms and 128 instructions a cycle, so that all ten
// bound it: for Q = 1 million (32 images of 256 x 128) 5.8 us at K = 16 and 37 us at K = 100 on an
// H200 (computed, 132 multiprocessors at 1.7 GHz), where the 25 MB of a pass over as many float32
// colour images take 5.9 us. With few control points memory bounds a pass, with many the
// instructions; a stored grid would add 16 Q bytes to a pass and save the forward one nothing.
//
// Forward. A thread owns an output pixel: it evaluates the spline once, from control points and
// weights in shared memory, and uses the position for all its channels, of which it reads several
// side by side (one 16-byte vector where the image is channels-last). Channels are split over
// blocks only where the pixels alone do not fill the chip.
//
// Image gradient, without atomics and without a stored grid. A block owns a patch of the image and
// has to find the output pixels that read there, for any warp. One small kernel leaves the box of
// image pixels that every tile of 8 x 8 output pixels reads, and that of every region of 8 x 8
// tiles: a quarter of a byte per pixel. A block goes through the boxes of regions, then of tiles,
// computes the positions of the tiles' pixels, and lists those that read its patch; a list is
// sorted by cell, and every image pixel then collects from the four cells around it. With scale 1
// the tiles of a block have about twice as many pixels as its patch, so that this pass makes about
// 3 Q K terms, one Q K of them for the boxes. A list that is full is worked off and begun
// again, so that any number of pixels may read one place (they do where padding clamps them), in
// bounded memory; then a channel group has the positions computed anew, else it reuses the list.
// Lists, cells and sums have one fixed order: the same bits on every run. The two kernels must
// agree on where a pixel reads: every rounding of a position is fixed (position_at, sample.h).
//
// Weighed and left: owners that evaluate tent functions max(0, 1 - |i - x|) over the unsorted list
// (no sort, but every owner then walks over all the list, hundreds of steps instead of four);
// sorting the whole sample in device memory (the positions become a stored grid); scattering with
// atomic additions (another result on every run).
//
// Spline gradient. A block owns a run of output pixels of one sample. The gradient by position is
// four dot products over the channels; it lies in shared memory with the pixel's own position, and
// tps_device.cuh projects it on the control points. Partial sums are left per block and added by a
// second launch in a fixed order.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/launch.h"
#include "../tps/tps_device.cuh"
#include "counting_sort.cuh"
#include "sample.h"
#include "warp.h"
#include "warp_image_plan.h"

namespace gsalign::warp {

// Where output pixels read: all that does not depend on the type of the features.
struct Sampling {
  const float* coefficients;    // [batch, points + 3, 2]
  const float* control_points;  // [batch, points, 2]
  int channels, height, width, out_height, out_width, points;
  Mode mode;
  Padding padding;
  bool align_corners;

  GSALIGN_HOST_DEVICE int pixels() const { return out_height * out_width; }
};

// The image as it lies in memory: contiguous and channels-last are read alike.
template <typename T>
struct Image {
  const T* data;
  std::int64_t batch, channel, row, column;  // strides
};

// ---- pieces ----

using Centre = tps::Centre<float, 2>;
using tps::kCentreChunk;

// The spline of a sample with its control points in shared memory. All threads of a block make it
// and ask it together, with a barrier of the caller's between.
class BlockSpline {
 public:
  GSALIGN_DEVICE BlockSpline(const Sampling& sampling, int sample, unsigned char* shared)
      : spline_(tps::SplineSample<float>::of(
            sampling.coefficients, sampling.control_points, sampling.points, 2, sample)),
        centres_(reinterpret_cast<Centre*>(shared)) {
    if (spline_.points <= kCentreChunk) {
      tps::stage_centres(centres_, spline_, 0, spline_.points, 0);
    }
  }

  GSALIGN_DEVICE const tps::SplineSample<float>& spline() const { return spline_; }

  // Where the thread's point is sent. Two kernels that ask this get the same bits: every rounding
  // is fixed.
  GSALIGN_DEVICE Point<float> position_at(Point<float> at) const {
    Point<float> sum{0.0f, 0.0f};
    for (int first = 0; first < spline_.points; first += kCentreChunk) {
      const int left = spline_.points - first;
      const int count = left < kCentreChunk ? left : kCentreChunk;
      if (spline_.points > kCentreChunk) {
        barrier();  // all have read the chunk before
        tps::stage_centres(centres_, spline_, first, count, 0);
        barrier();
      }
      for (int k = 0; k < count; ++k) {
        const Centre centre = centres_[k];
        const float dx = at.x - centre.x, dy = at.y - centre.y;
        const float r2 = multiply_add(dx, dx, multiply(dy, dy));
        const float u = multiply(r2, fast_log2(std::fmax(r2, 1e-8f)));
        sum.x = multiply_add(centre.weight[0], u, sum.x);
        sum.y = multiply_add(centre.weight[1], u, sum.y);
      }
    }
    constexpr float kHalfLog2 = 0.346573590279972655f;  // r2/2 log r2 = this * r2 log2 r2
    const float* affine = spline_.coefficients + static_cast<std::int64_t>(spline_.points) * 2;
    const float x = multiply_add(affine[4], at.y, multiply_add(affine[2], at.x, affine[0]));
    const float y = multiply_add(affine[5], at.y, multiply_add(affine[3], at.x, affine[1]));
    return {multiply_add(kHalfLog2, sum.x, x), multiply_add(kHalfLog2, sum.y, y)};
  }

 private:
  tps::SplineSample<float> spline_;
  Centre* centres_;
};

// The centre of an output pixel, in [-1, 1].
GSALIGN_DEVICE Point<float> pixel_centre(const Sampling& sampling, int row, int column) {
  return {
      tps::pixel_position<float>(column, sampling.out_width, sampling.align_corners),
      tps::pixel_position<float>(row, sampling.out_height, sampling.align_corners)};
}

// The four pixels a position reads: corner bit 0 is the right one, bit 1 the lower one.
struct PixelTaps {
  SampleAxis<float, int> x, y;

  GSALIGN_DEVICE bool undefined() const { return x.undefined || y.undefined; }
  GSALIGN_DEVICE bool inside(int corner) const {
    return (corner & 1 ? x.next_inside : x.first_inside) &&
           (corner & 2 ? y.next_inside : y.first_inside);
  }
  GSALIGN_DEVICE float weight(int corner) const {
    return (corner & 1 ? x.fraction : 1.0f - x.fraction) *
           (corner & 2 ? y.fraction : 1.0f - y.fraction);
  }
};

GSALIGN_DEVICE PixelTaps taps_at(const Sampling& s, Point<float> position) {
  return {
      sample_axis(position.x, s.width, s.mode, s.padding, s.align_corners),
      sample_axis(position.y, s.height, s.mode, s.padding, s.align_corners)};
}

// kStep channels from `source` on: one aligned vector, or `count` single values `stride` apart.
template <typename T, int kStep, bool kAdjacent>
GSALIGN_DEVICE void load_channels(
    const T* source, std::int64_t stride, int count, bool exists, float (&values)[kStep]) {
  if constexpr (kAdjacent) {
    load_values<T, kStep>(source, values, exists);
  } else {
    GSALIGN_UNROLL
    for (int i = 0; i < kStep; ++i) {
      float one[1];
      load_values<T, 1>(source + i * stride, one, exists && i < count);
      values[i] = one[0];
    }
  }
}

// The upper left of the pixels that a position reads, in the first channel; it may not exist.
template <typename T>
GSALIGN_DEVICE const T* corner_of(const Image<T>& image, int sample, const PixelTaps& taps) {
  return image.data + sample * image.batch + taps.y.cell * image.row + taps.x.cell * image.column;
}
template <typename T>
GSALIGN_DEVICE std::int64_t corner_step(const Image<T>& image, int corner) {
  return (corner & 1 ? image.column : 0) + (corner & 2 ? image.row : 0);
}

// ---- forward ----

template <typename T, int kStep, bool kAdjacent>
GSALIGN_KERNEL(kThreads)
warp_image_forward_kernel(Sampling sampling, Image<T> image, Share share, T* output) {
  const int pixels = sampling.pixels();
  const int chunks = divide_up(pixels, block_size());
  const int pixel = block_index() % chunks * block_size() + thread_index();
  const int first_channel = block_index() / chunks % share.groups * share.channels;
  const int sample = block_index() / chunks / share.groups;
  const BlockSpline spline(sampling, sample, shared_memory());
  barrier();
  const bool exists = pixel < pixels;
  const int row = exists ? pixel / sampling.out_width : 0;
  const int column = exists ? pixel - row * sampling.out_width : 0;
  const PixelTaps taps = taps_at(sampling, spline.position_at(pixel_centre(sampling, row, column)));
  const int left = exists ? sampling.channels - first_channel : 0;
  const int channels = left < share.channels ? left : share.channels;

  const T* source = corner_of(image, sample, taps) + first_channel * image.channel;
  T* target = output +
              (static_cast<std::int64_t>(sample) * sampling.channels + first_channel) * pixels +
              pixel;
  const float start = taps.undefined() ? kNan<float> : 0.0f;
  for (int c = 0; c < channels; c += kStep) {
    float sum[kStep];
    GSALIGN_UNROLL
    for (int i = 0; i < kStep; ++i) {
      sum[i] = start;
    }
    GSALIGN_UNROLL
    for (int corner = 0; corner < 4; ++corner) {
      float values[kStep];
      load_channels<T, kStep, kAdjacent>(
          source + corner_step(image, corner), image.channel, channels - c, taps.inside(corner),
          values);
      GSALIGN_UNROLL
      for (int i = 0; i < kStep; ++i) {
        sum[i] += taps.weight(corner) * values[i];
      }
    }
    GSALIGN_UNROLL
    for (int i = 0; i < kStep; ++i) {
      if (i < channels - c) {
        target[static_cast<std::int64_t>(i) * pixels] = from_float<T>(sum[i]);
      }
    }
    source += kStep * image.channel;
    target += static_cast<std::int64_t>(kStep) * pixels;
  }
}

// ---- gradient of the image ----

// Pixels of the image, bounds included; empty where left > right.
struct alignas(16) Box {
  int left, right, top, bottom;

  GSALIGN_DEVICE static Box empty() { return {1 << 30, -1, 1 << 30, -1}; }
  GSALIGN_DEVICE void cover(const Box& other) {
    left = other.left < left ? other.left : left;
    right = other.right > right ? other.right : right;
    top = other.top < top ? other.top : top;
    bottom = other.bottom > bottom ? other.bottom : bottom;
  }
  GSALIGN_DEVICE bool meets(const Box& other) const {
    return left <= other.right && other.left <= right && top <= other.bottom && other.top <= bottom;
  }
};

// The box of the warp's boxes, in every lane.
GSALIGN_DEVICE Box cover_warp(Box box) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    box.cover(
        {shuffle_xor(box.left, mask), shuffle_xor(box.right, mask), shuffle_xor(box.top, mask),
         shuffle_xor(box.bottom, mask)});
  }
  return box;
}

GSALIGN_DEVICE bool reads(const SampleAxis<float, int>& axis) {
  return axis.first_inside || axis.next_inside;
}

// The pixels of the image that a position reads.
GSALIGN_DEVICE Box box_of(const PixelTaps& taps) {
  if (!reads(taps.x) || !reads(taps.y)) {
    return Box::empty();
  }
  return {
      taps.x.cell + (taps.x.first_inside ? 0 : 1), taps.x.cell + (taps.x.next_inside ? 1 : 0),
      taps.y.cell + (taps.y.first_inside ? 0 : 1), taps.y.cell + (taps.y.next_inside ? 1 : 0)};
}

// An output pixel by its tile (region times kRegionTiles plus tile within) and its place there.
struct OutputPixel {
  int row, column;

  GSALIGN_DEVICE OutputPixel(const Regions& regions, int tile, int within) {
    const int region = tile / kRegionTiles, inner = tile % kRegionTiles;
    row = (region / regions.across * kRegionSide + inner / kRegionSide) * kTileSide +
          within / kTileSide;
    column = (region % regions.across * kRegionSide + inner % kRegionSide) * kTileSide +
             within % kTileSide;
  }
};

// Boxes per sample: of every tile, region by region, then of every region. A block makes those of
// one region, a warp those of one tile at a time.
GSALIGN_KERNEL(kThreads, kGradientBlocks)
warp_image_boxes_kernel(Sampling sampling, Box* tile_boxes, Box* region_boxes) {
  const Regions regions = Regions::of(sampling.out_height, sampling.out_width);
  const int region = block_index() % regions.count();
  const int sample = block_index() / regions.count();
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int warps = block_size() / kWarpSize;
  Box* found = reinterpret_cast<Box*>(shared_memory());  // by tile
  const BlockSpline spline(
      sampling, sample, shared_memory() + kRegionTiles * static_cast<int>(sizeof(Box)));
  barrier();
  // Rows of tiles that the output has.
  const int rows =
      divide_up(sampling.out_height, kTileSide) - region / regions.across * kRegionSide;
  const int tiles = (rows < kRegionSide ? rows : kRegionSide) * kRegionSide;
  for (int tile = tiles + thread_index(); tile < kRegionTiles; tile += block_size()) {
    found[tile] = Box::empty();
  }
  for (int first = 0; first < tiles; first += warps) {
    const int tile = first + warp;
    Box box = Box::empty();
    for (int within = lane; within < kTilePixels; within += kWarpSize) {
      const OutputPixel pixel(regions, region * kRegionTiles + tile, within);
      const Box own = box_of(
          taps_at(sampling, spline.position_at(pixel_centre(sampling, pixel.row, pixel.column))));
      if (pixel.row < sampling.out_height && pixel.column < sampling.out_width) {
        box.cover(own);
      }
    }
    box = cover_warp(box);
    if (lane == 0 && tile < tiles) {
      found[tile] = box;
    }
  }
  barrier();
  const std::int64_t block = block_index();
  for (int tile = thread_index(); tile < kRegionTiles; tile += block_size()) {
    tile_boxes[block * kRegionTiles + tile] = found[tile];
  }
  if (warp == 0) {
    Box box = found[lane];
    for (int tile = lane + kWarpSize; tile < kRegionTiles; tile += kWarpSize) {
      box.cover(found[tile]);
    }
    box = cover_warp(box);
    if (lane == 0) {
      region_boxes[block] = box;
    }
  }
}

struct alignas(8) Fractions {
  float x, y;
};

// Appends the items of the threads that keep theirs to a list, in the order of the threads, and
// returns how long the list is then. The caller's barrier must follow before the list is read, or
// this is called again.
template <typename Put>
GSALIGN_DEVICE int append(bool keep, int length, int* scratch, Put put) {
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const unsigned word = ballot(keep);
  if (lane == 0) {
    scratch[warp] = count_bits(word);
  }
  barrier();
  int place = length + count_bits(word & ((1u << lane) - 1));
  for (int w = 0; w < block_size() / kWarpSize; ++w) {
    const int count = scratch[w];
    place += w < warp ? count : 0;
    length += count;
  }
  if (keep) {
    put(place);
  }
  return length;
}

// How far a block has come with its search: regions met and not yet searched, tiles met and not yet
// searched.
struct Search {
  int next_region = 0;
  int regions = 0, region = 0;
  int tiles = 0, tile = 0;
};

// A block's patch of the image, and its lists in shared memory.
struct Patch {
  const PatchWork& work;
  int left, top;
  unsigned char* shared;

  GSALIGN_DEVICE Patch(const PatchWork& work_, int index, unsigned char* shared_)
      : work(work_),
        left(index % work.patches.across * kPatchWidth),
        top(index / work.patches.across * work.patches.height),
        shared(shared_) {}

  // May reach past the image's edges, where nothing reads.
  GSALIGN_DEVICE Box box() const {
    return {left, left + kPatchWidth - 1, top, top + work.patches.height - 1};
  }

  template <typename V>
  GSALIGN_DEVICE V* at(int offset) const {
    return reinterpret_cast<V*>(shared + offset);
  }

  // Lists output pixels that read the patch, until there are no more or the list may not hold those
  // of another step. Returns whether there may be more.
  GSALIGN_DEVICE bool list(
      const Sampling& sampling, const BlockSpline& spline, const Box* tile_boxes,
      const Box* region_boxes, Search& search, int& listed) const {
    int* found_regions = at<int>(work.layout.regions);
    int* found_tiles = at<int>(work.layout.tiles);
    int* scratch = at<int>(work.layout.scratch);
    const int group = thread_index() / kTilePixels, within = thread_index() % kTilePixels;
    static_assert(kTilePixels == kRegionTiles, "threads are laid over pixels as over tiles");
    listed = 0;
    while (true) {
      if (search.tile < search.tiles) {
        if (listed + block_size() > work.layout.listed) {
          return true;
        }
        bool keep = search.tile + group < search.tiles;
        const OutputPixel pixel(work.regions, keep ? found_tiles[search.tile + group] : 0, within);
        keep = keep && pixel.row < sampling.out_height && pixel.column < sampling.out_width;
        const PixelTaps taps =
            taps_at(sampling, spline.position_at(pixel_centre(sampling, pixel.row, pixel.column)));
        // A cell reaches into the patch from its left and upper neighbours too.
        const int column = taps.x.cell - left + 1, row = taps.y.cell - top + 1;
        keep = keep && reads(taps.x) && reads(taps.y) && column >= 0 && column <= kPatchWidth &&
               row >= 0 && row <= work.patches.height;
        listed = append(keep, listed, scratch, [&](int place) {
          at<Fractions>(0)[place] = {taps.x.fraction, taps.y.fraction};
          at<int>(work.layout.pixels)[place] = pixel.row * sampling.out_width + pixel.column;
          at<int>(work.layout.cells)[place] = row * work.layout.cell_columns + column;
        });
        search.tile += block_size() / kTilePixels;
      } else if (search.region < search.regions) {
        int tile = 0;
        bool keep = search.region + group < search.regions;
        if (keep) {
          tile = found_regions[search.region + group] * kRegionTiles + within;
          keep = tile_boxes[tile].meets(box());
        }
        search.tiles = append(keep, 0, scratch, [&](int place) { found_tiles[place] = tile; });
        search.tile = 0;
        search.region += block_size() / kRegionTiles;
      } else if (search.next_region < work.regions.count()) {
        const int region = search.next_region + thread_index();
        const bool keep = region < work.regions.count() && region_boxes[region].meets(box());
        search.regions =
            append(keep, 0, scratch, [&](int place) { found_regions[place] = region; });
        search.region = 0;
        search.next_region += block_size();
      } else {
        return false;
      }
      barrier();
    }
  }

  // Brings the list into the order of the cells.
  GSALIGN_DEVICE void sort(int listed) const {
    const int* cells = at<int>(work.layout.cells);
    int* bounds = at<int>(work.layout.bounds);
    for (int i = thread_index(); i <= work.layout.cell_count; i += block_size()) {
      bounds[i] = 0;
    }
    barrier();
    for (int i = thread_index(); i < listed; i += block_size()) {
      count_one(bounds + 1 + cells[i]);
    }
    barrier();
    place_in_order(
        cells, listed, bounds, work.layout.cell_count, at<int>(work.layout.scratch),
        [&](int i, int place) {
          at<Fractions>(work.layout.sorted_fractions)[place] = at<Fractions>(0)[i];
          at<int>(work.layout.sorted_pixels)[place] = at<int>(work.layout.pixels)[i];
        });
    barrier();
  }

  // The thread's pixels of the patch.
  GSALIGN_DEVICE int column(int) const { return thread_index() % kPatchWidth; }
  GSALIGN_DEVICE int row(int owned) const {
    return (thread_index() + owned * block_size()) / kPatchWidth;
  }

  // Adds what the list sends to the thread's pixels in `count` channels of the output's gradient.
  template <typename T>
  GSALIGN_DEVICE void gather(
      const T* grad_output, int pixels, int count, bool nearest,
      float (&sums)[kOwned][kGradientStep]) const {
    const int* bounds = at<int>(work.layout.bounds);
    GSALIGN_UNROLL
    for (int owned = 0; owned < kOwned; ++owned) {
      // Cells of the row above and of its own row, each with the left neighbour; nearest has only
      // the pixel's own cell.
      for (int up = nearest ? 0 : 1; up >= 0; --up) {
        const int cell = (row(owned) + 1 - up) * work.layout.cell_columns + column(owned) + 1;
        const int middle = bounds[cell], end = bounds[cell + 1];
        for (int e = nearest ? middle : bounds[cell - 1]; e < end; ++e) {
          const Fractions fraction = at<Fractions>(work.layout.sorted_fractions)[e];
          const T* source = grad_output + at<int>(work.layout.sorted_pixels)[e];
          const float weight = (e < middle ? fraction.x : 1.0f - fraction.x) *
                               (up != 0 ? fraction.y : 1.0f - fraction.y);
          GSALIGN_UNROLL
          for (int c = 0; c < kGradientStep; ++c) {
            float value[1];
            load_values<T, 1>(source + static_cast<std::int64_t>(c) * pixels, value, c < count);
            sums[owned][c] += weight * value[0];
          }
        }
      }
    }
  }
};

template <typename T>
GSALIGN_KERNEL(kThreads, kGradientBlocks)
warp_image_gradient_kernel(
    Sampling sampling, PatchWork work, const T* grad_output, const Box* tile_boxes,
    const Box* region_boxes, T* grad_image) {
  const int patches = work.patches.count(), regions = work.regions.count();
  const Share& share = work.share;
  const int first_channel = block_index() / patches % share.groups * share.channels;
  const int sample = block_index() / patches / share.groups;
  const Patch patch(work, block_index() % patches, shared_memory());
  // Regions and tiles are found, between barriers, before the spline is asked.
  const BlockSpline spline(sampling, sample, shared_memory() + work.layout.centres);
  tile_boxes += static_cast<std::int64_t>(sample) * regions * kRegionTiles;
  region_boxes += static_cast<std::int64_t>(sample) * regions;
  const int pixels = sampling.pixels();
  const std::int64_t plane = static_cast<std::int64_t>(sampling.height) * sampling.width;
  const std::int64_t planes = static_cast<std::int64_t>(sample) * sampling.channels;
  const int left = sampling.channels - first_channel;
  const int channels = left < share.channels ? left : share.channels;

  bool holds_all = false;  // the list in shared memory is the only one there is
  for (int c = 0; c < channels; c += kGradientStep) {
    const int count = channels - c < kGradientStep ? channels - c : kGradientStep;
    float sums[kOwned][kGradientStep] = {};
    Search search;
    bool first = true, more = true;
    while (more) {
      more = false;
      if (!holds_all) {
        int listed = 0;
        more = patch.list(sampling, spline, tile_boxes, region_boxes, search, listed);
        patch.sort(listed);
        holds_all = first && !more;
      }
      first = false;
      patch.gather(
          grad_output + (planes + first_channel + c) * pixels, pixels, count,
          sampling.mode == Mode::nearest, sums);
    }
    GSALIGN_UNROLL
    for (int owned = 0; owned < kOwned; ++owned) {
      const int row = patch.top + patch.row(owned), column = patch.left + patch.column(owned);
      if (row < sampling.height && column < sampling.width) {
        T* target = grad_image + (planes + first_channel + c) * plane +
                    static_cast<std::int64_t>(row) * sampling.width + column;
        GSALIGN_UNROLL
        for (int i = 0; i < kGradientStep; ++i) {
          if (i < count) {
            target[i * plane] = from_float<T>(sums[owned][i]);
          }
        }
      }
    }
  }
}

// ---- gradients of coefficients and control points ----

using PointGradient = tps::PointGradient<float, 2>;
using RowSums = tps::RowSums<float, 2>;
using SplineLayout = tps::GradientLayout<float, 2>;
static_assert(kSplinePixels * sizeof(PointGradient) <= tps::kTileBytes, "a tile must fit");

// A pixel's dot products of the output's gradient with the four pixels it reads.
struct alignas(16) Dots {
  float of[4];

  GSALIGN_DEVICE void operator+=(const Dots& other) {
    GSALIGN_UNROLL
    for (int corner = 0; corner < 4; ++corner) {
      of[corner] += other.of[corner];
    }
  }
};
static_assert(sizeof(Dots) == sizeof(RowSums), "they share the scratch");

// Sums of a block over `each` pixels of a sample, into a row of tps::partial_numbers(). Threads are
// laid over (slice of the channels, pixel).
template <typename T, int kStep, bool kAdjacent>
GSALIGN_KERNEL(kThreads, kSplineBlocks)
warp_image_spline_kernel(
    Sampling sampling, Image<T> image, int each, const T* grad_output, float* partials) {
  const int pixels = sampling.pixels();
  const int chunks = divide_up(pixels, each);
  const int begin = block_index() % chunks * each;
  const int sample = block_index() / chunks;
  const int count = pixels - begin < each ? pixels - begin : each;
  const int round = each < block_size() ? each : block_size();  // pixels at a time
  const int slices = block_size() / round;
  const int slice = thread_index() / round;
  const SplineLayout layout = SplineLayout::make(each, block_size());
  PointGradient* tile = reinterpret_cast<PointGradient*>(shared_memory());
  unsigned char* scratch = shared_memory() + layout.scratch;
  const BlockSpline spline(sampling, sample, shared_memory() + layout.total);
  barrier();

  for (int first = 0; first < count; first += round) {
    const int slot = first + thread_index() % round;
    const bool exists = slot < count && slice < slices;
    const int pixel = begin + (exists ? slot : 0);
    const int row = pixel / sampling.out_width, column = pixel - row * sampling.out_width;
    const Point<float> centre = pixel_centre(sampling, row, column);
    const PixelTaps taps = taps_at(sampling, spline.position_at(centre));
    Dots dots{};
    if (exists && !taps.undefined()) {
      const T* source = corner_of(image, sample, taps);
      const T* gradient =
          grad_output + static_cast<std::int64_t>(sample) * sampling.channels * pixels + pixel;
      for (int c = slice * kStep; c < sampling.channels; c += slices * kStep) {
        const int left = sampling.channels - c;
        float dy[kStep];
        load_channels<T, kStep, false>(
            gradient + static_cast<std::int64_t>(c) * pixels, pixels, left, true, dy);
        GSALIGN_UNROLL
        for (int corner = 0; corner < 4; ++corner) {
          float values[kStep];
          load_channels<T, kStep, kAdjacent>(
              source + c * image.channel + corner_step(image, corner), image.channel, left,
              taps.inside(corner), values);
          GSALIGN_UNROLL
          for (int i = 0; i < kStep; ++i) {
            dots.of[corner] += dy[i] * values[i];
          }
        }
      }
    }
    tps::sum_slices(dots, reinterpret_cast<Dots*>(scratch), slice, slices, round);
    if (exists && slice == 0) {
      const Point<float> by_position = position_gradient(
          taps.x.fraction, taps.y.fraction, dots.of[0], dots.of[1], dots.of[2], dots.of[3]);
      // Where clamped or undefined there is no gradient, whatever the image holds.
      tile[slot] = {
          centre.x,
          centre.y,
          {taps.x.slope != 0.0f && !taps.undefined() ? taps.x.slope * by_position.x : 0.0f,
           taps.y.slope != 0.0f && !taps.undefined() ? taps.y.slope * by_position.y : 0.0f}};
    }
    barrier();  // before the scratch is used again, and the tile read
  }
  tps::accumulate_gradient(
      spline.spline(), 0, tile, count, reinterpret_cast<RowSums*>(scratch),
      partials + block_index() * tps::partial_numbers(sampling.points, 2));
}

// ---- launching: shared by the CUDA entry points and the host tests ----

inline int spline_bytes(const Sampling& sampling) {
  return tps::centre_bytes<float, 2>(sampling.points);
}

// Calls `launch(channels side by side, adjacent)`, both as types; `kStrided` channels where they
// are not one vector.
template <typename T, int kStrided, typename Launch>
LaunchStatus for_layout(bool vectors, Launch&& launch) {
  if (vectors) {
    return launch(
        std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{}, std::true_type{});
  }
  return launch(std::integral_constant<int, kStrided>{}, std::false_type{});
}

// Whether all channels of a pixel may be read as 16-byte vectors.
template <typename T>
bool has_vectors(const Image<T>& image, int channels) {
  constexpr int kValues = 16 / static_cast<int>(sizeof(T));
  return image.channel == 1 && channels % kValues == 0 && image.batch % kValues == 0 &&
         image.row % kValues == 0 && image.column % kValues == 0 &&
         reinterpret_cast<std::uintptr_t>(image.data) % 16 == 0;
}

struct ForwardPlan {
  Share share;
  std::int64_t blocks;
};
template <typename T>
ForwardPlan plan_image_forward(
    const Sampling& s, bool vectors, std::int64_t batch, int threads, int multiprocessors) {
  const std::int64_t blocks = batch * divide_up(s.pixels(), threads);
  const int step = vectors ? 16 / static_cast<int>(sizeof(T)) : kStridedStep;
  const Share share = share_channels(blocks, s.channels, step, multiprocessors);
  return {share, blocks * share.groups};
}

// Wants a batch and channels.
template <typename T, typename Stream>
LaunchStatus launch_image_forward(
    const Sampling& sampling, const Image<T>& image, const ForwardPlan& plan, bool vectors,
    T* output, int threads, Stream stream) {
  return for_layout<T, kStridedStep>(vectors, [&](auto step, auto adjacent) {
    constexpr auto kernel = &warp_image_forward_kernel<T, step(), adjacent()>;
    GSALIGN_LAUNCH(
        kernel, static_cast<int>(plan.blocks), threads, spline_bytes(sampling), stream, sampling,
        image, plan.share, output);
    return launch_status();
  });
}

// Blocks of the launches, zero where there is nothing to do, and how work is split.
struct ImageBackwardPlan {
  std::int64_t box_blocks, gradient_blocks, spline_blocks, sum_blocks;
  PatchWork work;
  int spline_pixels, spline_chunks;
  std::int64_t box_floats, partial_floats;  // of workspace
};
inline ImageBackwardPlan plan_image_backward(
    const Sampling& s, std::int64_t batch, int threads, int multiprocessors) {
  ImageBackwardPlan plan{};
  plan.sum_blocks = batch * tps::sum_blocks_per_sample(s.points, 2);
  if (batch == 0 || s.channels == 0) {
    return plan;
  }
  plan.work.regions = Regions::of(s.out_height, s.out_width);
  plan.box_blocks = batch * plan.work.regions.count();
  plan.box_floats = plan.box_blocks * (kRegionTiles + 1) * static_cast<int>(sizeof(Box) / 4);
  plan.work.layout = PatchLayout::make(threads);
  plan.work.patches = Patches::of(s.height, s.width, threads);
  const std::int64_t patches = batch * plan.work.patches.count();
  plan.work.share = share_channels(patches, s.channels, kGradientStep, multiprocessors);
  plan.gradient_blocks = patches * plan.work.share.groups;
  if (s.mode != Mode::nearest) {  // else the positions have no gradient
    plan.spline_pixels = spline_pixels(batch, s.pixels(), multiprocessors);
    plan.spline_chunks = divide_up(s.pixels(), plan.spline_pixels);
    plan.spline_blocks = batch * plan.spline_chunks;
    plan.partial_floats = plan.spline_blocks * tps::partial_numbers(s.points, 2);
  }
  return plan;
}

// `workspace` has box_floats + partial_floats floats, aligned to 16 bytes. Wants a batch; without
// channels the gradients of the spline are zero.
template <typename T, typename Stream>
LaunchStatus launch_image_backward(
    const Sampling& sampling, const Image<T>& image, const ImageBackwardPlan& plan, bool vectors,
    const T* grad_output, T* grad_image, float* grad_coefficients, float* grad_control_points,
    float* workspace, int batch, int threads, Stream stream) {
  LaunchStatus status = kLaunched;
  if (plan.gradient_blocks > 0) {
    Box* tile_boxes = reinterpret_cast<Box*>(workspace);
    Box* region_boxes = tile_boxes + plan.box_blocks * kRegionTiles;
    GSALIGN_LAUNCH(
        warp_image_boxes_kernel, static_cast<int>(plan.box_blocks), threads,
        kRegionTiles * static_cast<int>(sizeof(Box)) + spline_bytes(sampling), stream, sampling,
        tile_boxes, region_boxes);
    status = launch_status();
    if (status != kLaunched) {
      return status;
    }
    GSALIGN_LAUNCH(
        warp_image_gradient_kernel<T>, static_cast<int>(plan.gradient_blocks), threads,
        plan.work.layout.centres + spline_bytes(sampling), stream, sampling, plan.work, grad_output,
        tile_boxes, region_boxes, grad_image);
    status = launch_status();
    if (status != kLaunched) {
      return status;
    }
  }
  float* partials = workspace + plan.box_floats;
  if (plan.spline_blocks > 0) {
    status = for_layout<T, kSplineStep>(vectors, [&](auto step, auto adjacent) {
      constexpr auto kernel = &warp_image_spline_kernel<T, step(), adjacent()>;
      GSALIGN_LAUNCH(
          kernel, static_cast<int>(plan.spline_blocks), threads,
          SplineLayout::make(plan.spline_pixels, threads).total + spline_bytes(sampling), stream,
          sampling, image, plan.spline_pixels, grad_output, partials);
      return launch_status();
    });
    if (status != kLaunched) {
      return status;
    }
  }
  return tps::launch_sum_partials(
      partials, grad_coefficients, grad_control_points, batch, sampling.points, 2,
      plan.spline_chunks, threads, stream);
}

}  // namespace gsalign::warp
