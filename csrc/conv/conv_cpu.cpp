// A 3 x 3 convolution of a token map, ReLU and the mean over the map, on the CPU.
//
// Winograd's F(4x4, 3x3) throughout, sums in float32 (float64 for float64 tokens). Images are taken
// in groups, whose transformed tokens all threads share. A unit of work is a panel of output
// channels: it transforms its kernels block by block, in the cache, multiplies, and when the sums
// are whole turns them into responses, of which only the mean and the signs are written.
//
// Every sum has one order, whatever the group or the number of threads: so have all bits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../common/cpu.h"
#include "../common/tensor.h"
#include "tiles.h"

namespace gsalign::conv {
namespace {

// Tiles of a group: with them a panel's sums stay in the second-level cache.
constexpr std::int64_t kGroupTiles = 64;

constexpr std::int64_t kSignsOfByte = 8;

struct Call {
  Map map;
  std::int64_t batch, channels, outputs;

  std::int64_t sign_bytes() const { return ceil_div(outputs, kSignsOfByte); }
  std::int64_t images_of_group() const {
    return std::max<std::int64_t>(1, kGroupTiles / map.tiles());
  }
};

struct Group {
  std::int64_t first, images;
};

// What a thread keeps: a block of kernels, and the sums of a panel.
template <typename S>
struct Workspace {
  explicit Workspace(std::int64_t rows)
      : lanes(panel_lanes<S>()),
        kernels(Planes<S>::size(kDepth, lanes)),
        sums(Planes<S>::size(std::max(rows, kDepth), lanes)),
        taps(1) {}

  Planes<S> kernel_planes() const { return {kernels.data(), kDepth, lanes}; }
  Planes<S> sum_planes(std::int64_t rows) const { return {sums.data(), rows, lanes}; }

  std::int64_t lanes;
  Scratch<S> kernels, sums;
  Scratch<Taps<S>> taps;
};

// Tiles of the tokens of a group; a unit is a block of an image.
template <typename T, typename S>
void make_input_tiles(
    const Call& call, const TokenRows<const T>& tokens, const Group& group,
    const TileBlocks<S>& to) {
  parallel_for(
      group.images * to.blocks(), [&] { return Scratch<S>(call.map.positions() * kDepth); },
      [&](const Scratch<S>& rows, std::int64_t unit) {
        const std::int64_t image = unit / to.blocks(), block = unit % to.blocks();
        const std::int64_t count = std::min(kDepth, call.channels - block * kDepth);
        const T* from =
            tokens.start + (group.first + image) * tokens.sample_stride + block * kDepth;
        const std::int64_t first = image * call.map.tiles();
        if constexpr (std::is_same_v<T, S>) {
          if (count == kDepth) {
            make_tiles<kInput>(call.map, from, tokens.stride, to.block(block), first);
            return;
          }
        }
        for (std::int64_t p = 0; p < call.map.positions(); ++p) {
          S* row = rows.data() + p * kDepth;
          row_load(row, from + p * tokens.stride, count);
          std::fill(row + count, row + kDepth, S(0));
        }
        make_tiles<kInput, S>(call.map, rows.data(), kDepth, to.block(block), first);
      });
}

// sums = tiles times kernels: all planes of a panel of lanes, over all blocks.
template <typename S>
void multiply_blocks(
    const TileBlocks<S>& tiles, const Kernels<const S>& kernels, std::int64_t lane,
    const Workspace<S>& work, const Planes<S>& sums) {
  const Planes<S> panel = work.kernel_planes();
  for (std::int64_t block = 0; block < tiles.blocks(); ++block) {
    make_kernels(kernels, lane, block * kDepth, work.taps[0], panel);
    const Planes<S> from = tiles.block(block);
    const std::int64_t depth = std::min(kDepth, kernels.depth - block * kDepth);
    with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
      constexpr int kBytes = decltype(width)::kBytes;
      for (int p = 0; p < kPlanes; ++p) {
        multiply<S, kBytes>(
            {from.row(p, 0), kDepth, 1}, from.rows, panel.row(p, 0), panel.lanes, depth, block > 0,
            sums.row(p, 0));
      }
    });
  }
}

