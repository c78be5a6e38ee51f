"""Runs of two processes on the CPU: one batch shared, one result, nothing counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from distributed_driver import COMPARED, COMPARED_RUNS, config_of
from tiny_run import TINY

from gsalign.config import load_config
from gsalign.data import load_dataset
from gsalign.engine.build import build_trainer
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


def compared(name: str, runs: Path, people: Path, folder: Path) -> tuple[Path, Path]:
    """Folders of a run of two processes and of the same run by one."""
    overrides = [o for o in COMPARED_RUNS[name] if not o.startswith("training.global_losses")]
    config = config_of(people, folder, name, *COMPARED, *overrides)
    build_trainer(config).train()
    return runs / name, config.run_folder


@pytest.mark.parametrize("name", [name for name in COMPARED_RUNS if name.startswith("global")])
def test_two_processes_train_as_one_with_the_whole_batch(name, runs, people, tmp_path):
    shared, alone = compared(name, runs, people, tmp_path)
    for mine, wanted in zip(records(shared, "train"), records(alone, "train"), strict=True):
        assert mine["lr"] == wanted["lr"]
        assert mine["losses"] == pytest.approx(wanted["losses"], rel=1e-4, abs=1e-6)
    mine, wanted = (
        safetensors.torch.load_file(folder / "model_final.safetensors")
        for folder in (shared, alone)
    )
    for key, tensor in wanted.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_losses_of_its_own_images_are_others(runs, people, tmp_path):
    shared, alone = compared("own", runs, people, tmp_path)
    mine, wanted = (records(folder, "train")[-1]["losses"] for folder in (shared, alone))
    for name in ("triplet", "identity"):
        assert abs(mine[name] - wanted[name]) > 1e-3 * wanted[name]


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
