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

constexpr std::int64_t kStretches = 4;  // of a block, whose sums are in flight at once

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

// One axis of the taps of a block; what SampleAxis in sample.h has for one tap. The cells are moved
// inside the image, so that they may always be read; the masks, of all or no bits, say which count.
template <typename R>
struct alignas(64) AxisBlock {
  R fraction[kPointBlock], slope[kPointBlock];  // a fraction that is NaN makes the sample NaN
  std::int32_t first[kPointBlock], next[kPointBlock];
  std::int32_t first_counts[kPointBlock], next_counts[kPointBlock];
};

// The arithmetic of sample_axis without branches, for zeros and border padding.
template <typename R, bool kBorder, bool kNearest>
GSALIGN_INLINE void sample_block(
    const R* __restrict coordinate, std::int64_t length, bool align_corners,
    AxisBlock<R>* __restrict axis) {
  const R size = static_cast<R>(length), last = size - R(1);
  const R half = (align_corners ? last : size) / R(2);
  const std::int32_t limit = static_cast<std::int32_t>(length);
#pragma omp simd
  for (std::int64_t n = 0; n < kPointBlock; ++n) {
    // The two ways of pixel_position_of, whose roundings differ.
    const R centres = ((coordinate[n] + R(1)) / R(2)) * last;
    const R edges = ((coordinate[n] + R(1)) * size - R(1)) / R(2);
    R position = align_corners ? centres : edges;
    R slope = half;
    R undefined = R(0);
    if constexpr (kBorder) {
      const bool above = position > R(0), below = position < last;  // neither, for a NaN
      slope = above && below ? slope : R(0);
      position = above ? (below ? position : last) : R(0);
    } else {
      const R zero_or_nan = position - position;  // NaN for what is not finite
      const bool near = position >= R(-2) && position <= size + R(1);
      undefined = kNearest ? R(0) : zero_or_nan;
      slope = near ? slope : R(0);
      position = near ? position : R(-2);
    }
    if constexpr (kNearest) {
      position = std::is_same_v<R, double> ? static_cast<R>(__builtin_rint(position))
                                           : static_cast<R>(__builtin_rintf(position));
      slope = R(0);
    }
    const std::int32_t truncated = static_cast<std::int32_t>(position);
    const std::int32_t cell = truncated - (position < static_cast<R>(truncated) ? 1 : 0);
    axis->fraction[n] = (position - static_cast<R>(cell)) + undefined;
    axis->slope[n] = slope;
    const std::int32_t low = cell < 0 ? 0 : cell, high = cell + 1 < 0 ? 0 : cell + 1;
    axis->first[n] = low < limit ? low : limit - 1;
    axis->next[n] = high < limit ? high : limit - 1;
    axis->first_counts[n] = cell >= 0 && cell < limit ? -1 : 0;
    axis->next_counts[n] = !kNearest && cell >= -1 && cell < limit - 1 ? -1 : 0;
  }
}

template <typename R>
GSALIGN_INLINE void sample_block(
    const R* coordinate, std::int64_t length, const Settings& s, AxisBlock<R>* axis) {
  const bool border = s.padding == Padding::border, nearest = s.mode == Mode::nearest;
  if (s.padding == Padding::reflection) {
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      const auto tap = sample_axis(coordinate[n], length, s.mode, s.padding, s.align_corners);
      axis->fraction[n] = tap.fraction;
      axis->slope[n] = tap.slope;
      axis->first[n] = static_cast<std::int32_t>(std::clamp<std::int64_t>(tap.cell, 0, length - 1));
      axis->next[n] =
          static_cast<std::int32_t>(std::clamp<std::int64_t>(tap.cell + 1, 0, length - 1));
      axis->first_counts[n] = tap.first_inside ? -1 : 0;
      axis->next_counts[n] = tap.next_inside ? -1 : 0;
    }
  } else if (border && nearest) {
    sample_block<R, true, true>(coordinate, length, s.align_corners, axis);
  } else if (border) {
    sample_block<R, true, false>(coordinate, length, s.align_corners, axis);
  } else if (nearest) {
    sample_block<R, false, true>(coordinate, length, s.align_corners, axis);
  } else {
    sample_block<R, false, false>(coordinate, length, s.align_corners, axis);
  }
}