// Sums of a panel to the means of an image's responses [lanes], and to their signs.
template <typename S>
void finish_image(
    const Call& call, const Planes<S>& sums, std::int64_t first_row, const S* bias, S* mean,
    std::uint8_t* signs, std::int64_t sign_stride, std::int64_t sign_bytes) {
  const Map& map = call.map;
  const auto count = static_cast<S>(map.positions());
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    using V = Vector<S, kBytes>;
    using Mask = decltype(V{} > V{});
    constexpr std::int64_t kMany = kLanes<S, kBytes>, kLength = kVectorLength<S, kBytes>;
    constexpr int kVectors = Panel<kBytes>::kVectors;
    V total[kVectors] = {};
    for (std::int64_t tile = 0; tile < map.tiles(); ++tile) {
      Mask positive[kOutputs][kVectors];
      const std::int64_t top = map.top(tile), left = map.left(tile);
      for (int v = 0; v < kVectors; ++v) {
        V in[kPlanes], out[kOutputs];
#pragma GCC unroll 36
        for (int p = 0; p < kPlanes; ++p) {
          in[p] = load_vector<S, kBytes>(sums.row(p, first_row + tile) + v * kLength);
        }
        sandwich<kOutput, S>(in, out);
        const V shift = load_vector<S, kBytes>(bias + v * kLength);
        for (int i = 0; i < kOutputs; ++i) {
          const V response = out[i] + shift;
          // Not > 0: a NaN is as positive as PyTorch's ReLU takes it to be.
          positive[i][v] = ~(response <= V{});
          if (map.position(top + i / kTile, left + i % kTile) >= 0) {
            total[v] += positive[i][v] ? response : V{};
          }
        }
      }
      for (int i = 0; i < kOutputs; ++i) {
        const std::int64_t position = map.position(top + i / kTile, left + i % kTile);
        if (position < 0) {
          continue;
        }
        using Word = std::conditional_t<sizeof(S) == 8, std::uint64_t, std::uint32_t>;
        Word flags[kMany];
        std::memcpy(flags, positive[i], sizeof flags);
        for (std::int64_t byte = 0; byte < sign_bytes; ++byte) {
          unsigned bits = 0;
#pragma GCC unroll 8
          for (int k = 0; k < kSignsOfByte; ++k) {
            bits |= static_cast<unsigned>(flags[byte * kSignsOfByte + k] & 1) << k;
          }
          signs[position * sign_stride + byte] = static_cast<std::uint8_t>(bits);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store_vector(mean + v * kLength, total[v] / count);
    }
  });
}

// mean [batch, outputs]; signs [batch, positions, sign_bytes].
template <typename T, typename S>
void forward(
    const Call& call, const TokenRows<const T>& tokens, const S* weight, const S* bias, S* mean,
    std::uint8_t* signs) {
  const Kernels<const S> kernels{
      weight, call.outputs, call.channels * kKernelSize, call.channels, kKernelSize};
  const std::int64_t lanes = panel_lanes<S>(), panels = ceil_div(call.outputs, lanes);
  const std::int64_t tiles = call.map.tiles(), most = call.images_of_group();
  const TileBlocks<S> inputs(call.channels, std::min(most, call.batch) * tiles);
  for (std::int64_t first = 0; first < call.batch; first += most) {
    const Group group{first, std::min(most, call.batch - first)};
    make_input_tiles(call, tokens, group, inputs);
    parallel_for(
        panels, [&] { return Workspace<S>(inputs.rows()); },
        [&](const Workspace<S>& work, std::int64_t panel) {
          const std::int64_t lane = panel * lanes;
          const std::int64_t count = std::min(lanes, call.outputs - lane);
          const Planes<S> sums = work.sum_planes(inputs.rows());
          multiply_blocks(inputs, kernels, lane, work, sums);
          alignas(64) S shift[kMostLanes<S>] = {}, means[kMostLanes<S>];
          std::copy_n(bias + lane, count, shift);
          for (std::int64_t i = 0; i < group.images; ++i) {
            const std::int64_t image = group.first + i;
            finish_image(
                call, sums, i * tiles, shift, means,
                signs + image * call.map.positions() * call.sign_bytes() + lane / kSignsOfByte,
                call.sign_bytes(), ceil_div(count, kSignsOfByte));
            std::copy_n(means, count, mean + image * call.outputs + lane);
          }
        });
  }
}

