"""``python -m benchmarks.parts``: where the time of the published network goes, part by part.

Both ways on a CPU, round by round in turn: as the authors' code computes, and as ours does. A
part's time is its own, without that of parts inside it; ``rest`` is what belongs to none: sums of
tokens, concatenations, heads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.__main__ import restart_with_allocator

PARTS = ("patch embedding", "attention", "MLP", "LayerNorm", "convolution", "warp", "rest")


class Clock:
    """Milliseconds per part, each without the parts inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted for ``part``."""

        def run(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            result = function(*arguments, **options)
            took = 1e3 * (time.perf_counter() - start)
            self.spent[part] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took
            return result

        return run


def work(config: Any, batch: int) -> dict[str, float]:
    """GFLOP per part of a forward pass of the whole network, direct convolutions."""
    rows, columns = config.grid
    patches, width = rows * columns, config.width
    tokens = patches + 2
    hidden = config.ltps.hidden[0]
    per_token = 2 * batch * tokens * width
    return {
        "patch embedding": 2e-9 * batch * patches * width * 3 * config.patch_size**2,
        "attention": 1e-9 * config.depth * per_token * (4 * width + 2 * tokens),
        "MLP": 1e-9 * config.depth * per_token * 2 * int(width * config.mlp_ratio),
        "convolution": 2e-9 * len(config.ltps_layers) * batch * patches * 9 * width * hidden,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    line = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    line.add_argument("--batch", type=int, default=8, help="images; 8 by default")
    line.add_argument("--rounds", type=int, default=5, help="of which medians are told; 5")
    line.add_argument("--bfloat16", action="store_true", help="under autocast")
    line.add_argument("--step", action="store_true", help="losses and their gradients as well")
    options = line.parse_args(given)
    restart_with_allocator(given, "benchmarks.parts")

    import torch
    from rich.console import Console
    from rich.table import Table

    import gsalign_kernels
    from benchmarks import published_network
    from gsalign.model import GSAlign, ModelConfig, vit
    from gsalign.model.linear import keeping_weights
    from gsalign_kernels import use_kernels

    torch.manual_seed(0)
    network = GSAlign(ModelConfig(drop_path=0.0)).eval()
    published = published_network.PublishedWay(network)
    height, width = network.config.image_size
    images = torch.randn(options.batch, 3, height, width)
    clock = Clock()
    backbone = network.backbone
    owners: list[tuple[Any, str, str]] = [
        (vit, "attend", "attention"),
        (vit, "feed_forward", "MLP"),
        (gsalign_kernels, "conv_relu_mean", "convolution"),
        (gsalign_kernels, "warp_tokens", "warp"),
        (published_network, "_attention", "attention"),
        (published_network._Warp, "__call__", "warp"),
        (backbone.patch_embed, "forward", "patch embedding"),
        (backbone.norm, "forward", "LayerNorm"),
    ]
    for block in backbone.blocks:
        owners += [(block.norm1, "forward", "LayerNorm"), (block.norm2, "forward", "LayerNorm")]
        owners += [(block.mlp, "forward", "MLP")]
    for ltps in backbone.ltps.values():
        owners += [(ltps.predictor.conv, "forward", "convolution")]
        owners += [(ltps.predictor, "features_of", "warp"), (ltps.predictor, "angle", "warp")]

    def embed(way: Any) -> None:
        half = torch.autocast("cpu", torch.bfloat16) if options.bfloat16 else nullcontext()
        with torch.no_grad(), half:
            way.embed(images)

    def step(way: Any) -> None:
        labels = torch.arange(options.batch)
        half = torch.autocast("cpu", torch.bfloat16) if options.bfloat16 else nullcontext()
        with half:
            losses = way.losses(images, labels // 4, labels % 2)
        torch.stack(list(losses.values())).sum().backward()
        network.zero_grad(set_to_none=True)

    ways = {"published": (published, "reference"), "ours": (network, "auto")}
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    with torch.random.fork_rng(), contexts(clock, owners), keeping_weights():
        for index in range(options.rounds + 1):
            for name, (way, kernels) in ways.items():
                clock.spent.clear()
                with use_kernels(kernels):
                    clock.timed("rest", embed)(way)
                    measured = dict(clock.spent)
                    measured["embedding"] = sum(measured.values())
                    if options.step:
                        network.train()
                        start = time.perf_counter()
                        step(way)
                        measured["training step"] = 1e3 * (time.perf_counter() - start)
                        network.eval()
                for part, spent in measured.items():
                    if index > 0:  # the first round warms up
                        samples[part, name].append(spent)

    done = work(network.config, options.batch)
    table = Table("part", "GFLOP", "published ms", "ours ms", "ratio", title=f"B {options.batch}")
    for part in (*PARTS, "embedding", *(["training step"] if options.step else [])):
        theirs, ours = (median(samples[part, name]) for name in ways)
        flops = f"{done[part]:.1f}" if part in done else ""
        table.add_row(part, flops, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}")
    Console().print(table)
    return 0


def contexts(clock: Clock, owners: Sequence[tuple[Any, str, str]]) -> Any:
    """A context in which the named functions are timed."""
    stack = ExitStack()
    for owner, name, part in owners:
        timed = clock.timed(part, getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, timed))
    return stack


if __name__ == "__main__":
    sys.exit(main())
