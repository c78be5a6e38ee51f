"""Layers computed again in the backward pass: the same bits, and less kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gsalign.model import GSAlign, ModelConfig
from gsalign.model.lean import linear_after_gelu, linear_after_norm

BATCH = 4


def network(config: ModelConfig, *, recompute: str) -> GSAlign:
    torch.manual_seed(0)
    made = GSAlign(config).train()
    made.backbone.recompute = recompute
    return made


def step(made: GSAlign) -> tuple[list[Tensor], int]:
    """Losses and gradients of a step with stochastic depth; bytes kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, *made.config.image_size, generator=generator)
    labels = torch.tensor([0, 0, 1, 1])
    parameters = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)  # of stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = torch.stack(list(made.losses(images, labels, labels % 2).values()))
    losses.sum().backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    return [losses.detach(), *grads], sum(kept.values())


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize(("recompute", "share"), [("cheap", 0.75), ("layers", 0.5)])
def test_the_same_bits_from_less_memory(tiny_config, parts, recompute, share):
    config = tiny_config.model_copy(update={"drop_path": 0.5, "depth": 4, "parts": parts})
    plain, kept = step(network(config, recompute="nothing"))
    again, kept_again = step(network(config, recompute=recompute))
    assert len(plain) == len(again) > 10
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    assert kept_again < share * kept


def test_embedding_needs_no_second_pass(tiny_config):
    images = torch.zeros(2, 3, *tiny_config.image_size)
    with torch.no_grad():
        plain, cheap, layers = (
            network(tiny_config, recompute=r).embed(images) for r in ("nothing", "cheap", "layers")
        )
    assert torch.equal(plain, cheap) and torch.equal(plain, layers)


def test_cheap_recomputation_under_autocast_and_with_frozen_weights(tiny_config):
    def gradients(recompute: str) -> dict[str, Tensor]:
        made = network(tiny_config, recompute=recompute)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("blocks.0.mlp.fc1" not in name and "norm2" not in name)
        images = torch.randn(4, 3, *tiny_config.image_size)
        labels = torch.tensor([0, 0, 1, 1])
        with torch.autocast("cpu", torch.bfloat16):
            losses = made.losses(images, labels, labels % 2)
        torch.stack(list(losses.values())).sum().backward()
        return {n: p.grad for n, p in made.named_parameters() if p.grad is not None}

    torch.manual_seed(3)
    wanted = gradients("nothing")
    torch.manual_seed(3)
    mine = gradients("cheap")
    assert mine.keys() == wanted.keys() and len(mine) > 10
    for name, grad in wanted.items():
        assert mine[name].dtype == grad.dtype == torch.float32
        torch.testing.assert_close(mine[name], grad, rtol=2e-2, atol=2e-5, msg=name)


def test_gradients_of_the_lean_layers_are_those_of_finite_differences():
    linear, norm = nn.Linear(3, 4).double(), nn.LayerNorm(3).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def after_norm(x: Tensor, *_: Tensor) -> Tensor:
        return linear_after_norm(linear, norm, x, again=True)

    def after_gelu(x: Tensor, *_: Tensor) -> Tensor:
        return linear_after_gelu(linear, x, again=True)

    assert torch.autograd.gradcheck(after_norm, (x, *norm.parameters(), *linear.parameters()))
    assert torch.autograd.gradcheck(after_gelu, (x, *linear.parameters()))