// Gradients of the responses of one image, one block of outputs: rows [positions][kDepth]. Adds
// their sums over the map to grad_bias [kDepth].
template <typename S>
void response_gradients(
    const Call& call, const S* grad, const std::uint8_t* signs, std::int64_t count, S* rows,
    S* grad_bias) {
  const auto positions = static_cast<S>(call.map.positions());
  S slopes[kDepth] = {};
  std::int64_t counts[kDepth] = {};
  for (std::int64_t o = 0; o < count; ++o) {
    slopes[o] = grad[o] / positions;
  }
  for (std::int64_t p = 0; p < call.map.positions(); ++p) {
    const std::uint8_t* of_position = signs + p * call.sign_bytes();
    S* row = rows + p * kDepth;
    for (std::int64_t o = 0; o < count; ++o) {
      const bool positive = of_position[o / kSignsOfByte] >> (o % kSignsOfByte) & 1;
      row[o] = positive ? slopes[o] : S(0);
      counts[o] += positive;
    }
    std::fill(row + count, row + kDepth, S(0));
  }
  for (std::int64_t o = 0; o < count; ++o) {
    grad_bias[o] = slopes[o] * static_cast<S>(counts[o]);
  }
}

template <typename S>
void make_response_tiles(
    const Call& call, const S* grad, const std::uint8_t* signs, const Group& group,
    const TileBlocks<S>& to, S* grad_bias) {
  parallel_for(
      group.images * to.blocks(), [&] { return Scratch<S>(call.map.positions() * kDepth); },
      [&](const Scratch<S>& rows, std::int64_t unit) {
        const std::int64_t i = unit / to.blocks(), block = unit % to.blocks();
        const std::int64_t image = group.first + i, first = block * kDepth;
        response_gradients(
            call, grad + image * call.outputs + first,
            signs + image * call.map.positions() * call.sign_bytes() + first / kSignsOfByte,
            std::min(kDepth, call.outputs - first), rows.data(),
            grad_bias + image * call.outputs + first);
        make_tiles<kOutputBack, S>(
            call.map, rows.data(), kDepth, to.block(block), i * call.map.tiles());
      });
}

// Sums of a panel of channels to the gradients of an image's tokens: rows [positions][lanes].
template <typename S>
void join_tiles(const Map& map, const Planes<S>& sums, std::int64_t first_row, S* rows) {
  std::fill_n(rows, map.positions() * sums.lanes, S(0));
  with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
    constexpr int kBytes = decltype(width)::kBytes;
    using V = Vector<S, kBytes>;
    constexpr std::int64_t kLength = kVectorLength<S, kBytes>;
    for (std::int64_t tile = 0; tile < map.tiles(); ++tile) {
      for (std::int64_t lane = 0; lane < kLanes<S, kBytes>; lane += kLength) {
        V in[kPlanes], out[kPlanes];
#pragma GCC unroll 36
        for (int p = 0; p < kPlanes; ++p) {
          in[p] = load_vector<S, kBytes>(sums.row(p, first_row + tile) + lane);
        }
        sandwich<kInputBack, S>(in, out);
        for (int i = 0; i < kPlanes; ++i) {
          const std::int64_t position = map.position(
              map.top(tile) + i / kSide - kReach<kInput>,
              map.left(tile) + i % kSide - kReach<kInput>);
          if (position >= 0) {
            S* row = rows + position * kLanes<S, kBytes> + lane;
            store_vector(row, load_vector<S, kBytes>(row) + out[i]);
          }
        }
      }
    }
  });
}

