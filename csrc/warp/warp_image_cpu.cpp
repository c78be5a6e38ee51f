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
constexpr std::int64_t kTogether = 4;    // channels whose sums are, too

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

// A mask's choice: bits of `yes` where it is set.
template <typename V, typename I>
GSALIGN_INLINE V chosen(const I& mask, const V& yes, const V& no) {
  return bit_cast<V>((bit_cast<I>(yes) & mask) | (bit_cast<I>(no) & ~mask));
}

// Where a block of output pixels reads. The two pixels that one reads of a row are neighbours: a
// pair, that can be moved by one access. It lies inside the image, so at its sides it may be one
// off, and one of its pixels does not count. Arrays of pairs have left and right in turn; [0] is
// the upper row, [1] the lower one.
template <typename R>
struct alignas(64) TapBlock {
  AxisBlock<R> x, y;
  Index<R> left[kPointBlock];  // column of the pair
  R weight[2][2 * kPointBlock];
  Index<R> counts[2][2 * kPointBlock];
  R left_weight[kPointBlock], right_weight[kPointBlock];  // along x, and their derivatives
  R left_slope[kPointBlock], right_slope[kPointBlock];
  std::int64_t count;
  bool whole;  // all pixels of all taps count

  template <int kBytes>
  GSALIGN_INLINE void set(const Settings& s, const R* grid, std::int64_t count_) {
    using V = Vector<R, kBytes>;
    using I = typename detail::VectorOf<R, kBytes>::Mask;
    constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
    constexpr int kSign = 8 * sizeof(R) - 1;
    count = count_;
    sample_block<kBytes>(grid, s.width, s, &x);
    sample_block<kBytes>(grid + kPointBlock, s.height, s, &y);
    I all = I{} - 1;
    const V one = V{} + R(1);
    const I last = I{} + static_cast<Index<R>>(std::max<std::int64_t>(s.width - 2, 0));
    for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
      const auto take = [&](const R* from)
                            GSALIGN_VECTOR_BODY { return load_vector<R, kBytes>(from + n); };
      const auto take_index = [&](const Index<R>* from) GSALIGN_VECTOR_BODY {
        I result;
        std::memcpy(&result, from + n, sizeof result);
        return result;
      };
      const V fx = take(x.fraction), fy = take(y.fraction);
      const I first = take_index(x.first), pair = first > last ? last : first;
      const I x0 = take_index(x.first_counts), x1 = take_index(x.next_counts);
      const I y0 = take_index(y.first_counts), y1 = take_index(y.next_counts);
      const I after = (pair - first) >> kSign, before = x1 & ~x0;  // the pair is one off
      const I counts_left = (x0 & ~after) | before, counts_right = x0 & (after | x1);
      const V weight_left = chosen<V>(before, fx, one - fx);
      const V weight_right = chosen<V>(after, one - fx, fx);
      store_vector(left + n, pair);
      store_vector(left_weight + n, weight_left);
      store_vector(right_weight + n, weight_right);
      store_vector(left_slope + n, chosen<V>(before, one, -one));
      store_vector(right_slope + n, chosen<V>(after, -one, one));
      const auto set_row = [&](int row, const V& by, const I& counted) GSALIGN_VECTOR_BODY {
        const V l = weight_left * by, r = weight_right * by;
        store_vector(weight[row] + 2 * n, interleaved<0, R>(l, r));
        store_vector(weight[row] + 2 * n + kLength, interleaved<1, R>(l, r));
        const I cl = counts_left & counted, cr = counts_right & counted;
        store_vector(counts[row] + 2 * n, interleaved<0, R>(cl, cr));
        store_vector(counts[row] + 2 * n + kLength, interleaved<1, R>(cl, cr));
      };
      set_row(0, one - fy, y0);
      set_row(1, fy, y1);
      all &= x0 & y0 & x1 & y1;
    }
    whole = true;
    for (std::int64_t i = 0; i < kLength; ++i) {
      whole = whole && all[i] != 0;
    }
  }

  // A vector of values of pairs, zero where they do not count: an infinity outside must not become
  // a NaN.
  template <bool kWhole, typename V>
  GSALIGN_INLINE V counted(const V& value, int row, std::int64_t at) const {
    if constexpr (kWhole) {
      return value;
    } else {
      typename detail::VectorOf<R, sizeof(V)>::Mask mask;
      std::memcpy(&mask, counts[row] + at, sizeof mask);
      return bit_cast<V>(bit_cast<decltype(mask)>(value) & mask);
    }
  }
};

