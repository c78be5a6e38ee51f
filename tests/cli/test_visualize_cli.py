"""``gsalign visualize``: which pictures it draws, of what, and where it says no."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml
from picture_file import assert_picture
from PIL import Image

from gsalign.engine.pictures.names import PICTURES


def test_visualize_writes_pictures_elsewhere_and_leaves_the_run_alone(call, finished, tmp_path):
    before = sorted(path.name for path in finished.iterdir())
    told = call("visualize", "--run", finished, "--out", tmp_path / "pictures")
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {
        *("training_curves.png", "cmc_curves.png", "rank_lists.png", "embedding_map.png"),
        *("attention.png", "ltps_grids.png"),
    }
    for name in names:
        assert_picture(tmp_path / "pictures" / name)
        assert name in told
    assert "no contact_sheet: " in told and "no part_masks: the network has no parts" in told
    assert "no alignment: the network aligns no images" in told
    assert sorted(path.name for path in finished.iterdir()) == before


def test_visualize_draws_no_grids_for_a_network_without_ltps(call, settings, people, tmp_path):
    folder = tmp_path / "run"
    more = ("model.ltps.layers=[]", "model.dam.enabled=false", "training.iterations=2")
    options = ("--config-file", settings, "--data-root", people, "--output", folder)
    call("train", *options, *more)
    told = call("visualize", "--run", folder)
    assert "the network has no LTPS" in told
    assert not (folder / "ltps_grids.png").exists()
    assert_picture(folder / "training_curves.png")


def test_only_the_pictures_asked_for_are_drawn(call, refuse, finished, tmp_path):
    out = tmp_path / "pictures"
    told = call("visualize", "--run", finished, "--out", out, "--only", "attention", "cmc_curves")
    assert {path.name for path in out.iterdir()} == {"attention.png", "cmc_curves.png"}
    wrote = [line for line in told.splitlines() if line.startswith("wrote ")]
    assert len(wrote) == 2 and "embedding tiny: 16/16 images" in told
    told = refuse("visualize", "--run", finished, "--out", out, "--only", "faces", "attention")
    assert "--only is 'faces'" in told and all(name in told for name in PICTURES)
    told = refuse("visualize", "--run", finished, "--out", finished / "metrics.json")
    assert "metrics.json, which is a file; wanted a folder" in told
    # What does not apply is an error where it was asked for; the others are drawn all the same.
    names = ("part_masks", "ltps_grids", "seed=0")
    told = refuse("visualize", "--run", finished, "--out", out, "--only", *names)
    assert "no part_masks: the network has no parts" in told
    assert_picture(out / "ltps_grids.png")


def test_training_curves_need_neither_weights_nor_data(call, refuse, finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.json", "config.yaml"):
        shutil.copy(finished / name, folder)
    call("visualize", "--run", folder, "--only", "training_curves", "data.root=nowhere")
    assert_picture(folder / "training_curves.png")
    told = refuse("visualize", "--run", folder, "--only", "attention")
    assert f"{folder} has no weights yet" in told


def test_images_of_ones_own_are_looked_at(call, refuse, finished, tmp_path):
    image = tmp_path / "somebody.png"
    Image.new("RGB", (30, 70), (200, 30, 60)).save(image)
    weights = tmp_path / "other" / "weights.safetensors"
    weights.parent.mkdir()
    shutil.copy(finished / "model_final.safetensors", weights)
    # A checkpoint alone will do, without a run or a data set.
    call("visualize", "--checkpoint", weights, "--images", image, image, "--heads", "max")
    assert {path.name for path in weights.parent.iterdir()} == {
        *("weights.safetensors", "attention.png", "ltps_grids.png"),
    }
    options = ("visualize", "--run", finished, "--out", tmp_path, "--images", image)
    told = refuse(*options, "--only", "rank_lists")
    assert "'rank_lists', which is not drawn of --images" in told and "part_masks" in told
    assert "nobody.png, which is not a file" in refuse(*options, tmp_path / "nobody.png")
    assert "--images names 26 files" in refuse(*options, *[image] * 25)
    image.write_bytes(b"no image")
    assert "somebody.png" in refuse(*options, "--only", "attention")


def test_several_runs_are_compared(call, refuse, finished, people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    told = call("visualize", "--run", finished, "--run", other)
    written = ("training_curves.png", "cmc_curves.png")
    wrote = [line for line in told.splitlines() if line.startswith("wrote ")]
    assert wrote == [f"wrote {name}" for name in written]
    for name in written:
        assert_picture(tmp_path / name)
    assert "--run names a folder twice" in refuse("visualize", "--run", other, tmp_path / "other/.")
    told = refuse("visualize", "--run", finished, other, "--only", "attention")
    assert "'attention', which is not drawn of several runs" in told
    for option in ("--images", "--checkpoint"):
        told = refuse("visualize", "--run", finished, other, option, "some.file")
        assert f"{option} goes with one run, and --run names 2" in told

    # Of another data set.
    elsewhere = Path(shutil.copytree(people, tmp_path / "elsewhere"))
    settings = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8"))
    settings["data"]["root"] = str(elsewhere)
    (other / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    told = call("visualize", "--run", finished, other, "--out", "new", "--only", "cmc_curves")
    assert "of different data sets" in told and str(elsewhere) in told
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cmc_curves.png"]


def test_tsne_by_name_without_scikit_learn_is_told_before_anything_is_done(
    refuse, finished, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    told = refuse("visualize", "--run", finished, "--out", tmp_path / "new", "--projection", "tsne")
    assert "pip install 'gsalign[visualize]'" in told
    assert not (tmp_path / "new").exists()


def test_visualize_of_no_run_is_told(refuse, tmp_path):
    assert "is not the folder of a run" in refuse("visualize", "--run", tmp_path)


def test_metrics_that_are_not_json_are_told(refuse, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    (folder / "metrics.json").write_text(f"rubbish\n{text}", encoding="utf-8")
    told = refuse("visualize", "--run", folder)
    assert "metrics.json" in told and "line 1" in told
