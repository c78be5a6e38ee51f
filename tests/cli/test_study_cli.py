"""``gsalign study`` from end to end: what runs, what is kept, what is refused, what is told."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import read_files

from gsalign.cli.main import main
from gsalign.config import load_config
from gsalign.engine.checkpoint_hook import CheckpointHook
from gsalign.engine.metrics import read_metrics
from gsalign.model import load_model
from gsalign.study import StudyFolder, read_rows

BASELINE = {"model.ltps.layers": [], "model.dam.enabled": False}


@pytest.fixture
def document(settings, people) -> dict:
    """A study of two variants and two seeds on a set that is there."""
    return {
        "name": "tiny",
        "about": "What the parts are worth.",
        "config": str(settings),
        "overrides": {"training.evaluate_every": 2},
        "data": {"people": {"root": str(people)}},
        "variants": {
            "baseline": {"about": "neither", "overrides": BASELINE},
            "full": {"about": "LTPS | DAM"},
        },
        "seeds": [0, 1],
        "protocols": ["all", "aerial-to-ground"],
    }


@pytest.fixture
def study(document, tmp_path):
    """Write the study file, with changes to it, and give its path."""

    def write(**changes: object) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**document, **changes}, sort_keys=False), encoding="utf-8")
        return path

    return write


class Here:
    """Stands for a process: runs the command in this one, which has PyTorch loaded already."""

    commands: list[list[str]]
    environments: list[dict[str, str]]

    def __init__(self, command, output, environment, keep_open):
        assert command[:3] == [sys.executable, "-m", "gsalign.cli"]
        assert environment["PATH"] == os.environ["PATH"]
        assert all(os.fstat(descriptor) for descriptor in keep_open) and keep_open
        self.commands.append(command[3:])
        self.environments.append(environment)
        with (
            output.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            self.returncode = main(command[3:])

    def poll(self):
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    """Commands of the runs, which are carried out in this process."""
    monkeypatch.setattr("gsalign.study.runner._spawn", Here)
    monkeypatch.setattr(Here, "commands", [], raising=False)
    monkeypatch.setattr(Here, "environments", [], raising=False)
    return Here.commands


def folders(commands: list[list[str]]) -> list[str]:
    return [Path(command[command.index("--output") + 1]).name for command in commands]


def test_a_study_runs_seed_by_seed_and_reports(call, study, here, tmp_path):
    out = tmp_path / "out"
    told = call("study", study(), "--out", out)
    assert folders(here) == ["baseline-seed0", "full-seed0", "baseline-seed1", "full-seed1"]
    assert "4 runs, 0 of them finished" in told
    assert "[1/4] baseline seed 0: begun" in told and "full seed 1: mAP ALL " in told
    assert "about 0:00:0" in told and "A->G, 4 queries" in told and "G->A" not in told

    rows = read_rows(StudyFolder(out).table)
    assert len(rows) == 2 * 2 * 6 * 2
    assert {(row.step, row.steps) for row in rows} == {(2, 4), (4, 4)}
    # The figures are those of the run's own log.
    records = read_metrics(out / "full-seed1" / "metrics.json")
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    (row,) = [
        row
        for row in rows
        if (row.variant, row.seed, row.protocol, row.step) == ("full", 1, "all", 4)
    ]
    assert row.figures["mAP"] == pytest.approx(last["protocols"]["all"]["mAP"], abs=1e-4)
    assert row.torch == torch.__version__ and row.seconds > 0

    # Each run is one of gsalign train, with its own settings.
    config = load_config(out / "full-seed1" / "config.yaml")
    assert (config.seed, config.model.dam.enabled, config.training.evaluate_every) == (1, True, 2)
    network = load_model(out / "baseline-seed0" / "model_final.safetensors")
    assert network.config.ltps_layers == () and not network.config.dam.enabled

    page = (out / "study.md").read_text(encoding="utf-8")
    assert "What the parts are worth." in page and "LTPS \\| DAM" in page
    assert page.count("| full | 2 | ") == 2
    assert "4 runs of 4 steps" in page and torch.__version__ in page


def test_runs_at_a_time_share_gpus_and_cores(call, study, here, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    call("study", study(), "--out", tmp_path / "out", "--jobs", 3)
    assert len(here) == 4
    # The fourth has the place of the first that ended.
    devices = [environment["CUDA_VISIBLE_DEVICES"] for environment in Here.environments]
    assert devices == ["4", "7", "4", "4"]
    assert {environment["OMP_NUM_THREADS"] for environment in Here.environments} == {"3"}


def test_nothing_is_run_twice_and_the_report_is_made_from_the_table_alone(
    call, study, here, tmp_path
):
    out = tmp_path / "out"
    path = study()
    told = call("study", path, "--out", out, "--seeds", 1, "--only", "full")
    assert folders(here) == ["full-seed1"] and "1 runs" in told
    told = call("study", path, "--out", out, "--seeds", 1)
    assert folders(here) == ["full-seed1", "baseline-seed1"] and "1 of them finished" in told
    before = read_files(out)
    # All that is finished is in the table, and what is written again is the same.
    call("study", path, "--out", out, "--seeds", 1, "--only", "full")
    assert len(here) == 2 and read_files(out) == before

    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(out / "study.csv", copy)
    told = call("study", path, "--out", copy, "--report")
    assert len(here) == 2
    for name in ("study.csv", "study.md", "study.png", "curves.png"):
        assert (copy / name).read_bytes() == before[name] and f"wrote {copy / name}" in told


def test_a_stopped_run_goes_on_and_ends_where_it_would_have(
    call, refuse, study, here, tmp_path, monkeypatch
):
    path = study(seeds=[0])
    call("study", path, "--out", tmp_path / "whole", "--only", "full")
    with monkeypatch.context() as patch:
        original = CheckpointHook.after_iteration

        def stop_after_the_second(self, trainer):
            original(self, trainer)
            if trainer.progress.iteration == 2:
                raise KeyboardInterrupt

        patch.setattr(CheckpointHook, "after_iteration", stop_after_the_second)
        told = refuse("study", path, "--out", tmp_path / "out", "--only", "full")
    assert "1 of 1 runs failed" in told and "stopped after iteration 2 of 4" in told
    told = call("study", path, "--out", tmp_path / "out", "--only", "full")
    assert "full seed 0: resumed" in told and here[-1][-1] == "--resume"
    name = "full-seed0/model_final.safetensors"
    resumed, whole = (load_file(tmp_path / folder / name) for folder in ("out", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in resumed.items())


def test_a_run_that_left_nothing_to_resume_begins_again(call, study, here, tmp_path):
    folder = tmp_path / "out" / "full-seed0"
    path = study(seeds=[0])
    call("study", path, "--out", tmp_path / "out", "--only", "full")
    for name in ("model_final", "checkpoint"):
        (folder / f"{name}.safetensors").unlink()
    told = call("study", path, "--out", tmp_path / "out", "--only", "full")
    assert "full seed 0: begun again" in told and here[-1][-1] == "--overwrite"


def test_a_failing_variant_is_named_and_the_others_go_on(refuse, study, here, document, tmp_path):
    broken = {"overrides": {"data.identities_per_batch": 1000}}
    variants = {"broken": broken, **document["variants"]}
    told = refuse("study", study(variants=variants, seeds=[0]), "--out", tmp_path / "out")
    assert "1 of 3 runs failed" in told and "broken seed 0: identities_per_batch is 1000" in told
    assert "output.txt" in told
    assert len(here) == 3
    assert {row.variant for row in read_rows(tmp_path / "out" / "study.csv")} == {
        "baseline",
        "full",
    }


def test_a_run_that_is_killed_is_told(refuse, study, tmp_path, monkeypatch):
    class Killed:
        returncode = -9

        def __init__(self, command, output, *_):
            output.write_text("all went well\n\n")

        def poll(self):
            return self.returncode

    monkeypatch.setattr("gsalign.study.runner._spawn", Killed)
    told = refuse("study", study(seeds=[0]), "--out", tmp_path / "out", "--only", "full")
    assert "full seed 0: killed by signal 9" in told


def test_a_changed_configuration_is_refused(call, refuse, study, here, document, tmp_path):
    out = tmp_path / "out"
    call("study", study(seeds=[0]), "--out", out)
    changed = {**document["variants"], "full": {"overrides": {"optimizer.lr": 0.5}}}
    told = refuse("study", study(variants=changed), "--out", out)
    assert told.count("full-seed0: optimizer.lr was 0.008, is 0.5") == 1 and "baseline" not in told
    # Also where the changed variant is not asked for: it would stay in the table.
    assert "optimizer.lr" in refuse(
        "study", study(variants=changed), "--out", out, "--only", "baseline"
    )
    assert len(here) == 2
    call("study", study(variants=changed, seeds=[0]), "--out", tmp_path / "other")


def test_a_generated_set_is_made_and_checked(call, refuse, study, here, document, tmp_path):
    generate = {
        "train_identities": 6,
        "test_identities": 3,
        "images_per_identity_aerial": 2,
        "images_per_identity_ground": 2,
        "queries_per_identity": 2,
        "image_size": [32, 16],
    }
    root = tmp_path / "set"
    data = {"people": document["data"]["people"], "made": {"root": str(root), "generate": generate}}
    variants = {"full": {"data": "made"}}
    path = study(data=data, variants=variants, seeds=[0])
    told = call("study", path, "--out", tmp_path / "out")
    assert "data made: 36 images, rendered in " in told and (root / "truth.csv").is_file()
    (row, *_) = read_rows(tmp_path / "out" / "study.csv")
    assert len(row.data) == 64
    told = call("study", path, "--out", tmp_path / "again")
    assert "data made: 36 images, is there already" in told

    data["made"]["generate"] = {**generate, "aerial_roll": 0.0}
    path = study(data=data, variants=variants, seeds=[0])
    told = refuse("study", path, "--out", tmp_path / "out")
    assert "full-seed0: data is another set" in told
    told = refuse("study", path, "--out", tmp_path / "third")
    assert "data.made: " in told and "other settings" in told


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"nmae": "x"}, "unknown key 'nmae'"),
        ({"name": "../up"}, "name: "),
        ({"config": None}, "config: "),
        ({"variants": {}}, "variants: "),
        ({"variants": {"a b": {}}}, "variants.a b: "),
        ({"variants": {"full": {"overrides": {"seed": 3}}}}, "seed is decided by the study"),
        (
            {"variants": {"full": {"data": "mars"}}},
            "full.data is 'mars'; there are people",
        ),
        ({"variants": {"full": {"overrides": {"optimizer.lrr": 3}}}}, "did you mean optimizer.lr"),
        ({"variants": {"full": {"overrides": {"optimizer.lr": "x"}}}}, "variant full of "),
        ({"baseline": "none"}, "baseline is 'none'; the variants are baseline, full"),
        ({"seeds": [0, 0]}, "seeds: wanted each only once"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"metrics": ["map"]}, "metrics.0: "),
        ({"protocols": ["moon"]}, "'moon' is unknown"),
        ({"data": {"people": {"root": "x", "generate": {"night_share": 2}}}}, "night_share"),
    ],
)
def test_a_broken_study_file_is_told(refuse, study, here, tmp_path, changes, wanted):
    assert wanted in refuse("study", study(**changes), "--out", tmp_path / "out")
    assert not here


def test_a_wrong_call_is_told(refuse, study, here, document, tmp_path):
    out = tmp_path / "out"
    assert "does not exist" in refuse("study", tmp_path / "none.yaml")
    assert "--jobs is 0" in refuse("study", study(), "--jobs", 0)
    assert "--seeds has -1" in refuse("study", study(), "--seeds", -1)
    assert "'fll' is unknown" in refuse("study", study(), "--out", out, "--only", "fll")
    assert "study.csv does not exist" in refuse("study", study(), "--out", out, "--report")
    missing = {"people": {"root": str(tmp_path / "nowhere")}}
    told = refuse("study", study(data=missing), "--out", out)
    assert "nowhere does not exist" in told and "data.people.generate" in told
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.csv").write_text("variant,seed\nfull,0\n")
    told = refuse("study", study(), "--out", tmp_path / "broken", "--report")
    assert "other columns" in told
    with StudyFolder(out).claimed():
        assert "another study is at work" in refuse("study", study(), "--out", out)
    assert not here


def test_ctrl_c_saves_what_runs(study, tmp_path):
    """Real processes and a real signal, to the study alone."""
    out = tmp_path / "out"
    long = {"training.iterations": 100_000, "training.evaluate_every": 0}
    path = study(overrides=long, seeds=[0])
    command = [sys.executable, "-m", "gsalign.cli", "study", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--only", "full"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = out / "full-seed0" / "metrics.json"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "gsalign: study stopped; the same command goes on where it was\n"
    assert "full seed 0: gsalign: stopped after iteration " in told
    assert (out / "full-seed0" / "checkpoint.safetensors").is_file()
    assert not (out / "full-seed0" / "model_final.safetensors").exists()
    # Nobody is left behind: the folder can be claimed.
    with StudyFolder(out).claimed():
        pass
