"""Runs: the files they leave, resuming them exactly, and how they fail."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY, read_files

import gsalign.data.packed as packed
from gsalign.config import load_config
from gsalign.engine.build import build_trainer
from gsalign.engine.meters import NonFiniteLossError
from gsalign.engine.metrics import MetricsFile, read_metrics
from gsalign.engine.trainer import Hook, RunStopped, Trainer
from gsalign.errors import CheckpointError, ConfigError, DataError
from gsalign.evaluation import PROTOCOLS
from gsalign.model import load_model


def configured(people: Path, folder: Path, *overrides: str):
    return load_config(None, [*TINY, f"data.root={people}", f"output={folder}", *overrides])


def run(people: Path, folder: Path, *overrides: str, hooks=(), **options) -> Trainer:
    trainer = build_trainer(configured(people, folder, *overrides), hooks=hooks, **options)
    trainer.train()
    return trainer


def losses(folder: Path) -> list[dict[str, float]]:
    records = read_metrics(folder / "metrics.json")
    return [{"lr": r["lr"], **r["losses"]} for r in records if r["kind"] == "train"]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def assert_equal(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


@pytest.fixture(scope="module")
def finished(people, tmp_path_factory):
    """A run of 4 iterations; for looking at only."""
    torch.set_num_threads(1)
    return run(people, tmp_path_factory.mktemp("runs") / "run")


class Stop(Hook):
    """Sends this process a signal after an iteration, as Ctrl-C would."""

    def __init__(self, after: int, number: int = signal.SIGINT) -> None:
        self.after, self.number = after, number

    def after_iteration(self, trainer: Trainer) -> None:
        if trainer.progress.iteration == self.after:
            os.kill(os.getpid(), self.number)


class Look(Hook):
    """Keeps whether PyTorch was told to be deterministic while iterating."""

    def after_iteration(self, trainer: Trainer) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()


class Spoil(Hook):
    """Makes a weight infinite after an iteration."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_iteration(self, trainer: Trainer) -> None:
        if trainer.progress.iteration == self.after:
            with torch.no_grad():
                trainer.network.backbone.class_token.fill_(float("inf"))


def test_a_run_leaves_all_its_files(finished):
    files = read_files(finished.folder.root)
    events = [name for name in files if name.startswith("tensorboard/events.out.tfevents.")]
    assert len(events) == 1
    assert set(files) - set(events) == {
        "checkpoint.safetensors",
        "config.yaml",
        "metrics.json",
        "model_best.safetensors",
        "model_final.safetensors",
        "train.log",
    }
    assert all(files.values())


def test_the_saved_configuration_is_the_one_of_the_run(finished):
    saved = load_config(finished.folder.config)
    assert saved == finished.config
    assert saved.model.num_identities == 6


def test_metrics_hold_every_iteration_and_the_evaluation_at_the_end(finished):
    records = [json.loads(line) for line in finished.folder.metrics.read_text().splitlines()]
    assert [r["kind"] for r in records] == ["train"] * 4 + ["evaluation"]
    assert [r["iteration"] for r in records] == [1, 2, 3, 4, 4]
    for record in records[:4]:
        assert set(record["losses"]) == {
            "identity",
            "triplet",
            "view",
            "orthogonality",
            "mask",
            "deformation",
        }
        assert record["total_loss"] == pytest.approx(sum(record["losses"].values()))
        assert record["losses"]["identity"] > 0
        assert set(record["angles"]) == {"0", "1"}
        assert record["epoch"] == round(record["iteration"] / finished.epoch_length, 4)
    assert [r["lr"] for r in records[:4]] == [finished.schedule(i) for i in range(4)]
    assert set(records[4]["protocols"]) == set(PROTOCOLS)
    figures = records[4]["protocols"]["all"]
    assert figures["queries"] == figures["valid_queries"] == figures["gallery"] == 8
    assert 0 <= figures["mAP"] <= 100


def test_the_log_tells_losses_results_and_where_the_weights_are(finished):
    log = finished.folder.log.read_text(encoding="utf-8")
    assert "iter: 4/4" in log and "total_loss:" in log and "LTPS angle by layer" in log
    assert "cargo ALL" in log
    assert str(finished.folder.final) in log


