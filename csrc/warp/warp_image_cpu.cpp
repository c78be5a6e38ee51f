// Image warp on the CPU: the spline is evaluated and sampled block by block of output pixels;
// neither the grid nor a pixels x control points matrix is ever stored.
//
// Most of the work is logarithms (K per pixel), then four loads per pixel and channel. Control
// points shared by the batch have their logarithms taken once for all samples. Backward makes one
// pass: a block's positions serve the gradient of the image and that of the spline.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "../tps/tps_block.h"
#include "sample.h"

namespace gsalign::warp {
namespace {

using tps::kPointBlock;

// A batch smaller than this is cut into chunks of output rows, so that there is work for several
// threads. Fixed, so that no sum depends on the number of threads.
constexpr std::int64_t kWholeSamples = 4;
constexpr std::int64_t kChunks = 4;

constexpr std::int64_t kBlocksAhead = 4;  // that are fetched before they are needed

constexpr std::int64_t kStretches = 16;  // of a block, whose sums are in flight at once

struct Settings {
  std::int64_t batch, channels, height, width;  // of the input
  std::int64_t out_height, out_width;
  std::int64_t points;
  Mode mode;
  Padding padding;
  bool align_corners;
  bool shared;  // one set of control points for every sample

  std::int64_t pixels() const { return out_height * out_width; }
  std::int64_t plane() const { return height * width; }
  std::int64_t blocks() const { return ceil_div(pixels(), kPointBlock); }
};

// The image as it lies in memory: contiguous and channels-last are read alike.
template <typename T>
struct Image {
  const T* data;
  std::int64_t batch, channel, row, column;  // strides
};

// An integer as wide as R: offsets of pixels, and masks of all or no bits.
template <typename R>
using Index = std::conditional_t<std::is_same_v<R, double>, std::int64_t, std::int32_t>;

// One axis of the taps of a block; what SampleAxis in sample.h has for one tap. The cells are moved
// inside the image, so that they may always be read; the masks say which count.
template <typename R>
struct alignas(64) AxisBlock {
  R fraction[kPointBlock], slope[kPointBlock];  // a fraction that is NaN makes the sample NaN
  Index<R> first[kPointBlock], next[kPointBlock];
  Index<R> first_counts[kPointBlock], next_counts[kPointBlock];
};

// The arithmetic of sample_axis without branches, for zeros and border padding.
template <int kBytes, bool kBorder, bool kNearest, typename R>
GSALIGN_INLINE void sample_block(
    const R* coordinate, std::int64_t length, bool align_corners, AxisBlock<R>* axis) {
  using V = Vector<R, kBytes>;
  using I = typename detail::VectorOf<R, kBytes>::Mask;
  const R size = static_cast<R>(length), last = size - R(1);
  const V half = V{} + (align_corners ? last : size) / R(2);
  const Index<R> limit = static_cast<Index<R>>(length);
  constexpr int kSign = 8 * sizeof(R) - 1;
  for (std::int64_t n = 0; n < kPointBlock; n += kVectorLength<R, kBytes>) {
    const V given = load_vector<R, kBytes>(coordinate + n);
    const auto sign = [](const V& value) GSALIGN_VECTOR_BODY {  // all bits where negative
      return bit_cast<I>(value) >> kSign;
    };
    V position =
        align_corners ? ((given + R(1)) * R(0.5)) * last : ((given + R(1)) * size - R(1)) * R(0.5);
    V slope = half, undefined{};
    // Masks by arithmetic on signs, comparisons only as minima and maxima: GCC takes any other
    // comparison of vectors apart, number by number.
    if constexpr (kBorder) {
      const V end = V{} + last;
      position = position > V{} ? position : V{};  // a NaN goes to the first pixel
      position = position < end ? position : end;
      const I free = sign(V{} - position) & sign(position - end);
      slope = bit_cast<V>(bit_cast<I>(half) & free);
    } else {
      if constexpr (!kNearest) {
        undefined = position - position;  // 0, or NaN for what is not finite
      }
      const V nearest_out = V{} - R(2), furthest = V{} + (size + R(1));
      position = position > nearest_out ? position : nearest_out;  // a NaN too
      const I out = sign(furthest - position);
      slope = bit_cast<V>(bit_cast<I>(half) & ~out);
      position = bit_cast<V>((bit_cast<I>(position) & ~out) | (bit_cast<I>(nearest_out) & out));
    }
    if constexpr (kNearest) {
      // Adding and taking off rounds to an integer, halves to even, for what is small enough.
      constexpr R kRounder = std::is_same_v<R, double> ? R(0x1.8p52) : R(0x1.8p23);
      position = (position + kRounder) - kRounder;
      slope = V{};
    }
    const I truncated = __builtin_convertvector(position, I);
    const V past = (position - __builtin_convertvector(truncated, V)) + R(0);  // no -0
    const I cell = truncated + sign(past);                                     // floor
    const V fraction = (position - __builtin_convertvector(cell, V)) + undefined;
    const I next = cell + 1, end = I{} + (limit - 1);
    const I first_counts = ~((cell | (end - cell)) >> kSign);
    const I next_counts = ~((next | (end - next)) >> kSign);
    const I low = cell < I{} ? I{} : cell, high = next < I{} ? I{} : next;
    store_vector(axis->fraction + n, fraction);
    store_vector(axis->slope + n, slope);
    store_vector(axis->first + n, low > end ? end : low);
    store_vector(axis->next + n, high > end ? end : high);
    store_vector(axis->first_counts + n, first_counts);
    store_vector(axis->next_counts + n, kNearest ? I{} : next_counts);
  }
}

template <int kBytes, typename R>
GSALIGN_INLINE void sample_block(
    const R* coordinate, std::int64_t length, const Settings& s, AxisBlock<R>* axis) {
  const bool border = s.padding == Padding::border, nearest = s.mode == Mode::nearest;
  if (s.padding == Padding::reflection) {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      const auto tap = sample_axis(coordinate[n], length, s.mode, s.padding, s.align_corners);
      const auto inside = [&](std::int64_t cell) {
        return static_cast<Index<R>>(std::clamp<std::int64_t>(cell, 0, length - 1));
      };
      axis->fraction[n] = tap.fraction;
      axis->slope[n] = tap.slope;
      axis->first[n] = inside(tap.cell);
      axis->next[n] = inside(tap.cell + 1);
      axis->first_counts[n] = tap.first_inside ? -1 : 0;
      axis->next_counts[n] = tap.next_inside ? -1 : 0;
    }
  } else if (border && nearest) {
    sample_block<kBytes, true, true>(coordinate, length, s.align_corners, axis);
  } else if (border) {
    sample_block<kBytes, true, false>(coordinate, length, s.align_corners, axis);
  } else if (nearest) {
    sample_block<kBytes, false, true>(coordinate, length, s.align_corners, axis);
  } else {
    sample_block<kBytes, false, false>(coordinate, length, s.align_corners, axis);
  }
}

// Where a block of output pixels reads: four pixels each (first index y, second x), their weights,
// and which of them count.
template <typename R>
struct alignas(64) TapBlock {
  AxisBlock<R> x, y;
  R weight[4][kPointBlock];
  Index<R> counts[4][kPointBlock];
  std::int64_t count;
  bool whole;  // all pixels of all taps count

