"""Layers computed again in the backward pass: the same bits, and less kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gsalign.model import GSAlign, ModelConfig

BATCH = 4


def network(config: ModelConfig, *, recompute: bool) -> GSAlign:
    torch.manual_seed(0)
    made = GSAlign(config).train()
    made.backbone.recompute = recompute
    return made


def step(made: GSAlign) -> tuple[list[Tensor], int]:
    """Losses and gradients of a step with stochastic depth; bytes kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, *made.config.image_size, generator=generator)
    labels = torch.tensor([0, 0, 1, 1])
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(2)  # of stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = torch.stack(list(made.losses(images, labels, labels % 2).values()))
    losses.sum().backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    return [losses.detach(), *grads], kept


@pytest.mark.parametrize("parts", [0, 2])
def test_the_same_bits_from_less_memory(tiny_config, parts):
    config = tiny_config.model_copy(update={"drop_path": 0.5, "parts": parts})
    plain, kept = step(network(config, recompute=False))
    again, kept_again = step(network(config, recompute=True))
    assert len(plain) == len(again) > 10
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    assert kept_again < 0.5 * kept


def test_embedding_needs_no_second_pass(tiny_config):
    images = torch.zeros(2, 3, *tiny_config.image_size)
    with torch.no_grad():
        embedded = network(tiny_config, recompute=True).embed(images)
        assert torch.equal(embedded, network(tiny_config, recompute=False).embed(images))
