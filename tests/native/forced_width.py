"""Operators of a library that was compiled for one width of vectors, against PyTorch in float64.

Run as ``python forced_width.py LIBRARY``, in a process of its own: the library defines the
operators that the installed one has. Prints relative errors in the norm as JSON, by operator,
result and type.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.nn import functional

# (B, H, W, C, O, prefix): whole tiles and cut ones; channels and outputs with and without a rest.
CONVOLUTIONS = ((2, 8, 4, 64, 32, 2), (3, 5, 7, 150, 37, 1), (5, 1, 1, 3, 2, 0))
# (queries, gallery, P, C)
DISTANCES = ((3, 5, 2, 7), (37, 29, 3, 33))
# (B, D)
PROTOTYPES = ((9, 33), (70, 64))


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Seeded normal figures."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def convolution(dtype: torch.dtype, batch, height, width, channels, outputs, prefix):
    """Our and the wanted means and gradients of ``conv_relu_mean``."""
    tokens = normal(batch, prefix + height * width, channels, seed=1, dtype=dtype)
    weight = normal(outputs, channels, 3, 3, seed=2, dtype=dtype) / (3 * channels**0.5)
    bias = 0.3 * normal(outputs, seed=3, dtype=dtype)
    mean, signs = torch.ops.gsalign.conv_relu_mean(tokens, weight, bias, height, width, prefix)
    upstream = normal(batch, outputs, seed=4, dtype=dtype)
    grads = torch.ops.gsalign.conv_relu_mean_backward(
        upstream, tokens, weight, signs, height, width, prefix
    )
    exact = [t.double().requires_grad_() for t in (tokens, weight, bias)]
    image = exact[0][:, prefix:].mT.unflatten(2, (height, width))
    wanted = functional.conv2d(image, *exact[1:], padding=1).relu().mean((2, 3))
    wanted_grads = torch.autograd.grad(wanted, exact, upstream.double())
    return {"mean": (mean, wanted)} | {
        f"d {name}": pair
        for name, *pair in zip(("tokens", "weight", "bias"), grads, wanted_grads, strict=True)
    }


def distance(dtype: torch.dtype, queries, images, parts, channels):
    """Our and the wanted Euclidean distances, every part seen."""
    query = normal(queries, parts, channels, seed=5, dtype=dtype)
    gallery = normal(images, parts, channels, seed=6, dtype=dtype)
    seen = [torch.ones(count, parts, dtype=dtype) for count in (queries, images)]
    ours = torch.ops.gsalign.part_distance(query, gallery, *seen, 1, 2.0)
    wanted = (query.double()[:, None] - gallery.double()[None]).norm(dim=3).mean(2)
    return {"distance": (ours, wanted)}


def prototype(dtype: torch.dtype, batch, channels):
    """Our and the wanted losses and gradients of ``masked_prototype_loss``."""
    features = normal(batch, channels, seed=7, dtype=dtype)
    masks = normal(batch, channels, seed=8, dtype=dtype).sigmoid()
    labels = torch.arange(batch) % 4
    losses = torch.ops.gsalign.masked_prototype_loss(features, masks, labels)
    one = torch.ones((), dtype=dtype)
    grads = torch.ops.gsalign.masked_prototype_loss_backward(
        one, one, features, masks, labels, *losses[2:]
    )
    exact = [t.double().requires_grad_() for t in (features, masks)]
    same = (labels[:, None] == labels).double()
    means = functional.normalize(same @ exact[0] / same.sum(1, keepdim=True))
    prototypes = functional.normalize(means * exact[1])
    alignment = (functional.normalize(exact[0]) - prototypes).square().mean()
    entropy = -(exact[1] * exact[1].clamp_min(1e-6).log()).mean()
    wanted = torch.autograd.grad(alignment + entropy, exact)
    pairs = zip((*losses[:2], *grads), (alignment, entropy, *wanted), strict=True)
    return dict(zip(("alignment", "entropy", "d features", "d masks"), pairs, strict=True))


def main(library: str) -> None:
    """Prints the largest errors."""
    torch.ops.load_library(library)
    errors: dict[str, float] = {}
    for function, shapes in (
        (convolution, CONVOLUTIONS),
        (distance, DISTANCES),
        (prototype, PROTOTYPES),
    ):
        for dtype in (torch.float32, torch.float64):
            for shape in shapes:
                for name, (ours, wanted) in function(dtype, *shape).items():
                    error = float((ours.double() - wanted.detach()).norm() / wanted.detach().norm())
                    key = f"{function.__name__} {name} {str(dtype).removeprefix('torch.')}"
                    errors[key] = max(errors.get(key, 0.0), error)
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1])