  template <int kBytes>
  GSALIGN_INLINE void set(const Settings& s, const R* grid, std::int64_t count_) {
    using V = Vector<R, kBytes>;
    using I = typename detail::VectorOf<R, kBytes>::Mask;
    constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
    count = count_;
    sample_block<kBytes>(grid, s.width, s, &x);
    sample_block<kBytes>(grid + kPointBlock, s.height, s, &y);
    I all = I{} - 1;
    for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
      const V fx = load_vector<R, kBytes>(x.fraction + n);
      const V fy = load_vector<R, kBytes>(y.fraction + n);
      store_vector(weight[0] + n, (R(1) - fx) * (R(1) - fy));
      store_vector(weight[1] + n, fx * (R(1) - fy));
      store_vector(weight[2] + n, (R(1) - fx) * fy);
      store_vector(weight[3] + n, fx * fy);
      const auto counted_at = [&](const Index<R>* from) GSALIGN_VECTOR_BODY {
        I result;
        std::memcpy(&result, from + n, sizeof result);
        return result;
      };
      const I x0 = counted_at(x.first_counts), x1 = counted_at(x.next_counts);
      const I y0 = counted_at(y.first_counts), y1 = counted_at(y.next_counts);
      store_vector(counts[0] + n, x0 & y0);
      store_vector(counts[1] + n, x1 & y0);
      store_vector(counts[2] + n, x0 & y1);
      store_vector(counts[3] + n, x1 & y1);
      all &= x0 & y0 & x1 & y1;
    }
    whole = true;
    for (std::int64_t i = 0; i < kLength; ++i) {
      whole = whole && all[i] != 0;
    }
  }

