"""A 3 x 3 convolution of a token map, ReLU and the mean over the map, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gsalign_kernels.reference.tps import computation_dtype


def conv_relu_mean(
    tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], prefix: int
) -> Tensor:
    """Mean over the map of ``relu(conv3x3(map) + bias)``: ``[B, O]``, float32 or float64.

    The convolution runs in the type of the tokens, or in autocast's, for a GPU's fast products;
    only the mean is always float32. The view of the tokens is a channels-last image.
    """
    image = tokens[:, prefix:].transpose(1, 2).unflatten(2, size)
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    response = functional.conv2d(image, weight, bias, padding=1).relu()
    # Half types are summed in float32, without a float32 copy of the map.
    return response.mean(dim=(2, 3), dtype=computation_dtype(tokens))


def response_gradients(grad: Tensor, signs: Tensor) -> Tensor:
    """The gradients of the responses of a fused forward pass, from the signs it kept.

    Args:
        grad: ``[B, O]``, of the means.
        signs: ``[B, N, ceil(O / 8)]``, uint8: bit ``o % 8`` of byte ``o // 8`` says whether
            response ``o`` at a position is positive.

    Returns:
        ``[B, N, O]`` in the type of ``grad``.
    """
    bits = torch.arange(8, device=signs.device, dtype=torch.uint8)
    positive = (signs.unsqueeze(-1) >> bits & 1).flatten(2)[..., : grad.shape[1]]
    return positive * (grad / signs.shape[1]).unsqueeze(1)
