"""Runs of two processes on the CPU: one batch shared, one result, nothing counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_run import TINY

from gsalign.config import load_config
from gsalign.data import load_dataset
from gsalign.engine.distributed import build_accelerator, gather_rows
from gsalign.engine.launch import launch, require_gpus
from gsalign.engine.metrics import read_metrics
from gsalign.engine.testing import evaluate_network
from gsalign.errors import ConfigError
from gsalign.model import load_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `whole` and `parts` of two processes each."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(HERE / "distributed_driver.py"), str(people), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.json") if record["kind"] == kind]


def test_one_process_writes_one_record_per_iteration(runs: Path):
    assert [record["iteration"] for record in records(runs / "whole", "train")] == [1, 2, 3, 4]
    assert [record["iteration"] for record in records(runs / "whole", "evaluation")] == [2, 4]


def test_every_query_counts_once(runs: Path):
    figures = records(runs / "whole", "evaluation")[-1]["protocols"]["all"]
    assert (figures["queries"], figures["valid_queries"], figures["gallery"]) == (8, 8, 8)


def test_the_shared_evaluation_is_that_of_the_saved_weights(runs: Path):
    # Fails when each process evaluates with running statistics of its own.
    config = load_config(runs / "whole" / "config.yaml")
    dataset = load_dataset(config.data)
    network = load_model(runs / "whole" / "model_final.safetensors")
    accelerator = build_accelerator(device="cpu")
    alone = evaluate_network(network, dataset.query, dataset.gallery, config.data, accelerator)
    shared = records(runs / "whole", "evaluation")[-1]["protocols"]
    for name, result in alone.items():
        assert shared[name] == pytest.approx(result.as_dict()), name


def test_a_resumed_run_equals_an_uninterrupted_one(runs: Path):
    whole, parts = (records(runs / name, "train") for name in ("whole", "parts"))
    assert [r["losses"] for r in parts] == [r["losses"] for r in whole]
    weights = [
        safetensors.torch.load_file(runs / name / "model_final.safetensors")
        for name in ("whole", "parts")
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_two_processes_train_as_the_loss_of_their_parts_says(runs: Path, people: Path):
    # Drop path and batch statistics are each process's own, so the losses are near those of one
    # process, not equal; the learning rates and what there is to see are the same.
    first = records(runs / "whole", "train")[0]
    assert first["losses"]["identity"] == pytest.approx(np.log(6), abs=0.3)
    assert first["lr"] == pytest.approx(0.008 * 0.01)


def test_one_process_keeps_its_rows():
    rows = torch.arange(6).reshape(3, 2)
    assert gather_rows(build_accelerator(device="cpu"), rows) is rows


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    require_gpus(1)
    with pytest.raises(ConfigError, match="--num-gpus is 2, but PyTorch sees 1"):
        require_gpus(2)


def test_launch_gives_the_exit_code_of_its_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    assert launch(["--version"], processes=2) == 0
    assert launch(["no-such-command"], processes=2) == 2


def test_identities_that_processes_cannot_share_are_refused(people: Path):
    from gsalign.data import train_loader

    config = load_config(None, [*TINY, f"data.root={people}"])
    with pytest.raises(ConfigError, match="3, which 2 processes"):
        train_loader(load_dataset(config.data).train, config.data, world_size=2)
