"""Compiled runs: no graph break in any kind of run, and the numbers of an eager one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_host_waits import VARIANTS, trainer_for

import gsalign.engine.compilation as compilation
from gsalign.engine.trainer import Trainer
from gsalign.model import GSAlign, ModelConfig


@pytest.fixture(autouse=True)
def captured_but_not_generated(monkeypatch):
    """All of the capture, forward and backward, without the minutes of a C++ compiler."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def rows(trainer: Trainer) -> torch.Tensor:
    found = []
    for batch in trainer._batches():
        trainer._iteration(batch)
        found.append(torch.stack(list(trainer.losses.values())))
    return torch.stack(found)


@pytest.mark.parametrize("variant", ["part labels", "upright", "recompute", "bf16"])
def test_a_compiled_run_is_the_eager_run(people: Path, tmp_path: Path, variant: str):
    settings = (*VARIANTS[variant], "model.drop_path=0", "training.iterations=1")
    eager = rows(trainer_for(people, tmp_path / "eager", *settings))
    trainer = trainer_for(people, tmp_path / "compiled", *settings, "training.compile=true")
    compiled = rows(trainer)
    assert trainer.network._compiled_call_impl is not None
    close = 2e-2 if variant == "bf16" else 1e-5
    torch.testing.assert_close(compiled, eager, rtol=close, atol=1e-6)
    # The angles are seen from inside the graph.
    layers = [str(layer) for layer in trainer.network.config.ltps_layers]
    turned = ["image"] if variant == "upright" else []
    assert list(trainer.angles.read()) == turned + layers


def test_a_weight_that_rises_is_not_compiled_anew(people: Path, tmp_path: Path):
    settings = (*VARIANTS["own points"], "model.drop_path=0")
    eager = rows(trainer_for(people, tmp_path / "eager", *settings))
    trainer = trainer_for(people, tmp_path / "compiled", *settings, "training.compile=true")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = rows(trainer)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert all(angle.points_std is not None for angle in trainer.angles.read().values())


def test_compiled_embeddings_of_batches_of_any_size():
    config = ModelConfig(
        image_size=(32, 16), patch_size=8, width=24, depth=2, num_heads=2, num_identities=5,
        parts=2, ltps={"hidden": (8, 4)},
        orientation={"enabled": True, "reads": "parts", "cuts_out": True, "turns": False},
    )  # fmt: skip
    network = GSAlign(config).eval()
    images = torch.randn(5, 3, 32, 16)
    with torch.no_grad():
        wanted = network.embed(images)
        seen = network.embed_parts(images)
        compilation.compile_embedding(network)
        for size in (5, 3):
            torch.testing.assert_close(network.embed(images[:size]), wanted[:size])
            mine = network.embed_parts(images[:size])
            torch.testing.assert_close(mine.vectors, seen.vectors[:size])