  // A pixel's value, or zero where it does not count: an infinity outside must not become a NaN.
  GSALIGN_INLINE R counted(R value, int corner, std::int64_t n) const {
    return bit_cast<R>(bit_cast<Index<R>>(value) & counts[corner][n]);
  }
};

// Steps between rows and columns of values, the taps of a block as offsets by them.
template <typename R>
struct alignas(64) Offsets {
  std::int64_t row, column;
  Index<R> upper[kPointBlock], lower[kPointBlock], left[kPointBlock], right[kPointBlock];

  template <int kBytes>
  GSALIGN_INLINE void set(const TapBlock<R>& taps, std::int64_t row_, std::int64_t column_) {
    row = row_;
    column = column_;
    const Index<R> by_row = static_cast<Index<R>>(row_), by_column = static_cast<Index<R>>(column_);
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      upper[n] = taps.y.first[n] * by_row;
      lower[n] = taps.y.next[n] * by_row;
      left[n] = taps.x.first[n] * by_column;
      right[n] = taps.x.next[n] * by_column;
    }
  }

  GSALIGN_INLINE std::int64_t first(std::int64_t n) const {
    return std::int64_t(upper[n]) + left[n];
  }
  GSALIGN_INLINE void all(std::int64_t n, std::int64_t out[4]) const {
    const std::int64_t top = upper[n], bottom = lower[n];
    out[0] = top + left[n];
    out[1] = top + right[n];
    out[2] = bottom + left[n];
    out[3] = bottom + right[n];
  }
};

struct Arguments {
  Settings settings;
  Tensor image, coefficients, control_points;

  template <typename R>
  tps::Spline<R> spline(std::int64_t sample) const {
    const std::int64_t points = settings.points;
    return {
        data<R>(coefficients) + sample * (points + 3) * 2,
        data<R>(control_points) + sample * points * 2, points, 2};
  }

  template <typename T>
  Image<T> pixels() const {
    return {data<T>(image), image.stride(0), image.stride(1), image.stride(2), image.stride(3)};
  }
};

