"""A training step never waits for its device: nothing in it asks for a number, or copies one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from host_waits import HostWaitError, NoHostWaits
from tiny_run import TINY

from gsalign.config import load_config
from gsalign.engine.build import build_trainer
from gsalign.engine.config import OptimizerConfig
from gsalign.engine.optimizer import build_optimizer
from gsalign.engine.trainer import Trainer
from gsalign.model import GSAlign
from gsalign_kernels import use_kernels

VARIANTS = {
    "published": (),
    "parts": ("model.parts=2",),
    "part labels": ("model.parts=2", "model.part_cells=2", "model.losses.part_labels=1"),
    "on device": ("model.parts=2", "model.losses.part_labels=1", "data.augment_on_device=true"),
    "upright": ("model.orientation.enabled=true", "model.parts=2", "model.losses.part_labels=1"),
    "upright by parts": ("model.orientation.enabled=true", "model.orientation.reads=parts"),
    "cut out": (
        *("model.orientation.enabled=true", "model.orientation.reads=parts"),
        *("model.orientation.cuts_out=true", "model.orientation.turns=false"),
    ),
    "baseline": ("model.ltps.layers=[]", "model.dam.enabled=false"),
    "adamw": ("optimizer.name=adamw",),
    "recompute": ("training.recompute=layers",),
    "bf16": ("training.precision=bf16",),
    "own points": ("model.ltps.points_per_image=true", "model.losses.deformation_warmup=3"),
}


def trainer_for(people: Path, folder: Path, *overrides: str) -> Trainer:
    settings = [*TINY, f"data.root={people}", f"output={folder}", "training.log_every=50"]
    return build_trainer(load_config(None, [*settings, *overrides]))


@pytest.mark.parametrize(
    "question",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.unique(),
        lambda t: t.nonzero(),
        lambda t: t.masked_select(t > 0),
        lambda t: t.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda t: t.index_put_((t > 0,), torch.tensor(0.0)),
        lambda t: t.to("meta"),
    ],
)
def test_questions_are_noticed(question):
    values = torch.rand(4)
    with pytest.raises(HostWaitError), NoHostWaits():
        question(values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_iteration_waits(people, tmp_path, variant):
    trainer = trainer_for(people, tmp_path, *VARIANTS[variant])
    before = copy.deepcopy(trainer.network.state_dict())
    # The reference is made of PyTorch's operators, which can be looked at one by one.
    with use_kernels("reference"):
        for number, batch in enumerate(trainer._batches()):
            with NoHostWaits():
                trainer._iteration(batch)
                trainer.meter.add(number, trainer.losses)
    assert number == 3
    moved = [n for n, t in trainer.network.state_dict().items() if not torch.equal(t, before[n])]
    assert len(moved) > 20
    assert ("part_labels" in trainer.losses) == bool(trainer.config.model.losses.part_labels)
    assert all(loss for name, loss in trainer.losses.items() if name == "part_labels")


@pytest.mark.parametrize("variant", ["part labels", "upright", "upright by parts", "cut out"])
def test_losses_make_nothing_on_another_device(variant):
    # Without figures nothing can be read, by tolist() either, and a tensor made on the host shows
    # as a copy between devices.
    config = load_config(None, [*TINY, *VARIANTS[variant]]).model
    with torch.device("meta"):
        network = GSAlign(config).train()
        labels = torch.zeros(6, dtype=torch.int64)
        images = torch.zeros(6, 3, *config.image_size)
        part_labels = torch.zeros(6, *config.image_size, dtype=torch.uint8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, foreach=True)
    with use_kernels("reference"), NoHostWaits():
        losses = network.losses(images, labels, labels, part_labels)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    assert all(loss.device.type == "meta" for loss in losses.values())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("overflow", [False, True])
def test_the_step_of_fp16_waits_for_no_scaler(name, overflow):
    network = torch.nn.Linear(3, 2)
    before = network.weight.detach().clone()
    optimizer = build_optimizer(network, OptimizerConfig(name=name, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with NoHostWaits():
        loss = network(torch.ones(4, 3)).square().mean() * (torch.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(network.weight, before) is overflow
    assert scaler.get_scale() == (4.0 if overflow else 8.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_iteration_waits_on_a_gpu(people, tmp_path, precision):
    trainer = trainer_for(people, tmp_path, "device=cuda", f"training.precision={precision}")
    batches = trainer._batches()
    trainer._iteration(next(batches))  # kernels are compiled, libraries set up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._iteration(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in trainer.losses.values())