template <typename T, typename S>
void token_gradients(
    const Call& call, const Group& group, const TileBlocks<S>& responses, const S* weight,
    const TokenRows<T>& grad) {
  const Kernels<const S> kernels{
      weight, call.channels, kKernelSize, call.outputs, call.channels * kKernelSize};
  struct Own {
    Own(std::int64_t rows, std::int64_t positions)
        : work(rows), map(positions * panel_lanes<S>()) {}
    Workspace<S> work;
    Scratch<S> map;
  };
  const std::int64_t lanes = panel_lanes<S>();
  parallel_for(
      ceil_div(call.channels, lanes), [&] { return Own(responses.rows(), call.map.positions()); },
      [&](const Own& own, std::int64_t panel) {
        const std::int64_t lane = panel * lanes, count = std::min(lanes, call.channels - lane);
        const Planes<S> sums = own.work.sum_planes(responses.rows());
        multiply_blocks(responses, kernels, lane, own.work, sums);
        for (std::int64_t i = 0; i < group.images; ++i) {
          join_tiles(call.map, sums, i * call.map.tiles(), own.map.data());
          T* to = grad.start + (group.first + i) * grad.sample_stride + lane;
          for (std::int64_t p = 0; p < call.map.positions(); ++p) {
            row_store(to + p * grad.stride, S(1), own.map.data() + p * lanes, count);
          }
        }
      });
}

// Adds a group's share of the gradient of the kernels; a unit is a block of channels times a panel
// of outputs.
template <typename S>
void add_weight_gradients(
    const Call& call, const Group& group, const TileBlocks<S>& inputs,
    const TileBlocks<S>& responses, S* grad) {
  const Kernels<S> kernels{
      grad, call.outputs, call.channels * kKernelSize, call.channels, kKernelSize};
  const std::int64_t lanes = panel_lanes<S>(), panels = ceil_div(call.outputs, lanes);
  const std::int64_t depth = group.images * call.map.tiles();
  parallel_for(
      panels * inputs.blocks(), [&] { return Workspace<S>(kDepth); },
      [&](const Workspace<S>& work, std::int64_t unit) {
        const std::int64_t block = unit / panels, lane = unit % panels * lanes;
        const Planes<S> from = inputs.block(block), by = responses.block(lane / kDepth);
        const Planes<S> sums = work.sum_planes(kDepth);
        const std::int64_t count = std::min(kDepth, call.channels - block * kDepth);
        const std::int64_t rows = ceil_div(count, kRowsTogether) * kRowsTogether;
        with_vectors([&](auto width) GSALIGN_VECTOR_BODY {
          constexpr int kBytes = decltype(width)::kBytes;
          for (int p = 0; p < kPlanes; ++p) {
            multiply<S, kBytes>(
                {from.row(p, 0), 1, kDepth}, rows, by.row(p, 0) + lane % kDepth, kDepth, depth,
                false, sums.row(p, 0));
          }
        });
        add_kernels(sums, lane, block * kDepth, work.taps[0], kernels);
      });
}

// bias_shares [batch, outputs].
template <typename T, typename S>
void backward(
    const Call& call, const S* grad, const TokenRows<const T>& tokens, const S* weight,
    const std::uint8_t* signs, const TokenRows<T>& grad_tokens, S* grad_weight, S* bias_shares) {
  const std::int64_t most = call.images_of_group();
  const std::int64_t tiles = std::min(most, call.batch) * call.map.tiles();
  const TileBlocks<S> inputs(call.channels, tiles), responses(call.outputs, tiles);
  for (std::int64_t first = 0; first < call.batch; first += most) {
    const Group group{first, std::min(most, call.batch - first)};
    make_response_tiles(call, grad, signs, group, responses, bias_shares);
    token_gradients(call, group, responses, weight, grad_tokens);
    make_input_tiles(call, tokens, group, inputs);
    add_weight_gradients(call, group, inputs, responses, grad_weight);
  }
}

