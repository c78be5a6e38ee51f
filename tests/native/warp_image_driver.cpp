// Runs the CUDA kernels of the image warp on the host, on cases read from a file.
//
//   warp_image_driver CASES RESULTS [--skip-barrier N] [--missing-shared BYTES]
//
// CASES is a sequence of records: a Header, then float32 image [B, C, H, W], gradient of the
// output, coefficients, control points. RESULTS gets per record five int32 of the plans (16-byte
// vectors, channel groups forward and of the image's gradient, output pixels of a block of the
// spline's gradient, blocks of the image's gradient) and as float32 the output, then the gradients
// of image, coefficients and control points. Every pass runs `repeats` times into poisoned memory;
// a run that differs from the first by one bit ends the program with 3.
#define GSALIGN_HOST_LAUNCH "host_launch.h"
#include "../../csrc/warp/warp_image_kernels.cuh"
#include "driver.h"

namespace {

using namespace gsalign;
using namespace gsalign::warp;
using host::keep_first;
using host::narrow;
using host::poisoned;
using host::read_values;
using host::write_widened;

enum class Layout { contiguous = 0, channels_last = 1, odd = 2 };

struct Header {
  std::int32_t type;  // 0 float32, 1 float16, 2 bfloat16
  std::int32_t batch, channels, height, width, out_height, out_width, points;
  std::int32_t mode, padding, align_corners, layout;
  std::int32_t threads, multiprocessors;
  std::int32_t passes;  // 1 forward, 2 gradient of the image, 4 of the spline; together
  std::int32_t repeats;
};

// The image in one of the layouts; between the elements of the odd one lies poison.
template <typename T>
struct Stored {
  Stored(const Header& h, const std::vector<T>& values) {
    const std::int64_t c = h.channels, y = h.height, x = h.width;
    switch (static_cast<Layout>(h.layout)) {
      case Layout::contiguous:
        image = {nullptr, c * y * x, y * x, x, 1};
        break;
      case Layout::channels_last:
        image = {nullptr, c * y * x, 1, x * c, c};
        break;
      case Layout::odd:  // columns, then channels, then rows, then samples, each with a gap
        image = {
            nullptr, 2 * ((2 * c + 1) * (2 * x + 1) * y + 1), 2 * x + 1, (2 * c + 1) * (2 * x + 1),
            2};
    }
    std::int64_t room = 0;
    for_each(h, [&](std::int64_t, std::int64_t at) { room = at >= room ? at + 1 : room; });
    memory = poisoned<T>(room);
    for_each(h, [&](std::int64_t index, std::int64_t at) { memory[at] = values[index]; });
    image.data = memory.data();
  }

  template <typename Visit>
  void for_each(const Header& h, Visit visit) const {
    std::int64_t index = 0;
    for (std::int64_t b = 0; b < h.batch; ++b) {
      for (std::int64_t c = 0; c < h.channels; ++c) {
        for (std::int64_t y = 0; y < h.height; ++y) {
          for (std::int64_t x = 0; x < h.width; ++x) {
            visit(index++, b * image.batch + c * image.channel + y * image.row + x * image.column);
          }
        }
      }
    }
  }

  std::vector<T> memory;
  Image<T> image;
};

template <typename T>
void run_case(std::FILE* cases, std::FILE* results, const Header& h) {
  const std::size_t planes = static_cast<std::size_t>(h.batch) * h.channels;
  const std::size_t values = planes * h.height * h.width;
  const std::size_t out_values = planes * h.out_height * h.out_width;
  const std::size_t of_coefficients = static_cast<std::size_t>(h.batch) * (h.points + 3) * 2;
  const std::size_t of_points = static_cast<std::size_t>(h.batch) * h.points * 2;
  const Stored<T> stored(h, narrow<T>(read_values<float>(cases, values)));
  const std::vector<T> gradient = narrow<T>(read_values<float>(cases, out_values));
  const std::vector<float> coefficients = read_values<float>(cases, of_coefficients);
  const std::vector<float> control_points = read_values<float>(cases, of_points);
  const Sampling sampling{
      coefficients.data(),
      control_points.data(),
      h.channels,
      h.height,
      h.width,
      h.out_height,
      h.out_width,
      h.points,
      static_cast<Mode>(h.mode),
      static_cast<Padding>(h.padding),
      h.align_corners != 0};
  const bool vectors = has_vectors(stored.image, h.channels);
  const bool empty = h.batch == 0 || h.channels == 0;
  const ForwardPlan forward =
      empty ? ForwardPlan{}
            : plan_image_forward<T>(sampling, vectors, h.batch, h.threads, h.multiprocessors);
  ImageBackwardPlan backward = plan_image_backward(sampling, h.batch, h.threads, h.multiprocessors);
  if ((h.passes & 2) == 0) {
    backward.gradient_blocks = 0;
  }
  if ((h.passes & 4) == 0) {
    backward.spline_blocks = 0;
    backward.spline_chunks = 0;
  }
  const std::int32_t told[5] = {
      vectors, forward.share.groups, backward.work.share.groups, backward.spline_pixels,
      static_cast<std::int32_t>(backward.gradient_blocks)};
  host::write(results, told, 5);

  const void* stream = nullptr;
  std::vector<T> output = poisoned<T>(out_values), grad_image = poisoned<T>(values);
  std::vector<float> grad_coefficients = poisoned<float>(of_coefficients);
  std::vector<float> grad_points = poisoned<float>(of_points);
  for (int repeat = 0; repeat < h.repeats; ++repeat) {
    if ((h.passes & 1) != 0 && !empty) {
      std::vector<T> now = poisoned<T>(out_values);
      launch_image_forward<T>(
          sampling, stored.image, forward, vectors, now.data(), h.threads, stream);
      keep_first(output, std::move(now), repeat == 0);
    }
    if ((h.passes & 6) != 0 && h.batch > 0) {
      std::vector<T> image_now = poisoned<T>(values);
      std::vector<float> coefficients_now = poisoned<float>(of_coefficients);
      std::vector<float> points_now = poisoned<float>(of_points);
      std::vector<float> workspace = poisoned<float>(backward.box_floats + backward.partial_floats);
      launch_image_backward<T>(
          sampling, stored.image, backward, vectors, gradient.data(), image_now.data(),
          coefficients_now.data(), points_now.data(), workspace.data(), h.batch, h.threads, stream);
      keep_first(grad_image, std::move(image_now), repeat == 0);
      keep_first(grad_coefficients, std::move(coefficients_now), repeat == 0);
      keep_first(grad_points, std::move(points_now), repeat == 0);
    }
  }
  write_widened(results, output);
  write_widened(results, grad_image);
  host::write(results, grad_coefficients.data(), grad_coefficients.size());
  host::write(results, grad_points.data(), grad_points.size());
}

}  // namespace

int main(int argc, char** argv) {
  return gsalign::host::run_cases<Header>(
      argc, argv, [](std::FILE* cases, std::FILE* results, const Header& header) {
        switch (header.type) {
          case 0:
            return run_case<float>(cases, results, header);
          case 1:
            return run_case<gsalign::Half>(cases, results, header);
          default:
            return run_case<gsalign::BFloat16>(cases, results, header);
        }
      });
}
