"""Steps and embeddings as CUDA graphs: the same numbers as without; what no graph can hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_host_waits import VARIANTS, trainer_for
from torch import Tensor, nn

from gsalign.engine.config import OptimizerConfig, TrainingConfig
from gsalign.engine.cuda_graphs import (
    KEPT_SIZES,
    WARMUP,
    GraphedEmbedding,
    GraphedStep,
    rates_on_device,
    require_graphs,
)
from gsalign.engine.optimizer import build_optimizer
from gsalign.engine.trainer import Trainer
from gsalign.errors import ConfigError
from gsalign.model import GSAlign, ModelConfig

NETWORK = ModelConfig(
    image_size=(32, 16), patch_size=8, width=24, depth=2, num_heads=2, num_identities=5,
    drop_path=0.0, ltps={"hidden": (8, 4)},
)  # fmt: skip
TAUGHT = ModelConfig(
    **NETWORK.model_dump(exclude={"parts", "part_cells", "losses", "orientation"}),
    parts=2, part_cells=2, losses={"part_labels": 1.0}, orientation={"enabled": True},
)  # fmt: skip
STEPS = WARMUP + 4


def leaves(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, dict) else [result]


class Pretend:
    """Stands in for a capture where there is no GPU: nothing is computed but by a replay."""

    def __init__(self, *state: nn.Module) -> None:
        self.state = state
        self.captures = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        before = [copy.deepcopy(module.state_dict()) for module in self.state]
        kept = function()
        for module, values in zip(self.state, before, strict=True):
            module.load_state_dict(values)
        for tensor in leaves(kept):
            tensor.fill_(torch.nan)

        def replay() -> None:
            for module in self.state:
                module.zero_grad()  # a graph writes gradients anew
            for old, new in zip(leaves(kept), leaves(function()), strict=True):
                old.copy_(new)

        return replay, kept


def batches(device: str = "cpu") -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 1, 1])
    return [
        tuple(
            t.to(device)
            for t in (
                torch.randn(4, 3, *NETWORK.image_size, generator=generator),
                (labels + number) % 5,
                labels.flip(0),
                torch.randint(0, 4, (4, *NETWORK.image_size), generator=generator).byte(),
            )
        )
        for number in range(STEPS)
    ]


def steps_of(
    model: GSAlign, device: str, *, graphed: bool, recorder: Pretend | None = None
) -> list[list[float]]:
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01, momentum=0.0))
    rates_on_device(optimizer, torch.device(device))

    def step(*batch: Tensor) -> dict[str, Tensor]:
        losses = model.losses(*batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    run = GraphedStep(step, optimizer.zero_grad, recorder=recorder) if graphed else step
    rows = []
    for number, batch in enumerate(batches(device)):
        if not graphed:
            optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"].fill_(0.01 / (number + 1))
        rows.append([loss.item() for loss in run(*batch).values()])
    return rows


def test_a_step_captures_once_and_trains_as_without():
    torch.manual_seed(0)
    plain = GSAlign(TAUGHT).train()
    graphed = copy.deepcopy(plain)
    pretend = Pretend(graphed)
    mine = steps_of(graphed, "cpu", graphed=True, recorder=pretend)
    assert mine == steps_of(plain, "cpu", graphed=False)
    assert pretend.captures == 1
    wanted = plain.state_dict()
    for name, tensor in graphed.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def rows_of(trainer: Trainer) -> Tensor:
    """Losses of a run, iteration by iteration: ``[iterations, terms]``."""
    rows = []
    for batch in trainer._batches():
        trainer._iteration(batch)
        trainer.progress.iteration += 1
        rows.append(torch.stack(list(trainer.losses.values())).cpu())
    return torch.stack(rows)


def test_a_captured_step_reads_anew_what_rises(people: Path, tmp_path: Path):
    settings = (
        *VARIANTS["own points"], f"model.losses.deformation_warmup={STEPS}", "model.drop_path=0",
        f"training.iterations={STEPS}", "optimizer.momentum=0",
    )  # fmt: skip
    wanted = rows_of(trainer_for(people, tmp_path / "plain", *settings))
    trainer = trainer_for(people, tmp_path / "graphed", *settings)
    step, pretend = trainer.step, Pretend(trainer.network)
    rates_on_device(trainer.optimizer, torch.device("cpu"))
    step._graphed = GraphedStep(step._compute, step._forget, recorder=pretend)
    torch.testing.assert_close(rows_of(trainer), wanted)
    assert pretend.captures == 1
    deformation = wanted[:, list(trainer.losses).index("deformation")]
    assert deformation[0] == 0 and (deformation[1:] > 0).all()


def test_a_batch_of_another_size_is_refused():
    step = GraphedStep(lambda images, *_: {"loss": images.sum()}, lambda: None, recorder=Pretend())
    images, labels = torch.ones(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    for _ in range(WARMUP + 1):
        step(images, labels, labels)
    with pytest.raises(ValueError, match=r"captured step has images \[4, 3, 2, 2\], got \[3, 3"):
        step(images[:3], labels[:3], labels[:3])


def test_embeddings_have_a_graph_per_size_and_are_tensors_of_their_own():
    network = GSAlign(NETWORK).eval()
    pretend = Pretend()
    embed = GraphedEmbedding(network, recorder=pretend)
    images = torch.randn(KEPT_SIZES + 1, 3, *NETWORK.image_size)
    first, again = embed(images[:2]), embed(images[1:3])
    assert pretend.captures == 1
    with torch.no_grad():
        assert torch.equal(first, network.embed(images[:2]))
        assert torch.equal(again, network.embed(images[1:3]))
    for size in range(1, KEPT_SIZES + 2):
        embed(images[:size])
    assert len(embed._graphs) == KEPT_SIZES
    with torch.no_grad():
        network.identity_head.neck.weight.mul_(2.0)
    torch.testing.assert_close(embed(images[:2]), 2 * first)


@pytest.mark.parametrize(
    ("settings", "device", "processes", "told"),
    [
        ({}, "cpu", 1, "needs a GPU, and this run is on cpu"),
        ({"precision": "bf16"}, "cuda", 2, "serves one process, and this run has 2"),
        ({"precision": "fp16"}, "cuda", 1, "cannot hold the loss scaler"),
        ({"precision": "no", "recompute": "layers"}, "cuda", 1, "recompute=cheap"),
    ],
)
def test_what_no_graph_can_hold_is_refused(settings, device, processes, told):
    with pytest.raises(ConfigError, match=f"training.cuda_graphs .*{told}"):
        require_graphs(TrainingConfig(**settings), torch.device(device), processes)
    require_graphs(TrainingConfig(precision="bf16"), torch.device("cuda"), 1)


def test_a_run_on_the_cpu_refuses_graphs(people: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="needs a GPU"):
        trainer_for(people, tmp_path, "training.cuda_graphs=true")
    with pytest.raises(ConfigError, match="CUDA graphs need a GPU"):
        GraphedEmbedding(GSAlign(NETWORK))


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_captured_step_trains_as_without_on_a_gpu(device):
    torch.manual_seed(0)
    plain = GSAlign(TAUGHT).to(device).train()
    graphed = copy.deepcopy(plain)
    mine, wanted = steps_of(graphed, device, graphed=True), steps_of(plain, device, graphed=False)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    for mine, wanted in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("variant", ["part labels", "own points"])
def test_a_run_with_graphs_is_the_run_without_on_a_gpu(
    people, tmp_path, device, name, precision, variant
):
    losses = []
    for graphs in ("false", "true"):
        trainer = trainer_for(
            people, tmp_path / graphs, f"device={device}", f"optimizer.name={name}",
            f"training.precision={precision}", f"training.cuda_graphs={graphs}",
            f"training.iterations={STEPS}", "model.drop_path=0", *VARIANTS[variant],
        )  # fmt: skip
        losses.append(rows_of(trainer))
    torch.testing.assert_close(*losses, rtol=2e-2 if precision == "bf16" else 1e-3, atol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_embeddings_are_those_of_the_network_on_a_gpu(device, dtype):
    network = GSAlign(NETWORK).to(device).eval()
    embed = GraphedEmbedding(network, dtype=dtype)
    for size in (1, 3, 1):
        images = torch.randn(size, 3, *NETWORK.image_size, device=device)
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            wanted = network.embed(images)
        torch.testing.assert_close(embed(images), wanted, rtol=1e-3, atol=1e-4)
