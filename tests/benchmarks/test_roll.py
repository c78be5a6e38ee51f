"""The benchmark of the roll: it learns, prints figures of every view, and keeps them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import roll
from gsalign.data.synthetic import SyntheticConfig, generate
from gsalign.model import ModelConfig, create_model


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("roll") / "set"
    sizes = SyntheticConfig(
        train_identities=2,
        test_identities=2,
        images_per_identity_aerial=2,
        images_per_identity_ground=2,
        queries_per_identity=2,
        image_size=(32, 16),
        write_parts=True,
    )
    generate(root, sizes)
    return root


@pytest.mark.parametrize("reads", ["rays", "parts"])
def test_it_trains_and_prints_a_table(people, tmp_path, monkeypatch, capsys, reads):
    made: list[roll.Uprighting] = []
    started: list[torch.Tensor] = []

    def create(config):
        made.append(create_uprighting(config))
        started.append(next(made[0].parameters()).detach().clone())
        return made[0]

    create_uprighting = roll.create_uprighting
    monkeypatch.setattr(roll, "create_uprighting", create)
    settings = ["--data", str(people), "--reads", reads, "--steps", "2", "--people", "2"]
    kept = tmp_path / "new" / "finder.safetensors"
    roll.main([*settings, "--save", str(kept)])
    told = capsys.readouterr().out
    assert "angles against the true roll" in told
    rows = [line.split() for line in told.splitlines() if line.strip().startswith("image")]
    assert [row[:3] for row in rows if "," not in row[1]] == [
        ["image", "aerial", "4"],
        ["image", "ground", "4"],
    ]
    assert not torch.equal(next(made[0].parameters()), started[0])
    orientation = {"enabled": True, "reads": reads, "pretrained": str(kept)}
    sizes = {"image_size": (32, 16), "patch_size": 8, "width": 8, "depth": 1, "num_heads": 1}
    network, _ = create_model(ModelConfig.model_validate({**sizes, "orientation": orientation}))
    for name, tensor in made[0].state_dict().items():
        assert torch.equal(network.uprighting.state_dict()[name], tensor)


def test_of_true_label_maps_there_is_nothing_to_save(people, tmp_path):
    with pytest.raises(SystemExit):
        roll.main(["--data", str(people), "--reads", "maps", "--save", str(tmp_path / "none")])
    with pytest.raises(SystemExit):  # before anything is trained
        roll.main(["--data", "nowhere", "--reads", "parts", "--save", str(tmp_path)])


def test_rows_are_kept_and_replaced(people, tmp_path):
    """Rows of a run replace those of one alike; true label maps know the roll."""
    kept = tmp_path / "roll.csv"
    kept.write_text(",".join(roll.COLUMNS) + "\nset,rays,9,9,0,aerial" + ",0" * 9 + "\n")
    for _ in range(2):
        roll.main(["--data", str(people), "--reads", "maps", "--out", str(kept)])
    with kept.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["reads"] for row in rows].count("rays") == 1
    maps = {row["view"]: row for row in rows if row["reads"] == "maps"}
    assert len(maps) == len(rows) - 1
    assert maps["ground"]["within_90"] == "1.000" and maps["ground"]["images"] == "4"
    assert float(maps["ground"]["median_error_degrees"]) < 15
    kept.write_text("a,b\n")
    with pytest.raises(SystemExit, match="wanted the columns"):
        roll.main(["--data", str(people), "--reads", "maps", "--out", str(kept)])