Arguments checked_arguments(
    const Tensor& image, const Tensor& coefficients, const Tensor& control_points,
    std::int64_t height, std::int64_t width, std::int64_t mode, std::int64_t padding_mode,
    bool align_corners) {
  check_shape("image", image, {-1, -1, -1, -1});
  STD_TORCH_CHECK(
      image.size(2) >= 1 && image.size(3) >= 1, "image: has no pixels, shape ", shape_text(image));
  constexpr std::int64_t kLongest = 1 << 22;  // positions are told apart in float32
  STD_TORCH_CHECK(
      image.size(2) <= kLongest && image.size(3) <= kLongest, "image: wanted at most ", kLongest,
      " pixels along an axis, got ", shape_text(image));
  STD_TORCH_CHECK(
      height >= 1 && width >= 1, "size: wanted positive lengths, got ", height, " x ", width);
  STD_TORCH_CHECK(mode == 0 || mode == 1, "mode: wanted 0 or 1, got ", mode);
  STD_TORCH_CHECK(
      padding_mode >= 0 && padding_mode <= 2, "padding_mode: wanted 0, 1 or 2, got ", padding_mode);
  // Offsets inside a plane are 32-bit numbers.
  STD_TORCH_CHECK(
      image.size(2) <= INT32_MAX / image.size(3), "image: wanted fewer than 2^31 pixels, got ",
      shape_text(image));
  const bool far = (image.size(2) - 1) * image.stride(2) + (image.size(3) - 1) * image.stride(3) >
                   std::int64_t(INT32_MAX);
  const std::int64_t batch = image.size(0);
  check_shape("control_points", control_points, {batch, -1, 2});
  check_shape("coefficients", coefficients, {batch, control_points.size(1) + 3, 2});
  check_type("control_points", control_points, compute_type(image.scalar_type()));
  check_type("coefficients", coefficients, compute_type(image.scalar_type()));
  const Settings settings{
      batch,
      image.size(1),
      image.size(2),
      image.size(3),
      height,
      width,
      control_points.size(1),
      static_cast<Mode>(mode),
      static_cast<Padding>(padding_mode),
      align_corners,
      batch > 1 && control_points.stride(0) == 0};
  return {
      settings, far ? as_contiguous(image) : image, as_contiguous(coefficients),
      as_contiguous(control_points)};
}

// ---- forward ----

// One channel of a block.
template <typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_channel(
    const TapBlock<R>& taps, const Offsets<R>& offsets, std::int64_t column, const T* plane,
    T* __restrict to) {
  const std::int64_t row = offsets.row;
  if (taps.whole) {
    for (std::int64_t n = 0; n < taps.count; ++n) {
      const T* at = plane + offsets.first(n);
      const R upper = taps.weight[0][n] * load(at[0]) + taps.weight[1][n] * load(at[column]);
      const R lower =
          taps.weight[2][n] * load(at[row]) + taps.weight[3][n] * load(at[row + column]);
      to[n] = store<T>(upper + lower);
    }
    return;
  }
  for (std::int64_t n = 0; n < taps.count; ++n) {
    std::int64_t at[4];
    offsets.all(n, at);
    R part[4];
    for (int corner = 0; corner < 4; ++corner) {
      part[corner] = taps.weight[corner][n] * taps.counted(load(plane[at[corner]]), corner, n);
    }
    to[n] = store<T>((part[0] + part[1]) + (part[2] + part[3]));
  }
}

// Asks for what a later block is about to read or write: with a few planes at a time, each
// for a few lines, processors do not see the streams.
template <bool kWritten, typename T>
GSALIGN_INLINE void fetch_ahead(const T* at) {
  constexpr std::int64_t kBlockBytes = kPointBlock * static_cast<std::int64_t>(sizeof(T));
  const char* from = reinterpret_cast<const char*>(at) + kBlocksAhead * kBlockBytes;
  for (std::int64_t offset = 0; offset < kBlockBytes; offset += 64) {
    __builtin_prefetch(from + offset, kWritten ? 1 : 0, 3);
  }
}

template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_pixels(
    const Settings& s, const Image<T>& image, const TapBlock<R>& taps, std::int64_t sample,
    std::int64_t begin, T* out) {
  Offsets<R> offsets;
  offsets.template set<kBytes>(taps, image.row, image.column);
  for (std::int64_t c = 0; c < s.channels; ++c) {
    const T* plane = image.data + sample * image.batch + c * image.channel;
    T* to = out + (sample * s.channels + c) * s.pixels() + begin;
    fetch_ahead<false>(plane + offsets.first(0));
    fetch_ahead<true>(to);
    if (image.column == 1) {  // known to the compiler
      sample_channel(taps, offsets, 1, plane, to);
    } else {
      sample_channel(taps, offsets, image.column, plane, to);
    }
  }
}

