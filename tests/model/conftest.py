"""The recorded figures of the published code, and a network small enough for every test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gsalign.model import GSAlign, ModelConfig, load_published

GOLDEN = Path(__file__).parents[1] / "golden"


def read(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        arrays = {key: file[key] for key in file.files}
    return {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind in "fiub"}


class Golden:
    """The tiny published network: weights, batch, results."""

    def __init__(self) -> None:
        self.figures = read("tiny_4x2_k4.npz")
        self.gradients = {k[2:]: v for k, v in read("tiny_4x2_k4_grads.npz").items()}
        self.state = {
            key[2:]: value.float() if value.dtype == torch.float16 else value
            for key, value in self.figures.items()
            if key.startswith("w.")
        }
        self.images = self.figures["images_norm"]
        self.identities = self.figures["pids"]
        self.views = self.figures["view_is_aerial"]

    def model(self, dtype: torch.dtype = torch.float32) -> GSAlign:
        return load_published(self.state, image_size=(64, 32), num_heads=4, eta=0.1).to(dtype)

    def __getitem__(self, key: str) -> Tensor:
        return self.figures[key]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def read_golden():
    return read


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(
        image_size=(32, 16),
        patch_size=8,
        width=24,
        depth=2,
        num_heads=3,
        drop_path=0.0,
        num_identities=5,
        ltps={"hidden": (8, 6)},
    )


def shaken(config: ModelConfig, scale: float = 0.05) -> GSAlign:
    """A network away from its symmetric start: points off the grid, angles away from 0."""
    model = GSAlign(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def batch_for(config: ModelConfig, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, *config.image_size, generator=generator)
    identities = torch.arange(size) // 2 % config.num_identities
    return images, identities, torch.arange(size) % 2


@pytest.fixture(scope="session")
def make_model():
    return shaken


@pytest.fixture(scope="session")
def make_batch():
    return batch_for
