"""The command line: every command from end to end, and failures as one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cargo_folder import write_image
from picture_file import assert_picture

from gsalign import __version__
from gsalign.cli import info
from gsalign.cli.main import build_parser, main, parse
from gsalign.config import load_config
from gsalign.data.synthetic import part_groups
from gsalign.engine.metrics import read_metrics
from gsalign.engine.pictures.names import PICTURES
from gsalign.evaluation import PROTOCOLS
from gsalign.model import load_model
from gsalign_kernels import kernel_report

GENERATED = (
    "train_identities=4",
    "test_identities=2",
    "images_per_identity_aerial=2",
    "images_per_identity_ground=2",
    "queries_per_identity=2",
    "image_size=[32,16]",
    "write_parts=true",
)


def train(settings: Path, root: Path, folder: Path, *more: object) -> list[object]:
    return ["train", "--config-file", settings, "--data-root", root, "--output", folder, *more]


def break_first(folder: Path) -> Path:
    """Cut the first image of a folder off in the middle."""
    path = sorted(folder.rglob("*.jpg"))[0]
    path.write_bytes(path.read_bytes()[:60])
    return path


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The commands below a parser that do something."""
    inner = [
        command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    ]
    return [deep for command in inner for deep in commands(command)] or [parser]


# What works.


@pytest.mark.parametrize("command", commands(build_parser()), ids=lambda command: command.prog)
def test_help_explains_every_command_and_argument(command):
    assert command.description
    assert not [action.dest for action in command._actions if not action.help]


def test_info_lists_operators_implementations_and_versions(call):
    told = call("info")
    for operator in kernel_report().table:
        assert operator in told
    for name in ("reference", "cpp", "cuda", "triton", torch.__version__, __version__):
        assert name in told


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from gsalign.cli.main import main; "
        "codes = [main(['--help']), main(['--version'])]; "
        "sys.exit(codes != [0, 0] or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"gsalign {__version__}" in done.stdout
    names = ("info", "data", "train", "eval", "study", "extract", "index", "search", "visualize")
    for command in names:
        assert command in done.stdout


