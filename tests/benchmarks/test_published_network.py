"""The network computed the published way: the same numbers as ours, with parameters shared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.published_network import PublishedWay
from gsalign.model import GSAlign, LtpsConfig, ModelConfig

BATCH = 6


def network(**changes) -> GSAlign:
    settings = {
        "image_size": (64, 32),
        "width": 48,
        "depth": 3,
        "num_heads": 4,
        "drop_path": 0.0,
        "num_identities": 5,
        "ltps": LtpsConfig(hidden=(16, 8), control_points=9),
    }
    torch.manual_seed(3)
    made = GSAlign(ModelConfig(**settings | changes)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(BATCH, 3, 64, 32, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 1, 1, 4, 0, 2]), torch.arange(BATCH) % 2


@pytest.mark.parametrize("changes", [{}, {"ltps": LtpsConfig(hidden=(16, 8), layers=(1,))}])
def test_losses_gradients_and_statistics_are_those_of_the_network(changes):
    ours, theirs = network(**changes).train(), network(**changes).train()
    for computed, owner in ((ours, ours), (PublishedWay(theirs), theirs)):
        terms = computed.losses(*batch())
        torch.stack(list(terms.values())).sum().backward()
        owner.terms = {name: term.detach() for name, term in terms.items()}
    torch.testing.assert_close(theirs.terms, ours.terms, rtol=1e-10, atol=1e-12)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_embeddings_are_those_of_the_network():
    made = network().eval()
    images = batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(
            PublishedWay(made).embed(images), made.embed(images), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("switch", ["aspect_true", "points_per_image"])
def test_warps_of_another_kind_are_refused(switch):
    with pytest.raises(ValueError, match=f"{switch}.* to false"):
        PublishedWay(network(ltps=LtpsConfig(hidden=(16, 8), **{switch: True})))


def test_body_parts_are_refused():
    with pytest.raises(ValueError, match="no body parts"):
        PublishedWay(network(parts=2))