// One block of one sample.
template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void forward_one(
    const Settings& s, const Image<T>& image, const tps::Spline<R>& spline, std::int64_t sample,
    std::int64_t begin, T* out) {
  tps::PointBlock<R> at;
  at.set_pixels(
      begin, std::min(kPointBlock, s.pixels() - begin), s.out_height, s.out_width, s.align_corners);
  alignas(64) R grid[2 * kPointBlock];
  tps::evaluate_block<kBytes, false, R>(spline, at, nullptr, grid);
  TapBlock<R> taps;
  taps.template set<kBytes>(s, grid, at.count);
  sample_pixels<kBytes>(s, image, taps, sample, begin, out);
}

// One block of every sample, whose control points are the same; `rows` has K blocks.
template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void forward_all(
    const Settings& s, const Image<T>& image, tps::Spline<R> spline, std::int64_t begin, R* rows,
    T* out) {
  tps::PointBlock<R> at;
  at.set_pixels(
      begin, std::min(kPointBlock, s.pixels() - begin), s.out_height, s.out_width, s.align_corners);
  tps::logarithm_rows<kBytes>(spline.control_points, spline.points, at, rows);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    alignas(64) R grid[2 * kPointBlock];
    tps::evaluate_block<kBytes, true, R>(spline, at, rows, grid);
    TapBlock<R> taps;
    taps.template set<kBytes>(s, grid, at.count);
    sample_pixels<kBytes>(s, image, taps, b, begin, out);
    spline.coefficients += (s.points + 3) * 2;
  }
}

template <typename T>
void forward(const Arguments& arguments, T* out) {
  using R = Compute<T>;
  const Settings& s = arguments.settings;
  const Image<T> image = arguments.pixels<T>();
  if (s.shared) {
    parallel_for(
        s.blocks(), [&] { return Scratch<R>(s.points * kPointBlock); },
        [&](const Scratch<R>& rows, std::int64_t block) {
          with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
            forward_all<decltype(width)::kBytes>(
                s, image, arguments.spline<R>(0), block * kPointBlock, rows.data(), out);
          });
        });
    return;
  }
  parallel_for(s.batch * s.blocks(), [&](std::int64_t unit) {
    with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
      const std::int64_t b = unit / s.blocks();
      forward_one<decltype(width)::kBytes>(
          s, image, arguments.spline<R>(b), b, unit % s.blocks() * kPointBlock, out);
    });
  });
}

// ---- backward ----

// One channel of a block: adds to the image's gradient `sums` [plane], and to the gradient by
// position, without its slope, `gx`, `gy`.
//
// Neighbouring pixels add to the same places, each sum waiting for the one before: four stretches
// of the block are taken in turn, so that their sums wait side by side.
template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void backward_channel(
    const TapBlock<R>& taps, const Offsets<R>& offsets, std::int64_t column,
    const Offsets<R>& places, const T* plane, const T* gradient, R* sums, R* gx, R* gy) {
  using V = Vector<R, kBytes>;
  constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
  alignas(64) R g[kPointBlock], share[4][kPointBlock], value[4][kPointBlock] = {};
  if (taps.count < kPointBlock) {
    std::fill_n(g, kPointBlock, R(0));
    for (std::int64_t n = 0; n < taps.count; ++n) {
      g[n] = load(gradient[n]);
    }
  } else {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      g[n] = load(gradient[n]);
    }
  }
  for (int corner = 0; corner < 4; ++corner) {
    for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
      store_vector(
          share[corner] + n,
          load_vector<R, kBytes>(taps.weight[corner] + n) * load_vector<R, kBytes>(g + n));
    }
  }
  const std::int64_t row = offsets.row, width = places.row;
  constexpr std::int64_t kStretch = kPointBlock / kStretches;
  for (std::int64_t i = 0; i < kStretch; ++i) {
    for (std::int64_t n = i; n < taps.count; n += kStretch) {
      if (taps.whole) {
        const T* at = plane + offsets.first(n);
        value[0][n] = load(at[0]);
        value[1][n] = load(at[column]);
        value[2][n] = load(at[row]);
        value[3][n] = load(at[row + column]);
        R* to = sums + places.first(n);
        to[0] += share[0][n];
        to[1] += share[1][n];
        to[width] += share[2][n];
        to[width + 1] += share[3][n];
      } else {
        std::int64_t at[4], to[4];
        offsets.all(n, at);
        places.all(n, to);
        for (int corner = 0; corner < 4; ++corner) {
          value[corner][n] = taps.counted(load(plane[at[corner]]), corner, n);
          sums[to[corner]] += taps.counted(share[corner][n], corner, n);
        }
      }
    }
  }
  for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
    const auto take = [&](const R* from)
                          GSALIGN_VECTOR_BODY { return load_vector<R, kBytes>(from + n); };
    const V fx = take(taps.x.fraction), fy = take(taps.y.fraction), by = take(g);
    const V v0 = take(value[0]), v1 = take(value[1]), v2 = take(value[2]), v3 = take(value[3]);
    store_vector(gx + n, take(gx) + by * ((R(1) - fy) * (v1 - v0) + fy * (v3 - v2)));
    store_vector(gy + n, take(gy) + by * ((R(1) - fx) * (v2 - v0) + fx * (v3 - v1)));
  }
}