// The pairs of a block as offsets into values with these steps between rows and columns.
template <typename R>
struct alignas(64) Offsets {
  std::int64_t column;  // from left to right
  Index<R> row[2][kPointBlock];

  GSALIGN_INLINE void set(
      const Settings& s, const TapBlock<R>& taps, std::int64_t by_row, std::int64_t by_column) {
    column = s.width > 1 ? by_column : 0;
    const auto down = static_cast<Index<R>>(by_row), across = static_cast<Index<R>>(by_column);
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      const Index<R> left = taps.left[n] * across;
      row[0][n] = taps.y.first[n] * down + left;
      row[1][n] = taps.y.next[n] * down + left;
    }
  }
};

// A vector of pairs. kNeighbours: left and right lie side by side, one load fetches both.
template <int kBytes, bool kNeighbours, typename T, typename R = Compute<T>>
GSALIGN_INLINE Vector<R, kBytes> load_pairs(
    const T* plane, const Index<R>* offsets, std::int64_t column) {
  if constexpr (kNeighbours && std::is_same_v<T, float>) {
    typedef double Pair __attribute__((aligned(4), may_alias));
    return (Vector<float, kBytes>)vector_of<double, kBytes>(
        [&](int i) GSALIGN_VECTOR_BODY -> double {
          return *reinterpret_cast<const Pair*>(plane + offsets[i]);
        });
  } else {
    return vector_of<R, kBytes>(
        [&](int i) GSALIGN_VECTOR_BODY { return load(plane[offsets[i / 2] + (i % 2) * column]); });
  }
}

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
template <int kBytes, bool kWhole, bool kNeighbours, typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_channel(
    const TapBlock<R>& taps, const Offsets<R>& offsets, const T* plane, T* __restrict to) {
  using V = Vector<R, kBytes>;
  constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
  alignas(64) R short_or_half[kPointBlock];
  R* out = short_or_half;
  if constexpr (std::is_same_v<T, R>) {
    out = taps.count == kPointBlock ? to : out;
  }
  for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
    V sum[2];
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = n + half * (kLength / 2);
      V part[2];
      for (int row = 0; row < 2; ++row) {
        const V value =
            load_pairs<kBytes, kNeighbours>(plane, offsets.row[row] + at, offsets.column);
        part[row] = load_vector<R, kBytes>(taps.weight[row] + 2 * at) *
                    taps.template counted<kWhole>(value, row, 2 * at);
      }
      sum[half] = part[0] + part[1];
    }
    store_vector(out + n, every_other<0, R>(sum[0], sum[1]) + every_other<1, R>(sum[0], sum[1]));
  }
  if (out == short_or_half) {
    for (std::int64_t n = 0; n < taps.count; ++n) {
      to[n] = store<T>(out[n]);
    }
  }
}

// Calls function(whole, neighbours), two constants, for the block and the image at hand.
template <typename R, typename Function>
GSALIGN_INLINE void with_layout(
    const TapBlock<R>& taps, const Offsets<R>& offsets, const Function& function) {
  const bool neighbours = offsets.column == 1;
  if (taps.whole && neighbours) {
    function(std::true_type{}, std::true_type{});
  } else if (neighbours) {
    function(std::false_type{}, std::true_type{});
  } else {
    function(std::false_type{}, std::false_type{});
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

// The same along the lower row of the pairs, which bends with the warp.
template <bool kWritten, typename T, typename R>
GSALIGN_INLINE void fetch_ahead(const T* plane, const Offsets<R>& pairs) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t n = 0; n < kPointBlock; n += kLine) {
    __builtin_prefetch(plane + pairs.row[1][n] + kBlocksAhead * kPointBlock, kWritten ? 1 : 0, 3);
  }
  __builtin_prefetch(
      plane + pairs.row[1][kPointBlock - 1] + kBlocksAhead * kPointBlock, kWritten ? 1 : 0, 3);
}

