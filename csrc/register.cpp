// Every operator schema, in one list. Kernels are registered beside their code: CPU kernels at the
// end of <family>_cpu.cpp, CUDA kernels at the end of <family>_cuda.cu. Fakes, autograd formulas
// and autocast rules are registered from Python, in gsalign_kernels/<family>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gsalign, m) {
  // Thin-plate splines. `factors` are kept for the backward pass: [B, K (K + 1) / 2 + 3 K + 3],
  // laid out as each device likes. `info` [B] says per sample: 0 solved, 1 singular, 2 points not
  // finite; where it is not 0, the coefficients are NaN. With `check_errors` that is an error
  // instead.
  m.def(
      "tps_solve(Tensor control_points, Tensor values, float regularization, bool check_errors)"
      " -> (Tensor coefficients, Tensor factors, Tensor info)");
  m.def(
      "tps_solve_backward(Tensor grad, Tensor coefficients, Tensor control_points, Tensor factors)"
      " -> (Tensor, Tensor)");
  m.def("tps_evaluate(Tensor coefficients, Tensor control_points, Tensor points) -> Tensor");
  m.def(
      "tps_evaluate_backward(Tensor grad, Tensor coefficients, Tensor control_points,"
      " Tensor points) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tps_grid(Tensor coefficients, Tensor control_points, int height, int width,"
      " bool align_corners) -> Tensor");
  m.def(
      "tps_grid_backward(Tensor grad, Tensor coefficients, Tensor control_points,"
      " bool align_corners) -> (Tensor, Tensor)");

  // Warps. mode: 0 bilinear, 1 nearest. padding_mode: 0 zeros, 1 border, 2 reflection.
  m.def(
      "warp_tokens(Tensor tokens, Tensor source_points, Tensor angle, Tensor basis, int height,"
      " int width, float eta, int prefix) -> Tensor");
  m.def(
      "warp_tokens_backward(Tensor grad, Tensor tokens, Tensor source_points, Tensor angle,"
      " Tensor basis, int height, int width, float eta, int prefix) -> (Tensor, Tensor, Tensor)");
  m.def(
      "warp_image(Tensor image, Tensor coefficients, Tensor control_points, int height, int width,"
      " int mode, int padding_mode, bool align_corners) -> Tensor");
  m.def(
      "warp_image_backward(Tensor grad, Tensor image, Tensor coefficients, Tensor control_points,"
      " int mode, int padding_mode, bool align_corners) -> (Tensor, Tensor, Tensor)");

  // Masked part pooling. mode: 0 weighted mean, 1 mean, 2 max. activation: 0 none, 1 softmax over
  // the channels of the masks, 2 sigmoid. background: channel 0 of the masks is no part.
  // visibility: 0 continuous, 1 binary. `totals` are the sums of the weights, `peaks` the positions
  // of continuous visibilities (-1: none, binary ones have no gradient), `winners` the positions of
  // the maxima (empty but in mode 2).
  m.def(
      "masked_part_pool(Tensor tokens, Tensor masks, int prefix, int mode, int activation,"
      " bool background, int visibility, float eps) -> (Tensor pooled, Tensor visibility,"
      " Tensor totals, Tensor peaks, Tensor winners)");
  m.def(
      "masked_part_pool_backward(Tensor grad_pooled, Tensor grad_visibility, Tensor tokens,"
      " Tensor masks, Tensor totals, Tensor peaks, Tensor winners, int prefix, int mode,"
      " int activation, bool background, float eps) -> (Tensor, Tensor)");

  // Masked prototype alignment. Kept for the backward pass: `means` [B, D], each sample's class
  // mean, and `norms` [B, 4], per sample |f|, |q|, f q and |mean| (csrc/prototype/prototype.h).
  m.def(
      "masked_prototype_loss(Tensor features, Tensor masks, Tensor labels)"
      " -> (Tensor alignment, Tensor entropy, Tensor means, Tensor norms)");
  m.def(
      "masked_prototype_loss_backward(Tensor grad_alignment, Tensor grad_entropy, Tensor features,"
      " Tensor masks, Tensor labels, Tensor means, Tensor norms) -> (Tensor, Tensor)");

  // A 3 x 3 convolution of a token map, ReLU, and the mean over the map. `signs`
  // [B, H W, ceil(O / 8)], uint8: bit o % 8 of byte o / 8 says whether response o counts.
  m.def(
      "conv_relu_mean(Tensor tokens, Tensor weight, Tensor bias, int height, int width, int prefix)"
      " -> (Tensor mean, Tensor signs)");
  m.def(
      "conv_relu_mean_backward(Tensor grad, Tensor tokens, Tensor weight, Tensor signs,"
      " int height, int width, int prefix) -> (Tensor, Tensor, Tensor)");

  // Distances of part embeddings. metric: 0 cosine, 1 Euclidean. Queries and visibilities come in
  // the type that is computed in; the gallery may be stored in a half type. The search takes what
  // has no part in common as infinitely far. No gradients.
  m.def(
      "part_distance(Tensor query, Tensor gallery, Tensor query_visibility,"
      " Tensor gallery_visibility, int metric, float unmatched) -> Tensor");
  m.def(
      "part_search(Tensor query, Tensor gallery, Tensor query_visibility,"
      " Tensor gallery_visibility, int k, int metric) -> (Tensor distances, Tensor indices)");
}
