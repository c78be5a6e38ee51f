"""Bytes kept for the backward pass: counted once, and how many the network keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.bench_model import DEMO, total_loss
from benchmarks.kept import kept_mib
from benchmarks.published_network import PublishedWay
from gsalign.model import GSAlign


def test_each_storage_counts_once_and_what_was_there_before_does_not():
    weight = torch.ones(256, 256, requires_grad=True)  # a quarter of a MiB
    x = torch.ones(512, 256)

    def forward() -> torch.Tensor:
        made = (x @ weight).relu()  # relu keeps its result, half a MiB
        return (made * made.T.T).sum()

    assert kept_mib(forward, [weight, x]) == 0.5
    assert kept_mib(forward, [x]) == 0.5  # no input but weight wants a gradient
    assert kept_mib(forward, [weight]) == 1.0
    assert kept_mib(forward, [weight, x], lambda: [torch.zeros(2**18)]) == 1.5


@pytest.mark.parametrize(("recompute", "most"), [("nothing", 0.8), ("cheap", 0.6), ("layers", 0.2)])
def test_what_a_step_keeps_beside_the_published_way(recompute, most):
    network = GSAlign(DEMO).train()
    labels = torch.arange(8)
    inputs = (torch.randn(8, 3, *DEMO.image_size), labels // 4, labels % 2)
    known = [*network.parameters(), *network.buffers(), *inputs]
    published = PublishedWay(network)
    theirs = kept_mib(lambda: total_loss(published, inputs), known, lambda: published.kept)
    network.backbone.recompute = recompute
    assert kept_mib(lambda: total_loss(network, inputs), known) < most * theirs