template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_pixels(
    const Settings& s, const Image<T>& image, const TapBlock<R>& taps, std::int64_t sample,
    std::int64_t begin, T* out) {
  Offsets<R> offsets;
  offsets.set(s, taps, image.row, image.column);
  with_layout(taps, offsets, [&](auto whole, auto neighbours) GSALIGN_VECTOR_BODY {
    for (std::int64_t c = 0; c < s.channels; ++c) {
      const T* plane = image.data + sample * image.batch + c * image.channel;
      T* to = out + (sample * s.channels + c) * s.pixels() + begin;
      fetch_ahead<false>(plane, offsets);
      fetch_ahead<true>(to);
      sample_channel<kBytes, whole(), neighbours()>(taps, offsets, plane, to);
    }
  });
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
  tps::evaluate_block<kBytes, tps::Rows::none, R>(spline, at, nullptr, grid);
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
    tps::evaluate_block<kBytes, tps::Rows::read, R>(spline, at, rows, grid);
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

// What of a block's gradient is summed up over the channels: <dY, X> for the pairs of both rows.
template <typename R>
struct alignas(64) Dots {
  R row[2][2 * kPointBlock] = {};

  // The gradient by position, without its slope.
  template <int kBytes>
  GSALIGN_INLINE void by_position(const TapBlock<R>& taps, R* gx, R* gy) const {
    using V = Vector<R, kBytes>;
    constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
    for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
      const auto take = [&](const R* from)
                            GSALIGN_VECTOR_BODY { return load_vector<R, kBytes>(from + n); };
      V across[2], along[2];
      for (int i = 0; i < 2; ++i) {
        const V first = take(row[i] + n), second = take(row[i] + n + kLength);
        const V left = every_other<0, R>(first, second), right = every_other<1, R>(first, second);
        across[i] = take(taps.left_slope) * left + take(taps.right_slope) * right;
        along[i] = take(taps.left_weight) * left + take(taps.right_weight) * right;
      }
      const V fy = take(taps.y.fraction);
      store_vector(gx + n, (R(1) - fy) * across[0] + fy * across[1]);
      store_vector(gy + n, along[1] - along[0]);
    }
    std::fill(gx + taps.count, gx + kPointBlock, R(0));  // of a short block, nothing
    std::fill(gy + taps.count, gy + kPointBlock, R(0));
  }
};

// One channel of a block: adds to `dots`, and sets the shares of the image's gradient.
template <int kBytes, bool kWhole, bool kNeighbours, typename T, typename R = Compute<T>>
GSALIGN_INLINE void backward_channel(
    const TapBlock<R>& taps, const Offsets<R>& offsets, const T* plane, const T* gradient,
    Dots<R>* dots, R (*share)[2 * kPointBlock]) {
  using V = Vector<R, kBytes>;
  constexpr std::int64_t kLength = kVectorLength<R, kBytes>;
  alignas(64) R short_or_half[kPointBlock];
  const R* g = short_or_half;
  if (taps.count < kPointBlock) {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      short_or_half[n] = n < taps.count ? load(gradient[n]) : R(0);
    }
  } else if constexpr (std::is_same_v<T, R>) {
    g = gradient;
  } else {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      short_or_half[n] = load(gradient[n]);
    }
  }
  for (std::int64_t n = 0; n < kPointBlock; n += kLength) {
    const V both = load_vector<R, kBytes>(g + n);
    const V twice[2] = {interleaved<0, R>(both, both), interleaved<1, R>(both, both)};
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = n + half * (kLength / 2);
      for (int row = 0; row < 2; ++row) {
        const V value =
            load_pairs<kBytes, kNeighbours>(plane, offsets.row[row] + at, offsets.column);
        R* dot = dots->row[row] + 2 * at;
        store_vector(
            dot, load_vector<R, kBytes>(dot) +
                     twice[half] * taps.template counted<kWhole>(value, row, 2 * at));
        const V part = load_vector<R, kBytes>(taps.weight[row] + 2 * at) * twice[half];
        store_vector(share[row] + 2 * at, taps.template counted<kWhole>(part, row, 2 * at));
      }
    }
  }
}

