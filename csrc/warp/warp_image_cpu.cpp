// Image warp on the CPU: the spline is evaluated and sampled block by block of output pixels;
// neither the grid nor a pixels x control points matrix is ever stored.
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

// Fixed units of work, so that no sum depends on the number of threads.
constexpr std::int64_t kPixelChunk = 16 * kPointBlock;  // output pixels
constexpr std::int64_t kChannelGroup = 16;  // channels that share one evaluation of the grid

struct Settings {
  std::int64_t batch, channels, height, width;  // of the input
  std::int64_t out_height, out_width;
  std::int64_t points;
  Mode mode;
  Padding padding;
  bool align_corners;

  std::int64_t pixels() const { return out_height * out_width; }
};

// The image as it lies in memory: contiguous and channels-last are read alike.
template <typename T>
struct Image {
  const T* data;
  std::int64_t batch, channel, row, column;  // strides
};

template <typename R>
struct Taps {
  SampleAxis<R> x, y;

  bool undefined() const { return x.undefined || y.undefined; }
  bool inside(int corner) const {
    return (corner & 1 ? x.next_inside : x.first_inside) &&
           (corner & 2 ? y.next_inside : y.first_inside);
  }
  R weight(int corner) const {
    return (corner & 1 ? x.fraction : R(1) - x.fraction) *
           (corner & 2 ? y.fraction : R(1) - y.fraction);
  }
  std::int64_t row(int corner) const { return y.cell + (corner >> 1); }
  std::int64_t column(int corner) const { return x.cell + (corner & 1); }
};

// Where a block of output pixels reads.
template <typename R>
class TapBlock {
 public:
  TapBlock(
      const Settings& settings, const tps::Spline<R>& spline, std::int64_t begin,
      std::int64_t count)
      : count_(count) {
    for (std::int64_t n = 0; n < count; ++n) {
      x_[n] = tps::pixel_position<R>(
          (begin + n) % settings.out_width, settings.out_width, settings.align_corners);
      y_[n] = tps::pixel_position<R>(
          (begin + n) / settings.out_width, settings.out_height, settings.align_corners);
    }
    R grid[2 * kPointBlock];
    tps::evaluate_block(spline, x_, y_, count, grid);
    for (std::int64_t n = 0; n < count; ++n) {
      taps_[n] = {
          sample_axis(
              grid[n], settings.width, settings.mode, settings.padding, settings.align_corners),
          sample_axis(
              grid[kPointBlock + n], settings.height, settings.mode, settings.padding,
              settings.align_corners)};
    }
  }

  std::int64_t count() const { return count_; }
  const Taps<R>& operator[](std::int64_t n) const { return taps_[n]; }
  const R* x() const { return x_; }
  const R* y() const { return y_; }

 private:
  std::int64_t count_;
  R x_[kPointBlock], y_[kPointBlock];
  Taps<R> taps_[kPointBlock];
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
      align_corners};
  return {settings, image, as_contiguous(coefficients), as_contiguous(control_points)};
}

template <typename T>
void forward(const Arguments& arguments, T* out) {
  using R = Compute<T>;
  const Settings& s = arguments.settings;
  const Image<T> image = arguments.pixels<T>();
  const std::int64_t blocks = ceil_div(s.pixels(), kPointBlock);
  parallel_for(s.batch * blocks, [&](std::int64_t unit) {
    const std::int64_t b = unit / blocks, begin = unit % blocks * kPointBlock;
    const TapBlock<R> taps(
        s, arguments.spline<R>(b), begin, std::min(kPointBlock, s.pixels() - begin));
    for (std::int64_t c = 0; c < s.channels; ++c) {
      const T* plane = image.data + b * image.batch + c * image.channel;
      T* to = out + (b * s.channels + c) * s.pixels() + begin;
      for (std::int64_t n = 0; n < taps.count(); ++n) {
        const Taps<R>& tap = taps[n];
        R sum = tap.undefined() ? std::numeric_limits<R>::quiet_NaN() : R(0);
        for (int corner = 0; corner < 4; ++corner) {
          if (tap.inside(corner)) {
            sum += tap.weight(corner) *
                   load(plane[tap.row(corner) * image.row + tap.column(corner) * image.column]);
          }
        }
        to[n] = store<T>(sum);
      }
    }
  });
}