// Blocks `first` to `last` of one sample: adds to `sums` [C, plane], sets the spline's `totals`.
template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void backward_blocks(
    const Settings& s, const Image<T>& image, const tps::Spline<R>& spline, std::int64_t sample,
    std::int64_t first, std::int64_t last, const T* gradient, R* sums, double* totals) {
  tps::SplineGradient<R, kBytes> of_spline(s.points, 2, totals);
  for (std::int64_t block = first; block < last; ++block) {
    const std::int64_t begin = block * kPointBlock;
    tps::PointBlock<R> at;
    at.set_pixels(
        begin, std::min(kPointBlock, s.pixels() - begin), s.out_height, s.out_width,
        s.align_corners);
    alignas(64) R grid[2 * kPointBlock];
    tps::evaluate_block<kBytes, false, R>(spline, at, nullptr, grid);
    TapBlock<R> taps;
    taps.template set<kBytes>(s, grid, at.count);
    alignas(64) R by_position[2 * kPointBlock] = {};
    Offsets<R> offsets, places;
    offsets.template set<kBytes>(taps, image.row, image.column);
    places.template set<kBytes>(taps, s.width, 1);
    for (std::int64_t c = 0; c < s.channels; ++c) {
      const T* plane = image.data + sample * image.batch + c * image.channel;
      const T* from = gradient + (sample * s.channels + c) * s.pixels() + begin;
      R* to = sums + c * s.plane();
      fetch_ahead<false>(plane + offsets.first(0));
      fetch_ahead<false>(from);
      fetch_ahead<true>(to + places.first(0));
      R *gx = by_position, *gy = by_position + kPointBlock;
      if (image.column == 1) {
        backward_channel<kBytes>(taps, offsets, 1, places, plane, from, to, gx, gy);
      } else {
        backward_channel<kBytes>(taps, offsets, image.column, places, plane, from, to, gx, gy);
      }
    }
    if (s.mode == Mode::nearest) {
      continue;  // a step function of the position: no gradient
    }
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      // Where clamped, not even a NaN passes.
      const R x = by_position[n] * taps.x.slope[n];
      const R y = by_position[kPointBlock + n] * taps.y.slope[n];
      by_position[n] = taps.x.slope[n] != R(0) ? x : R(0);
      by_position[kPointBlock + n] = taps.y.slope[n] != R(0) ? y : R(0);
    }
    of_spline.template add<false>(spline, at, by_position, nullptr, nullptr);
  }
  of_spline.flush();
}