def test_tensorboard_has_the_losses_of_metrics(finished):
    events = EventAccumulator(str(finished.folder.events)).Reload()
    read = {event.step: event.value for event in events.Scalars("loss/identity")}
    records = read_metrics(finished.folder.metrics)
    wanted = {r["iteration"]: r["losses"]["identity"] for r in records if r["kind"] == "train"}
    assert read == pytest.approx(wanted)
    assert "test_all/mAP" in events.Tags()["scalars"]


def test_the_weights_are_those_of_the_network(finished):
    for path in (finished.folder.best, finished.folder.final):
        network = load_model(path)
        assert network.config == finished.config.model
        assert_equal(network.state_dict(), finished.network.state_dict())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(people, tmp_path, finished):
    again = run(people, tmp_path / "again")
    assert losses(again.folder.root) == losses(finished.folder.root)
    assert_equal(tensors(again.folder.final), tensors(finished.folder.final))
    other = run(people, tmp_path / "other", "seed=1")
    assert losses(other.folder.root) != losses(finished.folder.root)


def test_ltps_learns_at_its_own_rate_also_in_a_run_that_began_without(people, tmp_path, finished):
    shutil.copytree(finished.folder.root, tmp_path / "run")
    longer = ("training.iterations=6", "optimizer.ltps_lr_factor=0.0")
    trainer = run(people, tmp_path / "run", *longer, resume=True)
    before, after = tensors(finished.folder.final), tensors(trainer.folder.final)
    for name in before:
        if name.startswith("backbone.ltps."):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["backbone.position"], after["backbone.position"])