// Steps between rows and columns of values.
struct Steps {
  std::int64_t row, column;
};

// Where a block of output pixels reads: four pixels each (first index y, second x), their weights,
// and which of them count.
template <typename R>
struct alignas(64) TapBlock {
  AxisBlock<R> x, y;
  R weight[4][kPointBlock];
  std::int32_t counts[4][kPointBlock];
  std::int64_t count;
  bool whole;  // all pixels of all taps count

  GSALIGN_INLINE void set(const Settings& s, const R* grid, std::int64_t count_) {
    count = count_;
    sample_block(grid, s.width, s, &x);
    sample_block(grid + kPointBlock, s.height, s, &y);
    std::int32_t all = -1;
#pragma omp simd reduction(& : all)
    for (std::int64_t n = 0; n < kPointBlock; ++n) {
      const R fx = x.fraction[n], fy = y.fraction[n];
      weight[0][n] = (R(1) - fx) * (R(1) - fy);
      weight[1][n] = fx * (R(1) - fy);
      weight[2][n] = (R(1) - fx) * fy;
      weight[3][n] = fx * fy;
      counts[0][n] = x.first_counts[n] & y.first_counts[n];
      counts[1][n] = x.next_counts[n] & y.first_counts[n];
      counts[2][n] = x.first_counts[n] & y.next_counts[n];
      counts[3][n] = x.next_counts[n] & y.next_counts[n];
      all &= counts[0][n] & counts[3][n];
    }
    whole = all == -1;
  }

  // Offsets of the four pixels of a tap.
  GSALIGN_INLINE void offsets(std::int64_t n, const Steps& steps, std::int64_t out[4]) const {
    const std::int64_t upper = y.first[n] * steps.row, lower = y.next[n] * steps.row;
    const std::int64_t left = x.first[n] * steps.column, right = x.next[n] * steps.column;
    out[0] = upper + left;
    out[1] = upper + right;
    out[2] = lower + left;
    out[3] = lower + right;
  }