template <typename T>
void backward_image(const Arguments& arguments, const T* gradient, T* grad_image) {
  using R = Compute<T>;
  const Settings& s = arguments.settings;
  const std::int64_t groups = ceil_div(s.channels, kChannelGroup);
  const std::int64_t plane = s.height * s.width;
  parallel_for(s.batch * groups, [&](std::int64_t unit) {
    const std::int64_t b = unit / groups, first = unit % groups * kChannelGroup;
    const std::int64_t channels = std::min(kChannelGroup, s.channels - first);
    std::vector<R> sums(channels * plane, R(0));
    for (std::int64_t begin = 0; begin < s.pixels(); begin += kPointBlock) {
      const TapBlock<R> taps(
          s, arguments.spline<R>(b), begin, std::min(kPointBlock, s.pixels() - begin));
      for (std::int64_t c = 0; c < channels; ++c) {
        const T* from = gradient + (b * s.channels + first + c) * s.pixels() + begin;
        R* to = sums.data() + c * plane;
        for (std::int64_t n = 0; n < taps.count(); ++n) {
          const Taps<R>& tap = taps[n];
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.inside(corner)) {
              to[tap.row(corner) * s.width + tap.column(corner)] +=
                  tap.weight(corner) * load(from[n]);
            }
          }
        }
      }
    }
    T* out = grad_image + (b * s.channels + first) * plane;
    for (std::int64_t i = 0; i < channels * plane; ++i) {
      out[i] = store<T>(sums[i]);
    }
  });
}

template <typename T>
void backward_spline(
    const Arguments& arguments, const T* gradient, Compute<T>* grad_coefficients,
    Compute<T>* grad_control_points) {
  using R = Compute<T>;
  const Settings& s = arguments.settings;
  const Image<T> image = arguments.pixels<T>();
  const std::int64_t of_coefficients = (s.points + 3) * 2;
  const std::int64_t numbers = of_coefficients + 2 * s.points;
  const std::int64_t chunks = ceil_div(s.pixels(), kPixelChunk);
  std::vector<double> partials(s.batch * chunks * numbers, 0.0);
  parallel_for(s.batch * chunks, [&](std::int64_t unit) {
    const std::int64_t b = unit / chunks;
    const std::int64_t end = std::min((unit % chunks + 1) * kPixelChunk, s.pixels());
    double* partial = partials.data() + unit * numbers;
    const tps::Spline<R> spline = arguments.spline<R>(b);
    for (std::int64_t begin = unit % chunks * kPixelChunk; begin < end; begin += kPointBlock) {
      const TapBlock<R> taps(s, spline, begin, std::min(kPointBlock, end - begin));
      R grid[2 * kPointBlock] = {};
      for (std::int64_t c = 0; c < s.channels; ++c) {
        const T* plane = image.data + b * image.batch + c * image.channel;
        const T* from = gradient + (b * s.channels + c) * s.pixels() + begin;
        for (std::int64_t n = 0; n < taps.count(); ++n) {
          const Taps<R>& tap = taps[n];
          R value[4] = {};
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.inside(corner)) {
              value[corner] =
                  load(plane[tap.row(corner) * image.row + tap.column(corner) * image.column]);
            }
          }
          const R g = load(from[n]);
          const R fx = tap.x.fraction, fy = tap.y.fraction;
          if (tap.x.slope != R(0) && !tap.undefined()) {
            grid[n] += g * tap.x.slope *
                       ((R(1) - fy) * (value[1] - value[0]) + fy * (value[3] - value[2]));
          }
          if (tap.y.slope != R(0) && !tap.undefined()) {
            grid[kPointBlock + n] +=
                g * tap.y.slope *
                ((R(1) - fx) * (value[2] - value[0]) + fx * (value[3] - value[1]));
          }
        }
      }
      tps::evaluate_block_backward<R>(
          spline, taps.x(), taps.y(), taps.count(), grid, partial, partial + of_coefficients,
          nullptr, nullptr);
    }
  });
  tps::sum_partials(
      partials, s.batch, chunks, of_coefficients, 2 * s.points, grad_coefficients,
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
    backward_image<T>(arguments, data<T>(gradient), mutable_data<T>(grad_image));
    backward_spline<T>(
        arguments, data<T>(gradient), mutable_data<R>(grad_coefficients),
        mutable_data<R>(grad_control));
  });
  return {grad_image, grad_coefficients, grad_control};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("warp_image", TORCH_BOX(&warp_image));
  m.impl("warp_image_backward", TORCH_BOX(&warp_image_backward));
}

}  // namespace gsalign::warp