Call checked_call(
    const Tensor& tokens, const Tensor& weight, std::int64_t height, std::int64_t width,
    std::int64_t prefix) {
  check_shape("tokens", tokens, {-1, -1, -1});
  STD_TORCH_CHECK(tokens.size(2) >= 1, "tokens: wanted at least one channel, got none");
  STD_TORCH_CHECK(
      height >= 1 && width >= 1, "size: wanted at least 1 x 1, got ", height, " x ", width);
  STD_TORCH_CHECK(
      prefix >= 0 && tokens.size(1) == prefix + height * width, "tokens: wanted ", prefix, " + ",
      height, " * ", width, " tokens, got ", tokens.size(1));
  check_shape("weight", weight, {-1, tokens.size(2), kTaps, kTaps});
  check_type("weight", weight, compute_type(tokens.scalar_type()));
  return {{height, width}, tokens.size(0), tokens.size(2), weight.size(0)};
}

std::tuple<Tensor, Tensor> conv_relu_mean(
    const Tensor& tokens, const Tensor& weight, const Tensor& bias, std::int64_t height,
    std::int64_t width, std::int64_t prefix) {
  const Call call = checked_call(tokens, weight, height, width, prefix);
  check_shape("bias", bias, {call.outputs});
  check_type("bias", bias, weight.scalar_type());
  const Tensor in = with_contiguous_rows(tokens), kernels = as_contiguous(weight),
               shift = as_contiguous(bias);
  const Tensor mean = empty({call.batch, call.outputs}, weight.scalar_type());
  const Tensor signs =
      empty({call.batch, call.map.positions(), call.sign_bytes()}, ScalarType::Byte);
  if (mean.numel() == 0) {
    return {mean, signs};
  }
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    forward<T, S>(
        call, token_rows<T>(in, prefix), data<S>(kernels), data<S>(shift), mutable_data<S>(mean),
        mutable_data<std::uint8_t>(signs));
  });
  return {mean, signs};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_mean_backward(
    const Tensor& grad, const Tensor& tokens, const Tensor& weight, const Tensor& signs,
    std::int64_t height, std::int64_t width, std::int64_t prefix) {
  const Call call = checked_call(tokens, weight, height, width, prefix);
  check_shape("grad", grad, {call.batch, call.outputs});
  check_type("grad", grad, weight.scalar_type());
  check_shape("signs", signs, {call.batch, call.map.positions(), call.sign_bytes()});
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Byte, "signs: wanted uint8");
  const Tensor upstream = as_contiguous(grad), in = with_contiguous_rows(tokens),
               kernels = as_contiguous(weight), positive = as_contiguous(signs);
  const std::int64_t count = tokens.size(1);
  const Tensor grad_tokens = empty({call.batch, count, call.channels}, tokens.scalar_type());
  const Tensor grad_weight =
      empty({call.outputs, call.channels, kTaps, kTaps}, weight.scalar_type());
  const Tensor grad_bias = empty({call.outputs}, weight.scalar_type());
  dispatch_features("tokens", in.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = Compute<T>;
    T* to = mutable_data<T>(grad_tokens);
    // What the tokens behind the prefix do not overwrite.
    if (call.outputs == 0) {
      std::memset(to, 0, sizeof(T) * grad_tokens.numel());
    }
    for (std::int64_t b = 0; b < call.batch; ++b) {
      std::memset(to + b * count * call.channels, 0, sizeof(T) * prefix * call.channels);
    }
    std::fill_n(mutable_data<S>(grad_weight), grad_weight.numel(), S(0));
    std::fill_n(mutable_data<S>(grad_bias), call.outputs, S(0));
    if (upstream.numel() == 0) {
      return;
    }
    const Scratch<S> shares(upstream.numel());
    backward<T, S>(
        call, data<S>(upstream), token_rows<T>(in, prefix), data<S>(kernels),
        data<std::uint8_t>(positive),
        {to + prefix * call.channels, count * call.channels, call.channels},
        mutable_data<S>(grad_weight), shares.data());
    for (std::int64_t b = 0; b < call.batch; ++b) {
      row_add(mutable_data<S>(grad_bias), S(1), shares.data() + b * call.outputs, call.outputs);
    }
  });
  return {grad_tokens, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsalign, CPU, m) {
  m.impl("conv_relu_mean", TORCH_BOX(&conv_relu_mean));
  m.impl("conv_relu_mean_backward", TORCH_BOX(&conv_relu_mean_backward));
}

}  // namespace gsalign::conv