  // A pixel's value, or zero where it does not count: an infinity outside must not become a NaN.
  GSALIGN_INLINE R counted(R value, int corner, std::int64_t n) const {
    if constexpr (std::is_same_v<R, double>) {
      const std::int64_t mask = counts[corner][n];
      return bit_cast<double>(bit_cast<std::int64_t>(value) & mask);
    } else {
      return bit_cast<float>(bit_cast<std::int32_t>(value) & counts[corner][n]);
    }
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
  return {settings, image, as_contiguous(coefficients), as_contiguous(control_points)};
}

// ---- forward ----

// One channel of a block.
template <typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_channel(
    const TapBlock<R>& taps, const T* plane, const Steps& steps, T* __restrict to) {
  if (taps.whole) {
    for (std::int64_t n = 0; n < taps.count; ++n) {
      const T* at = plane + taps.y.first[n] * steps.row + taps.x.first[n] * steps.column;
      const R upper = taps.weight[0][n] * load(at[0]) + taps.weight[1][n] * load(at[steps.column]);
      at += steps.row;
      const R lower = taps.weight[2][n] * load(at[0]) + taps.weight[3][n] * load(at[steps.column]);
      to[n] = store<T>(upper + lower);
    }
    return;
  }
  for (std::int64_t n = 0; n < taps.count; ++n) {
    std::int64_t offset[4];
    taps.offsets(n, steps, offset);
    R part[4];
    for (int corner = 0; corner < 4; ++corner) {
      part[corner] = taps.weight[corner][n] * taps.counted(load(plane[offset[corner]]), corner, n);
    }
    to[n] = store<T>((part[0] + part[1]) + (part[2] + part[3]));
  }
}

template <typename T, typename R = Compute<T>>
GSALIGN_INLINE void sample_pixels(
    const Settings& s, const Image<T>& image, const TapBlock<R>& taps, std::int64_t sample,
    std::int64_t begin, T* out) {
  // Steps known to the compiler where the image is contiguous.
  const T* planes = image.data + sample * image.batch;
  T* to = out + sample * s.channels * s.pixels() + begin;
  for (std::int64_t c = 0; c < s.channels; ++c) {
    const T* plane = planes + c * image.channel;
    if (image.column == 1) {
      sample_channel(taps, plane, {image.row, 1}, to + c * s.pixels());
    } else {
      sample_channel(taps, plane, {image.row, image.column}, to + c * s.pixels());
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
  taps.set(s, grid, at.count);
  sample_pixels(s, image, taps, sample, begin, out);
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
    taps.set(s, grid, at.count);
    sample_pixels(s, image, taps, b, begin, out);
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
template <typename T, typename R = Compute<T>>
GSALIGN_INLINE void backward_channel(
    const TapBlock<R>& taps, const T* plane, const Steps& steps, const T* gradient, R* sums,
    std::int64_t width, R* __restrict gx, R* __restrict gy) {
  constexpr std::int64_t kLength = kPointBlock / kStretches;
  for (std::int64_t i = 0; i < kLength; ++i) {
    for (std::int64_t n = i; n < taps.count; n += kLength) {
      const R g = load(gradient[n]);
      const R fx = taps.x.fraction[n], fy = taps.y.fraction[n];
      R v[4];
      if (taps.whole) {
        const T* at = plane + taps.y.first[n] * steps.row + taps.x.first[n] * steps.column;
        v[0] = load(at[0]);
        v[1] = load(at[steps.column]);
        v[2] = load(at[steps.row]);
        v[3] = load(at[steps.row + steps.column]);
        R* to = sums + (taps.y.first[n] * width + taps.x.first[n]);
        to[0] += taps.weight[0][n] * g;
        to[1] += taps.weight[1][n] * g;
        to[width] += taps.weight[2][n] * g;
        to[width + 1] += taps.weight[3][n] * g;
      } else {
        std::int64_t offset[4], place[4];
        taps.offsets(n, steps, offset);
        taps.offsets(n, {width, 1}, place);
        for (int corner = 0; corner < 4; ++corner) {
          v[corner] = taps.counted(load(plane[offset[corner]]), corner, n);
          sums[place[corner]] += taps.counted(taps.weight[corner][n] * g, corner, n);
        }
      }
      gx[n] += g * ((R(1) - fy) * (v[1] - v[0]) + fy * (v[3] - v[2]));
      gy[n] += g * ((R(1) - fx) * (v[2] - v[0]) + fx * (v[3] - v[1]));
    }
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
    taps.set(s, grid, at.count);
    alignas(64) R by_position[2 * kPointBlock] = {};
    for (std::int64_t c = 0; c < s.channels; ++c) {
      const T* plane = image.data + sample * image.batch + c * image.channel;
      const T* from = gradient + (sample * s.channels + c) * s.pixels() + begin;
      R* to = sums + c * s.plane();
      if (image.column == 1) {
        backward_channel(
            taps, plane, {image.row, 1}, from, to, s.width, by_position, by_position + kPointBlock);
      } else {
        backward_channel(
            taps, plane, {image.row, image.column}, from, to, s.width, by_position,
            by_position + kPointBlock);
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
  const Tensor out = empty(image, {s.batch, s.channels, height, width}, image.scalar_type());
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
  const Tensor grad_image =
      empty(image, {s.batch, s.channels, s.height, s.width}, image.scalar_type());
  const Tensor grad_coefficients = empty(image, {s.batch, s.points + 3, 2}, type);
  const Tensor grad_control = empty(image, {s.batch, s.points, 2}, type);
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