template <typename T>
void backward(
    const Arguments& arguments, const T* gradient, T* grad_image, Compute<T>* grad_coefficients,
    Compute<T>* grad_control_points) {
  using R = Compute<T>;
  const Settings& s = arguments.settings;
  const Image<T> image = arguments.pixels<T>();
  const std::int64_t chunks = s.batch < kWholeSamples ? std::min(kChunks, s.blocks()) : 1;
  const std::int64_t numbers = (s.points + 3) * 2 + 2 * s.points;
  const std::int64_t values = s.channels * s.plane();
  // The sums of whole samples in the type of the image are the result itself.
  const bool in_place = chunks == 1 && std::is_same_v<T, R>;
  const bool kept = chunks > 1;
  std::vector<double> partials(s.batch * chunks * numbers);
  const Scratch<R> chunk_sums(kept ? s.batch * chunks * values : 0);
  parallel_for(
      s.batch * chunks, [&] { return Scratch<R>(in_place || kept ? 0 : values); },
      [&](const Scratch<R>& own, std::int64_t unit) {
        const std::int64_t b = unit / chunks, chunk = unit % chunks;
        R* sums = kept ? chunk_sums.data() + unit * values : own.data();
        if constexpr (std::is_same_v<T, R>) {
          sums = in_place ? grad_image + b * values : sums;
        }
        std::fill_n(sums, values, R(0));
        with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
          backward_blocks<decltype(width)::kBytes>(
              s, image, arguments.spline<R>(b), b, chunk * s.blocks() / chunks,
              (chunk + 1) * s.blocks() / chunks, gradient, sums, partials.data() + unit * numbers);
        });
        if (!in_place && !kept) {
          for (std::int64_t i = 0; i < values; ++i) {
            grad_image[b * values + i] = store<T>(sums[i]);
          }
        }
      });
  if (kept) {
    parallel_for(s.batch * s.channels, [&](std::int64_t unit) {
      const std::int64_t b = unit / s.channels, from = unit % s.channels * s.plane();
      for (std::int64_t i = from; i < from + s.plane(); ++i) {
        R sum = 0;
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += chunk_sums[(b * chunks + chunk) * values + i];
        }
        grad_image[b * values + i] = store<T>(sum);
      }
    });
  }
  tps::sum_partials(
      partials, s.batch, chunks, (s.points + 3) * 2, 2 * s.points, grad_coefficients,
      grad_control_points);
}

Tensor warp_image(
    const Tensor& image, const Tensor& coefficients, const Tensor& control_points,
    std::int64_t height, std::int64_t width, std::int64_t mode, std::int64_t padding_mode,
    bool align_corners) {
  const Arguments arguments = checked_arguments(
      image, coefficients, control_points, height, width, mode, padding_mode, align_corners);
  const Settings& s = arguments.settings;
  const Tensor out = empty({s.batch, s.channels, height, width}, image.scalar_type());
  dispatch_features("image", image.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    forward<T>(arguments, mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> warp_image_backward(
    const Tensor& grad, const Tensor& image, const Tensor& coefficients,
    const Tensor& control_points, std::int64_t mode, std::int64_t padding_mode,
    bool align_corners) {
  check_shape("grad", grad, {-1, -1, -1, -1});
  const Arguments arguments = checked_arguments(
      image, coefficients, control_points, grad.size(2), grad.size(3), mode, padding_mode,
      align_corners);
  const Settings& s = arguments.settings;
  check_shape("grad", grad, {s.batch, s.channels, s.out_height, s.out_width});
  check_type("grad", grad, image.scalar_type());
  const Tensor gradient = as_contiguous(grad);
  const ScalarType type = compute_type(image.scalar_type());
  const Tensor grad_image = empty({s.batch, s.channels, s.height, s.width}, image.scalar_type());
  const Tensor grad_coefficients = empty({s.batch, s.points + 3, 2}, type);
  const Tensor grad_control = empty({s.batch, s.points, 2}, type);
  dispatch_features("image", image.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using R = Compute<T>;
    backward<T>(
        arguments, data<T>(gradient), mutable_data<T>(grad_image),
        mutable_data<R>(grad_coefficients), mutable_data<R>(grad_control));
  });
  return {grad_image, grad_coefficients, grad_control};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("warp_image", TORCH_BOX(&warp_image));
  m.impl("warp_image_backward", TORCH_BOX(&warp_image_backward));
}

}  // namespace gsalign::warp
