"""Operators captured into CUDA graphs, forward and backward, replayed on other figures.

A graph holds addresses, not figures: whatever reads one on the host, waits for the device or keeps
memory of its own between calls shows here. ``tps_basis`` is left out: it checks its control points,
which waits, and belongs in front of a capture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import bitwise_equal, fused, random
from torch import Tensor

import gsalign_kernels as kernels

SIZE = (4, 6)


def spread(batch: int, seed: int) -> Tensor:
    corners = torch.tensor([[-1.0, -1.0], [1.0, -0.9], [-0.8, 1.0], [0.9, 1.1], [0.1, 0.2]])
    return corners + 0.1 * random(batch, 5, 2, seed=seed, dtype=torch.float32).clamp(-1, 1)


def figures(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float32)


def tps_solve(chosen: str, points: Tensor, values: Tensor) -> Tensor:
    return kernels.tps_solve(points, values, implementation=chosen)


def tps_solve_ex(chosen: str, points: Tensor, values: Tensor) -> Tensor:
    return kernels.tps_solve_ex(points, values, implementation=chosen).coefficients


def tps_evaluate(chosen: str, coefficients: Tensor, points: Tensor, where: Tensor) -> Tensor:
    return kernels.tps_evaluate(coefficients, points, where, implementation=chosen)


def tps_grid(chosen: str, coefficients: Tensor, points: Tensor) -> Tensor:
    return kernels.tps_grid(coefficients, points, SIZE, implementation=chosen)


def warp_image(chosen: str, image: Tensor, points: Tensor, values: Tensor) -> Tensor:
    return kernels.warp_image(
        image, points, values, size=SIZE, padding_mode="border", implementation=chosen
    )


def warp_tokens(
    chosen: str, tokens: Tensor, source: Tensor, angle: Tensor, basis: Tensor
) -> Tensor:
    return kernels.warp_tokens(
        tokens, source, angle, basis.detach(), size=SIZE, eta=0.3, prefix=1, implementation=chosen
    )


def masked_part_pool(chosen: str, tokens: Tensor, masks: Tensor) -> Tensor:
    pooled, visibility = kernels.masked_part_pool(
        tokens, masks, prefix=1, activation="softmax", implementation=chosen
    )
    return torch.cat([pooled.flatten(), visibility.flatten()])


def masked_prototype_loss(chosen: str, features: Tensor, masks: Tensor) -> Tensor:
    labels = torch.arange(3, device=features.device) // 2
    losses = kernels.masked_prototype_loss(features, masks, labels, implementation=chosen)
    return torch.stack(losses)


def conv_relu_mean(chosen: str, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.conv_relu_mean(tokens, weight, bias, size=SIZE, prefix=1, implementation=chosen)


# Per operator: what to call, and its arguments from a seed.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[int], list[Tensor]]]] = {
    "tps_solve": (tps_solve, lambda s: [spread(3, s), figures(3, 5, 2, seed=s + 1)]),
    "tps_solve_ex": (tps_solve_ex, lambda s: [spread(3, s), figures(3, 5, 2, seed=s + 1)]),
    "tps_evaluate": (
        tps_evaluate,
        lambda s: [figures(3, 8, 2, seed=s), spread(3, s + 1), figures(3, 7, 2, seed=s + 2)],
    ),
    "tps_grid": (tps_grid, lambda s: [figures(3, 8, 2, seed=s), spread(3, s + 1)]),
    "warp_image": (
        warp_image,
        lambda s: [figures(3, 5, 8, 9, seed=s), spread(3, s + 1), 0.8 * spread(3, s + 2)],
    ),
    "warp_tokens": (
        warp_tokens,
        lambda s: [
            figures(3, 25, 64, seed=s),
            figures(4, 2, seed=s + 1),
            figures(3, seed=s + 2),
            0.3 * figures(24, 4, seed=s + 3),
        ],
    ),
    "conv_relu_mean": (
        conv_relu_mean,
        lambda s: [
            figures(3, 25, 64, seed=s),
            0.1 * figures(16, 64, 3, 3, seed=s + 1),
            figures(16, seed=s + 2),
        ],
    ),
    "masked_part_pool": (
        masked_part_pool,
        lambda s: [figures(3, 25, 64, seed=s), figures(3, 4, 24, seed=s + 1)],
    ),
    "masked_prototype_loss": (
        masked_prototype_loss,
        lambda s: [figures(3, 64, seed=s), figures(3, 64, seed=s + 1).sigmoid()],
    ),
}


def operators() -> list:
    return [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in CASES
        for parameter in fused(name.removesuffix("_ex"))
        if parameter.values[0] in ("cuda", "triton")
    ]


def both_passes(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list:
    out = function(*leaves)
    wanted = leaves[:3] if function.__name__ == "warp_tokens" else leaves
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def copy_into(leaves: list[Tensor], new: list[Tensor]) -> None:
    with torch.no_grad():
        for leaf, figure in zip(leaves, new, strict=True):
            leaf.copy_(figure)


def test_every_operator_with_a_gpu_kernel_has_a_case():
    from gsalign_kernels import backends

    for name in backends.kernel_report().table:
        if name != "tps_basis" and {"cuda", "triton"} & set(backends.fused_implementations(name)):
            assert name in CASES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize(("name", "implementation"), operators())
def test_replayed_equals_eager(name, implementation):
    call, make = CASES[name]

    def function(*leaves: Tensor) -> Tensor:
        return call(implementation, *leaves)

    function.__name__ = name
    leaves = [t.cuda().requires_grad_() for t in make(1)]
    out = function(*leaves).detach()
    upstream = figures(*out.shape, seed=9).cuda()

    # Kernels compile and libraries set themselves up outside of the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both_passes(function, leaves, upstream)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(function, leaves, upstream)

    for seed in (1, 20, 40):
        new = make(seed)
        copy_into([*leaves, upstream], [*new, figures(*out.shape, seed=seed + 9)])
        graph.replay()
        replayed = [t.clone() for t in captured]
        graph.replay()
        torch.cuda.synchronize()
        eager = both_passes(function, [t.cuda().requires_grad_() for t in new], upstream)
        for first, second, wanted in zip(replayed, captured, eager, strict=True):
            assert bitwise_equal(first, wanted) and bitwise_equal(second, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize(
    ("name", "implementation"), [p for p in operators() if p.values[0] == "tps_solve_ex"]
)
def test_a_singular_sample_in_a_replay_is_told_by_info(name, implementation):
    points, values = (t.cuda() for t in CASES[name][1](1))

    def solve() -> kernels.TpsSolution:
        return kernels.tps_solve_ex(points, values, implementation=implementation)

    solve()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solution = solve()
    points[1] = 0.5
    graph.replay()
    assert solution.info.tolist() == [0, 1, 0]
    assert solution.coefficients[1].isnan().all() and solution.coefficients[0].isfinite().all()