class Shares(Hook):
    """Keeps what the network is told of the deformation's weight."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def before_run(self, trainer: Trainer) -> None:
        def keep(module: object, arguments: object, named: dict[str, torch.Tensor]) -> None:
            share = named.get("deformation_share")
            self.seen.append(None if share is None else share.item())

        trainer.network.register_forward_pre_hook(keep, with_kwargs=True)


def test_the_weight_of_the_deformation_rises_also_in_a_resumed_run(people, tmp_path):
    settings = ("model.losses.deformation_warmup=0.8", "training.iterations=5")
    settings += ("model.ltps.points_per_image=true",)
    shares = Shares()
    whole = run(people, tmp_path / "whole", *settings, hooks=[shares])
    assert shares.seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    terms = [record["deformation"] for record in losses(tmp_path / "whole")]
    assert terms[0] == 0.0 and min(terms[1:]) > 0.0
    part, shares = tmp_path / "part", Shares()
    with pytest.raises(RunStopped, match="stopped after iteration 3 of 5"):
        run(people, part, *settings, hooks=[Stop(after=3)])
    run(people, part, *settings, hooks=[shares], resume=True)
    assert shares.seen == [0.75, 1.0]
    assert losses(part) == losses(whole.folder.root)
    assert_equal(tensors(part / "model_final.safetensors"), tensors(whole.folder.final))
    angles = read_metrics(part / "metrics.json")[-2]["angles"]["0"]
    assert angles["moved"] > 0 and angles["points_std"] > 0


def test_without_a_warm_up_the_network_is_told_nothing_of_the_weight(people, tmp_path):
    shares = Shares()
    run(people, tmp_path / "run", hooks=[shares])
    assert shares.seen == [None] * 4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(people, tmp_path, optimizer, number):
    settings = (f"optimizer.name={optimizer}", "training.iterations=5")
    whole = run(people, tmp_path / "whole", *settings)
    part = tmp_path / "part"
    with pytest.raises(RunStopped, match="stopped after iteration 3 of 5; --resume"):
        run(people, part, *settings, hooks=[Stop(after=3, number=number)])
    assert len(losses(part)) == 3
    # What else draws random numbers in between must not matter.
    torch.manual_seed(123)
    resumed = run(people, part, *settings, resume=True)
    assert resumed.progress.iteration == 5
    assert losses(part) == losses(whole.folder.root)
    assert_equal(tensors(part / "model_final.safetensors"), tensors(whole.folder.final))
    mine, other = tensors(part / "checkpoint.safetensors"), tensors(whole.folder.state)
    assert any(name.startswith("optimizer.") for name in mine)
    assert_equal(mine, other)


def test_a_run_is_stopped_at_once_while_its_images_are_packed(people, tmp_path, monkeypatch):
    settings = ("data.cache=packed", f"data.cache_folder={tmp_path / 'packed'}")
    whole = run(people, tmp_path / "whole", *settings)
    read, asked = packed.read_image, []

    def interrupted(path):
        asked.append(path)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(path)

    monkeypatch.setattr(packed, "read_image", interrupted)
    monkeypatch.setattr(packed, "BLOCK", 4)
    part = tmp_path / "part"
    settings = ("data.cache=packed", f"data.cache_folder={tmp_path / 'stopped'}")
    with pytest.raises(RunStopped, match="stopped after iteration 0 of 4; --resume"):
        run(people, part, *settings)
    assert len(asked) < 24
    assert not list((tmp_path / "stopped").glob("*.npy"))
    run(people, part, *settings, resume=True)
    assert losses(part) == losses(whole.folder.root)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(people, tmp_path):
    class Die(Hook):
        def after_iteration(self, trainer: Trainer) -> None:
            if trainer.progress.iteration == 3:
                raise RuntimeError("power failure")

    settings = ("training.iterations=5",)
    whole = run(people, tmp_path / "whole", *settings)
    part = tmp_path / "part"
    with pytest.raises(RuntimeError, match="power failure"):
        run(people, part, *settings, hooks=[Die()])
    assert len(losses(part)) == 3
    # A line that was cut off in writing.
    with (part / "metrics.json").open("a") as file:
        file.write('{"kind": "tra')
    run(people, part, *settings, resume=True)
    assert losses(part) == losses(whole.folder.root)
    assert_equal(tensors(part / "model_final.safetensors"), tensors(whole.folder.final))


def test_resuming_a_finished_run_changes_nothing_of_its_weights(people, tmp_path):
    folder = tmp_path / "run"
    run(people, folder)
    # Tensors, not bytes: safetensors writes its metadata in any order.
    names = ("model_final.safetensors", "model_best.safetensors")
    before = {name: tensors(folder / name) for name in names}
    metrics = (folder / "metrics.json").read_bytes()
    resumed = run(people, folder, resume=True)
    assert resumed.progress.iteration == 4
    for name in names:
        assert_equal(tensors(folder / name), before[name])
    assert (folder / "metrics.json").read_bytes() == metrics


def test_a_folder_with_a_run_is_not_written_over(people, tmp_path, finished):
    before = read_files(finished.folder.root)
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume.*--overwrite"):
        run(people, finished.folder.root)
    assert read_files(finished.folder.root) == before
    folder = tmp_path / "run"
    run(people, folder)
    (folder / "notes.txt").write_text("mine")
    run(people, folder, "training.iterations=2", overwrite=True)
    assert len(losses(folder)) == 2
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_is_one_clear_error(people, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match=r"in iteration 3: .*identity nan") as caught:
        run(people, folder, "training.log_every=50", hooks=[Spoil(after=3)])
    assert "optimizer.lr" in str(caught.value) and "\n" not in str(caught.value)
    # It is found at once, long before anything is logged or saved.
    settings = ("training.log_every=50", "training.checkpoint_every=0", "training.iterations=9")
    trainer = build_trainer(
        configured(people, tmp_path / "other", *settings), hooks=[Spoil(after=3)]
    )
    with pytest.raises(NonFiniteLossError, match="in iteration 3: "):
        trainer.train()
    assert trainer.progress.iteration == 4
    # The last checkpoint is the one from before, and everything in it is finite.
    assert not (folder / "model_final.safetensors").exists()
    saved = tensors(folder / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in saved.values() if t.is_floating_point())
    resumed = run(people, folder, "training.log_every=50", resume=True)
    assert resumed.progress.iteration == 4


def test_the_loss_weights_of_zero_leave_a_loss_out_of_the_sum(people, tmp_path):
    run(people, tmp_path / "run", "model.losses.mask=0", "training.iterations=1")
    (row,) = losses(tmp_path / "run")
    assert row.get("mask", 0.0) == 0.0
    assert row["identity"] > 0


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_half_written_checkpoint_is_refused(people, tmp_path, finished, keep):
    folder = tmp_path / "run"
    folder.mkdir()
    whole = finished.folder.state.read_bytes()
    assert len(whole) > 5000
    (folder / "checkpoint.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="damaged or half written") as caught:
        run(people, folder, resume=True)
    assert str(folder) in str(caught.value)


def test_a_checkpoint_that_a_full_disk_cuts_off_leaves_the_last_as_it_was(people, tmp_path):
    trainer = build_trainer(configured(people, tmp_path / "run"))
    path = trainer.save()
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"safetensors cannot be written: .*27"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("seed=5",), "seed 0, this one has 5"),
        (("data.images_per_identity=4",), "images_per_identity 2, this one has 4"),
        (("optimizer.name=adamw",), "optimizer.name sgd, this one has adamw"),
        (("training.iterations=3",), "4 iterations done, but the run is to end after 3"),
        (("model.width=32",), "[32]"),
        (("model.depth=3",), "blocks.2"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(people, finished, overrides, told):
    before = read_files(finished.folder.root)
    with pytest.raises(CheckpointError) as caught:
        run(people, finished.folder.root, *overrides, resume=True)
    assert told in str(caught.value)
    assert str(finished.folder.state) in str(caught.value)
    assert read_files(finished.folder.root) == before


def test_weights_alone_cannot_be_resumed_from(people, tmp_path, finished):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(finished.folder.final.read_bytes())
    with pytest.raises(CheckpointError, match="weights alone cannot be resumed from"):
        run(people, folder, resume=True)


def test_nothing_to_resume_is_told(people, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*leave --resume out"):
        run(people, tmp_path / "nothing", resume=True)


def test_the_best_weights_are_chosen_on_held_out_people(people, tmp_path):
    settings = (
        "training.select_on=validation",
        "data.validation_fraction=0.34",
        "training.evaluate_every=1",
        "training.iterations=3",
    )
    trainer = run(people, tmp_path / "run", *settings)
    assert trainer.config.model.num_identities == 4
    query, gallery = trainer.validation
    held_out = set(query.identities.tolist())
    assert len(held_out) == 2 and set(gallery.identities.tolist()) == held_out
    assert not held_out & set(trainer.dataset.train.identities.tolist())
    records = read_metrics(trainer.folder.metrics)
    on_validation = {
        r["iteration"]: r["protocols"]["all"]["metric"]
        for r in records
        if r["kind"] == "evaluation" and r["split"] == "validation"
    }
    assert set(on_validation) == {1, 2, 3}
    best = max(on_validation.values())
    assert trainer.progress.best == pytest.approx(best / 100)
    first = min(step for step, value in on_validation.items() if value == best)
    assert trainer.progress.best_iteration == first


def test_settings_that_fit_no_batch_or_no_device_are_refused(people, tmp_path):
    with pytest.raises(ConfigError, match=r"identities_per_batch is 7.*only 6"):
        run(people, tmp_path / "run", "data.identities_per_batch=7")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU.*training.precision=no"):
        run(people, tmp_path / "run", "training.precision=fp16")
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_drop_what_came_after_the_resumed_iteration(tmp_path):
    path = tmp_path / "metrics.json"
    first = MetricsFile(path)
    for iteration in (1, 2, 3):
        first.append({"kind": "train", "iteration": iteration})
    MetricsFile(path, iteration=2).append({"kind": "train", "iteration": 3, "new": True})
    assert [record.get("new", False) for record in read_metrics(path)] == [False, False, True]
    path.write_text('{"iteration": 1}\nrubbish\n{"iteration": 2}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_metrics(path)


def test_a_deterministic_run_is_the_same_twice(people, tmp_path):
    weights = []
    for name in ("one", "two"):
        look = Look()
        run(people, tmp_path / name, "training.deterministic=true", hooks=[look])
        assert look.deterministic
        weights.append(tensors(tmp_path / name / "model_final.safetensors"))
    assert_equal(*weights)
    assert not torch.are_deterministic_algorithms_enabled()