def test_a_generated_set_goes_all_the_way(call, settings, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "run"
    told = call("data", "generate", "--out", root, "--workers", 0, *GENERATED)
    assert "24 images of 6 identities: train 16, query 4, gallery 4" in told
    assert len(list(root.glob("*/Cam*/*.jpg"))) == 24
    told = call("data", "generate", "--out", root, "--workers", 0, *GENERATED)
    assert "holds this set already" in told

    told = call("data", "check", root)
    assert "all 24 images can be read" in told
    assert "all" in told and "can be read" not in call("data", "check", root, "--fast")

    extended = (
        *("model.parts=2", "model.part_cells=2", "model.losses.part_labels=1.0"),
        "model.orientation.enabled=true",
    )
    told = call(*train(settings, root, folder, "training.iterations=2", *extended))
    assert "iter: 2/2" in told and "cargo ALL" in told
    assert "part_identity: " in told and "part_labels: " in told and "no label maps" not in told
    assert "orientation: " in told and "  image: " in told

    results = tmp_path / "results.json"
    told = call("eval", "--checkpoint", folder / "model_final.safetensors", "--json", results)
    assert "part masks against the truth, 8 images" in told
    assert "angles against the true roll" in told
    document = json.loads(results.read_text(encoding="utf-8"))
    angles = ("image", "layer 0", "layer 1", "all together")
    assert tuple(document["rolls"]) == angles
    assert all(set(document["rolls"][angle]) == {"aerial", "ground"} for angle in angles)
    parts = document["parts"]
    assert set(parts["parts"]) == set(part_groups(2)) and 0 <= parts["mean_iou"] <= 1

    told = call("visualize", "--run", folder)
    for name in PICTURES:
        assert f"wrote {folder / name}.png" in told
        assert_picture(folder / f"{name}.png")


def test_precision_is_short_for_the_setting(call, settings, people, tmp_path):
    folder = tmp_path / "run"
    call(*train(settings, people, folder, "training.iterations=1", "--precision", "bf16"))
    assert load_config(folder / "config.yaml").training.precision == "bf16"


def test_train_writes_a_run_and_prints_its_table(finished, people):
    config = load_config(finished / "config.yaml")
    assert config.data.root == people and config.output == finished
    kinds = [record["kind"] for record in read_metrics(finished / "metrics.json")]
    assert kinds == ["train"] * 4 + ["evaluation"]
    assert load_model(finished / "model_best.safetensors").config.width == 24


def test_overrides_may_stand_anywhere():
    parsed = parse(["train", "a=1", "--data-root", "x", "b=2", "c=3", "--resume", "d=4"])
    assert sorted(parsed.overrides) == ["a=1", "b=2", "c=3", "d=4"]
    assert parsed.data_root == "x" and parsed.resume


def test_paths_are_taken_as_they_are(call, settings, people, tmp_path):
    folder = tmp_path / "it's: a #run, [1] no"
    call(*train(settings, people, folder, "training.iterations=1", "name=007"))
    assert load_config(folder / "config.yaml").output == folder
    assert load_config(folder / "config.yaml").name == "7"


def test_train_resumes_and_replaces_on_request_only(call, refuse, settings, people, tmp_path):
    folder = tmp_path / "run"
    call(*train(settings, people, folder, "training.iterations=2"))
    told = refuse(*train(settings, people, folder))
    assert "--resume" in told and "--overwrite" in told
    told = call(*train(settings, people, folder, "--resume"))
    assert "iter: 4/4" in told and "iter: 2/4" not in told
    told = call(*train(settings, people, folder, "--overwrite", "training.iterations=1"))
    assert "iter: 1/1" in told
    assert len(read_metrics(folder / "metrics.json")) == 2


def test_eval_without_the_true_parts_says_nothing_of_them(call, settings, people, tmp_path):
    folder = tmp_path / "run"
    call(*train(settings, people, folder, "training.iterations=1", "model.parts=2"))
    told = call("eval", "--checkpoint", folder / "model_final.safetensors")
    assert "cargo ALL" in told and "part masks" not in told


def test_a_run_resumes_from_its_folder_alone(call, settings, people, tmp_path):
    folder = tmp_path / "run"
    call(*train(settings, people, folder, "training.iterations=2"))
    told = call("train", "--output", folder, "--resume", "training.iterations=3")
    assert "iter: 3/3" in told


def test_eval_prints_a_table_with_baselines_and_writes_json(call, finished, people, tmp_path):
    path = tmp_path / "results.json"
    checkpoint = finished / "model_best.safetensors"
    told = call("eval", "--checkpoint", checkpoint, "--baselines", "--json", path)
    assert "colour histogram" in told and "chance" in told
    assert told.count("cargo ALL") == 3
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["checkpoint"] == str(checkpoint) and document["data"] == str(people)
    results = document["results"]
    assert set(results) == {"network", "colour histogram", "chance"}
    for rows in results.values():
        assert set(rows) == set(PROTOCOLS)
        assert rows["all"]["valid_queries"] == 8
        assert 0 < rows["all"]["mAP"] <= 100
    # The same figures as at the end of training.
    record = read_metrics(finished / "metrics.json")[-1]
    assert results["network"]["all"]["mAP"] == pytest.approx(record["protocols"]["all"]["mAP"])


def test_eval_only_and_eval_of_a_configuration_take_its_best_weights(
    call, settings, finished, people
):
    # The titles differ in the path alone.
    tables = [
        call(*train(settings, people, finished, "--eval-only")),
        call("eval", "--config-file", settings, "--data-root", people, f"output={finished}"),
    ]
    assert tables[0] == tables[1]
    assert str(finished / "model_best.safetensors") in tables[0]


def test_eval_of_some_protocols_with_mirror_images(call, finished):
    checkpoint = finished / "model_final.safetensors"
    told = call(
        "eval", "--checkpoint", checkpoint, "--flip-test", "mean", "--protocols", "aerial-to-ground"
    )
    assert len([line for line in told.splitlines() if line.startswith("cargo ")]) == 1
    told = call("eval", "--checkpoint", checkpoint, "--protocols", "all", "data.eval_batch_size=3")
    assert "cargo ALL" in told and "embedding: 3/16" in told


def test_the_reference_kernels_can_be_chosen(call, settings, people, tmp_path):
    call(
        *train(settings, people, tmp_path / "run", "--kernels", "reference"),
        "training.iterations=1",
    )
    assert load_config(tmp_path / "run" / "config.yaml").kernels == "reference"


# What does not.


def test_a_missing_data_folder_is_told_with_the_layout_and_how_to_make_one(
    refuse, settings, tmp_path
):
    missing = tmp_path / "nowhere"
    for arguments in (
        train(settings, missing, tmp_path / "run"),
        ["data", "check", missing],
    ):
        told = refuse(*arguments)
        assert str(missing) in told and "does not exist" in told
        assert "train/ Cam1/" in told and "query/" in told and "gallery/" in told
        assert f"gsalign data generate --out {missing}" in told
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_split_is_told(refuse, own_people):
    shutil.rmtree(own_people / "gallery")
    assert "has no folder gallery" in refuse("data", "check", own_people)


def test_an_unknown_key_is_told_with_one_like_it(refuse, settings, people, tmp_path):
    told = refuse(*train(settings, people, tmp_path / "run", "optimizer.lrr=1"))
    assert "unknown key 'optimizer.lrr'" in told and "optimizer.lr?" in told
    told = refuse("data", "generate", "--out", tmp_path / "set", "train_identites=3")
    assert "train_identites" in told and "train_identities" in told
    assert not (tmp_path / "run").exists() and not (tmp_path / "set").exists()


def test_a_value_of_the_wrong_type_is_told(refuse, settings, people, tmp_path):
    told = refuse(*train(settings, people, tmp_path / "run", "optimizer.lr=fast"))
    assert "optimizer.lr: " in told and "'fast'" in told and "the command line" in told
    told = refuse("data", "generate", "--out", tmp_path / "set", "--workers", -1)
    assert "--workers is -1" in told


def test_a_missing_configuration_file_is_told(refuse, tmp_path):
    path = tmp_path / "none.yaml"
    for command in (["train"], ["eval"], ["visualize", "--run", tmp_path]):
        told = refuse(*command, "--config-file", path)
        assert str(tmp_path) in told
    assert "does not exist" in refuse("train", "--config-file", path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_that_cannot_run_are_told_with_those_that_can(
    refuse, settings, people, finished, tmp_path, name
):
    checkpoint = finished / "model_best.safetensors"
    for arguments in (
        train(settings, people, tmp_path / "run"),
        ["eval", "--checkpoint", checkpoint],
        ["visualize", "--run", finished],
    ):
        told = refuse(*arguments, "--kernels", name)
        assert name in told and "reference" in told
        reasons = {row[name] for row in kernel_report().table.values()}
        assert any(reason in told for reason in reasons)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_told(refuse, settings, people, tmp_path):
    told = refuse(*train(settings, people, tmp_path / "run", "--num-gpus", -1))
    assert "--num-gpus is -1" in told
    told = refuse(*train(settings, people, tmp_path / "run", "--device", "cuda"))
    assert "PyTorch sees no GPU" in told and "device=cpu" in told
    told = refuse(*train(settings, people, tmp_path / "run", "--num-gpus", 2))
    assert "--num-gpus is 2" in told
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_told(refuse, settings, people, finished):
    checkpoint = finished / "model_best.safetensors"
    options = ("--config-file", settings, "--data-root", people, "--checkpoint", checkpoint)
    told = refuse("eval", *options, "model.width=32")
    assert "width 24 instead of 32" in told and str(checkpoint) in told
    told = refuse("eval", *options, "model.ltps.layers=[1]")
    assert "ltps.layers [0, 1] instead of [1]" in told
    # The settings beside the weights count as a description too.
    told = refuse("eval", "--checkpoint", checkpoint, "model.width=32")
    assert "width 24 instead of 32" in told
    told = refuse(*train(settings, people, finished, "--resume", "model.width=32"))
    assert "checkpoint.safetensors" in told and "[24]" in told and "[32]" in told


def test_a_damaged_or_missing_checkpoint_is_told(refuse, finished, people, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert str(path) in refuse("eval", "--checkpoint", path, "--data-root", people)
    path.write_bytes((finished / "model_best.safetensors").read_bytes()[:1000])
    assert str(path) in refuse("eval", "--checkpoint", path, "--data-root", people)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    assert str(path) in refuse("eval", "--checkpoint", path, "--data-root", people)


def test_an_unreadable_image_is_told_or_passed_over(call, refuse, settings, own_people, tmp_path):
    broken = [break_first(own_people / split) for split in ("train", "query", "gallery")]
    # Every training image is in one of the four batches of the run.
    told = refuse(*train(settings, own_people, tmp_path / "error"))
    assert str(broken[0]) in told and "skip" in told
    told = refuse("data", "check", own_people)
    assert "3 of 40 images cannot be read" in told and "data.on_broken=skip" in told

    folder = tmp_path / "skip"
    told = call(*train(settings, own_people, folder, "data.on_broken=skip"))
    assert "iter: 4/4" in told
    for path in broken:
        assert str(path) in told
    figures = read_metrics(folder / "metrics.json")[-1]["protocols"]["all"]
    assert (figures["queries"], figures["gallery"]) == (7, 7)
    told = call("eval", "--checkpoint", folder / "model_best.safetensors", "--baselines")
    assert "7/7" in told
    told = call("visualize", "--run", folder)
    for name in ("training_curves", "rank_lists", "ltps_grids"):
        assert_picture(folder / f"{name}.png")


def test_an_identity_with_one_image_is_told_or_left_out(
    call, refuse, settings, own_people, tmp_path
):
    write_image(own_people / "train" / "Cam1" / "Cam1_day_77_900.jpg", seed=900)
    told = refuse(*train(settings, own_people, tmp_path / "run", "data.singletons=error"))
    assert "1 training identities have only one image" in told and "(77)" in told
    assert "drop" in told and "keep" in told
    told = call(*train(settings, own_people, tmp_path / "run", "training.iterations=1"))
    assert "left out" in told
    assert load_config(tmp_path / "run" / "config.yaml").model.num_identities == 6


def test_a_loss_that_is_not_finite_is_told(refuse, settings, people, tmp_path):
    more = ("optimizer.lr=1e30", "training.clip_norm=0", "schedule.warmup=0")
    told = refuse(*train(settings, people, tmp_path / "run", *more))
    assert "not finite in iteration" in told and "optimizer.lr" in told


def test_an_unknown_protocol_is_told_with_the_known_ones(refuse, finished):
    checkpoint = finished / "model_best.safetensors"
    told = refuse("eval", "--checkpoint", checkpoint, "--protocols", "everything")
    assert "everything" in told and "aerial-to-ground" in told


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["train", "--fast"],
        ["train", "stray"],
        ["data"],
        ["visualize"],
        ["train", "--kernels", "fortran"],
        ["train", "--precision", "fp8"],
        ["train", "--resume", "--overwrite"],
        ["info", "a=1"],
    ],
)
def test_arguments_that_cannot_be_parsed_are_told_on_one_line(refuse, arguments):
    assert "--help" in refuse(*arguments) or "key=value" in refuse(*arguments)


def test_exit_codes_of_other_ends(monkeypatch, capsys):
    def ends_with(error: BaseException) -> int:
        def fail(_):
            raise error

        monkeypatch.setattr(info, "run", fail)
        return main(["info"])

    assert ends_with(KeyboardInterrupt("stopped after iteration 3")) == 130
    assert capsys.readouterr().err == "gsalign: stopped after iteration 3\n"
    assert ends_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "gsalign: interrupted\n"
    assert ends_with(PermissionError(13, "Permission denied", "/x")) == 2
    assert "/x" in capsys.readouterr().err
    assert ends_with(torch.OutOfMemoryError("CUDA out of memory.\nTried to")) == 2
    assert capsys.readouterr().err == "gsalign: error: CUDA out of memory. Tried to\n"
    # A fault of the program keeps its traceback.
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())
