"""``gsalign eval``: search options, ROC, thresholds and dumps."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from gsalign.config import load_config
from gsalign.engine.metrics import read_metrics
from gsalign.evaluation import PROTOCOLS
from gsalign.model import GSAlign, save_weights


@pytest.fixture(scope="module")
def held_out(people, settings, tmp_path_factory):
    """Folder of a run that held identities out."""
    from gsalign.cli.main import main

    folder = tmp_path_factory.mktemp("held") / "run"
    words = ["train", "--config-file", settings, "--data-root", people, "--output", folder]
    words += ["data.validation_fraction=0.4", "training.select_on=validation"]
    assert main([str(word) for word in words]) == 0
    return folder


def test_search_options_change_the_figures(call, finished, tmp_path):
    found = {}
    for name, options in (
        ("plain", ()),
        ("euclidean", ("--metric", "euclidean")),
        ("expanded", ("--query-expansion", "--expansion-settings", "3,1")),
        ("reranked", ("--rerank", "--rerank-settings", "3,2,0.5")),
    ):
        path = tmp_path / f"{name}.json"
        checkpoint = finished / "model_best.safetensors"
        call("eval", "--checkpoint", checkpoint, "--json", path, *options)
        results = json.loads(path.read_text())["results"]["network"]
        assert set(results) == set(PROTOCOLS)
        found[name] = [results[protocol]["mAP"] for protocol in PROTOCOLS]
    # Embeddings are of length 1, so both metrics rank alike.
    assert found["euclidean"] == pytest.approx(found["plain"])
    assert found["expanded"] != found["plain"] != found["reranked"]


def test_roc_and_dump(call, finished, tmp_path):
    dump, document = tmp_path / "found.csv", tmp_path / "results.json"
    told = call(
        "eval", "--checkpoint", finished / "model_best.safetensors", "--roc", "--dump", dump,
        "--dump-top", 2, "--json", document, "--protocols", "all", "ground-to-aerial",
    )  # fmt: skip
    assert "at a false positive rate of" in told and f"what every query found: {dump}" in told
    roc = json.loads(document.read_text())["roc"]
    assert roc["all"]["positives"] == 16 and roc["all"]["negatives"] == 48
    assert roc["all"]["TPR@FPR=1e-02"] is None
    with dump.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["protocol"] for row in rows] == 8 * ["all"] + 4 * ["ground-to-aerial"]
    assert all(len(json.loads(row["nearest"])) == 2 for row in rows)
    network = json.loads(document.read_text())["results"]["network"]
    for name in ("all", "ground-to-aerial"):
        scores = [float(row["AP"]) for row in rows if row["protocol"] == name]
        assert 100 * sum(scores) / len(scores) == pytest.approx(network[name]["mAP"])


def test_who_only_cuts_out_is_told_how_well(call, settings, tmp_path):
    """No rolls and no parts: a table of the person, and the same in the document."""
    root, document = tmp_path / "set", tmp_path / "results.json"
    checkpoint = tmp_path / "cut.safetensors"
    sizes = ("train_identities=2", "test_identities=2", "image_size=[32,16]", "write_parts=true")
    few = ("images_per_identity_aerial=2", "images_per_identity_ground=2", "queries_per_identity=2")
    call("data", "generate", "--out", root, "--workers", 0, *sizes, *few)
    cuts_out = (
        "model.orientation.enabled=true",
        "model.orientation.reads=parts",
        "model.orientation.cuts_out=true",
        "model.orientation.turns=false",
        "model.ltps.layers=[]",
    )
    torch.manual_seed(0)
    save_weights(GSAlign(load_config(settings, cuts_out).model), checkpoint)
    told = call(
        "eval", "--checkpoint", checkpoint, "--config-file", settings, "--data-root", root,
        "--json", document, *cuts_out,
    )  # fmt: skip
    assert "who is cut out against the true person" in told
    assert "angles against" not in told and "part masks against" not in told
    tree = json.loads(document.read_text())
    assert set(tree) == {"checkpoint", "data", "results", "person"}
    assert list(tree["person"]) == ["aerial", "ground"]
    for view, figures in tree["person"].items():
        assert list(figures) == ["images", "iou", "person_kept", "background_left"]
        assert figures["images"] == 4 and 0 < figures["person_kept"] < 1
        cells = [f"{figures[name]:.3f}" for name in ("iou", "person_kept", "background_left")]
        assert [view, "4", *cells] == next(
            line.split() for line in told.splitlines() if line.split()[:2] == [view, "4"]
        )


def test_a_threshold_from_held_out_people(call, held_out, tmp_path):
    path = tmp_path / "results.json"
    told = call(
        "eval", "--checkpoint", held_out / "model_best.safetensors", "--threshold", 0.99,
        "--rerank", "--json", path,
    )  # fmt: skip
    assert "same person up to a distance of" in told and "warning" not in told
    threshold = json.loads(path.read_text())["threshold"]
    assert threshold["target_false_accept"] == 99.0
    assert threshold["validation"]["false_accept"] <= 99.0
    assert set(threshold["test"]) == set(PROTOCOLS)


def test_a_run_records_its_threshold_or_that_there_is_none(held_out, finished):
    (record,) = [r for r in read_metrics(held_out / "metrics.json") if r.get("split") == "test"]
    # Two people make too few pairs for a rate of 0.001.
    assert record["threshold"] is None
    (record,) = [r for r in read_metrics(finished / "metrics.json") if r.get("split") == "test"]
    assert "threshold" not in record


def test_a_threshold_needs_people_who_were_not_trained_on(call, refuse, finished):
    checkpoint = ("eval", "--checkpoint", finished / "model_best.safetensors")
    assert "needs held-out training identities" in refuse(*checkpoint, "--threshold", 0.5)
    told = call(*checkpoint, "--threshold", 0.99, "data.validation_fraction=0.4")
    assert "warning: the run was trained on the identities" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rerank-settings", "3"), "wanted a whole number, a whole number, a number"),
        (("--rerank", "--rerank-settings", "0,1,0.3"), "k1 of the re-ranking is 0"),
        (("--expansion-settings", "a,b"), "--expansion-settings is 'a,b'"),
        (
            ("--query-expansion", "--expansion-settings", "5,nan"),
            "alpha of the query expansion is nan",
        ),
        (("--json", "."), "--json is ., which is a folder; wanted a file"),
        (("--threshold", 2), "--threshold is 2; wanted a false accept rate"),
        (("--dump", "found.xlsx"), "must end in .csv, .jsonl, .parquet"),
        (("--dump-top", 0), "--dump-top is 0"),
        (("--protocols", "aerial-to-cctv"), "needs the list of its images"),
    ],
)
def test_wrong_options_are_one_line(refuse, finished, options, message):
    checkpoint = finished / "model_best.safetensors"
    assert message in refuse("eval", "--checkpoint", checkpoint, *options)


def test_weights_are_chosen_on_a_protocol_that_the_set_has(refuse, settings, people, tmp_path):
    words = ("train", "--config-file", settings, "--data-root", people)
    told = refuse(*words, "--output", tmp_path / "run", "training.select_on=aerial-to-cctv")
    assert "which data set cargo is not evaluated by; wanted last, validation or one of all" in told
    assert not (tmp_path / "run").exists()