// Adds the shares of a few channels to the image's gradient `sums` [channels, plane].
//
// Neighbouring pixels add to the same places, each sum waiting for the one before until it has left
// for the cache: so stretches of the block are taken in turn, and the channels side by side.
template <int kChannels, bool kNeighbours, typename R>
GSALIGN_INLINE void scatter(
    const Offsets<R>& places, std::int64_t count, std::int64_t plane,
    const R (*share)[2][2 * kPointBlock], R* sums) {
  constexpr std::int64_t kStretch = kPointBlock / kStretches;
  for (std::int64_t i = 0; i < kStretch; ++i) {
    for (std::int64_t n = i; n < count; n += kStretch) {
      for (int row = 0; row < 2; ++row) {
        R* to = sums + places.row[row][n];
        for (int c = 0; c < kChannels; ++c, to += plane) {
          const R* part = share[c][row] + 2 * n;
          if constexpr (kNeighbours) {
            typedef R Pair __attribute__((vector_size(2 * sizeof(R))));
            Pair sum, more;
            std::memcpy(&sum, to, sizeof sum);
            std::memcpy(&more, part, sizeof more);
            sum += more;
            std::memcpy(to, &sum, sizeof sum);
          } else {
            to[0] += part[0];
            to[places.column] += part[1];
          }
        }
      }
    }
  }
}

// Blocks `first` to `last` of one sample: adds to `sums` [C, plane], sets the spline's `totals`.
template <int kBytes, typename T, typename R = Compute<T>>
GSALIGN_INLINE void backward_blocks(
    const Settings& s, const Image<T>& image, const tps::Spline<R>& spline, std::int64_t sample,
    std::int64_t first, std::int64_t last, const T* gradient, R* sums, double* totals) {
  tps::SplineGradient<R, kBytes> of_spline(s.points, 2, totals);
  const Scratch<R> rows(s.points * kPointBlock);
  for (std::int64_t block = first; block < last; ++block) {
    const std::int64_t begin = block * kPointBlock;
    tps::PointBlock<R> at;
    at.set_pixels(
        begin, std::min(kPointBlock, s.pixels() - begin), s.out_height, s.out_width,
        s.align_corners);
    alignas(64) R grid[2 * kPointBlock];
    tps::evaluate_block<kBytes, tps::Rows::written, R>(spline, at, rows.data(), grid);
    TapBlock<R> taps;
    taps.template set<kBytes>(s, grid, at.count);
    Dots<R> dots;
    Offsets<R> offsets, places;
    offsets.set(s, taps, image.row, image.column);
    places.set(s, taps, s.width, 1);
    for (std::int64_t first = 0; first < s.channels; first += kTogether) {
      const std::int64_t channels = std::min(kTogether, s.channels - first);
      R* to = sums + first * s.plane();
      alignas(64) R share[kTogether][2][2 * kPointBlock];
      with_layout(taps, offsets, [&](auto whole, auto neighbours) GSALIGN_VECTOR_BODY {
        for (std::int64_t c = 0; c < channels; ++c) {
          const T* plane = image.data + sample * image.batch + (first + c) * image.channel;
          const T* from = gradient + (sample * s.channels + first + c) * s.pixels() + begin;
          fetch_ahead<false>(plane, offsets);
          fetch_ahead<false>(from);
          fetch_ahead<true>(to + c * s.plane(), places);
          backward_channel<kBytes, whole(), neighbours()>(
              taps, offsets, plane, from, &dots, share[c]);
        }
      });
      const auto scatter_all = [&](auto together) GSALIGN_VECTOR_BODY {
        if (s.width > 1) {
          scatter<together(), true>(places, at.count, s.plane(), share, to);
        } else {
          scatter<together(), false>(places, at.count, s.plane(), share, to);
        }
      };
      switch (channels) {
        case 1:
          scatter_all(std::integral_constant<int, 1>{});
          break;
        case 2:
          scatter_all(std::integral_constant<int, 2>{});
          break;
        case 3:
          scatter_all(std::integral_constant<int, 3>{});
          break;
        default:
          scatter_all(std::integral_constant<int, 4>{});
      }
    }
    if (s.mode == Mode::nearest) {
      continue;  // a step function of the position: no gradient
    }
    alignas(64) R by_position[2 * kPointBlock];
    dots.template by_position<kBytes>(taps, by_position, by_position + kPointBlock);
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      // Where clamped, not even a NaN passes.
      const R x = by_position[n] * taps.x.slope[n];
      const R y = by_position[kPointBlock + n] * taps.y.slope[n];
      by_position[n] = taps.x.slope[n] != R(0) ? x : R(0);
      by_position[kPointBlock + n] = taps.y.slope[n] != R(0) ? y : R(0);
    }
    of_spline.template add<false, true>(spline, at, by_position, nullptr, nullptr, rows.data());
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
